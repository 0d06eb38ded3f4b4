# SPDX-License-Identifier: Apache-2.0
"""What the tests of the compiled kernels compare with: NumPy adds, and rounding is done by hand, once."""

import ml_dtypes
import numpy as np
import pytest

from revkernels import native

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype("f8"), np.dtype("f4"), BFLOAT16, np.dtype("f2")]
SIGNIFICAND = {BFLOAT16: (8, -126, 3.3895313892515355e38), np.dtype("f2"): (11, -14, 65504.0)}

# Trying one chooses it, so the order ends with what the library chooses by itself: the best.
ISAS = []
if native.missing() is None:
    from revkernels import _native

    ISAS = [isa for isa in ("baseline", "avx2", "avx512") if _native.set_isa(isa)]


@pytest.fixture(params=ISAS)
def each_isa(request):
    """The name of each instruction set of this machine in turn, with the library's loops switched to it."""
    before = _native.cpu_isa()
    assert _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def rounded(value, dtype):
    """Round float32 or float64 values to ``dtype``, to nearest even, by counting significant bits."""
    if dtype not in SIGNIFICAND:
        return value.astype(dtype)
    bits, least, most = SIGNIFICAND[dtype]
    wide = value.astype("f8")
    finite = np.where(np.isfinite(wide), wide, 0.0)
    exponent = np.maximum(np.frexp(finite)[1] - 1, least)
    unit = np.ldexp(1.0, exponent - (bits - 1))
    nearest = np.copysign(np.rint(finite / unit) * unit, wide)
    nearest = np.where(np.abs(nearest) > most, np.copysign(np.inf, nearest), nearest)
    return np.where(np.isfinite(wide), nearest, wide).astype(dtype)


def compute(*arrays):
    return np.dtype("f8" if any(a.dtype == np.dtype("f8") for a in arrays) else "f4")


def expected(x, f, sign, out_dtype=None):
    wide = compute(x, f)
    with np.errstate(all="ignore"):
        return rounded(x.astype(wide) + sign * f.astype(wide), out_dtype or x.dtype)


def bits_of(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def assert_same_bits(got, want):
    """Equal bit for bit; a NaN may be any NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    got_nan, want_nan = np.isnan(got.astype("f8")), np.isnan(want.astype("f8"))
    wrong = np.where(got_nan | want_nan, got_nan != want_nan, bits_of(got) != bits_of(want))
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} differ, first {got[wrong][:3]} for {want[wrong][:3]}"


def edges(dtype):
    """Values where rounding, widening or special cases can go wrong."""
    one = [0.0, 1.0, 1 + 2**-8, 1 + 2**-7, 1 + 3 * 2**-8, 2**-24, 2**-25, 3 * 2**-25, 2**-14, 2**-14 - 2**-24, 65504.0]
    one += [65519.0, 65520.0, 2**-126, 2**-133, 2**-134, 3 * 2**-134, 2**-149, 3.3895313892515355e38, 3.4e38, 1e300]
    one += [np.inf, np.nan, 2**-1074, 1 + 2**-23, 1 + 2**-52, 1 / 3, 2**-1022]
    with np.errstate(all="ignore"):
        return np.array(one + [-v for v in one], dtype="f8").astype(dtype)


def operands(x_dtype, f_dtype, rng):
    a, b = edges(x_dtype), edges(f_dtype)
    pairs = [np.repeat(a, len(b)), np.tile(b, len(a))]
    size = 4099
    with np.errstate(all="ignore"):
        random = [
            (rng.standard_normal(size) * 2.0 ** rng.integers(-30, 16, size)).astype(d) for d in (x_dtype, f_dtype)
        ]
    return [np.concatenate(p) for p in zip(pairs, random, strict=True)]


def views(rng):
    """Arrays of shape (4, 6, 5, 3) in every memory layout that occurs, by name."""

    def buffer(*shape):
        return rng.standard_normal(shape).astype("f4")

    return {
        "dense": buffer(4, 6, 5, 3),
        "channels_last": buffer(4, 5, 3, 6).transpose(0, 3, 1, 2),
        "half": buffer(4, 12, 5, 3)[:, 6:],
        "channels_last_half": buffer(4, 5, 3, 12).transpose(0, 3, 1, 2)[:, :6],
        "cropped": buffer(4, 6, 9, 8)[:, :, 2:7, 3:6],
        "every_other": buffer(4, 12, 5, 6)[:, ::2, :, ::2],
        "transposed": buffer(3, 5, 6, 4).transpose(3, 2, 1, 0),
        "batch_inside": buffer(6, 5, 3, 4).transpose(3, 0, 1, 2),
        "no_two_merge": buffer(8, 12, 10, 6)[::2, ::2, ::2, ::2],
    }


LAYOUTS = list(views(np.random.default_rng(0)))
