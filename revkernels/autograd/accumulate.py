# SPDX-License-Identifier: Apache-2.0
"""The gradient accumulation of Algorithm 1 (lines 5 and 6) inside a backward: in place wherever that is safe."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from revkernels import eager
from revkernels.autograd import ownership

#: For each `way_of_calling`, the reference counts of a free gradient: learnt by `prepare`.
_free: dict[int, ownership.Counts] = {}
_lock = threading.Lock()
_learning = threading.local()  # .seen: the two gradients' counts, while this thread learns


def gather(ds: torch.Tensor | None, dh: torch.Tensor | None, kernels: Any) -> torch.Tensor | None:
    """Return ds + dh, the gradient of a stream: ds came through the coupling, dh through the branch.

    Written over ds, else over dh, if that tensor is free; else into a new tensor. Its layout is that of torch's own
    sum, like ds: some of torch's backwards are slow with a gradient that a branch has permuted, or wrong (instance
    norm's). Call it directly from a node's ``backward`` and from nowhere else: the caller's frames hold references to
    the gradient, which are counted.
    """
    if ds is None:
        return dh
    if dh is None:
        return ds
    if torch.is_grad_enabled() or type(ds) is not torch.Tensor or type(dh) is not torch.Tensor:
        return ds + dh  # create_graph: the sum itself must be differentiable
    if ownership.is_batched(ds) or ownership.is_batched(dh):
        return ds + dh
    if ds.is_neg() or dh.is_neg():  # lazy negation: the memory has the opposite sign
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
    """Whether dh has the layout of ``empty_like(ds)``."""
    return dh.stride() == ds.stride() or dh.stride() == torch.empty_like(ds, device="meta").stride()


def owned(gradient: torch.Tensor) -> bool:
    """Whether a node may overwrite a gradient that it received. Call it directly from the node's ``backward``."""
    if torch.is_grad_enabled() or type(gradient) is not torch.Tensor or not ownership.COUNTABLE:
        return False
    return not ownership.is_batched(gradient) and _is_free(gradient, _free.get(ownership.way_of_calling()))


def prepare() -> None:
    """Learn a free gradient's reference counts in this Python and torch, from two gradients known to be free.

    Not at import: it runs a backward, and torch's engine starts its threads with the first one.
    """
    way = ownership.way_of_calling()
    if way in _free or not ownership.COUNTABLE:
        return
    # No mode of the caller's may record, count or cache the tensors made here.
    with _lock, torch.inference_mode(False), torch.enable_grad(), _disable_current_modes():
        seen: list[ownership.Counts] = []
        # On the CPU whatever the default device: a device's backward runs in another thread, which does not learn.
        first, second = _Twin.apply(torch.zeros(2, device="cpu", requires_grad=True))
        _learning.seen = seen
        try:
            (first * 2 + second * 3).sum().backward()
        finally:
            del _learning.seen
        # Nothing was seen if the engine ran it in another thread, as it does from 60 backwards within each other on.
        if seen and way == ownership.way_of_calling():
            _free[way] = tuple(map(min, zip(*seen, strict=True)))


def _is_free(gradient: torch.Tensor, free: ownership.Counts | None) -> bool:
    counts = ownership.holders(gradient)
    if hasattr(_learning, "seen"):
        _learning.seen.append(counts)
        return False
    return free is not None and counts[0] <= free[0] and counts[1] <= free[1] and counts[2] <= free[2]


class _Twin(torch.autograd.Function):
    """s -> (s, s): a node with the same frames as the real ones, for `prepare`."""

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return s * 1, s * 1

    @staticmethod
    def backward(ctx: Any, ds: torch.Tensor, dh: torch.Tensor) -> Any:
        return gather(ds, dh, eager)
