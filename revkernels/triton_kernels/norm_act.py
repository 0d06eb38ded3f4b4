# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""norm_act, couple_norm_act and uncouple_norm_act.

All kernels view an array as samples x rows x positions x channels and walk it in tiles of [POSITIONS, CHANNELS]. A
program processes several tiles in sequence, of one sample and the same channels. Samples do not share statistics:
dimension 0 for a group norm, otherwise one sample. Whether positions or channels are adjacent in memory depends on the
operand (MINORS); the compiler lays threads along the adjacent dimension.
"""

import triton
import triton.language as tl

from revkernels.triton_kernels.arithmetic import double, narrow
from revkernels.triton_kernels.norm_arithmetic import (
    activate,
    inverse_root,
    load_bias,
    load_or,
    locate,
    normalise,
    number,
    place,
    positions_of,
    quotient,
    read_stream,
    statistic_at,
    step,
)


@triton.jit
def statistics_kernel(
    partial_ptr, out_ptr, x_ptr, f_ptr,  # partial: [4, samples * chunks, channels]
    plane, sizes, x_strides, out_strides, f_strides,
    SUBTRACT: tl.constexpr, WIDE: tl.constexpr, MINORS: tl.constexpr,
    UNIT: tl.constexpr, C_UNIT: tl.constexpr, B_UNIT: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Batch and group norm, first pass: out = x + f; and per channel and chunk of positions the count, a shift, the
    mean minus the shift, and the sum of squared deviations from the mean.

    The shift is the first tile's mean, subtracted before squaring. If that tile is far from the rest, the variance is
    large too, at least distance^2 / tiles, so the cancellation below stays within `tiles` units of rounding. The shift
    is stored apart from the small mean, because their sum would lose digits.
    """
    sample, partial, row, tile, count, in_row, positions, channels, channel = locate(
        sizes, C_UNIT, B_UNIT, POSITIONS, CHANNELS
    )
    position = positions_of(tile, POSITIONS)
    inside = (position < positions) & (channel < channels)
    x = read_stream(out_ptr, x_ptr, f_ptr, out_strides, x_strides, f_strides,
                    sample, row, position, channel, inside, SUBTRACT, WIDE, MINORS, UNIT)  # fmt: skip
    n = tl.minimum(positions - tile.to(tl.int64) * POSITIONS, POSITIONS)
    shift = quotient(tl.sum(x, 0, keep_dims=True), n.to(WIDE))
    apart = tl.where(inside, x - shift, 0.0)
    sums, squares = apart, apart * apart
    for _ in range(1, count):
        row, tile = step(row, tile, in_row)
        position = positions_of(tile, POSITIONS)
        inside = (position < positions) & (channel < channels)
        x = read_stream(out_ptr, x_ptr, f_ptr, out_strides, x_strides, f_strides,
                        sample, row, position, channel, inside, SUBTRACT, WIDE, MINORS, UNIT)  # fmt: skip
        n += tl.minimum(positions - tile.to(tl.int64) * POSITIONS, POSITIONS)
        apart = tl.where(inside, x - shift, 0.0)
        sums += apart
        squares += apart * apart
    total, square = tl.sum(sums, 0, keep_dims=True), tl.sum(squares, 0, keep_dims=True)
    off = quotient(total, n.to(WIDE))
    m2 = square - total * off
    at = partial_ptr + partial * channels + channel
    tl.store(at, tl.zeros((1, CHANNELS), WIDE) + n.to(WIDE), channel < channels)
    tl.store(at + number(plane), shift, channel < channels)
    tl.store(at + 2 * number(plane), off, channel < channels)
    tl.store(at + 3 * number(plane), tl.where(m2 < 0.0, 0.0, m2), channel < channels)


@triton.jit
def load_mean(at, plane, inside, reference):
    """A chunk's mean minus a reference, in float64, in the order that keeps digits where the mean is large."""
    shift = tl.load(at + plane, inside, 0.0).to(tl.float64) - reference
    return shift + tl.load(at + 2 * plane, inside, 0.0).to(tl.float64)


@triton.jit
def merge_statistics_kernel(
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, partial_ptr,
    plane, chunks, channels, group_size, eps_bits, momentum_bits,
    GROUPED: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merges the results of `statistics_kernel` in float64. A program takes one group, or CHANNELS channels."""
    chunks, channels, plane = number(chunks), number(channels), number(plane)
    program = tl.program_id(0).to(tl.int64)
    if GROUPED:
        size = number(group_size)
        groups = channels // size
        sample, begin = program // groups, program % groups * size
    else:
        size = CHANNELS
        sample, begin = program * 0, program * CHANNELS
    end = tl.minimum(begin + size, channels)
    corner = partial_ptr + sample * chunks * channels
    if GROUPED:
        reference = tl.load(corner + plane + begin).to(tl.float64)
    else:
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        reference = tl.load(corner + plane + channel, channel < end, 0.0).to(tl.float64)
    counts = tl.zeros((CHUNKS, CHANNELS), tl.float64)
    sums = tl.zeros((CHUNKS, CHANNELS), tl.float64)
    for first in range(begin, end, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        for k in range(0, chunks, CHUNKS):
            chunk = k + tl.arange(0, CHUNKS)[:, None]
            inside = (chunk < chunks) & (channel < end)
            at = corner + chunk.to(tl.int64) * channels + channel
            n = tl.load(at, inside, 0.0).to(tl.float64)
            counts += n
            sums += n * load_mean(at, plane, inside, reference)
    count, total = tl.sum(counts, 0, keep_dims=True), tl.sum(sums, 0, keep_dims=True)
    if GROUPED:
        count, total = tl.sum(count, 1, keep_dims=True), tl.sum(total, 1, keep_dims=True)
    count = tl.where(count > 0.0, count, 1.0)  # for channels beyond the end
    mean = total / count
    squares = tl.zeros((CHUNKS, CHANNELS), tl.float64)
    for first in range(begin, end, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        for k in range(0, chunks, CHUNKS):
            chunk = k + tl.arange(0, CHUNKS)[:, None]
            inside = (chunk < chunks) & (channel < end)
            at = corner + chunk.to(tl.int64) * channels + channel
            n = tl.load(at, inside, 0.0).to(tl.float64)
            off = load_mean(at, plane, inside, reference) - mean
            squares += tl.where(inside, tl.load(at + 3 * plane, inside, 0.0).to(tl.float64) + n * (off * off), 0.0)
    square = tl.sum(squares, 0, keep_dims=True)
    if GROUPED:
        square = tl.sum(square, 1, keep_dims=True)
        to = program + tl.zeros((1, 1), tl.int64)
        inside = to >= 0
    else:
        to = begin + tl.arange(0, CHANNELS)[None, :]
        inside = to < end
    mean += reference
    variance = square / count
    rstd = 1.0 / tl.sqrt(variance + double(eps_bits))
    tl.store(mean_ptr + to, mean.to(mean_ptr.dtype.element_ty), inside)
    tl.store(rstd_ptr + to, rstd.to(rstd_ptr.dtype.element_ty), inside)
    if running_mean_ptr is not None:
        momentum = double(momentum_bits)
        unbiased = tl.where(count > 1.0, square / tl.where(count > 1.0, count - 1.0, 1.0), variance)
        old_mean = tl.load(running_mean_ptr + to, inside, 0.0).to(tl.float64)
        old_var = tl.load(running_var_ptr + to, inside, 0.0).to(tl.float64)
        new_mean = (1.0 - momentum) * old_mean + momentum * mean
        new_var = (1.0 - momentum) * old_var + momentum * unbiased
        tl.store(running_mean_ptr + to, narrow(new_mean, running_mean_ptr.dtype.element_ty), inside)
        tl.store(running_var_ptr + to, narrow(new_var, running_var_ptr.dtype.element_ty), inside)


@triton.jit
def apply_kernel(
    h_ptr, out_ptr, x_ptr, f_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    group_size, sizes, h_strides, x_strides, out_strides, f_strides, statistic_strides,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, SUBTRACT: tl.constexpr, WIDE: tl.constexpr, MINORS: tl.constexpr,
    UNIT: tl.constexpr, C_UNIT: tl.constexpr, B_UNIT: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """h = activation(norm(x)) with known statistics; with f, of x + f (x - f), which is stored in ``out``."""
    sample, _, row, tile, count, in_row, positions, channels, channel = locate(
        sizes, C_UNIT, B_UNIT, POSITIONS, CHANNELS
    )
    group_size = number(group_size)
    weight = load_or(weight_ptr, channel, channel < channels, 1.0, WIDE)
    bias = load_bias(bias_ptr, channel, channel < channels, WIDE)
    for _ in range(count):
        position = positions_of(tile, POSITIONS)
        inside = (position < positions) & (channel < channels)
        x = read_stream(out_ptr, x_ptr, f_ptr, out_strides, x_strides, f_strides,
                        sample, row, position, channel, inside, SUBTRACT, WIDE, MINORS, UNIT)  # fmt: skip
        at = statistic_at(statistic_strides, sample, row, position, channel, channels // group_size, group_size, KIND)
        known = channel < channels if KIND == "batch" or KIND == "group" else position < positions
        _, _, z = normalise(x, mean_ptr, rstd_ptr, at, known, weight, bias, WIDE)
        h = narrow(activate(z, ACTIVATION), h_ptr.dtype.element_ty)
        tl.store(h_ptr + place(h_strides, sample, row, position, channel, MINORS, 3, UNIT), h, inside)
        row, tile = step(row, tile, in_row)


@triton.jit
def rows_kernel(
    h_ptr, out_ptr, x_ptr, f_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    eps_bits, sizes, h_strides, x_strides, out_strides, f_strides, statistic_strides,
    ACTIVATION: tl.constexpr, SUBTRACT: tl.constexpr, WIDE: tl.constexpr, MINORS: tl.constexpr,
    UNIT: tl.constexpr, C_UNIT: tl.constexpr, B_UNIT: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Layer and RMS norm in one pass: a tile has all channels of its positions."""
    sample, _, row, tile, count, in_row, positions, channels, channel = locate(
        sizes, C_UNIT, B_UNIT, POSITIONS, CHANNELS
    )
    weight = load_or(weight_ptr, channel, channel < channels, 1.0, WIDE)
    bias = load_bias(bias_ptr, channel, channel < channels, WIDE)
    n = channels.to(WIDE)
    eps = double(eps_bits).to(WIDE)
    for _ in range(count):
        position = positions_of(tile, POSITIONS)
        inside = (position < positions) & (channel < channels)
        x = read_stream(out_ptr, x_ptr, f_ptr, out_strides, x_strides, f_strides,
                        sample, row, position, channel, inside, SUBTRACT, WIDE, MINORS, UNIT)  # fmt: skip
        at = statistic_at(statistic_strides, sample, row, position, 0, 1, 1, "layer")
        if mean_ptr is None:
            apart = x
            variance = quotient(tl.sum(x * x, 1, keep_dims=True), n)
        else:
            mean = quotient(tl.sum(x, 1, keep_dims=True), n)
            apart = tl.where(inside, x - mean, 0.0)
            off = quotient(tl.sum(apart, 1, keep_dims=True), n)  # what the first sum lost by rounding
            variance = quotient(tl.sum(apart * apart, 1, keep_dims=True), n) - off * off
            variance = tl.where(variance < 0.0, 0.0, variance)
            mean += off
            tl.store(mean_ptr + at, mean, position < positions)
            apart = x - mean
        rstd = inverse_root(variance + eps)
        tl.store(rstd_ptr + at, rstd, position < positions)
        h = narrow(activate(apart * rstd * weight + bias, ACTIVATION), h_ptr.dtype.element_ty)
        tl.store(h_ptr + place(h_strides, sample, row, position, channel, MINORS, 3, UNIT), h, inside)
        row, tile = step(row, tile, in_row)


@triton.jit
def wide_rows_kernel(
    out_ptr, x_ptr, f_ptr, mean_ptr, rstd_ptr,
    eps_bits, sizes, x_strides, out_strides, f_strides, statistic_strides,
    SUBTRACT: tl.constexpr, WIDE: tl.constexpr, MINORS: tl.constexpr,
    UNIT: tl.constexpr, C_UNIT: tl.constexpr, B_UNIT: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Layer and RMS norm with more channels than a tile, first pass: out = x + f, and the statistics of a tile of
    positions.

    The shift is the mean over the first CHANNELS channels."""
    positions, channels = number(sizes[1]).to(tl.int64) * B_UNIT, number(sizes[2]) * C_UNIT
    in_row = tl.cdiv(positions, POSITIONS)
    program = tl.program_id(0).to(tl.int64)
    row, sample = program // in_row, program * 0
    position = program % in_row * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    lane = tl.arange(0, CHANNELS)[None, :]
    x = read_stream(out_ptr, x_ptr, f_ptr, out_strides, x_strides, f_strides, sample,
                    row, position, lane, position < positions, SUBTRACT, WIDE, MINORS, UNIT)  # fmt: skip
    shift = tl.zeros((POSITIONS, 1), WIDE)
    if mean_ptr is not None:
        shift += tl.sum(x, 1, keep_dims=True) * (1.0 / CHANNELS)
    apart = x - shift
    sums, squares = apart, apart * apart
    for begin in range(CHANNELS, channels, CHANNELS):
        inside = (position < positions) & (begin + lane < channels)
        x = read_stream(out_ptr, x_ptr, f_ptr, out_strides, x_strides, f_strides, sample,
                        row, position, begin + lane, inside, SUBTRACT, WIDE, MINORS, UNIT)  # fmt: skip
        apart = tl.where(inside, x - shift, 0.0)
        sums += apart
        squares += apart * apart
    n = channels.to(WIDE)
    at = statistic_at(statistic_strides, sample, row, position, 0, 1, 1, "layer")
    variance = quotient(tl.sum(squares, 1, keep_dims=True), n)
    if mean_ptr is not None:
        off = quotient(tl.sum(sums, 1, keep_dims=True), n)
        variance -= off * off
        variance = tl.where(variance < 0.0, 0.0, variance)
        tl.store(mean_ptr + at, shift + off, position < positions)
    tl.store(rstd_ptr + at, inverse_root(variance + double(eps_bits).to(WIDE)), position < positions)
