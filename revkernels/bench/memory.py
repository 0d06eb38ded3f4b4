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


def run(
    shape: Shape, depths: Sequence[int] = DEPTHS, begin: Callable[[str], None] = lambda step: None
) -> Iterator[dict[str, Any]]:
    """Yield a row ``{"benchmark", "case", "variant", "depth", "peak_bytes"}`` for every depth and way."""
    for depth in depths:
        at = replace(shape, depth=depth)
        chain = Chain(at)
        for way in _WAYS:
            begin(f"depth {depth}, {way}")
            step = chain.step(way)
            step()  # parameter gradients exist from here on, so that only activations are counted
            row = {"benchmark": "memory", "case": str(at), "variant": way, "depth": depth}
            yield row | {"peak_bytes": peak_bytes(step, at.device)}
