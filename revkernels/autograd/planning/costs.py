# SPDX-License-Identifier: Apache-2.0
"""Measures the costs of a chain's call, half-step by half-step, in a backward that recomputes everything."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from revkernels.autograd.ownership import PLAIN, blocks_of
from revkernels.autograd.planning import op_workspace
from revkernels.autograd.planning.kept_ops import Looking, Measuring, OpCost, is_distributed, overhead
from revkernels.autograd.planning.knapsack import Option
from revkernels.autograd.planning.live_bytes import bytes_of
from revkernels.autograd.planning.memory_meter import Level
from revkernels.autograd.planning.rematerialize import MadeAgain, SavedView
from revkernels.autograd.step_record import Frame, RecordedStep

_LEAST_SHARE = 0.02  # of a recompute's time: faster operators are left out of the plan


@dataclass(frozen=True)
class StepCost:
    """The cost of one half-step.

    Attributes:
        branch: its name.
        ops: of the branch, in order.
        rebuild: seconds of the recompute, couplings included.
        backward: seconds of the branch's backward after it.
        own: bytes of its saved tensors, except streams and parameters.
        source: bytes of the stream it reads, if that is saved.
        target: bytes of the stream it adds to.
        parameter: bytes of the parameters of its largest layer, whose gradients exist before they are accumulated.
        live: most bytes allocated at the readings in its backward, above the level at the start of the call; None if
            not available.
        forward: as ``live``, of its forward.
        covers: the stream it reads is saved, and is the one that the next half-step adds to.
        made_again: bytes of ``own`` that are outputs of norms and activations, which can be recomputed.
        making: seconds that recomputing these takes.
        inside: most bytes allocated inside one of its operators, or a node of its backward, counted like ``live``; None
            if not available.
        scratch: the part of ``inside`` on top of the level before.
        talks: its recompute communicates with other processes.
    """

    branch: str
    ops: tuple[OpCost, ...]
    rebuild: float
    backward: float
    own: int
    source: int
    target: int
    parameter: int
    live: int | None = None
    forward: int | None = None
    covers: bool = False
    made_again: int = 0
    making: float = 0.0
    inside: int | None = None
    scratch: int = 0
    talks: bool = False

    @property
    def kind(self) -> Any:
        """Equal for half-steps that run the same operators on tensors of the same sizes."""
        ops = tuple((op.name, op.bytes, op.print) for op in self.ops)
        return ops, self.own, self.source, self.target, self.parameter, self.made_again

    def working(self, base: int, earlier: int) -> int:
        """Bytes at the peak of its backward. ``earlier``: allocated when the call began; ``base``: these and all that
        the call's backward has throughout.

        Readings are taken before each node of the backward, and after each operator of the forward. Between these, an
        operator may create one tensor more than it returns, to reorder its data, and its backward `OpCost.passing`.
        Known without a reading are the reconstructed stream, and the branch's output beside the result of adding it.
        The larger estimate counts: a reading is too low if something else was freed meanwhile. What was seen inside
        operators counts too, where available.
        """
        largest = max([self.target, *(op.bytes for op in self.ops)])
        passing = max([self.target, *(op.passing for op in self.ops)])
        rest = base + self.own + 2 * self.target + self.parameter
        if self.live is None:
            return rest + max(passing, self.scratch)
        told = max(rest + passing, earlier + (self.inside or 0))
        seen = earlier + max(self.live + passing, (self.forward or 0) + largest) + self.parameter
        return max(seen, told)

    def choices(self, way: tuple[float, float] | None = None) -> list[Choice]:
        """What it may keep: nothing, outputs of operators (those that save most time per byte first), everything, or
        everything except what norms and activations can recompute, in host memory or on the device.

        ``way``: seconds per byte to host memory and back; None if host memory is not used.
        """
        found = [Choice.nothing()]
        worth = [op for op in self.ops if op.keepable and op.bytes and op.seconds > _LEAST_SHARE * self.rebuild]
        worth.sort(key=lambda op: op.seconds / op.bytes, reverse=True)
        kept, saved, ops = 0, -2 * len(self.ops) * overhead(), dict[int, int]()
        for op in worth:
            kept, saved = kept + op.bytes, saved + op.seconds
            ops[op.number] = op.print
            if saved > found[-1].option.saved:
                found.append(Choice(Option(kept, saved), dict(ops)))
        sizes = [(self.own + self.source, self.rebuild, False)]  # bytes, seconds saved, whether outputs are recomputed
        if self.made_again:
            sizes.insert(0, (sizes[0][0] - self.made_again, self.rebuild - self.making, True))
        for size, saved, again in sizes if way is not None else ():
            # Copies overlap with the forward, which takes as long as the recompute, and with the backward.
            there, back = ((size + self.target) * a_byte for a_byte in way)  # type: ignore[union-attr]
            saved -= max(0.0, there - self.rebuild) + max(0.0, back - self.backward)
            if saved > 0.0:
                found.append(Choice(Option(0, saved, True), {}, away=True, makes_again=again))
        for size, saved, again in sizes:
            if saved > 0.0 or not again:
                found.append(Choice(Option(size, saved, True, self.target, self.covers), {}, makes_again=again))
        return found


class Choice(NamedTuple):
    """An `Option`, the numbers of the operators whose outputs it keeps, with their fingerprints, and whether it keeps
    everything in host memory, or everything except what norms and activations can recompute."""

    option: Option
    ops: dict[int, int]
    away: bool = False
    makes_again: bool = False

    @staticmethod
    def nothing() -> Choice:
        """Keep nothing."""
        return Choice(Option(0, 0.0), {})


@dataclass
class CallCost:
    """The cost of one call of a chain.

    Attributes:
        streams: bytes of all streams together.
        steps: its half-steps; None for those whose backward did not run.
        measured: seconds that its forward and its half-steps' recomputes and backwards took, unsmoothed.
        turn: bytes allocated at the end of its forward and the start of its backward, counted like `StepCost.live`.
        entry: bytes allocated when it began, without its input, above the level when the step began.
    """

    streams: int
    steps: list[StepCost | None]
    measured: float
    turn: int | None = None
    entry: int = 0

    @property
    def talks(self) -> bool:
        """Whether its recompute communicates with other processes. These may have measured other times: if they kept
        other half-steps, one would wait for a message that another does not send, or mistake one for another."""
        return any(step is not None and step.talks for step in self.steps)

    @property
    def held(self) -> int:
        """Bytes of its input and output."""
        return 2 * self.streams

    @property
    def base(self) -> int:
        """Bytes that its backward has throughout: input, output, reconstructed streams, and the streams' gradients,
        both as they came in and accumulated."""
        return self.held + 3 * self.streams


def smoothed(steps: Sequence[StepCost | None]) -> list[StepCost | None]:
    """The same with median times over half-steps of one kind: the first of them ran cold."""
    kinds: dict[Any, list[StepCost]] = {}
    for step in steps:
        if step is not None:
            kinds.setdefault(step.kind, []).append(step)
    typical = {kind: _typical(alike) for kind, alike in kinds.items()}
    return [None if step is None else _at(typical[step.kind], step) for step in steps]


def _at(typical: StepCost, step: StepCost) -> StepCost:
    """The typical cost of its kind, with the step's own readings."""
    own: dict[str, Any] = {"live": step.live, "forward": step.forward, "inside": step.inside, "scratch": step.scratch}
    return replace(typical, branch=step.branch, covers=step.covers, talks=step.talks, **own)


def _typical(alike: Sequence[StepCost]) -> StepCost:
    def middle(values: Any) -> float:
        return statistics.median(list(values))

    ops = tuple(
        replace(op, seconds=middle(step.ops[place].seconds for step in alike), keepable=_all_keep(alike, place))
        for place, op in enumerate(alike[0].ops)
    )
    rebuild, backward = middle(step.rebuild for step in alike), middle(step.backward for step in alike)
    making = middle(step.making for step in alike)
    return replace(alike[0], ops=ops, rebuild=rebuild, backward=backward, making=making)


def _all_keep(alike: Sequence[StepCost], place: int) -> bool:
    return all(step.ops[place].keepable for step in alike)


@dataclass
class _Reading:
    mode: Measuring
    start: Any
    end: Any = None
    left: Any = None  # including the checks after the recompute
    sizes: dict[str, int] = field(default_factory=dict)
    making: list[tuple[Any, Any]] = field(default_factory=list)
    live: int | None = None
    reads: int | None = None  # index of the stream that it reads, if that is saved
    target: int = -1
    talks: bool = False


class Meter:
    """Records times and sizes while a call's backward recomputes its half-steps; `costs` returns them afterwards."""

    def __init__(
        self, streams: Sequence[torch.Tensor], branches: Sequence[Any], level: Level, entered: int, kept: int
    ) -> None:
        self.watch, self.level = level.clock, level
        self.streams = sum(map(bytes_of, streams))
        now = level.read()
        self._offset = 0 if now is None else now - entered
        self._entry = max(0, self._offset - kept)
        self._readings: dict[int, _Reading] = {}
        self._entered, self._left = self.watch.read(), None
        self._turn: int | None = None
        self._forward: dict[int, int] = {}
        self._inside = op_workspace.Inside(level, self._count)
        level.watch(p for branch in branches if isinstance(branch, nn.Module) for p in branch.parameters())

    def forward_over(self) -> None:
        """The call's forward has ended."""
        self._left = self.watch.read()
        self._turn = self._read()

    def _read(self) -> int | None:
        return self._count(self.level.raw())

    def _count(self, now: int | None) -> int | None:
        counted = self.level.count(now)
        return None if counted is None else max(0, counted - self._offset)

    def forward_of(self, k: int) -> Looking:
        """The mode for the forward of half-step k's branch."""
        seen = self._inside.operators[k] = []

        def look(func: Any, before: int | None, now: int | None, most: int) -> None:
            now = self._count(now)
            if now is not None:
                self._forward[k] = max(now, self._forward.get(k, 0))
            self._inside.operator(k, before, most)
            if func is not None:
                seen.append((func, most))

        return Looking(self.level, look, lambda: op_workspace.begin(self.level.device))

    def forward_ran(self, k: int, f: Any, since: int) -> None:
        """Half-step k's branch has returned ``f``; its graph begins at number ``since``."""
        self._inside.watch(k, f, since)

    def backward_begins(self) -> None:
        """The backward is about to reconstruct the streams."""
        now = self._read()
        if now is not None and self._turn is not None:
            self._turn = max(self._turn, now)

    def asked(self) -> None:
        """A node of the backward unpacks a saved tensor."""
        self._inside.pause()

    def look(self, k: int) -> None:
        """A node of half-step k's backward is about to run."""
        if self._inside.resume():
            self._look(k)

    def _look(self, k: int) -> None:
        reading, now = self._readings[k], self._read()
        if now is not None:
            reading.live = now if reading.live is None else max(reading.live, now)

    def begin(self, k: int, generators: Sequence[torch.Generator] = ()) -> Measuring:
        """Half-step k is about to be recomputed: the mode for its branch, which may draw from these ``generators``."""
        saw, within = self._inside.operators.get(k, ()), functools.partial(self._inside.operator, k)
        mode = Measuring(self.watch.read, self.level, saw, within, generators)
        self._readings[k] = _Reading(mode, self.watch.read())
        self.level.recount()
        self._look(k)
        return mode

    def end(self, k: int, step: RecordedStep, frame: Frame, streams: Sequence[torch.Tensor], target: int) -> None:
        """It has been recomputed, and has saved ``frame``; the stream that it adds to has ``target`` bytes."""
        reading = self._readings[k]
        reading.mode.settle()
        self._look(k)
        reading.end = self.watch.read()
        # The mode sees nothing of a branch that torch.compile has compiled.
        parameters = (p for module in step.snapshot.modules for p in list(module._parameters.values()))
        reading.talks = reading.mode.talks or any(is_distributed(type(p)) for p in parameters)
        owned = (t for t in step.snapshot.tensors() if type(t) in PLAIN)
        theirs = {block.data_ptr() for t in owned for block in blocks_of(t)}
        of_streams = {
            stream.untyped_storage().data_ptr(): bytes_of(stream) for stream in streams if type(stream) in PLAIN
        }
        half_step = step.half_step
        reading.target = half_step.target
        plain = [t for t, _ in frame if type(t) in PLAIN]
        saved = {block.data_ptr(): block.nbytes() for t in plain for block in blocks_of(t)}
        reading.sizes = {
            "own": sum(size for at, size in saved.items() if at not in theirs and at not in of_streams),
            "source": sum(size for at, size in of_streams.items() if at in saved),
            "target": target,
            "parameter": max((_own(module) for module in step.snapshot.modules), default=0),
            "made_again": self._make_again(reading, step, frame),
        }
        if len(streams) == 1 and reading.sizes["source"]:
            reading.reads = half_step.sources[0]
        reading.left = self.watch.read()

    def _make_again(self, reading: _Reading, step: RecordedStep, frame: Frame) -> int:
        """Recompute the outputs that can be, and time it. Returns their bytes; 0 if one differs from what was saved."""
        outputs: dict[MadeAgain, list[tuple[SavedView, int]]] = {}
        for view, index in step.outputs.views if step.outputs else ():
            outputs.setdefault(view.output, []).append((view, index))
        for output, views in outputs.items():
            start = self.watch.read()
            made = output.make()
            reading.making.append((start, self.watch.read()))
            # The branch may have written to it without a new version, through .data or NumPy.
            if not all(torch.equal(view.on(made), frame[index][0]) for view, index in views):
                return 0
        return sum(output.bytes for output in outputs)

    def costs(self, names: Sequence[str]) -> CallCost:
        """The measured costs; waits for a device. ``names``: of the half-steps."""
        between, cost, beside = self.watch.between, overhead(), 0.0
        self._inside.over()
        found: list[StepCost | None] = [None] * len(names)
        for k, reading in self._readings.items():
            if reading.left is None:
                continue
            behind, ahead = self._readings.get(k - 1), self._readings.get(k + 1)
            making = sum(between(*pair) for pair in reading.making)
            looking = between(reading.end, reading.left)  # the checks, which are no part of a step
            backward = 0.0 if behind is None else between(reading.left, behind.start)
            beside += looking
            ops = tuple(reading.mode.costs(between))
            rebuild = max(0.0, between(reading.start, reading.end) - cost * len(ops))
            found[k] = StepCost(
                names[k],
                ops,
                rebuild,
                backward,
                **reading.sizes,
                live=reading.live,
                forward=self._forward.get(k),
                covers=reading.reads is not None and ahead is not None and ahead.target == reading.reads,
                making=making,
                inside=self._inside.found.get(k),
                scratch=self._inside.most.get(k, 0),
                talks=reading.talks,
            )
        forward = 0.0 if self._left is None else between(self._entered, self._left)
        took = forward + beside + sum(step.rebuild + step.backward for step in found if step is not None)
        return CallCost(self.streams, smoothed(found), took, self._turn, self._entry)


def _own(module: nn.Module) -> int:
    """Bytes of the layer's own parameters."""
    own = (p for p in module._parameters.values() if p is not None)
    return sum(bytes_of(p) for p in own if not isinstance(p, UninitializedTensorMixin))
