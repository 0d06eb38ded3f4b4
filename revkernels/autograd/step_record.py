# SPDX-License-Identifier: Apache-2.0
"""The record of one half-step's forward, and the checks that its recompute matches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from revkernels.autograd.fused.coupled_norm import Entry
from revkernels.autograd.fused.norm_context import Noted, Tape
from revkernels.autograd.half_step import HalfStep
from revkernels.autograd.output_check import OutputSample, key_if_new, sample_of
from revkernels.autograd.planning.kept_ops import KeptOp
from revkernels.autograd.planning.offload import OffloadedTensor, OffloadGroup
from revkernels.autograd.planning.rematerialize import Outputs
from revkernels.autograd.recomputing import is_within_a_branch
from revkernels.autograd.state.rewinding import NONE
from revkernels.autograd.state.rng_and_autocast import Drawn, tensors_in
from revkernels.autograd.state.snapshot import Snapshot

Frame = list[tuple[torch.Tensor, int]]  # the tensors that a recompute saved, with their versions


class RecordedStep:
    """The call, the branch's state and random numbers, and the dtypes and shapes of its saved tensors.

    Attributes:
        entry: the norm applied on the way into the branch, if any.
        statistics: those of the fused batch norms inside the branch, in call order.
        ways: how norms and Sequentials inside it ran, in call order.
        kept: operator outputs that the recompute reuses, by operator number; released once used.
        before: the target stream before the half-step, if the half-step is not recomputed; released once used.
        offloaded: its tensors in host memory; None if there are none.
        outputs: during the forward, outputs that can be rematerialized; None if not needed.
        nodes: the names of its graph's nodes if torch.compile was, or torch.jit may have been, active in the forward.
        sample: of its outputs, for `output_check`; else None.
        saved, dtypes: shapes and dtypes of its saved tensors. Two lists, because a list of pairs would add thousands of
            objects for the garbage collector to visit.
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
        """End of the forward: replace empty lists by a shared constant, as `Snapshot.complete` does."""
        self.statistics, self.ways = self.statistics or NONE, self.ways or NONE

    def tape(self, replaying: bool) -> Tape:
        """The tape that records the branch's batch statistics, or replays them."""
        return Tape(self.statistics, self.ways, replaying, self.outputs, self.snapshot.reads_running)

    def counted(self) -> list[nn.Module]:
        """The batch norms whose statistics were recorded, once per call."""
        layers = [layer for layer, *_ in self.statistics]
        if self.entry is not None and self.entry.counts:
            layers.append(self.entry.fusable.norm)
        return layers

    def saved_alike(self, frame: Frame) -> bool:
        """Whether the recompute saved as many tensors as the forward, of the same dtypes and shapes."""
        return [t.shape for t, _ in frame] == self.saved and [t.dtype for t, _ in frame] == self.dtypes

    def note_nodes(self, result: Any, given: Any, since: int) -> None:
        """Record the graph's nodes after torch.compile was active, or torch.jit may have been. The recompute may be
        compiled differently, or not, and save tensors of the same shapes in another order, which only the nodes reveal.
        ``since``: autograd's sequence number when the branch began."""
        self.nodes = self._nodes_behind(result, given, since)

    def may_run_scripts(self) -> bool:
        """Whether the branch may run TorchScript, whose first call makes another graph than later ones: it holds a
        scripted module, or has code of its own, is new, and something is scripted."""
        branch, snapshot = self.half_step.branch, self.snapshot
        if not snapshot.has_code():
            return False
        return snapshot.scripted or (key_if_new(branch) is not None and bool(_scripts().get_functions()))

    def note_result(self, result: Any, stream: torch.Tensor | None = None) -> None:
        """Sample the outputs of a branch with code of its own, and the stream that f is added to. Chains inside another
        branch are skipped: that branch is compared as a whole, and how far their streams drifted is unknown."""
        if self.snapshot.has_code() and not is_within_a_branch():
            self.sample = sample_of(self.half_step.branch, result, stream)

    def difference(self, frame: Frame, result: Any, given: Any, since: int, compiled: int) -> str | None:
        """Describe how the recompute, which returned ``result`` for ``given``, differs from the forward; None if it
        does not. ``compiled``: `frames_compiled` before the forward."""
        problem = None
        nodes = None if self.nodes is None else self._nodes_behind(result, given, since)
        other = nodes != self.nodes
        by_scripts = other and any("torch::jit" in name for name in (*self.nodes, *nodes))  # type: ignore[misc]
        if self.saved_alike(frame) and not (other and (by_scripts or frames_compiled() != compiled)):
            if self.sample is not None:
                problem = self.sample.difference(result, given)
            if problem is None:
                return None
            return (
                f"{problem}. The branch did not do the same twice: does it count its calls, draw from a generator that "
                f"no attribute holds, or keep what it reads in an object of its own? Keep that in a buffer or a tensor "
                f"attribute, and generators in attributes; or set activations='store'. (If this is accumulated "
                f"rounding, revkernels.diagnostics.drift shows it and coupling='exact' prevents it)"
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
        if by_scripts:
            return (
                f"{problem}torch.jit runs the first call of what it has scripted otherwise than later ones. Call the "
                f"network once before its first step, with gradients, and drop the result"
            )
        if frames_compiled() == compiled:
            return f"{problem}does it depend on something that changed in between, or count its calls?"
        return (
            f"{problem}torch.compile was at work since the forward began, and may compile a part otherwise, or not at "
            f"all, when it comes again. Call the network before its first step, with gradients and once with inputs of "
            f"every shape, and drop the results"
        )

    def _nodes_behind(self, result: Any, given: Any, since: int) -> list[str]:
        """Names of the nodes between outputs and inputs, in a fixed order, without those made before the branch began:
        a state is restored without its graph."""
        given = (given, self.half_step.args, dict(self.half_step.kwargs))
        seen = {tensor.grad_fn for _, tensor in tensors_in(given)}
        queue = [tensor.grad_fn for _, tensor in tensors_in(result)]
        names = []
        for node in queue:
            if node is not None and node not in seen and node._sequence_nr() >= since:
                seen.add(node)
                names.append(node.name())
                queue += [before for before, _ in node.next_functions]
        # Not those of leaves, as what is given may be, nor casts: autocast may still have the forward's in its cache.
        return [name for name in names if not name.endswith(("AccumulateGrad", "ToCopyBackward0"))]


def _scripts() -> Any:
    return torch.jit._state._python_cu


def frames_compiled() -> int:
    """The number of Python frames that torch.compile has processed so far."""
    utils = sys.modules.get("torch._dynamo.utils")
    frames = getattr(utils, "counters", {}).get("frames")
    return 0 if frames is None else frames["total"]


class Rearrangement(NamedTuple):
    """A permutation of the streams' elements: ``streams = there(*streams)``, inverted by ``back``.

    Neither may change values, save more than a fixed index for its gradient, or write to its inputs.
    """

    there: Callable[..., Sequence[torch.Tensor]]
    back: Callable[..., Sequence[torch.Tensor]]


class RearrangedStep:
    """A rearrangement between half-steps: it saves nothing and needs no recompute."""

    __slots__ = ("rearrangement", "strides")
    saved: Sequence[torch.Size] = ()
    before = entry = offloaded = None

    def __init__(self, rearrangement: Rearrangement, streams: Sequence[torch.Tensor]) -> None:
        self.rearrangement = rearrangement
        self.strides = [stream.stride() for stream in streams]  # before it

    def undo(self, streams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The streams before it, in their original strides."""
        with torch.no_grad():
            before = [stream.detach() for stream in self.rearrangement.back(*streams)]
            return [
                s if s.stride() == strides else s.new_empty_strided(s.shape, strides).copy_(s)
                for s, strides in zip(before, self.strides, strict=True)
            ]
