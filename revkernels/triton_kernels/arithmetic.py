# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RET505 (Triton compiles what follows a branch that returned, so every branch needs its else)
"""The coupling's arithmetic on tiles: conversions, rounding to the grid, reports. The same bits as csrc/ops."""

import triton
import triton.language as tl


@triton.jit
def widen(value, dtype: tl.constexpr):
    """The same number in a wider type.

    A bfloat16 becomes a float32 through its bits: between an extension from bfloat16 and a rounding to float16, LLVM
    would compute the sum itself in float16, which lacks bfloat16's range."""
    if value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def double(bits):
    """A float64 argument from `launch.float_bits`: a float that a kernel is called with would become a float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Round once, to nearest even.

    float64 narrows to a half type through a float32 rounded to odd, which makes the second rounding safe (Boldo and
    Melquiond 2008); Triton's own cast goes through the nearest float32 and rounds twice."""
    if value.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        return _round_to_odd(value).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def _round_to_odd(value):
    nearest = value.to(tl.float32)
    back = nearest.to(tl.float64)
    bits = nearest.to(tl.uint32, bitcast=True)
    inexact = (back != value) & (value == value)
    step = tl.where(tl.abs(back) > tl.abs(value), -1, 1).to(tl.uint32, bitcast=True)
    odd = tl.where(inexact & ((bits & 1) == 0), bits + step, bits)
    return odd.to(tl.float32, bitcast=True)


@triton.jit
def round_half_even(value):
    """rint. libdevice's name for it differs between targets, and the interpreter lacks it.

    Adding and subtracting 2^23 (float64: 2^52) rounds a value below it; a larger value is an integer already. The sign
    bit is restored, because rint(-0.3) is -0."""
    size = tl.abs(value)
    if value.dtype == tl.float64:
        whole = tl.where(size < 4503599627370496.0, (size + 4503599627370496.0) - 4503599627370496.0, size)
        sign = value.to(tl.uint64, bitcast=True) >> 63 << 63
        return (whole.to(tl.uint64, bitcast=True) | sign).to(tl.float64, bitcast=True)
    else:
        whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
        sign = value.to(tl.uint32, bitcast=True) >> 31 << 31
        return (whole.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def limited(steps):
    """The steps added to an int16 stream: limited to -2^23..2^23, 0 for NaN, as an int32."""
    near = tl.minimum(tl.maximum(steps, -8388608.0), 8388608.0)
    return tl.where(steps == steps, near, 0.0).to(tl.int32)


@triton.jit
def bits_of(stored):
    """The stored element as an unsigned integer, in 64 bits."""
    if stored.dtype.primitive_bitwidth == 16:
        return stored.to(tl.uint16, bitcast=True).to(tl.int64)
    elif stored.dtype.primitive_bitwidth == 32:
        return stored.to(tl.uint32, bitcast=True).to(tl.int64)
    else:
        return stored.to(tl.int64, bitcast=True)


@triton.jit
def magnitude_bits(stored):
    """stored| as float32 bits. Their integer order is the numbers' order, with NaN above infinity."""
    return stored.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
