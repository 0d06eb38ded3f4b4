# SPDX-License-Identifier: Apache-2.0
"""A training step of a whole network in every way: time, peak memory, gradients and running statistics.

Contenders have the same weights and the same batch, channels-last. Before the timing each takes one step whose gradient
is compared with the baseline's and whose updates of the running statistics are counted, then one whose peak is
measured. A contender that fails there becomes a row with its error; only the baseline and this package must not fail.

The baseline's gradient in float64 shows how far apart two correct ones may be: a ReLU input that one computation rounds
to the other side of zero turns a float32 gradient by up to a degree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revkernels.bench.clocks import Clock
from revkernels.bench.contenders import BASELINE, Contender, Way
from revkernels.bench.equal_memory import largest_batch
from revkernels.bench.harness import Measurement, Trial, measure
from revkernels.bench.networks import Data, Workload
from revkernels.bench.profiling import breakdown
from revkernels.bench.results import as_row
from revkernels.measure import angle, peak_bytes

__all__ = ["GOALS", "Job", "Limit", "planned", "run", "steps"]


@dataclass(frozen=True)
class Limit:
    """A limit on the ratio to another contender's time, on a processor.

    Attributes:
        variant, of: contenders.
        at_most: the limit.
        dtypes: where it applies.
        networks: prefixes of the network names to which it applies.
    """

    variant: str
    of: str
    at_most: float
    dtypes: Sequence[str] = ("float32",)
    networks: Sequence[str] = ("revnet", "bottleneck")


GOALS = (
    Limit("reconstruct, fused", "reconstruct, eager", 0.85, networks=("revnet", "bottleneck", "stage")),
    Limit("reconstruct, fused", "memcnn", 0.60, networks=("revnet", "bottleneck", "stage")),
    Limit("reconstruct, fused", BASELINE, 1.15),
    Limit("store, fused", BASELINE, 0.88),
    Limit("reconstruct, fused", BASELINE, 1.25, dtypes=("bfloat16",)),
    Limit("reconstruct, fused", BASELINE, 1.25, dtypes=("float32", "bfloat16"), networks=("revvit",)),
)


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        subject: "network" or "peers", the benchmark of a result line.
        name: of the workload, for goals and result lines.
        workload: the network.
        ways: contenders, including the baseline.
        batch: of all contenders.
        dtype: of a `Contender`.
        device: "cpu" or "cuda[:n]".
        rounds: number of timed rounds.
        most: at equal memory, the largest batch tried, in batches; 0 skips that.
        graphs: whether the replay of a CUDA graph of the step is timed. Peaks are the step's own in any case.
        profile: whether to report where the time of a step goes.
    """

    subject: str
    name: str
    workload: Workload
    ways: Sequence[Way]
    batch: int
    dtype: str = "float32"
    device: str = "cpu"
    rounds: int = 5
    most: int = 0
    graphs: bool = False
    profile: bool = False

    @property
    def case(self) -> str:
        """The case of a result line."""
        return f"{self.name} batch {self.batch} {self.dtype}{' CUDA graph' if self.graphs else ''}"


def steps(job: Job) -> int:
    """Return the number of steps of the work in `run`."""
    count = len(job.ways)
    equal_memory = count + 1 + job.rounds if job.most else 0
    return 1 + count + 1 + job.rounds + equal_memory + (count if job.profile else 0)


def run(job: Job, clock: Clock, begin: Callable[[str], None] = lambda step: None) -> Iterator[dict[str, Any]]:
    """Yield one row per contender, in the order of ``job.ways``.

    Keys besides those of a `Measurement`: ``kind``, ``version`` (of a peer), ``peak_bytes``, ``gradient_degrees`` to
    the baseline of the same dtype and ``float64_degrees`` to it in float64 (None if ``gradient_error`` tells why),
    ``statistics_updates`` per step, ``images_per_s``, ``ratio_to`` the contenders of the goals, ``goals``, with
    ``job.most`` ``equal_memory_batch`` and ``equal_memory_images_per_s``, and with ``job.profile`` also ``profile``, of
    `breakdown`. One with a memory budget has ``plan``, of `planned`. One that failed has ``error`` and no times.
    """
    data = _data(job)
    if any(way.compiled for way in job.ways):
        torch._dynamo.reset()  # so that earlier networks' code does not count against the recompilation limit
    living: dict[str, Contender] = {}
    timed: dict[str, Callable[[], None]] = {}
    found: dict[str, dict[str, Any]] = {}
    reference: list[Tensor] | None = None
    exact: list[Tensor] = []
    state: dict[str, Tensor] | None = None
    for way in sorted(job.ways, key=lambda way: way.name != BASELINE):
        begin(f"{job.case}: first steps of {way.name}")
        more: dict[str, Any] = {"kind": way.kind, "version": None if way.peer is None else way.peer.version()}
        try:
            contender = Contender(way, job.workload, job.dtype, job.device, state)
            contender.settle(data)
            gradients = _first_step(contender, data, more)
            if way.share is not None:
                more["plan"] = planned(contender.plan(data))
            more["peak_bytes"] = peak_bytes(lambda c=contender: c.step(data), job.device)  # type: ignore[misc]
            timed[way.name] = contender.captured(data) if job.graphs else _bound(contender, data)
        except Exception as error:
            # A grid's checksums and a plan's clock are read on the host, which a graph does not allow.
            if way.name == BASELINE or (way.kind == "ours" and not (job.graphs and way.settles)):
                raise
            found[way.name] = _failed(job, way, more, error)
            continue
        if reference is None:
            reference, state = gradients, contender.state
            begin(f"{job.case}: its gradient in float64")
            exact = Contender(way, job.workload, "float64", job.device, state).gradients(_data(job, "float64"))
        more |= _compared(gradients, reference, exact)
        living[way.name], found[way.name] = contender, more
    for contender in living.values():
        contender.forget_times()
    limits = [g for g in GOALS if _holds(g, job) and {g.variant, g.of} <= living.keys()]
    beside = tuple(dict.fromkeys(goal.of for goal in limits))
    trial = Trial(BASELINE, timed, beside=beside)
    for measured in measure(job.subject, job.case, trial, clock, job.rounds, 1, lambda s: begin(f"{job.case}: {s}")):
        found[measured.variant] = _judged(job, measured, limits, found[measured.variant])
    for name, contender in living.items():
        if "plan" in found[name]:
            found[name]["plan"]["measured_s"] = contender.plan().measured_seconds  # type: ignore[union-attr]
    if job.profile:
        for name, contender in living.items():
            begin(f"{job.case}: a profile of {name}")
            found[name]["profile"] = breakdown(_bound(contender, data), device=job.device)
    if job.most:
        _at_equal_memory(job, living, found, clock, begin)
    for way in job.ways:
        yield found[way.name]


def _first_step(contender: Contender, data: Data, more: dict[str, Any]) -> list[Tensor]:
    before = contender.updates()
    gradients = contender.gradients(data)
    after = contender.updates()
    more["statistics_updates"] = None if before is None or after is None else after - before
    return gradients


def planned(plan: Any) -> dict[str, Any]:
    """Return a plan's predictions and measurements for a result line; seconds are of the steps taken until now.

    Both are of the chains: from the entry of the first to the end of the backward. See `revkernels.nn.plan.Plan`.
    """
    return {
        "limit_bytes": plan.limit,
        "reconstructing_bytes": plan.reconstructing,
        "storing_bytes": plan.storing,
        "kept_bytes": plan.kept,
        "predicted_peak_bytes": plan.predicted_peak,
        "measured_peak_bytes": plan.measured_peak,
        "predicted_s": plan.predicted_seconds,
        "measured_s": plan.measured_seconds,
        "reconstructing_s": plan.reconstructing_seconds,
    }


def _data(job: Job, dtype: str | None = None, batch: int | None = None) -> Data:
    torch.manual_seed(1)
    wide = torch.float64 if (dtype or job.dtype) == "float64" else torch.float32
    return job.workload.data(batch or job.batch, wide)


def _compared(gradients: list[Tensor], reference: list[Tensor], exact: list[Tensor]) -> dict[str, Any]:
    try:
        degrees = {"gradient_degrees": angle(gradients, reference), "float64_degrees": angle(gradients, exact)}
    except ValueError as error:  # a zero or non-finite gradient has no direction
        return {"gradient_degrees": None, "float64_degrees": None, "gradient_error": str(error)}
    return degrees | {"gradient_error": None}


def _bound(contender: Contender, data: Data) -> Callable[[], None]:
    return lambda: contender.step(data)


def _holds(goal: Limit, job: Job) -> bool:
    on_processor = job.device == "cpu"
    return on_processor and job.dtype in goal.dtypes and job.name.startswith(tuple(goal.networks))


def _judged(job: Job, measured: Measurement, limits: Sequence[Limit], more: dict[str, Any]) -> dict[str, Any]:
    ratio_to = measured.more.get("ratio_to", {})
    goals = [
        {
            "quantity": "ratio",
            "at_most": g.at_most,
            "of": g.of,
            "value": ratio_to[g.of],
            "met": ratio_to[g.of] <= g.at_most,
        }
        for g in limits
        if g.variant == measured.variant
    ]
    measured.more |= more | {"images_per_s": job.batch / measured.median_s, "goals": goals, "error": None}
    return as_row(measured)


def _failed(job: Job, way: Way, more: dict[str, Any], error: Exception) -> dict[str, Any]:
    lines = str(error).strip().splitlines()
    row = dict.fromkeys(("median_s", "q1_s", "q3_s", "ratio", "bytes_moved", "gbps", "goal", "peak_bytes"))
    row |= {"benchmark": job.subject, "case": job.case, "variant": way.name, "baseline": BASELINE, "rounds": 0}
    why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return (
        row
        | {"gradient_degrees": None, "float64_degrees": None, "statistics_updates": None}
        | more
        | {"goals": [], "error": why}
    )


def _at_equal_memory(
    job: Job,
    living: dict[str, Contender],
    found: dict[str, dict[str, Any]],
    clock: Clock,
    begin: Callable[[str], None],
) -> None:
    """Add ``equal_memory_batch`` and ``equal_memory_images_per_s``.

    They are of the largest batch found whose step's peak is at most the baseline's at ``job.batch``.
    """
    limit = found[BASELINE]["peak_bytes"]
    batches, contenders = {}, {}
    for name, contender in living.items():
        begin(f"{job.case}: the batch of {name} at equal memory")
        # A compiled one has one batch: it would be recompiled for every batch tried.
        fixed = name == BASELINE or contender.way.compiled

        def peak(batch: int, contender: Contender = contender) -> int:
            data = _data(job, batch=batch)
            contender.settle(data)
            return peak_bytes(lambda: contender.step(data), job.device)

        first = found[name]["peak_bytes"]
        batch = job.batch if fixed else largest_batch(peak, limit, job.batch, first, job.most * job.batch)
        if batch and (first <= limit or not fixed):
            batches[name], contenders[name] = batch, _bound(contender, _data(job, batch=batch))
    trial = Trial(BASELINE, contenders)
    for measured in measure(
        job.subject, job.case, trial, clock, job.rounds, 1, lambda s: begin(f"{job.case}: equal memory, {s}")
    ):
        batch = batches[measured.variant]
        found[measured.variant] |= {
            "equal_memory_batch": batch,
            "equal_memory_images_per_s": batch / measured.median_s,
        }
