# SPDX-License-Identifier: Apache-2.0
"""The planner behind a memory budget: which tensors a step keeps, and what that is expected to cost.

One planner serves all chains that were given one budget. A step is a sequence of calls of chains, and the backwards
that end them. The first step of a kind (the same branches on streams of the same shapes, in the same order) rebuilds
everything and is measured; then the plan is made, and holds for every later step of that kind.
"""

from __future__ import annotations

import statistics
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from revkernels.autograd.allotment import Stop, allot
from revkernels.autograd.costs import CallCost, Choice, Level, Meter, StepCost
from revkernels.autograd.kept_ops import Looking, Noting, Replaying, Stopwatch
from revkernels.autograd.offload import way_of
from revkernels.budget import MemoryBudget, words

_KINDS = 32  # of steps that are remembered
_TIMES = 15  # of steps that the measured time is the median of

NOTHING = Choice.nothing()


def planner_of(budget: MemoryBudget) -> Planner:
    """The budget's planner."""
    if budget.planner is None:
        budget.planner = Planner(budget)
    planner: Planner = budget.planner
    return planner


class Made:
    """A plan for one kind of step.

    Attributes:
        calls: the costs of the calls of chains, in order.
        choices: for every call, what its half-steps keep.
        limit, reconstructing, storing: bytes at the peak: allowed, without keeping anything, keeping everything.
        peak, saved: what the plan is expected to have there, and the seconds that it saves.
        first: seconds of a step that rebuilds everything, from the measured one.
    """

    def __init__(
        self, budget: MemoryBudget, calls: Sequence[CallCost], first: float, way: tuple[float, float] | None = None
    ) -> None:
        self.calls, self.first = list(calls), first
        menus = [[[NOTHING] if step is None else step.choices(way) for step in call.steps] for call in calls]
        workings, self.turn = _workings(calls)
        if way is not None:  # on their way are the tensors of two half-steps at most
            owns = [step.own + step.source + step.target for call in calls for step in call.steps if step is not None]
            workings = [[at + 2 * max(owns, default=0) for at in of_call] for of_call in workings]
        everything = [[menu[-1] for menu in of_call] for of_call in menus]
        self._workings = workings
        self.reconstructing = self._peak([[NOTHING] * len(call.steps) for call in calls])
        self.storing = max(self.reconstructing, self._peak(everything))
        self.limit = budget.limit(self.reconstructing, self.storing)
        stops = [
            Stop([choice.option for choice in menu], working)
            for of_call, at in zip(menus, workings, strict=True)
            for menu, working in zip(of_call, at, strict=True)
        ]
        numbers = allot(stops, self.turn, self.limit)
        if numbers is None:
            raise ValueError(
                f"{budget!r} cannot be kept to: with everything rebuilt the chains of this step take "
                f"{words(self.reconstructing)} ({self.reconstructing} bytes) at their peak, which is the least budget "
                f"there is for inputs of this size"
            )
        left = iter(numbers)
        self.choices = [[menu[next(left)] for menu in of_call] for of_call in menus]
        self.peak = self._peak(self.choices)
        self.saved = sum(choice.option.saved for of_call in self.choices for choice in of_call)
        self.times: deque[tuple[Any, Any]] = deque(maxlen=_TIMES)

    def _peak(self, choices: Sequence[Sequence[Choice]]) -> int:
        used = most = 0
        whole = False
        for call, of_call, at in zip(self.calls, choices, self._workings, strict=True):
            # What keeps everything never rebuilds its streams.
            less = call.streams if all(option.whole for option, *_ in of_call) else 0
            for (option, *_), working in zip(of_call, at, strict=True):
                most = max(most, used + working - less)
                used += option.kept + (option.before if option.whole and not whole else 0)
                whole = option.whole
        return max(most, used + self.turn)

    @property
    def predicted(self) -> float:
        """Seconds that a step is expected to take."""
        return self.first - self.saved


def _workings(calls: Sequence[CallCost]) -> tuple[list[list[int]], int]:
    """The bytes that every half-step's backward works with, all that earlier calls hold included; and those at the
    turn from forward to backward."""
    earlier, turn, found = 0, 0, []
    for call in calls:
        base = earlier + call.base
        found.append([0 if step is None else step.working(base) for step in call.steps])
        earlier += call.held
        turn = max(turn, earlier if call.turn is None else call.turn)
    return found, turn


class Planner:
    """The plans of one budget, by kind of step."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self._lock = threading.RLock()
        self._costs: OrderedDict[Hashable, CallCost] = OrderedDict()
        self._plans: OrderedDict[tuple[Hashable, ...], Made | ValueError] = OrderedDict()
        self._order: list[Hashable] = []  # the calls of the step under way
        self._over = True  # a backward has ended it
        self._start: Any = None
        self._watch: Stopwatch | None = None
        self._kept = True  # nothing in the step under way was measured
        self.latest: Made | None = None
        self.looks = False  # whether to note how much was allocated as a step began, in `entry`
        self.entry: int | None = None

    def enter(
        self, kind: Hashable, names: Sequence[str], streams: Sequence[torch.Tensor], branches: Sequence[Any]
    ) -> Keeping:
        """A call of a chain begins. ``kind``: the same for calls that cost the same.

        Raises:
            ValueError: the step has been measured, and not even rebuilding everything keeps to the budget.
        """
        with self._lock:
            if self._over:
                self._order, self._over, self._kept = [], False, True
                self._level = Level(streams[0].device, streams)
                if self.looks:
                    self.entry = self._level.start
                self._watch = Stopwatch(streams[0].device)
                self._start = self._watch.read()
            self._order.append(kind)
            place = len(self._order) - 1
            made = self._plan_for(self._order)
            if isinstance(made, ValueError):
                self._over = True
                raise made.with_traceback(None)
            if made is not None:
                return Keeping(self, kind, names, made.choices[place], None)
            self._kept = False
            meter = None if kind in self._costs else Meter(streams, branches, self._level)
            return Keeping(self, kind, names, [NOTHING] * len(names), meter)

    def _plan_for(self, order: Sequence[Hashable]) -> Made | ValueError | None:
        """The plan made last for a step that begins with these calls."""
        for known in reversed(self._plans):
            if known[: len(order)] == tuple(order):
                return self._plans[known]
        return None

    def ended(self, keeping: Keeping) -> None:
        """The backward of a call is over."""
        with self._lock:
            self._over = True
            if keeping.meter is not None:
                self._costs[keeping.kind] = keeping.meter.costs(keeping.names)
                self._costs.move_to_end(keeping.kind)
                keeping.meter = None
            order, end = tuple(self._order), self._watch.read()  # type: ignore[union-attr]
            made = self._plans.get(order)
            if isinstance(made, Made):
                if self._kept:
                    self.latest = made
                    if not made.times or made.times[-1][0] is not self._start:
                        made.times.append((self._start, end))
                    else:
                        made.times[-1] = self._start, end
            elif made is None and all(kind in self._costs for kind in order):
                calls = [self._costs[kind] for kind in order]
                try:
                    self._plans[order] = self.latest = Made(self.budget, calls, self._first(calls, end), self._way())
                except ValueError as error:
                    self._plans[order] = error
            while len(self._plans) > _KINDS:
                self._plans.popitem(last=False)
            while len(self._costs) > 4 * _KINDS:
                self._costs.popitem(last=False)

    def _way(self) -> tuple[float, float] | None:
        """Seconds a byte to host memory and back, if tensors may be sent there."""
        device = self._level.device
        return way_of(device) if self.budget.offload else None

    def _first(self, calls: Sequence[CallCost], end: Any) -> float:
        """Seconds of the step that was measured, as a later one would take them: what ran cold is made warm."""
        took = self._watch.between(self._start, end)  # type: ignore[union-attr]
        steps = [step for call in calls for step in call.steps if step is not None]
        measured = sum(call.measured for call in calls)
        return max(0.0, took - measured) + sum(2 * step.rebuild + step.backward for step in steps)

    def forget_times(self) -> None:
        """Let `measured` tell of later steps alone."""
        with self._lock:
            for made in self._plans.values():
                if isinstance(made, Made):
                    made.times.clear()

    def measured(self, made: Made) -> float | None:
        """Seconds of a step under the plan, the median; None if there was none yet."""
        times = [self._watch.between(*pair) for pair in made.times]  # type: ignore[union-attr]
        return statistics.median(times) if times else None


class Keeping:
    """What one call of a chain keeps, and what is read off it."""

    def __init__(
        self, planner: Planner, kind: Hashable, names: Sequence[str], choices: Sequence[Choice], meter: Meter | None
    ) -> None:
        self.planner, self.kind, self.names, self.meter = planner, kind, names, meter
        self.choices = choices
        self._task = -1
        self._rebuilt = next((k for k, choice in enumerate(choices) if not choice.option.whole), len(choices))

    def whole(self, k: int) -> bool:
        """Whether half-step k keeps all that its backward needs."""
        return self.choices[k].option.whole

    def mode(self, k: int) -> Noting | Looking | None:
        """The mode for the forward of half-step k's branch."""
        if self.meter is not None:
            return self.meter.forward_of(k)
        ops = self.choices[k].ops
        return Noting(ops) if ops else None

    def away(self, k: int) -> bool:
        """Whether half-step k keeps it in host memory."""
        return self.choices[k].away

    def steps_over(self, k: int) -> bool:
        """Whether half-step k is not rebuilt, and a stream from before it is needed, for an earlier one that is."""
        return k > self._rebuilt and self.choices[k].option.whole

    def watch(self, task: int, end: Callable[[], None]) -> None:
        """The backward ``task`` is at work on the call: hear of its end, and call ``end`` then."""
        if task != self._task:
            self._task = task

            def over() -> None:
                end()
                self.planner.ended(self)

            torch.autograd.Variable._execution_engine.queue_callback(over)


__all__ = ["Keeping", "Made", "Planner", "Replaying", "StepCost", "planner_of"]
