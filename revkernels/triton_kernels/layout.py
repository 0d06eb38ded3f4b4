# SPDX-License-Identifier: Apache-2.0
"""How a kernel walks arrays of one shape and several strides. Plain integers: needs neither torch nor triton.

Dimensions that are adjacent in the written array's memory, and merge in every operand, become one. The rest is walked
as

    rank 1   cols                    dense operands, in any common order
    rank 2   rows x cols             channel halves, channels-last with a scale, rows of tokens
    rank 3   (outer x rows) x cols   both scales at once, NCHW against channels-last

and a rank beyond 3 is a loop over launches on the host (rare: a crop of an NCHW image with two scales).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

Strides = tuple[int, ...]

_MAX_RANK = 3
_MAX_ROWS = 2**30  # rank 3 divides the row index, in 32 bits
_TURNED_COLS = 32  # a square tile reads whole cache lines of a transposed operand


@dataclass(frozen=True, slots=True)
class Walk:
    """One way to walk all elements.

    Attributes:
        rank: 1, 2 or 3.
        rows: outer * rows of the table above; 1 for rank 1.
        cols: extent of the innermost dimension.
        period: rows per outer index (rank 3).
        strides: for every operand its ``rank`` strides, outermost first.
        offsets: one entry per launch: each operand's start, in elements.
        tile: (rows, cols) of one program, powers of two.
    """

    rank: int
    rows: int
    cols: int
    period: int
    strides: tuple[Strides, ...]
    offsets: tuple[Strides, ...]
    tile: tuple[int, int]

    @property
    def programs(self) -> int:
        """Programs of one launch."""
        return -(-self.rows // self.tile[0]) * self.col_tiles

    @property
    def col_tiles(self) -> int:
        """Tiles per row."""
        return -(-self.cols // self.tile[1])


def memory_positions(shape: Sequence[int], strides: Strides) -> Strides:
    """Return the strides that number an array's elements 0, 1, 2 ... in memory order."""
    positions = [0] * len(shape)
    count = 1
    for dim in reversed(_memory_order(strides)):
        positions[dim] = count
        count *= shape[dim]
    return tuple(positions)


def plan(shape: Sequence[int], strides: Sequence[Strides], arrays: int, elements: int) -> Walk:
    """Return the walk over operands of one ``shape``; the first of ``strides`` is the written array's.

    The first ``arrays`` operands are arrays of that shape; the others (scales, positions) do not affect the tile. A
    tile holds at most ``elements``.
    """
    dims = _merge(shape, strides)
    looped, walked = _split(dims)
    rank = len(walked)
    cols = walked[-1][0]
    period = walked[-2][0] if rank > 1 else 1
    rows = math.prod(size for size, _ in walked[:-1])
    turned = any(step != 1 for step in walked[-1][1][:arrays])
    tile_cols = elements
    if rank > 1:
        tile_cols = min(_power_of_two(cols), _TURNED_COLS if turned else elements)
    tile_rows = min(_power_of_two(rows), elements // tile_cols)
    return Walk(
        rank=rank,
        rows=rows,
        cols=cols,
        period=period,
        strides=tuple(tuple(steps[i] for _, steps in walked) for i in range(len(strides))),
        offsets=tuple(
            tuple(sum(at * steps[i] for at, (_, steps) in zip(index, looped, strict=True)) for i in range(len(strides)))
            for index in product(*(range(size) for size, _ in looped))
        ),
        tile=(tile_rows, tile_cols),
    )


def _memory_order(strides: Strides) -> list[int]:
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def _merge(shape: Sequence[int], strides: Sequence[Strides]) -> list[tuple[int, Strides]]:
    """(size, steps of all operands) of the merged dimensions, outermost in the written array's memory first."""
    dims: list[tuple[int, Strides]] = []
    for dim in _memory_order(strides[0]):
        size, steps = shape[dim], tuple(stride[dim] for stride in strides)
        if size == 1:
            continue
        if dims and all(outer == inner * size for outer, inner in zip(dims[-1][1], steps, strict=True)):
            size *= dims.pop()[0]
        dims.append((size, steps))
    return dims or [(1, (1,) * len(strides))]


def _split(dims: list[tuple[int, Strides]]) -> tuple[list[tuple[int, Strides]], list[tuple[int, Strides]]]:
    """The dimensions that the host loops over (the smallest, for few launches), and those that a kernel walks."""
    looped: list[tuple[int, Strides]] = []
    walked = list(dims)
    while len(walked) > _MAX_RANK or (len(walked) == _MAX_RANK and walked[0][0] * walked[1][0] >= _MAX_ROWS):
        smallest = min(range(len(walked) - 1), key=lambda i: walked[i][0])
        looped.append(walked.pop(smallest))
    return looped, walked


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
