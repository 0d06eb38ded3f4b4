# SPDX-License-Identifier: Apache-2.0
"""The planner behind a memory budget: which tensors a step keeps, and what that is expected to cost.

One planner serves all chains that share a budget. A step is a sequence of calls of chains, and the backwards that end
them. The first step of a kind (the same branches on streams of the same shapes, in the same order) recomputes
everything and is measured; then the plan is made, and is used for every later step of that kind. A call whose graph is
discarded does not count; one whose backward is still to come does, in whatever step that is.
"""

from __future__ import annotations

import statistics
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from revkernels.autograd.planning.costs import CallCost, Choice, Meter
from revkernels.autograd.planning.kept_ops import Looking, Noting, Stopwatch
from revkernels.autograd.planning.knapsack import Stop, allot
from revkernels.autograd.planning.live_bytes import bytes_of
from revkernels.autograd.planning.memory_meter import Level
from revkernels.autograd.planning.offload import way_of
from revkernels.budget import MemoryBudget, words

_KINDS = 32  # of steps to remember
_TIMES = 15  # of steps whose median is the measured time
_SPARE = 2**16  # bytes by which two readings of small chains differ

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
        known: whether all calls were measured.
        choices: for every call, what its half-steps keep.
        kept: the bytes of ``choices``, by call.
        limit, reconstructing, storing: bytes at the peak: allowed, keeping nothing, keeping everything.
        peak, saved: the plan's expected bytes at the peak, and the seconds that it saves.
        first: seconds of a step that recomputes everything, from the measured one.
    """

    def __init__(
        self, budget: MemoryBudget, calls: Sequence[CallCost], first: float, way: tuple[float, float] | None = None
    ) -> None:
        self.calls, self.first, self.known = list(calls), first, True
        menus = [
            [[NOTHING] if step is None or call.talks else step.choices(way) for step in call.steps] for call in calls
        ]
        workings, self.turn = _workings(calls)
        if way is not None:  # at most two half-steps' tensors are being copied
            owns = [step.own + step.source + step.target for call in calls for step in call.steps if step is not None]
            workings = [[at + 2 * max(owns, default=0) for at in of_call] for of_call in workings]
        nothing = [[NOTHING] * len(of_call) for of_call in menus]
        everything = [[menu[-1] for menu in of_call] for of_call in menus]
        self._workings = workings
        self.reconstructing = self._peak(nothing)
        self.storing = max(self.reconstructing, self._peak(everything))
        self.limit = budget.limit(self.reconstructing, self.storing)
        stops = [
            Stop([choice.option for choice in menu], working)
            for of_call, at in zip(menus, workings, strict=True)
            for menu, working in zip(of_call, at, strict=True)
        ]
        numbers = allot(stops, self.turn, self.limit)
        if numbers is None:
            least = self.reconstructing + max(self.reconstructing // 64, _SPARE)
            share = " (for a share write 1.0: an int is bytes)" if budget.bytes == 1 else ""
            raise ValueError(
                f"{budget!r} is too small: with everything reconstructed, the chains of this step peak at "
                f"{words(self.reconstructing)}, and some of what operators work with is not seen. The least budget for "
                f"inputs of this size is {least} bytes ({words(least)}){share}"
            )
        left = iter(numbers)
        self.choices = [[menu[next(left)] for menu in of_call] for of_call in menus]
        if budget.reconstructs:  # keep nothing, even if it costs no memory
            self.choices = nothing
        elif self._peak(everything) <= self.limit:  # `allot` also counts the streams of a reconstruction
            self.choices = everything
        self.kept = [sum(_kept_by(of_call)) for of_call in self.choices]
        self.peak = self._peak(self.choices)
        self.saved = sum(choice.option.saved for of_call in self.choices for choice in of_call)
        self.times: deque[tuple[Any, Any]] = deque(maxlen=_TIMES)

    def _peak(self, choices: Sequence[Sequence[Choice]]) -> int:
        used = most = 0
        for call, of_call, at in zip(self.calls, choices, self._workings, strict=True):
            # A call that keeps everything reconstructs no streams; from the output they are reconstructed one by one.
            whole, count = all(choice.option.whole for choice in of_call), len(at)
            for k, (kept, working) in enumerate(zip(_kept_by(of_call), at, strict=True)):
                step = call.steps[k]
                less = 0 if step is None or not whole else min(call.streams, (count - 1 - k) * step.target)
                most = max(most, used + working - less)
                used += kept
        return max(most, used + self.turn)

    @property
    def predicted(self) -> float:
        """Seconds that a step is expected to take."""
        return self.first - self.saved


def _kept_by(choices: Sequence[Choice]) -> Iterator[int]:
    """The bytes that each half-step of a call keeps."""
    rebuilt = covered = False
    for option, *_ in choices:
        # The streams are needed where an earlier half-step is recomputed.
        yield option.kept + (option.before if option.whole and rebuilt and not covered else 0)
        rebuilt, covered = rebuilt or not option.whole, option.covers


def _workings(calls: Sequence[CallCost]) -> tuple[list[list[int]], int]:
    """The bytes that every half-step's backward works with, including all that earlier calls hold; and those at the
    turn from forward to backward."""
    earlier, turn, found = 0, 0, []
    for call in calls:
        earlier = max(earlier, call.entry)
        found.append([0 if step is None else step.working(earlier + call.base, earlier) for step in call.steps])
        turn = max(turn, earlier + max(call.held, call.turn or 0))
        earlier += call.held
    return found, turn


class Planner:
    """The plans of one budget, by kind of step."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self._lock = threading.RLock()
        self._costs: OrderedDict[Hashable, tuple[CallCost, tuple[Hashable, ...]]] = OrderedDict()
        self._plans: OrderedDict[tuple[Hashable, ...], Made | ValueError] = OrderedDict()
        self._waiting: tuple[Hashable, ...] = ()  # a step in which a call's backward did not run
        self._calls: list[weakref.ref[Keeping]] = []  # of the current step, those whose graph still exists
        self._over = True  # a backward has ended it
        self._start: Any = None
        self._watch: Stopwatch | None = None
        self._kept = True  # no call of the current step is being measured
        self._captured = False
        self.latest: Made | None = None
        self.looks: Callable[[int], None] | None = None  # called as a step begins, with the bytes of its input

    def enter(
        self,
        kind: Hashable,
        names: Sequence[str],
        streams: Sequence[torch.Tensor],
        branches: Sequence[Any],
        entered: int,
    ) -> Keeping:
        """A call of a chain begins. ``kind``: the same for calls that cost the same. ``entered``: bytes of its input,
        in the streams and besides.

        Raises:
            ValueError: the step has been measured, and even recomputing everything exceeds the budget.
        """
        with self._lock:
            alive = [call for call in self._calls_now() if not call.over]
            self._calls = [weakref.ref(call) for call in alive]
            if self._over or not alive:
                self._over, self._kept = False, True
                # Time cannot be measured while a CUDA graph is captured: follow a plan, or recompute everything.
                self._captured = streams[0].is_cuda and torch.cuda.is_current_stream_capturing()
                self._level = Level(streams[0].device, entered, measured=kind not in self._costs)
                if self.looks is not None:
                    self.looks(entered)
                self._watch = self._level.clock
                self._start = self._watch.read()
            order = (*(call.kind for call in alive), kind)
            made = self._plan_for(order)
            if made is not None:
                # Inside a graph nothing waits for host memory, nor is it the same memory at each replay.
                choices = [NOTHING if choice.away and self._captured else choice for choice in made.choices[len(alive)]]
                keeping = Keeping(self, order, names, choices, None, made.kept[len(alive)])
                keeping.unknown = frozenset(k for k, step in enumerate(made.calls[len(alive)].steps) if step is None)
            else:
                self._kept = False
                held = sum(call.bytes for call in alive)
                known = kind in self._costs or self._captured
                meter = None if known else Meter(streams, branches, self._level, entered, held)
                keeping = Keeping(self, order, names, [NOTHING] * len(names), meter)
            keeping.streams = sum(map(bytes_of, streams))
            self._calls.append(weakref.ref(keeping))
            return keeping

    def _calls_now(self) -> list[Keeping]:
        return [call for call in (ref() for ref in self._calls) if call is not None]

    def _plan_for(self, order: tuple[Hashable, ...]) -> Made | None:
        """Of the plans for steps that begin with these calls, the one that keeps least in the last of them: whichever
        step it turns out to be, as much room is left as its own plan leaves.
        """
        place = len(order) - 1
        exact = self._plans.get(order)
        if isinstance(exact, ValueError):
            raise ValueError(*exact.args)  # another one each time: its traceback holds the step's activations
        found = [made for known, made in self._plans.items() if isinstance(made, Made) and known[: place + 1] == order]
        return min(found, key=lambda made: made.kept[place], default=None)

    def ended(self, keeping: Keeping) -> None:
        """The backward of a call is over."""
        with self._lock:
            self._over = keeping.over = True
            if self._captured:
                return
            if keeping.meter is not None:
                self._costs[keeping.kind] = keeping.meter.costs(keeping.names), keeping.order
                self._costs.move_to_end(keeping.kind)
                keeping.meter = None
            order = tuple(call.kind for call in self._calls_now())
            end = self._watch.read()  # type: ignore[union-attr]
            made = self._plans.get(order)
            if made is not None:
                self._plans.move_to_end(order)  # plans that are no longer used are dropped first
            if keeping.missed:  # the measured step's backward was partial
                self._forget(keeping.kind)
                return
            if isinstance(made, Made) and not made.known and all(kind in self._costs for kind in order):
                made = None  # the missing backward has run after all
            if isinstance(made, Made):
                if self._kept:
                    self.latest = made
                    if not made.times or made.times[-1][0] is not self._start:
                        made.times.append((self._start, end))
                    else:
                        made.times[-1] = self._start, end
            elif made is None:
                self._plan(order, end)
            while len(self._plans) > _KINDS:
                self._plans.popitem(last=False)
            while len(self._costs) > 4 * _KINDS:
                self._costs.popitem(last=False)

    def _plan(self, order: tuple[Hashable, ...], end: Any) -> None:
        """Plan a step of these calls, once all have been measured, or a backward is missing for the second time."""
        known = all(kind in self._costs for kind in order)
        if not known and self._waiting != order:
            self._waiting = order  # it may be part of this very backward
            return
        now = self._calls_now()
        calls = [
            self._cost_in(order[: place + 1])
            if kind in self._costs
            else CallCost(now[place].streams, [None] * len(now[place].names), 0.0)
            for place, kind in enumerate(order)
        ]
        try:
            made = Made(self.budget, calls, self._first(calls, end), self._way())
            made.known = known
            self._plans[order] = self.latest = made
        except ValueError as error:
            self._plans[order] = error.with_traceback(None)  # which holds the calls that were measured

    def _forget(self, kind: Hashable) -> None:
        """Measure such calls again."""
        self._costs.pop(kind, None)
        for order in [order for order in self._plans if kind in order]:
            del self._plans[order]

    def _way(self) -> tuple[float, float] | None:
        """Seconds per byte to host memory and back, if tensors may be sent there."""
        device = self._level.device
        return way_of(device) if self.budget.offload else None

    def _cost_in(self, order: tuple[Hashable, ...]) -> CallCost:
        """The cost of the last of these calls."""
        cost, measured = self._costs[order[-1]]
        return cost if measured == order else replace(cost, entry=0)  # after other calls, its entry level was another

    def _first(self, calls: Sequence[CallCost], end: Any) -> float:
        """Seconds of a later step that recomputes everything: those of the measured step, without its cold start."""
        took = self._watch.between(self._start, end)  # type: ignore[union-attr]
        steps = [step for call in calls for step in call.steps if step is not None]
        measured = sum(call.measured for call in calls)
        return max(0.0, took - measured) + sum(2 * step.rebuild + step.backward for step in steps)

    def forget_times(self) -> None:
        """Let `measured` count later steps only."""
        with self._lock:
            for made in self._plans.values():
                if isinstance(made, Made):
                    made.times.clear()

    def measured(self, made: Made) -> float | None:
        """Median seconds of a step under the plan; None if there was none yet."""
        times = [self._watch.between(*pair) for pair in made.times]  # type: ignore[union-attr]
        return statistics.median(times) if times else None


def _nothing() -> None:
    """Stands in for the callback of a call whose graph was freed."""


class Keeping:
    """What one call of a chain keeps, and its measurements."""

    def __init__(
        self,
        planner: Planner,
        order: tuple[Hashable, ...],
        names: Sequence[str],
        choices: Sequence[Choice],
        meter: Meter | None,
        kept: int = 0,
    ) -> None:
        self.planner, self.order, self.names, self.meter = planner, order, names, meter
        self.kind, self.bytes, self.over = order[-1], kept, False
        self.choices = choices
        self.streams = 0  # bytes of them
        self.unknown: frozenset[int] = frozenset()  # half-steps that were not measured, and are left out of the plan
        self.missed = False  # one of these was recomputed
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
        """Whether half-step k keeps its tensors in host memory."""
        return self.choices[k].away

    def makes_again(self, k: int) -> bool:
        """Whether half-step k keeps everything except what norms and activations can recompute."""
        return self.choices[k].makes_again

    def steps_over(self, k: int) -> bool:
        """Whether half-step k is not recomputed, but an earlier half-step is and needs the stream from before it."""
        return k > self._rebuilt and self.choices[k].option.whole

    def rebuilds(self, k: int) -> None:
        """Half-step k is about to be recomputed."""
        self.missed = self.missed or k in self.unknown

    def watch(self, task: int, end: Callable[[], Callable[[], None] | None]) -> None:
        """The backward ``task`` works on this call: when it ends, call what ``end`` refers to, if that still exists,
        and tell the planner."""
        if task != self._task:
            self._task = task

            def over() -> None:
                (end() or _nothing)()
                self.planner.ended(self)

            torch.autograd.Variable._execution_engine.queue_callback(over)


__all__ = ["Keeping", "Made", "Planner", "planner_of"]
