# SPDX-License-Identifier: Apache-2.0
"""The distance of reconstructed streams from the true ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["relative_errors"]

_ELEMENTS_ON_CPU, _ELEMENTS = 1 << 15, 1 << 22  # of a stream, compared at a time


def relative_errors(rebuilt: Sequence[torch.Tensor], true: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return (maximum, rms) relative error of some streams, taken as one long vector, in float64.

        maximum = max |rebuilt - true| / max |true|        rms = |rebuilt - true| / |true|   (Euclidean norms)

    0 if both are zero, infinity if only ``true`` is.
    """
    parts = []
    for ours, theirs in zip(rebuilt, true, strict=True):
        for a, b in zip(_pieces(ours.detach()), _pieces(theirs.detach()), strict=True):
            wide = b.double()
            size = torch.stack([wide.abs().max(), wide.square().sum()])
            error = wide.neg_().add_(a)
            parts.append(torch.cat([size, torch.stack([error.square().sum(), error.abs_().max()])]))
    if not parts:
        return 0.0, 0.0
    found = torch.stack(parts)
    numbers = torch.cat([found[:, [0, 3]].amax(0), found[:, [1, 2]].sum(0)]).tolist()  # one transfer from a device
    largest, biggest, total, squares = numbers
    return _ratio(biggest, largest), math.sqrt(_ratio(squares, total))


def _pieces(stream: torch.Tensor) -> Sequence[torch.Tensor]:
    """Parts along the first dimension, so that a part's float64 copy does not determine the step's peak memory."""
    if not stream.numel():
        return ()
    if not stream.dim():
        return (stream,)
    elements = _ELEMENTS_ON_CPU if stream.device.type == "cpu" else _ELEMENTS
    return stream.split(max(1, elements * stream.shape[0] // stream.numel()))


def _ratio(error: float, size: float) -> float:
    if size:
        return error / size
    return math.inf if error else 0.0
