# SPDX-License-Identifier: Apache-2.0
"""A chain's input as its two streams, and the options that every reversible module takes."""

from __future__ import annotations

from typing import Any

import torch

from revkernels import backends

ACTIVATIONS = ("reconstruct", "store")
COUPLINGS = ("float",)


def is_store(activations: Any) -> bool:
    """Whether activations are kept; ValueError for a choice that does not exist."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}; it must be {' or '.join(map(repr, ACTIVATIONS))}")
    return activations == "store"


def check_options(split_dim: Any, activations: Any, coupling: Any, backend: Any) -> None:
    """Raise TypeError or ValueError (BackendError for the backend) for an option that does not exist."""
    if isinstance(split_dim, bool) or not isinstance(split_dim, int):
        raise TypeError(f"split_dim is a {type(split_dim).__name__}; it must be an int")
    is_store(activations)
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling is {coupling!r}; it must be {' or '.join(map(repr, COUPLINGS))}")
    if backend is not None:
        backends.require(backend)


def pair_of(x: Any, split_dim: int, name: str) -> tuple[tuple[torch.Tensor, torch.Tensor], bool]:
    """Return the two streams of ``x``, and whether it was one tensor that has to be joined again."""
    joined = isinstance(x, torch.Tensor)
    if not joined and not (isinstance(x, tuple | list) and len(x) == 2 and all(isinstance(t, torch.Tensor) for t in x)):
        raise TypeError(f"{name} is {_describe(x)}; it must be a tensor, or a pair of tensors ({name}1, {name}2)")
    for half in (x,) if joined else x:
        if not half.is_floating_point():
            raise TypeError(f"{name} is {half.dtype}; it must be floating point (float64, float32, bfloat16, float16)")
    if joined:
        if not -x.dim() <= split_dim < x.dim():
            raise ValueError(f"{name} has shape {tuple(x.shape)}; split_dim={split_dim} is not one of its dimensions")
        if x.shape[split_dim] % 2:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: its size in dimension {split_dim} is {x.shape[split_dim]}; it "
                f"must be even, to be halved into two streams"
            )
        half_size = x.shape[split_dim] // 2
        return (x.narrow(split_dim, 0, half_size), x.narrow(split_dim, half_size, half_size)), True
    x1, x2 = x
    for what, first, second in (
        ("shape", tuple(x1.shape), tuple(x2.shape)),
        ("dtype", x1.dtype, x2.dtype),
        ("device", x1.device, x2.device),
    ):
        if first != second:
            raise ValueError(f"{name}1 has {what} {first}, {name}2 has {second}: they must be equal")
    return (x1, x2), False


def dense(half: torch.Tensor) -> torch.Tensor:
    """Return ``half`` without gaps in memory, copied only if it has some: strides are part of a stream's value."""
    if half.is_contiguous() or torch.empty_like(half, device="meta").stride() == half.stride():
        return half
    return half.clone()


def _describe(x: Any) -> str:
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)} ({', '.join(type(item).__name__ for item in x)})"
    return f"a {type(x).__name__}"
