# SPDX-License-Identifier: Apache-2.0
"""The keywords that a branch, or a layer inside one, takes."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import nn

__all__ = ["keywords_of", "passes_keywords"]

_PARAMETER = inspect.Parameter
#: For each callable, a weak reference to the function that it runs, which may close over it, and its keywords.
_accepts: weakref.WeakKeyDictionary[Any, tuple[Any, frozenset[str] | None]] = weakref.WeakKeyDictionary()


def _no_function() -> None:
    """Stands in for a reference to a function."""


def passes_keywords(module: Any) -> bool:
    """Whether it is a `revkernels.nn.FusedSequential` with that class's forward, which has a marker attribute."""
    return "forward" not in module.__dict__ and getattr(type(module).forward, "passes_keywords", False)


def keywords_of(called: Any) -> frozenset[str] | None:
    """The keywords that a call takes besides its input, of a `FusedSequential` those of its layers; None means any."""
    inner = getattr(called, "_orig_mod", called)  # a compiled module takes anything; what it wraps may not
    if isinstance(inner, nn.Sequential) and passes_keywords(inner):
        names: frozenset[str] = frozenset()
        for layer in inner:  # its current layers
            taken = keywords_of(layer)
            if taken is None:
                return None
            names |= taken
        return names
    if torch.compiler.is_dynamo_compiling():  # a write to the cache would force a new trace
        return _inspect(inner)
    if isinstance(inner, nn.Module) and "forward" in inner.__dict__:
        return _inspect(inner)  # not cached: it may be bound to the module, which would never be freed
    runs = type(inner).forward if isinstance(inner, nn.Module) else None
    try:
        known = _accepts.get(called)
        if known is None or known[0]() is not runs:
            known = _accepts[called] = weakref.ref(runs) if runs else _no_function, _inspect(inner)
        return known[1]
    except TypeError:  # a built-in function, which cannot be cached
        return _inspect(inner)


def _inspect(inner: Any) -> frozenset[str] | None:
    target = inner.forward if isinstance(inner, nn.Module) else inner
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(p.kind is _PARAMETER.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(
        p.name for p in parameters[1:] if p.kind in (_PARAMETER.KEYWORD_ONLY, _PARAMETER.POSITIONAL_OR_KEYWORD)
    )
