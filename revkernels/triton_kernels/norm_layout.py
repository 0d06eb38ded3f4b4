# SPDX-License-Identifier: Apache-2.0
"""How the kernels of norm_act walk: samples x rows x positions x channels. Plain integers, as in layout.py.

    batch         1 sample,            the other dimensions are rows x positions
    group         dimension 0,         1 row
    layer, rms    1 sample             likewise; the statistics are walked as one more operand

A tile spans positions and channels, so positions are the other dimension with the smallest stride. Images, channels
last, and rows of tokens are one row of positions; NCHW images are one row per image.

Addresses, sizes and strides are passed to the kernel in units of UNIT elements, so that the compiler knows their
divisor and uses up to 16-byte accesses without a variant per shape: 56 channels are as fast as 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Strides = tuple[int, ...]

_UNITS = (8, 4, 2)
_CHANNELS = 128  # adjacent: 256 bytes of a half type
_POSITIONS = 256
_SKIPPED = {"position": 2, "channel": 3, "none": None}  # the stride that is 1
_TURNED = 32  # for operands with both orders, as in layout.py


@dataclass(frozen=True, slots=True)
class Plane:
    """One way to walk all elements.

    Attributes:
        samples, rows, positions, channels: extents, outermost first.
        strides: every operand's (None if absent) four strides in units, 0 for the one that is 1.
        minors: every operand's dimension of stride 1: "position", "channel" or "none".
        statistic: strides of row statistics along rows and positions.
        unit, position_unit, channel_unit: the units of strides, positions and channels.
    """

    samples: int
    rows: int
    positions: int
    channels: int
    strides: tuple[Strides | None, ...]
    minors: tuple[str, ...]
    statistic: tuple[int, int]
    unit: int
    position_unit: int
    channel_unit: int

    def tile(self, elements: int) -> tuple[int, int]:
        """(positions, channels) of a tile for sums over positions, powers of two."""
        present = {minor for minor, stride in zip(self.minors, self.strides, strict=True) if stride is not None}
        positions, channels = power_of_two(self.positions), power_of_two(self.channels)
        if {"position", "channel"} <= present:
            wide = min(positions, _TURNED)
        elif "position" in present:
            wide = min(positions, max(_POSITIONS, elements // channels))
        else:
            wide = min(positions, max(1, elements // min(channels, _CHANNELS)))
        return wide, min(channels, elements // wide)

    def row_tile(self, elements: int, most: int) -> tuple[int, int]:
        """(positions, channels) of a tile for sums over channels: all channels if ``most`` elements suffice."""
        positions, channels = power_of_two(self.positions), power_of_two(self.channels)
        along = "position" in self.minors
        if channels > (most // 16 if along else most):
            channels = max(1, most // _TURNED if along else most // 2)
        wide = max(elements // channels, min(_TURNED, most // channels) if along else 1)
        return min(positions, wide), channels


def plane(kind: str, axis: int, shape: Sequence[int], strides: Sequence[Strides | None]) -> Plane:
    """Return the walk over operands of one ``shape`` without empty dimensions; the first of ``strides`` is x's."""
    present = [stride for stride in strides if stride is not None]
    kept = [d for d, size in enumerate(shape) if size > 1 and d != axis and not (kind == "group" and d == 0)]
    by_rows = kind in ("layer", "rms")
    steps = [*present, _row_major(shape, axis)] if by_rows else present
    # Adjacent dimensions merge in the array's own order, or in that of x's memory.
    orders = (kept, sorted(kept, key=lambda d: -present[0][d]))
    runs = min((_merge(shape, steps, order) for order in orders), key=len)
    if len(runs) > (1 if kind == "group" else 2):
        raise ValueError(
            f"shape {tuple(shape)}, strides {present}: too many dimensions beside the channels do not merge"
        )
    runs.sort(key=lambda run: -run[1][0])
    runs = [(1, (0,) * len(steps))] * (2 - len(runs)) + runs
    (rows, row_steps), (positions, position_steps) = runs
    samples, channels = shape[0] if kind == "group" else 1, shape[axis]
    found = [
        (step[0] if samples > 1 else 0, row_steps[i], position_steps[i], step[axis] if channels > 1 else 0)
        for i, step in enumerate(present)
    ]
    minors = [_minor(step, positions, channels) for step in found]
    unit = _unit(found, minors, positions, channels)
    scaled = [
        tuple(0 if i == _SKIPPED[minor] else size // unit for i, size in enumerate(step))
        for step, minor in zip(found, minors, strict=True)
    ]
    taken = iter(zip(scaled, minors, strict=True))
    operands = [(None, "none") if stride is None else next(taken) for stride in strides]
    return Plane(
        samples=samples,
        rows=rows,
        positions=positions,
        channels=channels,
        strides=tuple(stride for stride, _ in operands),
        minors=tuple(minor for _, minor in operands),
        statistic=(row_steps[-1], position_steps[-1]) if by_rows else (0, 0),
        unit=unit,
        position_unit=unit if "position" in minors else 1,
        channel_unit=unit if "channel" in minors else 1,
    )


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


def _row_major(shape: Sequence[int], axis: int) -> Strides:
    """Strides of a dense array without the dimension ``axis``."""
    strides, count = [0] * len(shape), 1
    for d in reversed(range(len(shape))):
        if d != axis:
            strides[d] = count
            count *= shape[d]
    return tuple(strides)


def _merge(shape: Sequence[int], strides: Sequence[Strides], order: Sequence[int]) -> list[tuple[int, Strides]]:
    """(size, steps of all operands) after merging adjacent dimensions of ``order`` wherever possible."""
    runs: list[tuple[int, Strides]] = []
    for d in order:
        size, steps = shape[d], tuple(stride[d] for stride in strides)
        if runs and all(outer == inner * size for outer, inner in zip(runs[-1][1], steps, strict=True)):
            size *= runs.pop()[0]
        runs.append((size, steps))
    return runs


def _minor(step: Strides, positions: int, channels: int) -> str:
    if channels > 1 and step[3] == 1:
        return "channel"
    return "position" if positions > 1 and step[2] == 1 else "none"


def _unit(steps: Sequence[Strides], minors: Sequence[str], positions: int, channels: int) -> int:
    """The largest unit that divides all strides other than 1 and the extents of those that are 1."""
    sizes = []
    for step, minor in zip(steps, minors, strict=True):
        sizes += [size for i, size in enumerate(step) if i != _SKIPPED[minor]]
        sizes.append({"position": positions, "channel": channels, "none": 1}[minor])
    return next((unit for unit in _UNITS if all(size % unit == 0 for size in sizes)), 1)
