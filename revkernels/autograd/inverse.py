# SPDX-License-Identifier: Apache-2.0
"""A chain of reversible blocks run backwards as a function: from its output to its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from revkernels import eager
from revkernels.autograd.coupling import differentiable
from revkernels.autograd.reversal import check_aux, check_branch_output
from revkernels.autograd.snapshot import Snapshot, put_back


def invert(
    streams: tuple[torch.Tensor, torch.Tensor],
    half_steps: Sequence[tuple[Any, tuple[tuple[Any, ...], dict[str, Any]]]],
    kernels: Any,
    name: Callable[[int], str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """s[k] = s[k+2] - B[k](s[k+1]) from the last half-step to the first, out of place.

    A branch runs on throw-away copies of its running statistics: undoing a batch must not count it again.
    """
    source, target = streams
    for k, (branch, (args, kwargs)) in reversed(list(enumerate(half_steps))):
        undo = Snapshot(branch).restore()
        try:
            f = branch(source, *args, **kwargs)
        finally:
            put_back(undo)
        if type(f) is tuple:
            f, _ = check_aux(f, name, k)
        check_branch_output(f, target, name, k)
        source, target = _uncouple(kernels, target, f), source
    return source, target


def _uncouple(kernels: Any, y: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    if kernels is eager:
        return (y - f).to(y.dtype)
    if torch.is_grad_enabled() and (y.requires_grad or f.requires_grad):
        return differentiable(kernels, "uncouple", y, f, None)
    x = torch.empty_like(y)
    kernels.uncouple(x, y, f, None)
    return x
