# SPDX-License-Identifier: Apache-2.0
"""Peak activation bytes of a training step against depth: linear when stored, flat when rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from revkernels.bench.chains import Chain, Shape
from revkernels.measure import peak_bytes

__all__ = ["DEPTHS", "run"]

DEPTHS = (6, 18, 54)
_WAYS = ("store, eager", "reconstruct, eager", "reconstruct, fused")
_MOST_GROWTH = 0  # bytes from the first depth to any other: what is rebuilt is gone before the next block is


def run(
    shape: Shape, depths: Sequence[int] = DEPTHS, begin: Callable[[str], None] = lambda step: None
) -> Iterator[dict[str, Any]]:
    """Yield a row ``{"benchmark", "case", "variant", "depth", "peak_bytes", "goal"}`` for every depth and way.

    The goal of what reconstructs is that its peak is the first depth's at every other depth; ``value`` is how many
    bytes more it is.
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
            judged = way in shallow and way.startswith("reconstruct")
            yield row | {"goal": _goal(peak - shallow[way], depths[0]) if judged else None}
            shallow.setdefault(way, peak)


def _goal(growth: int, shallowest: int) -> dict[str, Any]:
    limit = {"quantity": "growth_bytes", "at_most": _MOST_GROWTH, "of": f"depth {shallowest}"}
    return limit | {"value": growth, "met": growth <= _MOST_GROWTH}
