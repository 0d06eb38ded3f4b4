# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""norm_act_backward: dx = base + the gradient of x, dh that of h, dweight = sum of dz xhat, dbias = sum of dz.

The walk is that of norm_act.py. Beyond an array's end dh is 0 and adds nothing to any sum.
"""

import triton
import triton.language as tl

from revkernels.triton_kernels.arithmetic import narrow, widen
from revkernels.triton_kernels.norm_arithmetic import (
    activate_backward,
    load_bias,
    load_or,
    locate,
    normalise,
    number,
    place,
    positions_of,
    quotient,
    statistic_at,
    step,
)


@triton.jit
def read_gradient(
    x_ptr, dh_ptr, mean_ptr, rstd_ptr, x_strides, dh_strides, at, known,
    sample, row, position, channel, inside, weight, bias,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, MINORS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """(dz, xhat, rstd) of one tile."""
    x = widen(tl.load(x_ptr + place(x_strides, sample, row, position, channel, MINORS, 0, UNIT), inside, 0.0), WIDE)
    dh = widen(tl.load(dh_ptr + place(dh_strides, sample, row, position, channel, MINORS, 3, UNIT), inside, 0.0), WIDE)
    xhat, rstd, z = normalise(x, mean_ptr, rstd_ptr, at, known, weight, bias, WIDE)
    return activate_backward(dh, z, ACTIVATION), xhat, rstd


@triton.jit
def write_dx(
    gradient, dx_ptr, base_ptr, dx_strides, base_strides, sample, row, position, channel, inside,
    WIDE: tl.constexpr, MINORS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dx = base + gradient, rounded once."""
    if base_ptr is not None:
        base = tl.load(base_ptr + place(base_strides, sample, row, position, channel, MINORS, 2, UNIT), inside, 0.0)
        gradient = widen(base, WIDE) + gradient
    at = place(dx_strides, sample, row, position, channel, MINORS, 1, UNIT)
    tl.store(dx_ptr + at, narrow(gradient, dx_ptr.dtype.element_ty), inside)


@triton.jit
def sums_kernel(
    partial_ptr, x_ptr, dh_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    plane, group_size, sizes, x_strides, dh_strides, statistic_strides,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, MINORS: tl.constexpr,
    UNIT: tl.constexpr, C_UNIT: tl.constexpr, B_UNIT: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of dz xhat and of dz over a chunk of positions: partial[0] and [1], each [samples * chunks, channels]."""
    sample, partial, row, tile, count, in_row, positions, channels, channel = locate(
        sizes, C_UNIT, B_UNIT, POSITIONS, CHANNELS
    )
    group_size = number(group_size)
    weight = load_or(weight_ptr, channel, channel < channels, 1.0, WIDE)
    bias = load_bias(bias_ptr, channel, channel < channels, WIDE)
    dweight = tl.zeros((POSITIONS, CHANNELS), WIDE)
    dbias = tl.zeros((POSITIONS, CHANNELS), WIDE)
    for _ in range(count):
        position = positions_of(tile, POSITIONS)
        inside = (position < positions) & (channel < channels)
        at = statistic_at(statistic_strides, sample, row, position, channel, channels // group_size, group_size, KIND)
        known = channel < channels if KIND == "batch" or KIND == "group" else position < positions
        dz, xhat, _ = read_gradient(
            x_ptr, dh_ptr, mean_ptr, rstd_ptr, x_strides, dh_strides, at, known,
            sample, row, position, channel, inside, weight, bias, ACTIVATION, WIDE, MINORS, UNIT,
        )  # fmt: skip
        dweight += dz * xhat
        dbias += dz
        row, tile = step(row, tile, in_row)
    to = partial_ptr + partial * channels + channel
    tl.store(to, tl.sum(dweight, 0, keep_dims=True), channel < channels)
    tl.store(to + number(plane), tl.sum(dbias, 0, keep_dims=True), channel < channels)


@triton.jit
def merge_sums_kernel(
    dweight_ptr, dbias_ptr, partial_ptr, plane, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """dweight and dbias: the partial sums over [rows, channels] added up in float64."""
    rows, channels = number(rows), number(channels)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    dweight = tl.zeros((ROWS, CHANNELS), tl.float64)
    dbias = tl.zeros((ROWS, CHANNELS), tl.float64)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (channel < channels)
        at = partial_ptr + row.to(tl.int64) * channels + channel
        dweight += tl.load(at, inside, 0.0).to(tl.float64)
        dbias += tl.load(at + number(plane), inside, 0.0).to(tl.float64)
    if dweight_ptr is not None:
        total = tl.sum(dweight, 0, keep_dims=True).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + channel, total, channel < channels)
    if dbias_ptr is not None:
        total = tl.sum(dbias, 0, keep_dims=True).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + channel, total, channel < channels)


@triton.jit
def merge_moments_kernel(
    moments_ptr, partial_ptr, weight_ptr,  # moments: m(g xhat) and m(g), each [samples, groups]
    plane, moments_plane, chunks, channels, group_size, elements,
    CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A group norm's means: the partial sums of one sample and group, weighted and added up in float64."""
    chunks, channels, size = number(chunks), number(channels), number(group_size)
    program = tl.program_id(0).to(tl.int64)
    groups = channels // size
    sample, begin = program // groups, program % groups * size
    corner = partial_ptr + sample * chunks * channels
    slopes = tl.zeros((CHUNKS, CHANNELS), tl.float64)
    levels = tl.zeros((CHUNKS, CHANNELS), tl.float64)
    for first in range(begin, begin + size, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        weight = load_or(weight_ptr, channel, channel < begin + size, 1.0, tl.float64)
        for k in range(0, chunks, CHUNKS):
            chunk = k + tl.arange(0, CHUNKS)[:, None]
            inside = (chunk < chunks) & (channel < begin + size)
            at = corner + chunk.to(tl.int64) * channels + channel
            slopes += weight * tl.load(at, inside, 0.0).to(tl.float64)
            levels += weight * tl.load(at + number(plane), inside, 0.0).to(tl.float64)
    n = number(elements).to(tl.float64)
    to = moments_ptr + program
    tl.store(to, (tl.sum(slopes) / n).to(moments_ptr.dtype.element_ty))
    tl.store(to + number(moments_plane), (tl.sum(levels) / n).to(moments_ptr.dtype.element_ty))


@triton.jit
def gradient_kernel(
    dx_ptr, base_ptr, x_ptr, dh_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, slope_ptr, level_ptr,
    group_size, elements, sizes, x_strides, dx_strides, base_strides, dh_strides, statistic_strides,
    KIND: tl.constexpr, CONSTANT: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, MINORS: tl.constexpr,
    UNIT: tl.constexpr, C_UNIT: tl.constexpr, B_UNIT: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx from known sums: slope and level are dweight and dbias for a batch norm, m(g xhat) and m(g) for the others."""
    sample, _, row, tile, count, in_row, positions, channels, channel = locate(
        sizes, C_UNIT, B_UNIT, POSITIONS, CHANNELS
    )
    group_size = number(group_size)
    weight = load_or(weight_ptr, channel, channel < channels, 1.0, WIDE)
    bias = load_bias(bias_ptr, channel, channel < channels, WIDE)
    n = number(elements).to(WIDE)
    for _ in range(count):
        position = positions_of(tile, POSITIONS)
        inside = (position < positions) & (channel < channels)
        at = statistic_at(statistic_strides, sample, row, position, channel, channels // group_size, group_size, KIND)
        known = channel < channels if KIND == "batch" or KIND == "group" else position < positions
        dz, xhat, rstd = read_gradient(
            x_ptr, dh_ptr, mean_ptr, rstd_ptr, x_strides, dh_strides, at, known,
            sample, row, position, channel, inside, weight, bias, ACTIVATION, WIDE, MINORS, UNIT,
        )  # fmt: skip
        if CONSTANT:
            gradient = weight * rstd * dz
        else:
            slope = load_or(slope_ptr, at, known, 0.0, WIDE)
            level = load_or(level_ptr, at, known, 0.0, WIDE)
            if KIND == "batch":
                gradient = weight * rstd * (dz - quotient(level, n) - xhat * quotient(slope, n))
            else:
                gradient = rstd * (dz * weight - level - xhat * slope)
        write_dx(
            gradient, dx_ptr, base_ptr, dx_strides, base_strides, sample, row, position, channel, inside,
            WIDE, MINORS, UNIT,
        )  # fmt: skip
        row, tile = step(row, tile, in_row)


@triton.jit
def rows_gradient_kernel(
    dx_ptr, base_ptr, x_ptr, dh_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, partial_ptr,
    plane, sizes, x_strides, dx_strides, base_strides, dh_strides, statistic_strides,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, MINORS: tl.constexpr,
    UNIT: tl.constexpr, C_UNIT: tl.constexpr, B_UNIT: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Layer and RMS norm in one pass: dx, and unless partial is None the partial sums, as in `sums_kernel`.

    A tile has all channels of its positions."""
    sample, partial, row, tile, count, in_row, positions, channels, channel = locate(
        sizes, C_UNIT, B_UNIT, POSITIONS, CHANNELS
    )
    weight = load_or(weight_ptr, channel, channel < channels, 1.0, WIDE)
    bias = load_bias(bias_ptr, channel, channel < channels, WIDE)
    n = channels.to(WIDE)
    dweight = tl.zeros((POSITIONS, CHANNELS), WIDE)
    dbias = tl.zeros((POSITIONS, CHANNELS), WIDE)
    for _ in range(count):
        position = positions_of(tile, POSITIONS)
        inside = (position < positions) & (channel < channels)
        at = statistic_at(statistic_strides, sample, row, position, 0, 1, 1, "layer")
        dz, xhat, rstd = read_gradient(
            x_ptr, dh_ptr, mean_ptr, rstd_ptr, x_strides, dh_strides, at, position < positions,
            sample, row, position, channel, inside, weight, bias, ACTIVATION, WIDE, MINORS, UNIT,
        )  # fmt: skip
        if partial_ptr is not None:
            dweight += dz * xhat
            dbias += dz
        g = dz * weight
        slope = quotient(tl.sum(g * xhat, 1, keep_dims=True), n)
        if mean_ptr is None:
            gradient = rstd * (g - xhat * slope)
        else:
            gradient = rstd * (g - quotient(tl.sum(g, 1, keep_dims=True), n) - xhat * slope)
        write_dx(
            gradient, dx_ptr, base_ptr, dx_strides, base_strides, sample, row, position, channel, inside,
            WIDE, MINORS, UNIT,
        )  # fmt: skip
        row, tile = step(row, tile, in_row)
    if partial_ptr is not None:
        to = partial_ptr + partial * channels + channel
        tl.store(to, tl.sum(dweight, 0, keep_dims=True), channel < channels)
        tl.store(to + number(plane), tl.sum(dbias, 0, keep_dims=True), channel < channels)


@triton.jit
def wide_rows_moments_kernel(
    slope_ptr, level_ptr, x_ptr, dh_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    sizes, x_strides, dh_strides, statistic_strides,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, MINORS: tl.constexpr,
    UNIT: tl.constexpr, C_UNIT: tl.constexpr, B_UNIT: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """m(g xhat) and m(g) of a layer or RMS norm with more channels than a tile."""
    positions, channels = number(sizes[1]).to(tl.int64) * B_UNIT, number(sizes[2]) * C_UNIT
    in_row = tl.cdiv(positions, POSITIONS)
    program = tl.program_id(0).to(tl.int64)
    row, sample = program // in_row, program * 0
    position = program % in_row * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    at = statistic_at(statistic_strides, sample, row, position, 0, 1, 1, "layer")
    slopes = tl.zeros((POSITIONS, CHANNELS), WIDE)
    levels = tl.zeros((POSITIONS, CHANNELS), WIDE)
    for begin in range(0, channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        inside = (position < positions) & (channel < channels)
        weight = load_or(weight_ptr, channel, channel < channels, 1.0, WIDE)
        bias = load_bias(bias_ptr, channel, channel < channels, WIDE)
        dz, xhat, _ = read_gradient(
            x_ptr, dh_ptr, mean_ptr, rstd_ptr, x_strides, dh_strides, at, position < positions,
            sample, row, position, channel, inside, weight, bias, ACTIVATION, WIDE, MINORS, UNIT,
        )  # fmt: skip
        g = dz * weight
        slopes += g * xhat
        levels += g
    n = channels.to(WIDE)
    tl.store(slope_ptr + at, quotient(tl.sum(slopes, 1, keep_dims=True), n), position < positions)
    if level_ptr is not None:
        tl.store(level_ptr + at, quotient(tl.sum(levels, 1, keep_dims=True), n), position < positions)
