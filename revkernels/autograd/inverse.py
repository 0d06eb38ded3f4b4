# SPDX-License-Identifier: Apache-2.0
"""A chain of half-steps run backwards as a function: from its output to its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from revkernels import eager
from revkernels.autograd import fusion
from revkernels.autograd.coupling import differentiable
from revkernels.autograd.half_step import HalfStep, check_aux, check_branch_output
from revkernels.autograd.snapshot import Snapshot, put_back


def invert(
    streams: Sequence[torch.Tensor], half_steps: Sequence[HalfStep], kernels: Any, name: Callable[[int], str]
) -> list[torch.Tensor]:
    """s[target] = s[target] - B[k](h) from the last half-step to the first, out of place.

    A branch runs on throw-away copies of its running statistics: undoing a batch must not count it again.
    """
    streams = list(streams)
    for k, step in reversed(list(enumerate(half_steps))):
        target, sources = step.target, step.sources
        h = streams[sources[0]]
        for index in sources[1:]:
            h = h + streams[index]
        snapshot = Snapshot(step.branch)
        with snapshot.turn:
            snapshot.take()
            undo = snapshot.restore()
            try:
                with fusion.Within(kernels, None):
                    f = fusion.call_branch(step, h, kernels)
            finally:
                put_back(undo)
        if type(f) is tuple:
            f, _ = check_aux(f, name, k)
        check_branch_output(f, streams[target], name, k)
        streams[target] = _uncouple(kernels, streams[target], f)
    return streams


def _uncouple(kernels: Any, y: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    if kernels is eager:
        return (y - f).to(y.dtype)
    if torch.is_grad_enabled() and (y.requires_grad or f.requires_grad):
        return differentiable(kernels, "uncouple", y, f, None)
    x = torch.empty_like(y)
    kernels.uncouple(x, y, f, None)
    return x
