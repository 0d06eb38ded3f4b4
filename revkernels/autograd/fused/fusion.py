# SPDX-License-Identifier: Apache-2.0
"""Runs a branch with its norms and activations fused, and decides which layers may be.

The known layers of a `torch.nn.Sequential` are run one by one: a norm and the activation behind it become one kernel,
every other layer is called unchanged. A layer is not fused if anything else hooks into it (hooks, parametrisations,
sharded parameters), and nothing is where torch must see its own operators (torch.compile, torch.func, forward-mode
differentiation). Results are the same either way, up to rounding.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as _torch_module
from torch.utils._python_dispatch import _disable_current_modes

from revkernels import backends, eager
from revkernels.autograd.coupling import in_usual_order
from revkernels.autograd.fused.keywords import keywords_of, passes_keywords
from revkernels.autograd.fused.known_layers import (
    ACTIVATION_LAYERS,
    NORM_LAYERS,
    READ_THEIR_INPUT,
    Fusable,
    all_dense,
    fits,
    fusable_at,
    hooked,
    is_momentum,
    is_sequential,
    narrows,
    number_of,
    untouchable,
)
from revkernels.autograd.fused.norm_context import ambient, running_of
from revkernels.autograd.half_step import HalfStep
from revkernels.autograd.norm_act import ACTIVATIONS, Call, making_again, norm_act
from revkernels.autograd.ownership import PLAIN
from revkernels.integers import as_int
from revkernels.norm import Norm, Statistics

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- when


def kernels_for(x: Any) -> Any:
    """The backend that fuses here, or None where the layers must run unfused."""
    if type(x) not in PLAIN or x.dtype not in _FLOATS or is_recorded():
        return None
    kernels = ambient.kernels
    if kernels is eager or torch._C._are_functorch_transforms_active():
        return None
    if torch.autograd.forward_ad._current_level >= 0 or not in_usual_order(x) or x.numel() == 0 or x.is_neg():
        return None
    if kernels is None:
        kernels = backends.select(x)
        if kernels is eager:
            return None
    everywhere, tape = _torch_module, ambient.tape
    if (everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks) and not (tape and tape.replaying):
        return None  # hooks on every module expect to see each layer
    return kernels


def is_recorded() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace or make_fx records a graph, which must not contain our hooks
    and would not record our kernels."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    recorder = sys.modules.get("torch.fx.experimental.proxy_tensor")  # slow to import; imported if make_fx records
    return recorder is not None and recorder.get_proxy_mode() is not None


def call_of(fusable: Fusable, x: torch.Tensor, kernels: Any, narrow: bool) -> Call | None:
    """Prepare the norm for x; None if the layer itself must run (and raise its own errors).

    ``narrow``: autocast makes the next layer's input narrow.
    """
    layer: Any = fusable.norm
    parameters, buffers = layer._parameters, layer._buffers
    kind, axis = NORM_LAYERS[type(layer)]
    if not fits(layer, kind, axis, x):
        return None
    eps, groups = _eps(layer, kind, x), as_int(layer.num_groups) if kind == "group" else 1
    if eps is None or type(groups) is not int:
        return None  # torch raises its own error
    given, constant, running, source = None, False, _NOT_RUNNING, None
    weight = _held(parameters, "weight", layer)
    bias = None if kind == "rms" else _held(parameters, "bias", layer)
    if not all_dense(weight, bias):
        return None
    if kind == "batch":
        running_mean, running_var = _held(buffers, "running_mean", layer), _held(buffers, "running_var", layer)
        if not all_dense(running_mean, running_var) or not is_momentum(layer.momentum):
            return None
        if layer.training or running_mean is None:
            if x.numel() == x.shape[1]:
                return None  # one value a channel has no variance: torch raises its own error
            tape = ambient.tape
            if tape is not None and tape.replaying:
                given = tape.next(layer)
                if given is None:
                    return None
            elif layer.training and layer.track_running_stats:
                momentum = _count(layer, _held(buffers, "num_batches_tracked", layer))
                if running_mean is not None:
                    running = running_mean, running_var, momentum
        elif running_var is None:
            return None  # torch raises its own error
        else:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            rstd = (running_var.to(wide) + eps).rsqrt_()
            # A copy for the backward: until then a forward in training may write the buffer, undetected by versions.
            source = running_mean if torch.is_grad_enabled() else None
            given, constant = Statistics(running_mean.to(wide, copy=source is not None), rstd), True
    norm = Norm(kind, weight, bias, eps, fusable.activation, groups, axis, *running)
    call = Call(kernels, norm, _dtype(kind, x, narrow), given, constant)
    call.source = source
    return call


_NOT_RUNNING: tuple[Any, Any, float] = (None, None, 0.0)


def _eps(layer: Any, kind: str, x: torch.Tensor) -> float | None:
    if layer.eps is not None or kind != "rms":
        return number_of(layer.eps)
    wide = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")  # the layer would get float32
    return default_eps(torch.float32 if wide and x.dtype != torch.float64 else x.dtype)


@functools.cache
def default_eps(dtype: torch.dtype) -> float:
    """The eps that `torch.nn.RMSNorm` with eps None uses: by torch version, its input's or its compute dtype's."""
    own = torch.finfo(dtype).eps
    if dtype not in (torch.bfloat16, torch.float16):
        return own
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x = torch.full((1, 2), 2.0**-10, dtype=dtype, device="cpu")  # its square is far above one eps, below the other
        h = nn.functional.rms_norm(x, (2,))
    return own if float(h[0, 0]) < 0.5 else torch.finfo(torch.float32).eps


def _held(table: Mapping[str, Any], name: str, layer: Any) -> Any:
    """A parameter or buffer. `getattr` on the module takes ten times as long; it is the fallback for missing names."""
    return table[name] if name in table else getattr(layer, name)


def _count(layer: Any, batches: Any) -> float:
    """Count the batch. Returns the momentum of its statistics."""
    momentum = layer.momentum
    if batches is not None:
        batches.add_(1)
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(batches)
    return 0.0 if momentum is None else momentum


def _dtype(kind: str, x: torch.Tensor, narrow: bool) -> torch.dtype:
    """The output dtype: that of the layers themselves under autocast, or the one that the next layer casts to."""
    device = "cpu" if x.is_cpu else x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        if narrow:
            return torch.get_autocast_dtype(device)
        if kind != "batch" and device == "cuda":
            return torch.float32
    return x.dtype


def record(fusable: Fusable, call: Call) -> None:
    """After the norm has run: record its batch statistics for the recompute."""
    tape = ambient.tape
    if tape is not None and not tape.replaying and call.norm.kind == "batch" and not call.constant:
        tape.entries.append((fusable.norm, call.statistics, running_of(fusable.norm)))  # type: ignore[arg-type]


def note(call: Call, s: torch.Tensor, h: torch.Tensor) -> None:
    """After the norm has run: register how to recompute h, if anything asks for it."""
    tape = ambient.tape
    if tape is not None and tape.outputs is not None:
        make, of = making_again(call, s, h)
        tape.outputs.note(h, make, *of)


def _activated(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)`` of an activation whose gradient reads x, so that its output can be recomputed from it."""
    h: torch.Tensor = layer(x)
    tape = ambient.tape
    if tape is None or tape.outputs is None or type(x) not in PLAIN:
        return h
    if not hooked(layer) and untouchable(layer) is None and not getattr(layer, "inplace", False):
        at = x.detach()  # with its graph it would be a reference cycle
        tape.outputs.note(h, ACTIVATIONS[ACTIVATION_LAYERS[type(layer)](layer)], at)
    return h


# ---- running a branch


class Normed(NamedTuple):
    """The output of a branch's first norm, and how it was run."""

    h: torch.Tensor
    fusable: Fusable
    narrow: bool


def run(
    layers: Sequence[nn.Module], x: Any, normed: Normed | None = None, kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Run the layers one after the other, fused. ``normed``: the output of the first layers' norm, if already computed.

    ``kwargs`` go to the layers whose ``forward`` names them; those that no layer names, to layers that take any.
    """
    # torch.compile fuses by itself, and decides what is kept: no norm is ours there, and no activation is noted.
    index, count, fuses = 0, len(layers), not torch.compiler.is_compiling()
    while index < count:
        layer = layers[index]
        if fuses and type(layer) in NORM_LAYERS:
            fusable, narrow = _way_of(layers, index, normed)
            if isinstance(fusable, Fusable):
                h, normed = normed.h if normed is not None else fused(fusable, x, narrow), None
            else:
                h = None
            if ambient.tape is not None:
                ambient.tape.took(layer, (None if h is None else fusable, narrow))
            if h is not None:
                x, index = h, index + fusable.layers
                continue
        mine = _taken(kwargs, layer, layers) if kwargs else None
        if mine:
            x = layer(x, **mine)
        elif fuses and type(layer) in READ_THEIR_INPUT:
            x = _activated(layer, x)
        elif is_sequential(layer) and _apart(layer, _unhooked):
            x = run(list(layer._modules.values()), x)  # type: ignore[arg-type]
        else:
            x = layer(x)
        index += 1
    return x


def _way_of(layers: Sequence[nn.Module], index: int, normed: Normed | None) -> tuple[Any, bool]:
    """How to run the norm at ``layers[index]``: the fused layers, or None; and whether its output is narrow."""
    tape = ambient.tape
    if tape is not None and tape.replaying:  # a lazy layer that was not yet a norm is not recorded
        return tape.taken(layers[index]) or (None, False)
    if normed is not None:
        return normed.fusable, normed.narrow
    fusable = fusable_at(layers, index)
    if isinstance(fusable, str):
        return None, False
    behind = index + fusable.layers
    return fusable, behind < len(layers) and narrows(layers[behind])


def _unhooked(layer: nn.Module) -> bool:
    return not hooked(layer)


def _apart(sequential: nn.Module, may: Callable[[nn.Module], bool]) -> bool:
    """Whether to run its layers one by one: as recorded in the forward, else if ``may`` allows it now."""
    tape = ambient.tape
    if tape is None:
        return may(sequential)
    known = tape.taken(sequential)
    way = may(sequential) if known is None else bool(known)
    tape.took(sequential, way)
    return way


def _taken(kwargs: Mapping[str, Any], layer: nn.Module, layers: Sequence[nn.Module]) -> Mapping[str, Any]:
    """The keywords that the layer names; for a layer that takes any, those that no other layer names: it may pass them
    to a layer that takes none, as an adapter around a linear layer does."""
    names = keywords_of(layer)
    if names is not None:
        return {name: value for name, value in kwargs.items() if name in names}
    named = frozenset[str]().union(*(keywords_of(other) or () for other in layers))
    return {name: value for name, value in kwargs.items() if name not in named}


def fused(fusable: Fusable, x: Any, narrow: bool) -> torch.Tensor | None:
    """activation(norm(x)) in one kernel, or None where the layers must run unfused."""
    kernels = kernels_for(x)
    call = None if kernels is None else call_of(fusable, x, kernels, narrow)
    if call is None:
        return None
    h: torch.Tensor = norm_act(x, call.norm.weight, call.norm.bias, call)
    record(fusable, call)
    note(call, x, h)
    return h


def call_branch(step: HalfStep, x: Any, kernels: Any, normed: Normed | None = None) -> Any:
    """Return ``branch(x, *args, **kwargs)``. ``normed``: the output of its first norm, if already computed."""
    branch: Any = step.branch
    if kernels is not eager and _apart(branch, lambda _: normed is not None or may_be_taken_apart(step)):
        return run(list(branch._modules.values()), x, normed, step.kwargs)
    return branch(x, *step.args, **step.kwargs)


def may_be_taken_apart(step: HalfStep) -> bool:
    """Whether the branch's layers may be run one by one: it is a Sequential, and nothing would observe it."""
    branch: Any = step.branch
    if step.args or not is_sequential(branch) or hooked(branch):
        return False
    return not step.kwargs or passes_keywords(branch)
