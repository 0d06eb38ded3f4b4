# SPDX-License-Identifier: Apache-2.0
"""How a benchmark runs: contenders in turn, rotating operands, medians, and ratios within one run.

A machine's speed drifts (other load, clocks), so each contender runs once per round, in a random order per round; a
ratio is the median over the rounds of (contender / baseline *of the same round*), never a quotient of two separately
measured times.

    suite = Suite("coupling")

    @suite.benchmark(cases=["float32", "bfloat16"])
    def couple_(setup, dtype):
        return Trial("torch", {"torch": lambda x, f: x.add_(f), ...}, operands, bytes_moved)
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from revkernels.bench.clocks import Clock

__all__ = ["Goal", "Measurement", "Suite", "Trial", "measure", "rotation"]


@dataclass(frozen=True)
class Goal:
    """A limit on one contender.

    Attributes:
        quantity: "ratio" to ``of``, or "extra_us", microseconds per call above ``of``.
        at_most: the limit.
        of: a contender; None is the trial's baseline.
    """

    quantity: str
    at_most: float
    of: str | None = None


@dataclass(frozen=True)
class Trial:
    """One case of a benchmark: contenders that do the same work on the same operands.

    Attributes:
        baseline: the contender that ratios refer to.
        contenders: name to function; each is called with one set of operands.
        operands: sets used in turn, so that no contender finds its operands in the cache (see `rotation`).
        bytes_moved: what one call must read and write; the same for all, even if a contender moves more.
        goals: contender to its limit.
        calls: calls per timed sample, more than one if a call is too short for the clock.
        beside: contenders to which every ratio is wanted as well; reported as ``more["ratio_to"]``.
    """

    baseline: str
    contenders: Mapping[str, Callable[..., Any]]
    operands: Sequence[tuple[Any, ...]] = ((),)
    bytes_moved: int | None = None
    goals: Mapping[str, Goal] = field(default_factory=dict)
    calls: int = 1
    beside: Sequence[str] = ()


@dataclass
class Measurement:
    """The result of one contender; the fields are the keys of a result line.

    Attributes:
        median_s, q1_s, q3_s: seconds per call, the median and the quartiles over the rounds.
        ratio: to ``baseline``, the median over the rounds.
        gbps: ``bytes_moved / median_s``, in 1e9 bytes per second.
        goal: None, or ``{"quantity", "at_most", "of", "value", "met"}``.
        more: what the benchmark itself adds, such as peak bytes.
    """

    benchmark: str
    case: str
    variant: str
    baseline: str
    rounds: int
    median_s: float
    q1_s: float
    q3_s: float
    ratio: float
    bytes_moved: int | None
    gbps: float | None
    goal: dict[str, Any] | None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """A named function from a case to a `Trial`, and its cases."""

    name: str
    cases: tuple[str, ...]
    make: Callable[[Any, str], Trial]


class Suite:
    """The benchmarks of one subject, in the order of their definition."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.benchmarks: list[Benchmark] = []

    def benchmark(self, cases: Iterable[str]) -> Callable[[Callable[[Any, str], Trial]], Callable[[Any, str], Trial]]:
        """Register ``make(setup, case) -> Trial`` under its name."""

        def register(make: Callable[[Any, str], Trial]) -> Callable[[Any, str], Trial]:
            self.benchmarks.append(Benchmark(make.__name__, tuple(cases), make))
            return make

        return register

    def run(
        self, setup: Any, clock: Clock, rounds: int, begin: Callable[[str], None] = lambda step: None
    ) -> Iterator[Measurement]:
        """Measure every case; ``begin`` is called before each. A case's operands are freed after it."""
        for benchmark in self.benchmarks:
            for case in benchmark.cases:
                begin(f"{benchmark.name} {case}")
                yield from measure(benchmark.name, case, benchmark.make(setup, case), clock, rounds)

    def matching(self, words: Iterable[str]) -> Suite:
        """Return the benchmarks and cases whose names, "benchmark case", contain every one of ``words``.

        Raises:
            ValueError: there is none.
        """
        wanted = list(words)
        found = Suite(self.name)
        for benchmark in self.benchmarks:
            names = {case: f"{benchmark.name} {case}" for case in benchmark.cases}
            cases = tuple(case for case, name in names.items() if all(word in name for word in wanted))
            if cases:
                found.benchmarks.append(Benchmark(benchmark.name, cases, benchmark.make))
        if not found.benchmarks:
            last = self.benchmarks[-1]
            raise ValueError(f"no case has all of {wanted} in its name; one is {last.name + ' ' + last.cases[-1]!r}")
        return found

    def __len__(self) -> int:
        return sum(len(benchmark.cases) for benchmark in self.benchmarks)


def measure(
    benchmark: str,
    case: str,
    trial: Trial,
    clock: Clock,
    rounds: int,
    warmup: int = 2,
    begin: Callable[[str], None] = lambda step: None,
) -> list[Measurement]:
    """Time the trial's contenders in turn. Returns one measurement each; ``begin`` is called for every round.

    Raises:
        ValueError: fewer than 2 rounds (no spread), or a baseline, goal or ``beside`` that names no contender.
    """
    if rounds < 2:
        raise ValueError(f"rounds is {rounds}; at least 2 are needed for a spread")
    named = {trial.baseline, *trial.beside, *trial.goals, *(goal.of for goal in trial.goals.values() if goal.of)}
    if unknown := named - set(trial.contenders):
        raise ValueError(f"no contender {', '.join(sorted(unknown))}; there are {', '.join(trial.contenders)}")
    samples: dict[str, list[float]] = {name: [] for name in trial.contenders}
    contenders, shuffled, turn = list(trial.contenders.items()), random.Random(0), 0
    for number in range(warmup + rounds):
        begin("warm-up" if number < warmup else f"round {number - warmup + 1}")
        # A new order per round: what one contender leaves in the caches and the allocator affects the next, and in a
        # fixed order each contender would always have the same predecessor.
        for name, function in shuffled.sample(contenders, len(contenders)):
            operands = [trial.operands[(turn + call) % len(trial.operands)] for call in range(trial.calls)]
            turn += trial.calls
            seconds = clock.time(function, operands) / trial.calls
            if number >= warmup:
                samples[name].append(seconds)
    return [_summary(benchmark, case, trial, name, samples) for name in trial.contenders]


def rotation(bytes_of_a_set: int, cache_bytes: int) -> int:
    """Return how many sets of operands are needed so that a set has left the cache before its next turn.

    Sets rotate over at least twice the last-level cache.
    """
    return max(1, -(-2 * cache_bytes // max(1, bytes_of_a_set)))


def _summary(benchmark: str, case: str, trial: Trial, name: str, samples: Mapping[str, list[float]]) -> Measurement:
    seconds = samples[name]
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    moved = trial.bytes_moved
    return Measurement(
        benchmark=benchmark,
        case=case,
        variant=name,
        baseline=trial.baseline,
        rounds=len(seconds),
        median_s=median,
        q1_s=q1,
        q3_s=q3,
        ratio=_ratio(seconds, samples[trial.baseline]),
        bytes_moved=moved,
        gbps=None if moved is None else moved / median / 1e9,
        goal=_judge(trial, name, samples),
        more={"ratio_to": {of: _ratio(seconds, samples[of]) for of in trial.beside}} if trial.beside else {},
    )


def _judge(trial: Trial, name: str, samples: Mapping[str, list[float]]) -> dict[str, Any] | None:
    goal = trial.goals.get(name)
    if goal is None:
        return None
    of = goal.of or trial.baseline
    if goal.quantity == "ratio":
        value = _ratio(samples[name], samples[of])
    elif goal.quantity == "extra_us":
        value = 1e6 * statistics.median(a - b for a, b in zip(samples[name], samples[of], strict=True))
    else:
        raise ValueError(f"a goal's quantity is {goal.quantity!r}; it must be 'ratio' or 'extra_us'")
    return {"quantity": goal.quantity, "at_most": goal.at_most, "of": of, "value": value, "met": value <= goal.at_most}


def _ratio(seconds: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
