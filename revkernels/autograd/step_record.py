# SPDX-License-Identifier: Apache-2.0
"""One half-step as its forward ran, and whether its recompute came out the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from revkernels.autograd.fused.coupled_norm import Entry
from revkernels.autograd.fused.norm_context import Noted, Tape
from revkernels.autograd.half_step import HalfStep
from revkernels.autograd.output_check import OutputSample, sample_of
from revkernels.autograd.planning.kept_ops import KeptOp
from revkernels.autograd.planning.offload import OffloadedTensor, OffloadGroup
from revkernels.autograd.planning.rematerialize import Outputs
from revkernels.autograd.recomputing import is_within_a_branch
from revkernels.autograd.state.rewinding import NONE
from revkernels.autograd.state.rng_and_autocast import Drawn, tensors_in
from revkernels.autograd.state.snapshot import Snapshot

Frame = list[tuple[torch.Tensor, int]]  # the tensors that a recompute saved, with their versions


class RecordedStep:
    """The call, what the branch saw and drew, and the dtypes and shapes of what it saved.

    Attributes:
        entry: the norm that was applied on the way into the branch, if one was.
        statistics: of the fused batch norms inside the branch, in the order of their calls.
        ways: how norms and Sequentials inside it were run, likewise.
        kept: outputs of operators that the recompute need not run again, by the operator's number; let go once used.
        before: the stream it adds to, as it was, where the half-step is not to be rebuilt; let go likewise.
        offloaded: what it has sent to host memory; None if nothing goes there.
        outputs: while it runs, what it makes that can be made again; None if nobody asks.
        nodes: of its graph, if torch.compile was at work while it ran; else None.
        sample: of what it returned, to be compared in its first recomputes; else None.
        saved, dtypes: the shapes of the tensors that it saved, and their dtypes: two lists, for thousands of pairs are
            so many things for Python's garbage collector to look through.
    """

    __slots__ = (
        *("before", "drawn", "dtypes", "entry", "half_step", "kept", "offloaded", "needs_grad", "nodes", "outputs"),
        *("sample", "saved", "snapshot", "statistics", "strides", "ways"),
    )

    def __init__(self, half_step: HalfStep) -> None:
        self.half_step = half_step
        self.needs_grad = False
        self.entry: Entry | None = None
        self.statistics: list[Noted] = []
        self.ways: list[tuple[nn.Module, Any]] = []
        self.snapshot = Snapshot(half_step.branch, (*half_step.args, *half_step.kwargs.values()))
        self.saved: list[torch.Size] = []
        self.dtypes: list[torch.dtype] = []
        self.drawn: Drawn = []
        self.strides: tuple[int, ...] = ()  # of the target, before it was added to
        self.kept: dict[int, KeptOp] = {}
        self.before: torch.Tensor | OffloadedTensor | None = None
        self.offloaded: OffloadGroup | None = None
        self.outputs: Outputs | None = None
        self.nodes: list[str] | None = None
        self.sample: OutputSample | None = None

    def over(self) -> None:
        """The forward is: see `Snapshot.complete`, what is empty stays so."""
        self.statistics, self.ways = self.statistics or NONE, self.ways or NONE

    def tape(self, replaying: bool) -> Tape:
        """The branch's batch statistics, to be noted or to be used again."""
        return Tape(self.statistics, self.ways, replaying, self.outputs, self.snapshot.reads_running)

    def counted(self) -> list[nn.Module]:
        """The batch norms whose statistics were noted, once for each call."""
        layers = [layer for layer, *_ in self.statistics]
        if self.entry is not None and self.entry.counts:
            layers.append(self.entry.fusable.norm)
        return layers

    def saved_alike(self, frame: Frame) -> bool:
        """Whether the recompute saved as many tensors as the forward, of the same dtypes and shapes."""
        return [t.shape for t, _ in frame] == self.saved and [t.dtype for t, _ in frame] == self.dtypes

    def note_nodes(self, result: Any, given: Any, since: int) -> None:
        """Something was compiled while it ran. When it is run again torch may compile parts otherwise, or not at all,
        and these may save tensors of the same shapes in another order, which only the nodes of the graph tell.
        ``since``: autograd's count of its nodes when it began."""
        self.nodes = self._nodes_behind(result, given, since)

    def note_result(self, result: Any, stream: torch.Tensor | None = None) -> None:
        """Note what the branch returned, if it has code of its own; and the stream that this is added to. Inside
        another branch, which is compared as a whole, streams are rebuilt from what that one's recompute computed: of
        them nobody here knows how far they have drifted."""
        if self.snapshot.own is not None and not is_within_a_branch():
            self.sample = sample_of(self.half_step.branch, result, stream)

    def difference(self, frame: Frame, result: Any, given: Any, since: int) -> str | None:
        """Say what is not as it was in the recompute, which returned this for what it was given; None if all is."""
        problem = None
        if self.saved_alike(frame) and (self.nodes is None or self.nodes == self._nodes_behind(result, given, since)):
            if self.sample is not None:
                problem = self.sample.difference(result, given)
            if problem is None:
                return None
            return (
                f"{problem}. The branch did not do the same twice: does it count its calls, draw from Python's or "
                f"NumPy's generators, or keep what it reads in an object of its own? Keep that in a buffer or a tensor "
                f"attribute, and draw from torch's generators; or set activations='store'. (If it is rounding that "
                f"went so far, revkernels.diagnostics.drift tells, and coupling='exact' prevents it)"
            )
        if len(frame) != len(self.saved):
            problem = f"the recompute saved {len(frame)} tensors, the forward {len(self.saved)}"
        elif self.saved_alike(frame):
            problem = "the recompute made other nodes of its graph than the forward"
        else:
            then = list(zip(self.saved, self.dtypes, strict=True))
            index = next(i for i, (t, _) in enumerate(frame) if (t.shape, t.dtype) != then[i])
            (now, _), (shape, dtype) = frame[index], then[index]
            problem = (
                f"saved tensor {index} is {now.dtype} of shape {tuple(now.shape)} in the recompute and was {dtype} of "
                f"shape {tuple(shape)} in the forward"
            )
        problem += ". The branch did not do the same twice: "
        if self.nodes is None:
            return f"{problem}does it depend on something that changed in between, or count its calls?"
        return (
            f"{problem}torch.compile was at work in its forward, and may compile a part otherwise, or not at all, when "
            f"it comes again. Call the network once before its first step, with gradients, and drop the result"
        )

    def _nodes_behind(self, result: Any, given: Any, since: int) -> list[str]:
        """The names of the nodes between what it returned and what it was given, in a fixed order. Those from
        before are left out: a state comes back without its graph."""
        given = (given, self.half_step.args, dict(self.half_step.kwargs))
        seen = {tensor.grad_fn for _, tensor in tensors_in(given)}
        queue = [tensor.grad_fn for _, tensor in tensors_in(result)]
        names = []
        for node in queue:
            if node is not None and node not in seen and node._sequence_nr() >= since:
                seen.add(node)
                names.append(node.name())
                queue += [before for before, _ in node.next_functions]
        return [name for name in names if not name.endswith("AccumulateGrad")]  # of leaves, as what is given may be


def frames_compiled() -> int:
    """How many pieces of Python torch.compile has looked at so far."""
    utils = sys.modules.get("torch._dynamo.utils")
    frames = getattr(utils, "counters", {}).get("frames")
    return 0 if frames is None else frames["total"]


class Rearrangement(NamedTuple):
    """Streams whose elements are put in other places, all of them: ``streams = there(*streams)``, undone by ``back``.

    Neither may change a value, keep more than a fixed index for its gradient, or write to what it is given.
    """

    there: Callable[..., Sequence[torch.Tensor]]
    back: Callable[..., Sequence[torch.Tensor]]


class RearrangedStep:
    """A rearrangement between half-steps: nothing of it is saved, and nothing has to be run again."""

    __slots__ = ("rearrangement", "strides")
    saved: Sequence[torch.Size] = ()
    before = entry = offloaded = None

    def __init__(self, rearrangement: Rearrangement, streams: Sequence[torch.Tensor]) -> None:
        self.rearrangement = rearrangement
        self.strides = [stream.stride() for stream in streams]  # before it

    def undo(self, streams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The streams before it, in their strides of then."""
        with torch.no_grad():
            before = [stream.detach() for stream in self.rearrangement.back(*streams)]
            return [
                s if s.stride() == strides else s.new_empty_strided(s.shape, strides).copy_(s)
                for s, strides in zip(before, self.strides, strict=True)
            ]
