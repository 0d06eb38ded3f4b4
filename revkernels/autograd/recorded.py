# SPDX-License-Identifier: Apache-2.0
"""One half-step as its forward ran, and whether its recompute came out the same."""

from __future__ import annotations

import torch

from revkernels.autograd.half_step import HalfStep
from revkernels.autograd.snapshot import Snapshot
from revkernels.autograd.surroundings import Drawn

Metadata = tuple[torch.dtype, torch.Size]
Frame = list[tuple[torch.Tensor, int]]  # the tensors that a recompute saved, with their versions


class RecordedStep:
    """The call, what the branch saw and drew, and the dtypes and shapes of what it saved."""

    __slots__ = ("drawn", "half_step", "needs_grad", "saved", "snapshot", "strides")

    def __init__(self, half_step: HalfStep, needs_grad: bool) -> None:
        self.half_step, self.needs_grad = half_step, needs_grad
        self.snapshot = Snapshot(half_step.branch)
        self.saved: list[Metadata] = []
        self.drawn: Drawn = []
        self.strides: tuple[int, ...] = ()  # of the target, before it was added to

    def saved_alike(self, frame: Frame) -> bool:
        """Whether the recompute saved as many tensors as the forward, of the same dtypes and shapes."""
        return len(frame) == len(self.saved) and all(map(_like, frame, self.saved))

    def difference(self, frame: Frame) -> str:
        """Say what is not `saved_alike`."""
        if len(frame) != len(self.saved):
            return f"the recompute saved {len(frame)} tensors, the forward {len(self.saved)}"
        index = next(i for i, pair in enumerate(zip(frame, self.saved, strict=True)) if not _like(*pair))
        (now, _), (dtype, shape) = frame[index], self.saved[index]
        return (
            f"saved tensor {index} is {now.dtype} of shape {tuple(now.shape)} in the recompute and was {dtype} of "
            f"shape {tuple(shape)} in the forward"
        )


def _like(now: tuple[torch.Tensor, int], then: Metadata) -> bool:
    return now[0].dtype is then[0] and now[0].shape == then[1]
