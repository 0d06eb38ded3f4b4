# SPDX-License-Identifier: Apache-2.0
"""One half-step of a reversible recurrence, and the checks of its branch's output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from revkernels.autograd.ownership import PLAIN


class HalfStep(NamedTuple):
    """``streams[target] += branch(sum of streams[sources], *args, **kwargs)``; the target is none of the sources."""

    branch: Callable[..., Any]
    target: int
    sources: tuple[int, ...]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}  # never written to


def grouped(groups: int) -> list[tuple[int, tuple[int, ...]]]:
    """Targets and sources of a block's half-steps: the first reads the sum of the other streams, each later one the
    stream updated just before."""
    return [(index, (index - 1,) if index else tuple(range(1, groups))) for index in range(groups)]


def check_aux(result: tuple[Any, ...], name: Callable[[int], str], k: int) -> tuple[torch.Tensor, Any]:
    """A branch returns f, or (f, aux)."""
    if len(result) != 2:
        raise TypeError(f"{name(k)} returned a tuple of {len(result)}; it must return f, or the pair (f, aux)")
    return result


def check_branch_output(f: Any, stream: torch.Tensor, name: Callable[[int], str], k: int) -> None:
    """f can be added to the stream: a floating-point tensor of its shape, on its device."""
    if not isinstance(f, torch.Tensor):
        raise TypeError(f"{name(k)} returned a {type(f).__name__}; it must return a tensor, or (tensor, aux)")
    if f.shape != stream.shape:
        raise ValueError(
            f"{name(k)} returned shape {tuple(f.shape)} for a stream of shape {tuple(stream.shape)}: a reversible "
            f"block must keep the shape (stride 1, as many channels out as in)"
        )
    if not f.is_floating_point():
        raise TypeError(f"{name(k)} returned {f.dtype}; it must return a floating-point tensor")
    if f.device != stream.device:
        raise ValueError(f"{name(k)} returned a tensor on {f.device}; the stream is on {stream.device}")


def resolved(f: torch.Tensor) -> torch.Tensor:
    """f with its lazy negation (the imaginary part of a conjugate) materialized, and `arrived`."""
    return arrived(f).resolve_neg()


def arrived(x: torch.Tensor) -> torch.Tensor:
    """x, waited for if an asynchronous collective still produces it, as for a tensor-parallel layer's output."""
    if type(x) in PLAIN:
        return x
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is None or not isinstance(x, collectives.AsyncCollectiveTensor):
        return x
    there: torch.Tensor = _Arrive.apply(x)
    return there


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.trigger_wait()

    @staticmethod
    def backward(ctx: Any, dx: Any) -> Any:
        return dx
