# SPDX-License-Identifier: Apache-2.0
"""A training step of a chain of blocks: time and peak memory with stored, checkpointed or reconstructed activations.

Theory: a stored step costs 3N multiply-adds (N forward, 2N backward), the others 4N, one more forward of every branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from revkernels.bench.chains import WAYS, Chain, Shape
from revkernels.bench.clocks import Clock
from revkernels.bench.harness import Goal, Measurement, Trial, measure
from revkernels.measure import peak_bytes

__all__ = ["STEPS", "run"]

BASELINE = "store, eager"
STEPS = 1 + len(WAYS)  # besides the rounds: a warm-up, and each way's memory
_GOALS = {"reconstruct, fused": Goal("ratio", 1.0, of="reconstruct, eager")}


def run(
    shape: Shape, clock: Clock, rounds: int, begin: Callable[[str], None] = lambda step: None
) -> Iterator[Measurement]:
    """Measure one step in every way; ``more["peak_bytes"]`` is a step's peak memory above its start.

    ``begin`` is called for ``rounds`` + `STEPS` steps of the work.
    """
    chain = Chain(shape)
    steps = {way: chain.step(way) for way in WAYS}
    trial = Trial(BASELINE, steps, goals=_GOALS)
    for found in measure("block", str(shape), trial, clock, rounds, warmup=1, begin=begin):
        begin(f"memory of {found.variant}")
        found.more["peak_bytes"] = peak_bytes(steps[found.variant], shape.device)
        yield found
