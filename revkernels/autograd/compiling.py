# SPDX-License-Identifier: Apache-2.0
"""Runs the driver inside code compiled by torch.compile: the driver stays out of the graph, its branches do not.

The driver reads reference counts, versions and generators, which do not exist in a trace. So a chain that recomputes
its activations is a graph break: it runs uncompiled, and passes the compiler that met it to each of its branches, in
the forward and again in the recompute, for the same graphs and the same saved tensors.

Import it only where ``torch._dynamo`` has been imported, which is slow.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any

import torch._dynamo
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo.decorators import skip
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as by_torch

#: What dynamo must neither trace nor compile, in a forward or in a backward.
_OUTSIDE = (
    *(f"revkernels.autograd.{name}" for name in ("accumulate", "as_in_forward", "coupling", "driver_backward")),
    *(f"revkernels.autograd.{name}" for name in ("driver_forward", "early_recompute", "exact_coupling")),
    *(f"revkernels.autograd.{name}" for name in ("exact_coupling_int16", "fused.coupled_norm", "inverse", "norm_act")),
    *(f"revkernels.autograd.{name}" for name in ("output_check", "ownership", "planning", "recomputing", "state")),
    *("revkernels.autograd.step_record", "revkernels.eager"),
)

_local = threading.local()  # .compiler: the active compiler where `untraced` was called


@skip
def untraced(function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, run outside the graph with the compiler off until a branch is called."""
    outer = getattr(_local, "compiler", None)
    compiler = _local.compiler = set_eval_frame(None)
    try:
        return function(*args)
    finally:
        set_eval_frame(compiler)
        _local.compiler = outer


@skip
def uncompiled(function: Callable[[], Any]) -> Any:
    """Return ``function()``, run with the compiler off: a backward inside compiled code has it on."""
    before = set_eval_frame(None)
    try:
        return function()
    finally:
        set_eval_frame(before)


@skip
def checkpointed(ours: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`revkernels.nn.checkpoint`, which is ``ours``, as compiled code calls it.

    Traced, this is torch's checkpoint (below), which the compiler knows. If the function breaks the graph, this runs:
    torch's would then update running statistics twice. The compiler is off, as it will be in the recompute.
    """
    outer, _local.compiler = getattr(_local, "compiler", None), None
    try:
        return uncompiled(functools.partial(ours, function, *args, **kwargs))
    finally:
        _local.compiler = outer


@torch.compiler.substitute_in_graph(checkpointed)
def _checkpointed(ours: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return by_torch(function, *args, use_reentrant=False, **kwargs)


@skip
def active() -> Any:
    """The compiler that would compile a function called now: dynamo's callback, or None."""
    compiler = set_eval_frame(None)
    set_eval_frame(compiler)
    return compiler


@skip
def compiler() -> Any:
    """The compiler for the branches of a chain that is called now, or None."""
    return active() or getattr(_local, "compiler", None)


@skip
def call(compiler: Any, branch: Any, h: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return ``branch(h, *args, **kwargs)``, compiled by ``compiler``, or not compiled if it is None."""
    before = set_eval_frame(None)
    try:
        frame = _call if compiler is None else _frame_of(branch, (h, args, kwargs))
        set_eval_frame(compiler)
        return frame(branch, h, args, kwargs)
    finally:
        set_eval_frame(before)


def _call(branch: Any, h: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return branch(h, *args, **kwargs)  # our own frame, since dynamo skips those of torch.nn.Sequential


_frame_by_branch: weakref.WeakKeyDictionary[Any, FunctionType] = weakref.WeakKeyDictionary()
_numbers = itertools.count()


@functools.lru_cache(256)  # not all: a search over rates of dropout would keep the code of every network that it tried
def _frame(_key: Any, name: str) -> FunctionType:
    # Sizes that dynamo has seen change in code of the same name, file and line are variables from then on.
    code: CodeType = _call.__code__.replace(co_name=f"call_{name}_{next(_numbers)}")
    return FunctionType(code, globals())


def _frame_of(branch: Any, given: Any) -> Callable[..., Any]:
    """`_call` for the branches of one structure that were first given tensors of the same shapes. They share a
    compilation, however many they are.

    Not one function for all branches, because dynamo compiles a function only a few times before it gives up on it; and
    because what it compiles for a second shape, or a second float, also fits the first, and would take its place in the
    recompute.
    """
    try:
        return _frame_by_branch[branch]
    except (KeyError, TypeError):
        pass
    key = _structure(branch)
    if isinstance(branch, nn.Module):  # functions may be made anew in every call, and would be compiled for every shape
        key += tuple(map(_kind, tree_leaves(given)))
    frame = _frame(key, type(branch).__name__)
    with suppress(TypeError):  # if it cannot be cached, look it up each time
        _frame_by_branch[branch] = frame
    return frame


def _structure(branch: Any) -> Any:
    if not isinstance(branch, nn.Module):
        return getattr(branch, "__code__", type(branch))
    modules = branch.modules()
    return tuple((type(module), *map(_kind, module.parameters(False)), *_floats(module)) for module in modules)


def _floats(module: nn.Module) -> list[float]:
    """Its attributes that are floats. Of two values the compiler makes an input (as of two shapes, above); or, of a
    rate of dropout, code for each."""
    return [value for value in vars(module).values() if type(value) is float]


def _kind(value: Any) -> torch.Size | float | None:
    """A tensor's shape, or a float."""
    if isinstance(value, torch.Tensor) and not isinstance(value, UninitializedTensorMixin) and not value.is_nested:
        return value.shape
    return value if type(value) is float else None


for _name in _OUTSIDE:
    torch._dynamo.trace_rules.add(_name)


whole = True  # the last line: `tracking.met_compiler`
