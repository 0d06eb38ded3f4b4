# SPDX-License-Identifier: Apache-2.0
"""Splits a chain's input into streams, and checks the options of all reversible modules."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

import torch

from revkernels import backends
from revkernels.autograd.half_step import arrived
from revkernels.autograd.ownership import PLAIN
from revkernels.autograd.state.rng_and_autocast import autocast_dtype
from revkernels.budget import MemoryBudget
from revkernels.exact import Exact
from revkernels.options import Activations

#: What a chain takes and returns: one tensor, or a tuple of streams.
Streams = TypeVar("Streams", torch.Tensor, tuple[torch.Tensor, ...])

ACTIVATIONS = get_args(Activations)
COUPLINGS = ("float", "exact")


def is_store(activations: Any) -> bool:
    """Whether activations are stored; ValueError for an unknown option."""
    if isinstance(activations, MemoryBudget):
        return activations.stores
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"activations is {activations!r}; it must be {', '.join(map(repr, ACTIVATIONS))} or a "
            f"revkernels.MemoryBudget(...)"
        )
    return bool(activations == "store")


def check_coupling(coupling: Any) -> None:
    """Raise ValueError for an unknown coupling."""
    if not isinstance(coupling, Exact) and coupling not in COUPLINGS:
        raise ValueError(
            f"coupling is {coupling!r}; it must be {', '.join(map(repr, COUPLINGS))} or a revkernels.Exact(...)"
        )


def check_option(name: str, value: Any) -> None:
    """Raise TypeError or ValueError (BackendError for the backend) for an unknown option."""
    if name == "split_dim" and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"split_dim is a {type(value).__name__}; it must be an int")
    if name == "activations":
        is_store(value)
    elif name == "coupling":
        check_coupling(value)
    elif name == "backend" and value is not None:
        backends.require(value)


def check_options(split_dim: Any, activations: Any, coupling: Any, backend: Any) -> None:
    """`check_option` of each."""
    check_option("split_dim", split_dim)
    check_option("activations", activations)
    check_option("coupling", coupling)
    check_option("backend", backend)


def streams_of(x: Any, split_dim: int, groups: int, name: str) -> tuple[list[torch.Tensor], bool]:
    """Return the ``groups`` streams of ``x``, and whether it was one tensor that must be joined again."""
    if isinstance(x, torch.Tensor):
        x = arrived(x)
        _check_stream(x, name)
        if x.is_nested:
            raise TypeError(
                f"{name} is a nested tensor, which is not cut into streams: pass a tuple of {groups}, one per stream"
            )
        if not -x.dim() <= split_dim < x.dim():
            raise ValueError(f"{name} has shape {tuple(x.shape)}; split_dim={split_dim} is not one of its dimensions")
        size = x.shape[split_dim]
        if size % groups:
            need = "even, to be halved into two streams" if groups == 2 else f"divisible into {groups} streams"
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: its size in dimension {split_dim} is {size}; it must be {need}"
            )
        if type(x) not in PLAIN:  # torch 2.6 gathers the gradient of a DTensor's `narrow`, and gets it wrong
            return list(x.chunk(groups, split_dim)), True
        part = size // groups
        return [x.narrow(split_dim, index * part, part) for index in range(groups)], True
    if not (isinstance(x, (tuple, list)) and len(x) == groups and all(isinstance(t, torch.Tensor) for t in x)):
        several = f"a pair of tensors ({name}1, {name}2)" if groups == 2 else f"a tuple of {groups} tensors"
        raise TypeError(f"{name} is {_describe(x)}; it must be a tensor, or {several}")
    for stream in x:
        _check_stream(stream, name)
    first = x[0]
    for index, other in enumerate(x[1:], 2):
        for what, expected, got in (
            ("shape", tuple(first.shape), tuple(other.shape)),
            ("dtype", first.dtype, other.dtype),
            ("device", first.device, other.device),
        ):
            if got != expected:
                raise ValueError(f"{name}1 has {what} {expected}, {name}{index} has {got}: they must be equal")
    return list(map(arrived, x)), False


_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))  # float8 has no arithmetic in torch


def _check_stream(stream: torch.Tensor, name: str) -> None:
    if stream.layout not in (torch.strided, torch.jagged) or (stream.is_nested and stream.layout is torch.strided):
        kind = "nested tensor" if stream.is_nested else f"tensor of layout {stream.layout}"
        raise TypeError(f"{name} is a {kind}; it must be dense (strided), or nested with layout torch.jagged")
    if stream.dtype not in _FLOATS:
        raise TypeError(f"{name} is {stream.dtype}; it must be floating point (float64, float32, bfloat16, float16)")


def is_narrowed(stream: torch.Tensor) -> bool:
    """Whether autocast is on and the stream is of a half type, in which reconstruction drifts."""
    return stream.dtype in _HALVES and autocast_dtype(stream.device.type) is not None


def widened(stream: torch.Tensor) -> torch.Tensor:
    """The stream in float32 if autocast has narrowed it, as it does a convolution's output."""
    return stream.float() if is_narrowed(stream) else stream


def dense(stream: torch.Tensor) -> torch.Tensor:
    """Return ``stream`` without gaps in memory, copied only if needed: strides are part of a stream's value."""
    if stream.is_contiguous() or torch.empty_like(stream, device="meta").stride() == stream.stride():
        return stream
    return stream.clone()


def _describe(x: Any) -> str:
    if isinstance(x, (tuple, list)):
        return f"a {type(x).__name__} of {len(x)} ({', '.join(type(item).__name__ for item in x)})"
    return f"a {type(x).__name__}"
