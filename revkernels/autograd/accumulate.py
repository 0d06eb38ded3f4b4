# SPDX-License-Identifier: Apache-2.0
"""The gradient accumulation of Algorithm 1 (lines 5 and 6) inside a backward: in place wherever nobody can notice."""

from __future__ import annotations

from typing import Any

import torch

from revkernels.autograd import ownership

_free: ownership.Counts = (0, 0, 0)
_seen: list[ownership.Counts] | None = None


def gather(ds: torch.Tensor | None, dh: torch.Tensor | None, kernels: Any) -> torch.Tensor | None:
    """Return ds + dh, the gradient of a stream: what came through the coupling, and what came through the branch.

    Written over ds, else over dh, if that tensor is free; else a new tensor. To be called by a node's ``backward``
    itself and from nowhere else, since the caller's frames count as holders of the gradient.
    """
    if ds is None:
        return dh
    if dh is None:
        return ds
    if torch.is_grad_enabled() or type(ds) is not torch.Tensor or type(dh) is not torch.Tensor:
        return ds + dh  # create_graph: the sum itself must be differentiable
    if ownership.COUNTABLE:
        if _is_free(ds):
            kernels.accumulate((ds,), (dh,))
            return ds
        if dh.dtype == ds.dtype and _is_free(dh):
            kernels.accumulate((dh,), (ds,))
            return dh
    total = torch.empty_like(ds)
    kernels.couple(total, ds, dh, None)
    return total


def _is_free(gradient: torch.Tensor) -> bool:
    counts = ownership.holders(gradient)
    if _seen is not None:
        _seen.append(counts)
        return False
    if counts[0] > _free[0] or counts[1] > _free[1] or counts[2] > _free[2]:
        return False
    # Not a part of something larger, nor an expanded scalar.
    return gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()


class _Twin(torch.autograd.Function):
    """s -> (s, s): a node with the frames of the real ones, to learn what a free gradient looks like."""

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return s * 1, s * 1

    @staticmethod
    def backward(ctx: Any, ds: torch.Tensor, dh: torch.Tensor) -> Any:
        import revkernels.eager

        return gather(ds, dh, revkernels.eager)


def _learn() -> ownership.Counts:
    """The counts of a free gradient in this Python and this torch, read off two that are known to be free."""
    global _seen
    with torch.inference_mode(False), torch.enable_grad():
        first, second = _Twin.apply(torch.zeros(2, requires_grad=True))
        root = (first * 2 + second * 3).sum()
    seen: list[ownership.Counts] = []
    _seen = seen
    try:
        root.backward()
    finally:
        _seen = None
    return tuple(map(min, zip(*seen, strict=True)))


if ownership.COUNTABLE:
    _free = _learn()
