# SPDX-License-Identifier: Apache-2.0
"""How far rebuilt streams are from the true ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["relative_errors"]


def relative_errors(rebuilt: Sequence[torch.Tensor], true: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return (maximum, rms) relative error of some streams, taken as one long vector, in float64.

        maximum = max |rebuilt - true| / max |true|        rms = |rebuilt - true| / |true|   (Euclidean norms)

    0 where both are zero, infinity where only ``true`` is.
    """
    biggest = largest = squares = total = 0.0
    for ours, theirs in zip(rebuilt, true, strict=True):
        if theirs.numel():
            wide = theirs.detach().double()
            difference = ours.detach().double() - wide
            found = torch.stack(
                [difference.abs().max(), wide.abs().max(), difference.square().sum(), wide.square().sum()]
            )
            numbers = found.tolist()  # one transfer from a device
            biggest, largest = _max(biggest, numbers[0]), _max(largest, numbers[1])
            squares, total = squares + numbers[2], total + numbers[3]
    return _ratio(biggest, largest), math.sqrt(_ratio(squares, total))


def _max(a: float, b: float) -> float:
    return b if math.isnan(b) else max(a, b)


def _ratio(error: float, size: float) -> float:
    if size:
        return error / size
    return math.inf if error else 0.0
