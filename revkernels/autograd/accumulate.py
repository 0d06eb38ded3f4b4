# SPDX-License-Identifier: Apache-2.0
"""The gradient accumulation of Algorithm 1 (lines 5 and 6) inside a backward: in place wherever nobody can notice."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from revkernels import eager
from revkernels.autograd import ownership

#: For each way of calling, what a free gradient's counts are: learnt by `prepare`.
_free: dict[int, ownership.Counts] = {}
_lock = threading.Lock()
_learning = threading.local()  # .seen: the counts of the two gradients, while this thread learns


def gather(ds: torch.Tensor | None, dh: torch.Tensor | None, kernels: Any) -> torch.Tensor | None:
    """Return ds + dh, the gradient of a stream: what came through the coupling, and what came through the branch.

    Written over ds, else over dh, if that tensor is free; else a new tensor. In memory it lies as torch's own sum does,
    like ds: some of torch's backwards are slow with a gradient that a branch has permuted, or wrong (an instance
    norm's). To be called by a node's ``backward`` itself and from nowhere else, since the caller's frames count as
    holders of the gradient.
    """
    if ds is None:
        return dh
    if dh is None:
        return ds
    if torch.is_grad_enabled() or type(ds) is not torch.Tensor or type(dh) is not torch.Tensor:
        return ds + dh  # create_graph: the sum itself must be differentiable
    if ownership.is_batched(ds) or ownership.is_batched(dh):
        return ds + dh
    if ds.is_neg() or dh.is_neg():  # the imaginary part of a conjugate has a sign that its memory lacks
        return ds + dh
    if ownership.COUNTABLE:
        free = _free.get(ownership.way_of_calling())
        if _is_free(ds, free):
            kernels.accumulate((ds,), (dh,))
            return ds
        if dh.dtype == ds.dtype and _lies_like(dh, ds) and _is_free(dh, free):
            kernels.accumulate((dh,), (ds,))
            return dh
    total = torch.empty_like(ds)
    kernels.couple(total, ds, dh, None)
    return total


def _lies_like(dh: torch.Tensor, ds: torch.Tensor) -> bool:
    """Whether dh is laid out as a new tensor like ds would be."""
    return dh.stride() == ds.stride() or dh.stride() == torch.empty_like(ds, device="meta").stride()


def owned(gradient: torch.Tensor) -> bool:
    """Whether a node may write over a gradient that it was given. To be called as `gather` is, by its ``backward``."""
    if torch.is_grad_enabled() or type(gradient) is not torch.Tensor or not ownership.COUNTABLE:
        return False
    return not ownership.is_batched(gradient) and _is_free(gradient, _free.get(ownership.way_of_calling()))


def prepare() -> None:
    """Learn what a free gradient looks like in this Python and this torch, off two that are known to be free.

    Not at import: it runs a backward, and torch's engine starts its threads with the first one.
    """
    way = ownership.way_of_calling()
    if way in _free or not ownership.COUNTABLE:
        return
    # No mode of the caller's may keep, or count, or give back later, what is made here.
    with _lock, torch.inference_mode(False), torch.enable_grad(), _disable_current_modes():
        seen: list[ownership.Counts] = []
        # On the host whatever torch's default device is: a device has a thread of its own, which learns nothing.
        first, second = _Twin.apply(torch.zeros(2, device="cpu", requires_grad=True))
        _learning.seen = seen
        try:
            (first * 2 + second * 3).sum().backward()
        finally:
            del _learning.seen
        if way == ownership.way_of_calling():
            _free[way] = tuple(map(min, zip(*seen, strict=True)))


def _is_free(gradient: torch.Tensor, free: ownership.Counts | None) -> bool:
    counts = ownership.holders(gradient)
    if hasattr(_learning, "seen"):
        _learning.seen.append(counts)
        return False
    return free is not None and counts[0] <= free[0] and counts[1] <= free[1] and counts[2] <= free[2]


class _Twin(torch.autograd.Function):
    """s -> (s, s): a node with the frames of the real ones, to learn what a free gradient looks like."""

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return s * 1, s * 1

    @staticmethod
    def backward(ctx: Any, ds: torch.Tensor, dh: torch.Tensor) -> Any:
        return gather(ds, dh, eager)
