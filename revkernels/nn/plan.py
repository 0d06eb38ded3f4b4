# SPDX-License-Identifier: Apache-2.0
"""`net.plan()`: what a memory budget stores, its predicted cost, and its measured cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from revkernels.autograd.planning.planner import Made, Planner, planner_of
from revkernels.budget import MemoryBudget, words

_STEPS = 3  # steps that `plan_of` measures for the time


@dataclass(frozen=True)
class KeptStep:
    """One half-step of a plan.

    Attributes:
        chain: the index of the chain's call in the step, from 0.
        branch: its name.
        kept: what is stored: "nothing", "everything", "everything but norms' outputs" (and but activations' outputs,
            both of which are recomputed), "everything, in host memory", or the operators whose outputs are stored.
        bytes: how much is stored until the backward.
        seconds: the recompute time saved.
    """

    chain: int
    branch: str
    kept: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What is stored under a memory budget in a training step.

    Seconds are from the entry of the first chain to the end of the backward, peaks are the bytes that `MemoryBudget`
    bounds. ``str()`` is a table.

    Attributes:
        budget: the budget.
        limit: the peak that it allows.
        steps: the half-steps, in the order of the forward.
        predicted_peak, predicted_seconds: the plan's prediction.
        measured_peak: of a step that ``plan(x)`` took; None for ``plan()``, and if no allocator reports it.
        measured_seconds: the median of the steps since the plan; None if there was none.
        reconstructing, storing: the peaks of storing nothing and everything.
        reconstructing_seconds: of a step that stores nothing.
    """

    budget: MemoryBudget
    limit: float
    steps: tuple[KeptStep, ...]
    predicted_peak: int
    measured_peak: int | None
    predicted_seconds: float
    measured_seconds: float | None
    reconstructing: int
    storing: int
    reconstructing_seconds: float

    @property
    def kept(self) -> int:
        """Bytes stored, in total."""
        return sum(step.bytes for step in self.steps)

    def __str__(self) -> str:
        def of(measured: float | None, show: Any) -> str:
            return "not measured" if measured is None else f"{show(measured)} measured"

        def milliseconds(seconds: float) -> str:
            return f"{seconds * 1e3:.1f} ms"

        least, most = words(self.reconstructing), words(self.storing)
        lines = [
            f"{self.budget!r}: a peak of {words(self.limit)}; {least} with everything reconstructed, "
            f"{most} with all kept",
            f"peak  {words(self.predicted_peak)} predicted, {of(self.measured_peak, words)}",
            f"time  {milliseconds(self.predicted_seconds)} predicted, {of(self.measured_seconds, milliseconds)}; "
            f"{milliseconds(self.reconstructing_seconds)} with everything reconstructed",
        ]
        return "\n".join([*lines, *self._table()])

    def _table(self) -> Iterator[str]:
        rows = [("chain", "branch", "keeps", "bytes", "saves")]
        # Consecutive half-steps that store the same are one row.
        for _, group in itertools.groupby(self.steps, lambda step: (step.chain, step.kept, step.bytes)):
            run = list(group)
            first, last = run[0], run[-1]
            branch = first.branch if len(run) == 1 else f"{first.branch} ... {last.branch} ({len(run)})"
            size, saved = sum(step.bytes for step in run), sum(step.seconds for step in run)
            rows.append((str(first.chain), branch, first.kept, words(size), f"{saved * 1e3:.1f} ms"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [text.ljust(width) for text, width in zip(row[:3], widths, strict=False)]
            cells += [text.rjust(width) for text, width in zip(row[3:], widths[3:], strict=True)]
            yield "  ".join(cells).rstrip()


def plan_of(net: nn.Module, budget: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
    """The plan of the last training step; with an x, of steps on x that are taken now and undone.

    Raises:
        ValueError: there is no memory budget, or one that stores everything; no step has been measured; the budget is
            impossible; x is given under no_grad.
    """
    if not isinstance(budget, MemoryBudget):
        raise ValueError(f"activations is {budget!r}; a plan is made for a revkernels.MemoryBudget(...)")
    if budget.stores:
        raise ValueError(f"{budget!r} keeps everything: there is nothing to plan")
    planner = planner_of(budget)
    peak = None
    if x is not None:
        if not torch.is_grad_enabled():
            raise ValueError("the planner measures a forward and its backward: call plan(x) outside torch.no_grad()")
        peak = _measure(net, planner, x, args, kwargs)
    made = planner.latest
    if made is None:
        raise ValueError("no step has been measured yet: run a training step, or call plan(x) with an input")
    return _report(budget, planner, made, peak)


def _measure(net: nn.Module, planner: Planner, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    from revkernels.diagnostics.untouched import default_loss, detached, outside_autocast, tensors_in, untouched
    from revkernels.measure import peak_bytes_from

    device = next((t.device for t in tensors_in((x, args, kwargs))), None)
    if device is None:
        raise TypeError(f"x is a {type(x).__name__}; it must be an input of the network, with a tensor in it")

    def step() -> None:
        loss = default_loss(net(detached(x), *args, **kwargs))
        if not loss.requires_grad:
            raise ValueError("nothing in the network requires grad for this x: there is no backward to plan for")
        with outside_autocast(device.type):
            loss.backward()

    with untouched(net):
        for _ in range(1 + _STEPS):
            step()
        entered = 0

        def watched(begin: Callable[[], None]) -> None:
            def look(count: int) -> None:  # memory allocated before the first chain does not count
                nonlocal entered
                entered = count
                begin()

            planner.looks = look
            try:
                step()
            finally:
                planner.looks = None

        peak = peak_bytes_from(watched, device)
    return None if peak is None else peak + entered


def _report(budget: MemoryBudget, planner: Planner, made: Made, peak: int | None) -> Plan:
    steps = []
    for number, (call, choices) in enumerate(zip(made.calls, made.choices, strict=True)):
        for cost, choice in zip(call.steps, choices, strict=True):
            if cost is not None:
                names = [f"{op.name.removeprefix('aten.').partition('.')[0]} {op.number}" for op in cost.ops]
                some = ", ".join(name for op, name in zip(cost.ops, names, strict=True) if op.number in choice.ops)
                everything = "everything but norms' outputs" if choice.makes_again else "everything"
                if choice.away:
                    everything += ", in host memory"
                option = choice.option
                kept = everything if option.whole else some or "nothing"
                steps.append(KeptStep(number, cost.branch, kept, option.kept, option.saved))
    return Plan(
        budget=budget,
        limit=made.limit,
        steps=tuple(steps),
        predicted_peak=made.peak,
        measured_peak=peak,
        predicted_seconds=made.predicted,
        measured_seconds=planner.measured(made),
        reconstructing=made.reconstructing,
        storing=made.storing,
        reconstructing_seconds=made.first,
    )
