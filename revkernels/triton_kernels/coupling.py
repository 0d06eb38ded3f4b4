# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RET505 (Triton compiles what follows a branch that returned, so every branch needs its else)
"""couple, uncouple and reverse_step in one kernel: they differ in a sign and in whether there is a gradient."""

import triton
import triton.language as tl

from revkernels.triton_kernels.arithmetic import bits_of, limited, magnitude_bits, narrow, round_half_even, widen


@triton.jit
def place(strides, row, col, period, RANK: tl.constexpr):
    """The 64-bit offsets of a tile's elements from the operand's start."""
    if RANK == 1:
        return col * strides[0]
    elif RANK == 2:
        return row * strides[0] + col * strides[1]
    else:
        return (row // period).to(tl.int64) * strides[0] + (row % period).to(tl.int64) * strides[1] + col * strides[2]


@triton.jit
def load_scale(ptr, strides, row, col, rows, period, inside, VARIES: tl.constexpr, RANK: tl.constexpr):
    """The scale of every element, or of every row if it does not vary along a row."""
    if VARIES:
        return tl.load(ptr + place(strides, row, col, period, RANK), inside)
    elif RANK == 1:
        return tl.load(ptr)
    else:
        return tl.load(ptr + place(strides, row, 0, period, RANK), row < rows)


@triton.jit
def couple_kernel(
    out_ptr, x_ptr, f_ptr,              # out <- x + f', or x - f' if SUBTRACT; out may be x
    dy_ptr, df_ptr,                     # dy <- dy + df in the same pass; None in couple and uncouple
    value_ptr,                          # of an int16 stream: out in numbers; None is left out
    channel_ptr, sample_ptr, up, down,  # f' = rint(channel * sample * f * up) * down; what is None is left out
    checksum_ptr, amax_ptr, first,      # reports on out, added to; first is the position of the first element
    rows, cols, period, col_tiles,
    out_strides, x_strides, f_strides, dy_strides, df_strides, value_strides, channel_strides, sample_strides,
    positions,
    SUBTRACT: tl.constexpr, WIDE: tl.constexpr, WIDE_GRADIENT: tl.constexpr,
    CHANNEL_VARIES: tl.constexpr, SAMPLE_VARIES: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One half-step of Algorithm 1 on one tile: widen, compute in WIDE, round once.

    For an int16 stream a step is 2^-k, which is `down`: f in steps is limited and added as an integer, which wraps."""
    program = tl.program_id(0)
    if RANK == 1:
        col_start = program.to(tl.int64) * COLS
        col = col_start + tl.arange(0, COLS)
        row = col  # there is only one row
        full = col_start + COLS <= cols
    else:
        row_tile = program // col_tiles
        if RANK == 2:
            row_tile = row_tile.to(tl.int64)  # rank 3 divides rows in 32 bits, and the host keeps them below 2^30
        row_start = row_tile * ROWS
        col_start = (program % col_tiles).to(tl.int64) * COLS
        row = row_start + tl.arange(0, ROWS)[:, None]
        col = col_start + tl.arange(0, COLS)[None, :]
        full = (row_start + ROWS <= rows) & (col_start + COLS <= cols)

    # Two copies of one body: a full tile needs no mask and so uses 16-byte accesses for any element count.
    for MASKED in tl.static_range(2):
        if full == (MASKED == 0):
            if MASKED:
                inside = (row < rows) & (col < cols) if RANK > 1 else col < cols
            else:
                inside = tl.full((ROWS, COLS) if RANK > 1 else (COLS,), True, tl.int1)
            stream = tl.load(x_ptr + place(x_strides, row, col, period, RANK), inside)
            x = widen(stream, WIDE)
            f = widen(tl.load(f_ptr + place(f_strides, row, col, period, RANK), inside), WIDE)
            if dy_ptr is not None:
                dy_at = dy_ptr + place(dy_strides, row, col, period, RANK)
                df_at = df_ptr + place(df_strides, row, col, period, RANK)
                dy, df = widen(tl.load(dy_at, inside), WIDE_GRADIENT), widen(tl.load(df_at, inside), WIDE_GRADIENT)
                tl.store(dy_at, narrow(dy + df, dy_ptr.dtype.element_ty), inside)

            if channel_ptr is not None:
                scale = load_scale(channel_ptr, channel_strides, row, col, rows, period, inside, CHANNEL_VARIES, RANK)
                scale = scale.to(WIDE)
                if sample_ptr is not None:
                    sample = load_scale(sample_ptr, sample_strides, row, col, rows, period, inside, SAMPLE_VARIES, RANK)
                    scale *= sample.to(WIDE)
                f = scale * f
            elif sample_ptr is not None:
                sample = load_scale(sample_ptr, sample_strides, row, col, rows, period, inside, SAMPLE_VARIES, RANK)
                f = f * sample.to(WIDE)
            if up is not None:
                f = round_half_even(f * up)
                if out_ptr.dtype.element_ty != tl.int16:
                    f = f * down

            total = x - f if SUBTRACT else x + f
            if out_ptr.dtype.element_ty == tl.int16:
                q, m = stream.to(tl.int32), limited(f)
                out = (q - m if SUBTRACT else q + m).to(tl.int16)
                reach = total * down
                if value_ptr is not None:
                    value_type = value_ptr.dtype.element_ty
                    value = out.to(tl.float64 if value_type == tl.float64 else tl.float32) * down
                    at = value_ptr + place(value_strides, row, col, period, RANK)
                    tl.store(at, narrow(value, value_type), inside)
            else:
                out = narrow(total, out_ptr.dtype.element_ty)
                reach = out
            tl.store(out_ptr + place(out_strides, row, col, period, RANK), out, inside)

            if checksum_ptr is not None:
                position = first + place(positions, row, col, period, RANK)
                terms = tl.where(inside, bits_of(out) * (2 * position + 1), 0)
                tl.atomic_add(checksum_ptr.to(tl.pointer_type(tl.int64), bitcast=True), tl.sum(terms), sem="relaxed")
            if amax_ptr is not None:
                # A negative NaN already in the cell orders below every new value and is replaced by a NaN: the program
                # whose atomic comes first has read the cell before that.
                cell = amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
                before = tl.load(cell)
                largest = tl.max(tl.where(inside, magnitude_bits(reach), 0))
                largest = tl.where((before < 0) & (before > -0x800000), 0x7FC00000, largest)
                tl.atomic_max(cell, largest, sem="relaxed")
