# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of a network's training step against its memory budget, from reconstructing to storing.

Every contender is a copy with the same weights on the same kernels, and differs only in what it stores. A budget's
first step measures the chains and must not find them cold, so a stored copy takes a step first; then the plan is made,
and then the peak and the timed rounds are measured, interleaved (`revkernels.bench.harness`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revkernels.bench.clocks import Clock
from revkernels.bench.contenders import Contender, Way
from revkernels.bench.harness import Trial, measure
from revkernels.bench.network import planned
from revkernels.bench.networks import Workload
from revkernels.bench.results import as_row
from revkernels.measure import peak_bytes

__all__ = ["RECONSTRUCT", "SHARES", "STORE", "Sweep", "run", "steps"]

SHARES = (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 1.0)
RECONSTRUCT, STORE = "reconstruct", "store"


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    Attributes:
        name: of the workload, for result lines.
        workload: the network.
        batch: of all contenders.
        dtype: "float32", or "bfloat16" for autocast.
        device: "cpu" or "cuda[:n]".
        rounds: number of timed rounds.
        shares: of the way from the memory of reconstructing (0) to that of storing (1).
    """

    name: str
    workload: Workload
    batch: int
    dtype: str = "float32"
    device: str = "cpu"
    rounds: int = 7
    shares: Sequence[float] = SHARES

    @property
    def case(self) -> str:
        """The case of a result line."""
        return f"{self.name} batch {self.batch} {self.dtype}"

    @property
    def ways(self) -> list[Way]:
        """The contenders: reconstructing, the budgets in increasing order, storing."""
        budgets = (
            Way(f"budget {100 * share:g}%", "ours", backend=None, share=share) for share in sorted(set(self.shares))
        )
        return [
            Way(RECONSTRUCT, "ours", activations="reconstruct", backend=None),
            *budgets,
            Way(STORE, "ours", backend=None),
        ]


def steps(sweep: Sweep) -> int:
    """Return the number of steps of the work in `run`."""
    return 1 + len(sweep.ways) + 1 + sweep.rounds


def run(sweep: Sweep, clock: Clock, begin: Callable[[str], None] = lambda step: None) -> Iterator[dict[str, Any]]:
    """Yield one row per contender, in the order of ``sweep.ways``.

    Keys besides those of a `Measurement`, whose ratio is to reconstructing:

        share         of the budget; None for the two ends
        peak_bytes    of the whole step
        memory_share  (peak - peak of reconstructing) / (peak of storing - peak of reconstructing)
        time_share    (1 - ratio) / (1 - ratio of storing): the share of reconstructing's extra time that is saved

    and ``plan`` (of `revkernels.bench.network.planned`; None for the ends). A share of a gap that is not above 0 is
    None.
    """
    torch.manual_seed(1)
    data = sweep.workload.data(sweep.batch)
    begin("a stored step, so that nothing is cold")
    Contender(sweep.ways[-1], sweep.workload, sweep.dtype, sweep.device, None).step(data)
    state: dict[str, Tensor] | None = None
    living: dict[str, Contender] = {}
    found: dict[str, dict[str, Any]] = {}
    for way in sweep.ways:
        begin(f"first steps of {way.name}")
        contender = Contender(way, sweep.workload, sweep.dtype, sweep.device, state)
        state = contender.state
        contender.settle(data)
        contender.step(data)  # after it the gradients exist, and only activations are new memory
        plan = contender.plan(data)
        peak = peak_bytes(lambda c=contender: c.step(data), sweep.device)  # type: ignore[misc]
        found[way.name] = {
            "share": way.share,
            "peak_bytes": peak,
            "plan": None if plan is None else planned(plan),
        }
        living[way.name] = contender
    timed = {name: (lambda c=contender: c.step(data)) for name, contender in living.items()}
    for contender in living.values():
        contender.forget_times()
    trial = Trial(RECONSTRUCT, timed, beside=(STORE,))
    measured = measure("budget", sweep.case, trial, clock, sweep.rounds, 1, begin)
    ratios = {one.variant: one.ratio for one in measured}
    least, most = found[RECONSTRUCT]["peak_bytes"], found[STORE]["peak_bytes"]
    for one in measured:
        more = found[one.variant]
        if more["plan"] is not None:
            more["plan"]["measured_s"] = living[one.variant].plan().measured_seconds  # type: ignore[union-attr]
        more["memory_share"] = _share(more["peak_bytes"] - least, most - least)
        more["time_share"] = _share(1 - one.ratio, 1 - ratios[STORE])
        one.more |= more
        yield as_row(one)


def _share(part: float, gap: float) -> float | None:
    return part / gap if gap > 0 else None
