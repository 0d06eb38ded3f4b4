# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""accumulate on a list: many small dense pairs in one launch, with their pointers as kernel arguments."""

import triton
import triton.language as tl

from revkernels.triton_kernels.arithmetic import narrow, widen


@triton.jit
def accumulate_kernel(totals, parts, counts, PAIRS: tl.constexpr, WIDE: tl.constexpr, COLS: tl.constexpr):
    """totals[i] <- totals[i] + parts[i], tile by tile, over the concatenated pairs."""
    program = tl.program_id(0)
    total_ptr, part_ptr, count, tile = totals[0], parts[0], counts[0] >> 2, program
    begin = tl.cdiv(count, COLS)
    for i in tl.static_range(1, PAIRS):
        # Selecting among pointers instead of branching keeps one copy of the body.
        mine = program >= begin
        total_ptr = tl.where(mine, totals[i], total_ptr)
        part_ptr = tl.where(mine, parts[i], part_ptr)
        tile = tl.where(mine, program - begin, tile)
        count = tl.where(mine, counts[i] >> 2, count)
        begin += tl.cdiv(counts[i] >> 2, COLS)
    start = tile * COLS
    at = start + tl.arange(0, COLS)
    for MASKED in tl.static_range(2):  # as in couple_kernel: a full tile needs no mask
        if (start + COLS <= count) == (MASKED == 0):
            inside = at < count if MASKED else tl.full((COLS,), True, tl.int1)
            total = widen(tl.load(total_ptr + at, inside), WIDE) + widen(tl.load(part_ptr + at, inside), WIDE)
            tl.store(total_ptr + at, narrow(total, total_ptr.dtype.element_ty), inside)
