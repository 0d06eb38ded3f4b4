# SPDX-License-Identifier: Apache-2.0
"""Runs a chain of half-steps backwards as a function: from its output to its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from revkernels import eager
from revkernels.autograd.coupling import differentiable
from revkernels.autograd.exact_coupling import half_type_of
from revkernels.autograd.fused import fusion
from revkernels.autograd.fused.norm_context import Within
from revkernels.autograd.half_step import HalfStep, check_aux, check_branch_output, resolved
from revkernels.autograd.state.rewinding import Undo, put_back
from revkernels.autograd.state.snapshot import Snapshot
from revkernels.coupling import Coupling


def invert(
    streams: Sequence[torch.Tensor],
    half_steps: Sequence[HalfStep],
    kernels: Any,
    name: Callable[[int], str],
    grid_exponent: int | None = None,
) -> list[torch.Tensor]:
    """s[target] = s[target] - B[k](h) from the last half-step to the first, out of place.

    With a ``grid_exponent`` the couplings are exact, and the streams must be on that grid.

    A branch runs on throw-away copies of its running statistics: undoing a batch must not count it again.
    """
    # A kernel may traverse unaligned memory in another order, which gives its statistics other bits; a chain's own
    # streams are aligned.
    streams = [s if grid_exponent is None or s.data_ptr() % 16 == 0 else s.clone() for s in streams]
    coupling = None if grid_exponent is None else Coupling(grid_exponent=grid_exponent)
    for k, step in reversed(list(enumerate(half_steps))):
        target, sources = step.target, step.sources
        h = streams[sources[0]]
        for index in sources[1:]:
            h = h + streams[index]
        if coupling is not None and (narrow := half_type_of(step.branch)) is not None:
            h = h.to(narrow)
        snapshot = Snapshot(step.branch)
        with snapshot.turn:
            snapshot.take()
            if snapshot.own is not None:
                # As they are, with the graphs that a recompute's copies do not have: its gradient goes through these.
                graphs = snapshot.own.graphs
                snapshot.own.graphs = [(table, name, table[name], *rest) for table, name, _, *rest in graphs]
            undo: Undo = []
            try:
                snapshot.restore(undo)
                with Within(kernels, None):
                    f = fusion.call_branch(step, h, kernels)
            finally:
                try:
                    put_back(undo)
                except BaseException:  # an interrupt has cut it short
                    put_back(undo)
                    raise
        if type(f) is tuple:
            f, _ = check_aux(f, name, k)
        check_branch_output(f, streams[target], name, k)
        streams[target] = _uncouple(kernels, streams[target], resolved(f), coupling)
    return streams


def _uncouple(kernels: Any, y: torch.Tensor, f: torch.Tensor, coupling: Coupling | None) -> torch.Tensor:
    if kernels is eager and coupling is None:
        return (y - f).to(y.dtype)
    if torch.is_grad_enabled() and (y.requires_grad or f.requires_grad):
        return differentiable(kernels, "uncouple", y, f, coupling)
    x = torch.empty_like(y)
    kernels.uncouple(x, y, f, coupling)
    return x
