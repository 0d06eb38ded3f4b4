# SPDX-License-Identifier: Apache-2.0
"""Fuses the norm at the start of a branch with the coupling in front of it.

In the forward y = x + f and the next branch's h = activation(norm(y)) are one node and, except for batch statistics,
one pass; in the backward the norm's gradient is accumulated into the stream's; in the recompute x = y - f and h, with
the statistics of the forward, are one pass again. The norm belongs to the branch, so its weight is read before the
branch is called: this is done only where the branch is a Sequential without hooks, whose layers may be run one by one,
and where the weight is already a plain tensor (not sharded).
"""

from __future__ import annotations

from typing import Any

import torch

from revkernels.autograd.coupling import couple
from revkernels.autograd.fused import fusion
from revkernels.autograd.fused.known_layers import NORM_LAYERS, Fusable, fusable_at, narrows
from revkernels.autograd.fused.norm_context import put_running, running_of
from revkernels.autograd.half_step import HalfStep
from revkernels.autograd.norm_act import Call, couple_norm_act, enter_norm_act, norm_act, walk_together
from revkernels.norm import Norm, Statistics

#: A coupling deferred to the next branch's norm: the stream's index, the stream, and what is added.
Waiting = tuple[int, torch.Tensor, torch.Tensor]


class Entry:
    """A branch's first norm and activation, and what their recompute needs.

    Attributes:
        fusable: the layers.
        narrow: autocast makes the input of the layer behind them narrow.
        call: how they were applied in the forward.
        given: the statistics for the recompute; None if it computes them (those of rows).
        running: copies of a batch norm's buffers after it, if code of the branch may read them.
    """

    __slots__ = ("call", "fusable", "given", "narrow", "running")

    def __init__(self, fusable: Fusable, narrow: bool) -> None:
        self.fusable, self.narrow = fusable, narrow
        self.call: Call | None = None
        self.given: Statistics | None = None
        self.running: dict[str, torch.Tensor] | None = None

    @property
    def counts(self) -> bool:
        """Whether this was a batch norm that counted its batch."""
        return self.given is not None and not self.call.constant  # type: ignore[union-attr]

    def apply(
        self, streams: list[torch.Tensor], source: int, waiting: Waiting | None, kernels: Any, seen: bool
    ) -> fusion.Normed | None:
        """Run the ``waiting`` coupling and return h for the branch; None if the branch's own layers must compute it.

        ``seen``: hooks or the caller see the stream as it is now, and its gradient must include the branch's part.
        """
        x = streams[source] if waiting is None else waiting[1]
        found = fusion.kernels_for(x)
        call = None if found is None else fusion.call_of(self.fusable, x, kernels, self.narrow)
        graph = torch.is_grad_enabled()
        if waiting is not None and (
            call is None
            or not may_be_one(call.norm, x, waiting[2])
            or (graph and not (x.requires_grad or waiting[2].requires_grad))
        ):
            streams[source] = x = couple(x, waiting[2], kernels, None)[0]
            waiting = None
        if call is None:
            return None
        weight, bias = call.norm.weight, call.norm.bias
        if waiting is not None:
            streams[source], h = couple_norm_act(x, waiting[2], weight, bias, call)
        elif graph and x.requires_grad and not seen:
            streams[source], h = enter_norm_act(x, weight, bias, call)
        else:
            h = norm_act(x, weight, bias, call)
        fusion.note(call, streams[source], h)
        self.call = call
        if call.norm.kind == "batch":
            self.given = call.statistics
            self.running = None if call.constant else running_of(self.fusable.norm)
        else:
            call.statistics = None  # a float for every position: too large to keep
        return fusion.Normed(h, self.fusable, self.narrow)

    def again(self, s: torch.Tensor, ready: Ready | None) -> fusion.Normed:
        """Return h from the reconstructed stream, as a node that saves the same tensors as the forward's."""
        before: Any = self.call
        call = Call(before.kernels, before.norm, before.dtype, self.given, before.constant)
        call.source = before.source
        put_running(self.fusable.norm, self.running)
        if ready is not None:
            call.ready, call.given = ready
            call.statistics = call.given
        h: torch.Tensor = enter_norm_act(s, before.norm.weight, before.norm.bias, call)[1]
        fusion.note(call, s, h)
        return fusion.Normed(h, self.fusable, self.narrow)

    def uncouples(self, x: torch.Tensor, y: torch.Tensor, f: torch.Tensor) -> bool:
        """Whether `uncouple` supports these tensors."""
        return may_be_one(self.call.norm, x, f, y)  # type: ignore[union-attr]

    def uncouple(self, x: torch.Tensor, y: torch.Tensor, f: torch.Tensor) -> Ready:
        """x = y - f, the stream that this branch reads, and its h."""
        before: Any = self.call
        call = Call(before.kernels, before.norm, before.dtype, self.given)
        h, mean, rstd, given = call.outputs(x)
        before.kernels.uncouple_norm_act(h, x, y, f, before.norm, mean, rstd, given)
        return h, Statistics(mean, rstd)


def may_be_one(norm: Norm, stream: torch.Tensor, f: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether coupling and norm may be one pass. Behind a float64 branch it would compute the norm of float32 streams
    and its statistics in float64, unlike the norm by itself; and f may have a layout that couplings can traverse and
    the norm's kernels cannot."""
    if f.dtype == torch.float64 and stream.dtype != torch.float64:
        return False
    return walk_together(norm, stream, f, *others)


#: h, computed ahead of the branch's recompute, and its statistics.
Ready = tuple[torch.Tensor, Statistics]


def entry_of(step: HalfStep, kernels: Any) -> Entry | None:
    """The norm that the branch begins with, if it may be applied before the branch is called."""
    if len(step.sources) > 1 or kernels is fusion.eager:
        return None
    if not fusion.may_be_taken_apart(step):
        return None
    branch: Any = step.branch
    layers = list(branch._modules.values())
    if not layers or type(layers[0]) not in NORM_LAYERS:
        return None
    fusable = fusable_at(layers, 0)
    if isinstance(fusable, str):
        return None
    behind = layers[fusable.layers] if fusable.layers < len(layers) else None
    return Entry(fusable, behind is not None and narrows(behind))
