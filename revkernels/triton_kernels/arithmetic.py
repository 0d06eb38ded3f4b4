# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RET505 (Triton compiles what follows a branch that returned, so every branch needs its else)
"""The arithmetic of the coupling on tiles: two roundings, and the road of f into the sum. The same bits as csrc/ops."""

import triton
import triton.language as tl


@triton.jit
def widen(value, dtype: tl.constexpr):
    """The same number in a wider type. A bfloat16 becomes a float32 by its bits: between an extension from bfloat16 and
    a rounding to float16 LLVM makes the sum itself one of float16, which has not bfloat16's range."""
    if value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Round once, to nearest even. A half type is reached from float64 through an odd float32, which makes the second
    rounding safe (Boldo and Melquiond 2008); Triton's own cast goes through the nearest float32 and rounds twice."""
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
    """rint. libdevice has it under another name on every target and the interpreter lacks it. Adding and taking away
    2^23 (float64: 2^52) rounds only what lies below; a value above is whole already. The sign bit is put back, because
    rint(-0.3) is -0."""
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
    """What an int16 stream is moved by: -2^23 to 2^23 steps, 0 for NaN, as an int32."""
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
    """|stored| as a float32's bits. Among these a larger integer is a larger number, and NaN is above infinity."""
    return stored.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
