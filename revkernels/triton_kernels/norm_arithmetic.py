# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RET505 (Triton compiles what follows a branch that returned, so every branch needs its else)
"""Shared by the kernels of norm_act: activations and their derivatives, addressing, optional operands.

An operand that is None is replaced by the number that changes no bits: weight 1, bias -0 (z - 0 is z, for z = -0 too),
mean 0. Integers that vary between arrays are passed as 4n + 2, because Triton recompiles if one becomes 1 or a multiple
of 16.
"""

import triton
import triton.language as tl

from revkernels.triton_kernels.arithmetic import narrow, widen


@triton.jit
def quotient(a, b):
    """a / b, rounded to nearest: Triton's own float32 division is off by up to 2 units in the last place."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def inverse_root(value):
    """1 / sqrt(value), both rounded to nearest."""
    if value.dtype == tl.float64:
        return 1.0 / tl.sqrt(value)
    else:
        return tl.div_rn(tl.full(value.shape, 1.0, tl.float32), tl.sqrt_rn(value))


@triton.jit
def _exp_of_sum(high, low):
    """exp(high + low) for high <= 0 and |low| <= 0.06; 0 below the smallest subnormal, which for float32 on NVIDIA
    hardware is 0 below the smallest normal number.

    Triton's own float32 exp is 2^(u log2(e)) with one rounding in between, whose error grows with u. So whole powers of
    2 are subtracted first, with ln 2 in two parts, the first short enough for exact multiples; the remaining exponent
    is at most 1.
    """
    if high.dtype == tl.float64:
        return tl.exp(tl.where(high < -800.0, -800.0, high)) * tl.exp(low)
    else:
        high = tl.where(high < -110.0, -110.0, high)  # not tl.maximum, which drops NaN
        whole = tl.floor(high * 1.4426950408889634)
        rest = tl.fma(whole, -1.4286068203094172e-06, tl.fma(whole, -0.693145751953125, high)) + low
        return tl.exp2(whole) * tl.exp2(rest * 1.4426950408889634)


@triton.jit
def _sigmoid(u):
    """(sigmoid(u), its derivative), without overflow or cancellation: both come from exp(-|u|)."""
    e = _exp_of_sum(-tl.abs(u), tl.zeros_like(u))
    share = quotient(tl.full(u.shape, 1.0, u.dtype), 1.0 + e)
    return tl.where(u < 0.0, e * share, share), e * (share * share)


@triton.jit
def _normal(z):
    """(Phi(z), its derivative) of the normal distribution.

    Phi(-a) = exp(-a^2 / 2) S(t) / (a + c) with a = |z|, t = (a - c) / (a + c): S is smooth, and a polynomial in t keeps
    the digits of small probabilities that 1 + erf would lose. a^2 is exact, as the square of a's upper half plus a
    rest.
    """
    a = tl.abs(z)
    if z.dtype == tl.float64:
        a = tl.where(a > 39.0, 39.0, a)  # exp(-760) is 0
        upper = (a.to(tl.uint64, bitcast=True) >> 27 << 27).to(tl.float64, bitcast=True)
        inverse = 1.0 / (a + 4.0)
        s = _tail((a - 4.0) * inverse)
    else:
        a = tl.where(a > 15.0, 15.0, a)
        upper = (a.to(tl.uint32, bitcast=True) >> 12 << 12).to(tl.float32, bitcast=True)
        inverse = quotient(tl.full(a.shape, 1.0, tl.float32), a + 3.0)
        s = _tail((a - 3.0) * inverse)
    decay = _exp_of_sum(-0.5 * (upper * upper), -0.5 * ((a - upper) * (a + upper)))
    beyond = s * inverse * decay
    return tl.where(z < 0.0, beyond, 1.0 - beyond), 0.3989422804014327 * decay


@triton.jit
def _tail(t):
    """S(t) of `_normal`, fitted at Chebyshev points for a up to 39 (float64) or 15. Relative errors, including
    evaluation in the type itself, are below 5 units of 2^-53 and of 2^-24."""
    if t.dtype == tl.float64:
        s = tl.full(t.shape, -9.6615755481553e-10, tl.float64)
        s = s * t + 7.731895808625608e-11
        s = s * t + 1.3938808852558355e-08
        s = s * t + 1.4569488564608778e-08
        s = s * t - 7.642482978378022e-08
        s = s * t - 1.5426167593457165e-07
        s = s * t + 2.63742514249532e-07
        s = s * t + 1.0198152807723923e-06
        s = s * t - 6.251785640512302e-07
        s = s * t - 5.918905080396581e-06
        s = s * t + 7.150276513545111e-07
        s = s * t + 3.5144187813104215e-05
        s = s * t - 1.907873095933309e-06
        s = s * t - 0.0002310948203047214
        s = s * t + 0.00013334425522449717
        s = s * t + 0.0016308184422239424
        s = s * t - 0.0034796923623715906
        s = s * t - 0.0075401889656226675
        s = s * t + 0.0603965748907066
        s = s * t - 0.18652185795969298
        s = s * t + 0.3871374007422187
        s = s * t - 0.6078966419718917
        return s * t + 0.7552851304157515
    else:
        s = tl.full(t.shape, -0.000278988096, tl.float32)
        s = tl.fma(s, t, tl.full(t.shape, -0.00091387704, tl.float32))
        s = tl.fma(s, t, tl.full(t.shape, 0.00109011855, tl.float32))
        s = tl.fma(s, t, tl.full(t.shape, 0.00693457341, tl.float32))
        s = tl.fma(s, t, tl.full(t.shape, -0.0104852254, tl.float32))
        s = tl.fma(s, t, tl.full(t.shape, -0.0472590029, tl.float32))
        s = tl.fma(s, t, tl.full(t.shape, 0.230020046, tl.float32))
        s = tl.fma(s, t, tl.full(t.shape, -0.50933212, tl.float32))
        return tl.fma(s, t, tl.full(t.shape, 0.729083657, tl.float32))


@triton.jit
def _gate_and_slope(z, ACTIVATION: tl.constexpr):
    """(gate, slope) of h = z * gate(z).

    gelu_tanh is z * sigmoid(2 sqrt(2/pi) (z + 0.044715 z^3)); its exponent, computed in float32, has an error that
    grows with it."""
    if ACTIVATION == "silu":
        return _sigmoid(z)
    elif ACTIVATION == "gelu":
        return _normal(z)
    else:
        square = z * z
        gate, slope = _sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * square))
        return gate, slope * (1.5957691216057308 + 0.21406444881780076 * square)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """activation(z)"""
    if ACTIVATION == "none":
        return z
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # NaN stays
    else:
        gate, _ = _gate_and_slope(z, ACTIVATION)
        return z * gate


@triton.jit
def activate_backward(dh, z, ACTIVATION: tl.constexpr):
    """dh * activation'(z)"""
    if ACTIVATION == "none":
        return dh
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, dh)
    else:
        z = tl.where(z > 1000.0, 1000.0, z)  # the gradient has long reached its limit; avoids inf times 0
        z = tl.where(z < -1000.0, -1000.0, z)
        gate, slope = _gate_and_slope(z, ACTIVATION)
        return dh * (gate + z * slope)


@triton.jit
def number(code):
    """Decodes n from 4n + 2."""
    return code >> 2


@triton.jit
def place(strides, sample, row, position, channel, MINORS: tl.constexpr, OPERAND: tl.constexpr, UNIT: tl.constexpr):
    """The 64-bit offsets of an operand's elements. ``strides`` are those of sample, row, position and channel in units
    of UNIT, except that of MINORS[OPERAND] ("position", "channel" or "none"), which is 1.

    The tuple is indexed here, not by the caller: to Triton 3.6 its element is a str, which no function accepts.
    """
    at = sample * (number(strides[0]).to(tl.int64) * UNIT) + row * (number(strides[1]).to(tl.int64) * UNIT)
    if MINORS[OPERAND] == "position":
        at += position
    else:
        at += position * (number(strides[2]).to(tl.int64) * UNIT)
    if MINORS[OPERAND] == "channel":
        return at + channel
    else:
        return at + channel * (number(strides[3]).to(tl.int64) * UNIT)


@triton.jit
def load_or(ptr, at, inside, OTHERWISE: tl.constexpr, WIDE: tl.constexpr):
    """The loaded values, widened; OTHERWISE if there is no such operand."""
    if ptr is None:
        return tl.full((1, 1), OTHERWISE, WIDE)
    else:
        return widen(tl.load(ptr + at, inside, 0.0), WIDE)


@triton.jit
def load_bias(ptr, at, inside, WIDE: tl.constexpr):
    """The loaded biases, widened; -0 if there is none: as a product, because Triton 3.7 takes the number -0.0 for 0."""
    if ptr is None:
        return tl.full((1, 1), -1.0, WIDE) * 0.0
    else:
        return load_or(ptr, at, inside, 0.0, WIDE)


@triton.jit
def read_stream(
    out_ptr, x_ptr, f_ptr, out_strides, x_strides, f_strides, sample, row, position, channel, inside,
    SUBTRACT: tl.constexpr, WIDE: tl.constexpr, MINORS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """x of one tile, widened. With f: x + f (x - f) is stored in ``out`` and returned as stored."""
    x = tl.load(x_ptr + place(x_strides, sample, row, position, channel, MINORS, 0, UNIT), inside, 0.0)
    if f_ptr is not None:
        f = tl.load(f_ptr + place(f_strides, sample, row, position, channel, MINORS, 2, UNIT), inside, 0.0)
        x, f = widen(x, WIDE), widen(f, WIDE)
        x = narrow(x - f if SUBTRACT else x + f, out_ptr.dtype.element_ty)
        tl.store(out_ptr + place(out_strides, sample, row, position, channel, MINORS, 1, UNIT), x, inside)
    return widen(x, WIDE)


@triton.jit
def locate(sizes, C_UNIT: tl.constexpr, B_UNIT: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's (sample, row of its partial results, first tile's row, that tile's index in the row, number of
    tiles, tiles per row, positions, channels, channel indices).

    ``sizes`` are (rows, positions / B_UNIT, channels / C_UNIT, tiles per program)."""
    positions = number(sizes[1]).to(tl.int64) * B_UNIT
    channels = number(sizes[2]) * C_UNIT
    # Tiles are counted in 32 bits, and the host keeps them below 2^31, for short divisions.
    in_row = tl.cdiv(positions, POSITIONS).to(tl.int32)
    tiles = in_row * number(sizes[0]).to(tl.int32)
    most = number(sizes[3]).to(tl.int32)
    chunks = tl.cdiv(tiles, most)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    channel = (program % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    partial = program // channel_tiles
    first = partial % chunks * most
    count = tl.minimum(tiles - first, most)
    sample = (partial // chunks).to(tl.int64)
    return sample, partial.to(tl.int64), first // in_row, first % in_row, count, in_row, positions, channels, channel


@triton.jit
def positions_of(tile, POSITIONS: tl.constexpr):
    """The indices of a tile's positions in its row."""
    return tile.to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]


@triton.jit
def step(row, tile, in_row):
    """The next tile."""
    ends = tile + 1 == in_row
    return tl.where(ends, row + 1, row), tl.where(ends, 0, tile + 1)


@triton.jit
def normalise(x, mean_ptr, rstd_ptr, at, inside, weight, bias, WIDE: tl.constexpr):
    """(xhat, rstd, z), with the statistics at ``at``."""
    rstd = tl.load(rstd_ptr + at, inside, 0.0)
    xhat = (x - load_or(mean_ptr, at, inside, 0.0, WIDE)) * rstd
    return xhat, rstd, xhat * weight + bias


@triton.jit
def statistic_at(strides, sample, row, position, channel, groups, group_size, KIND: tl.constexpr):
    """The offsets of the statistics of a tile's elements: [1, CHANNELS] or [POSITIONS, 1]."""
    if KIND == "batch":
        return channel.to(tl.int64)
    elif KIND == "group":
        return sample * groups + channel // group_size
    else:
        return row.to(tl.int64) * number(strides[0]) + position * number(strides[1])
