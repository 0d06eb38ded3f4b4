# SPDX-License-Identifier: Apache-2.0
"""Peak activation bytes of a training step against depth: linear when stored, flat when reconstructed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from revkernels.bench.chains import Chain, Shape
from revkernels.measure import peak_bytes

__all__ = ["DEPTHS", "run"]

DEPTHS = (6, 18, 54)
_WAYS = ("store, eager", "reconstruct, eager", "reconstruct, fused")
#: Bytes that every branch adds per channel of a stream: reconstructed activations are freed before the next block's,
#: but fused norms keep the batch statistics for the recompute. A branch has two norms, each with float32 mean and rstd.
_MOST_GROWTH = {"reconstruct, eager": 0, "reconstruct, fused": 2 * 2 * 4}


def run(
    shape: Shape, depths: Sequence[int] = DEPTHS, begin: Callable[[str], None] = lambda step: None
) -> Iterator[dict[str, Any]]:
    """Yield a row ``{"benchmark", "case", "variant", "depth", "peak_bytes", "goal"}`` for every depth and way.

    The goal for reconstruction is the first depth's peak at every other depth, apart from kept batch statistics;
    ``value`` is the number of bytes above it.
    """
    shallow: dict[str, int] = {}
    for depth in depths:
        at = replace(shape, depth=depth)
        chain = Chain(at)
        for way in _WAYS:
            begin(f"depth {depth}, {way}")
            step = chain.step(way)
            step()  # parameter gradients exist from here on, so that only activations are counted
            peak = peak_bytes(step, at.device)
            row = {"benchmark": "memory", "case": str(at), "variant": way, "depth": depth, "peak_bytes": peak}
            goal = None
            if way in shallow and way in _MOST_GROWTH:
                most = _MOST_GROWTH[way] * shape.width * max(0, depth - depths[0])
                goal = _goal(peak - shallow[way], most, depths[0])
            yield row | {"goal": goal}
            shallow.setdefault(way, peak)


def _goal(growth: int, most: int, shallowest: int) -> dict[str, Any]:
    limit = {"quantity": "growth_bytes", "at_most": most, "of": f"depth {shallowest}"}
    return limit | {"value": growth, "met": growth <= most}
