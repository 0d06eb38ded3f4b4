# SPDX-License-Identifier: Apache-2.0
"""Scales, grid, checksum and amax of the compiled host kernels."""

import itertools

import numpy as np
import pytest
from native_oracle import BFLOAT16, DTYPES, LAYOUTS, assert_same_bits, bits_of, each_isa, views

from revkernels import native
from revkernels.coupling import Coupling

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)
isa = each_isa


def memory_order(array):
    """The elements in the order of memory, as a flat array."""
    return array.transpose(np.argsort([-s for s in array.strides], kind="stable")).ravel()


def checksum_of(array):
    bits = bits_of(memory_order(array)).astype("u8")
    return int((bits * (2 * np.arange(bits.size, dtype="u8") + 1)).sum(dtype="u8"))


@pytest.mark.parametrize("wide", [np.dtype("f4"), np.dtype("f8")], ids=str)
@pytest.mark.parametrize("channel_dim", [1, -1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_and_grid(isa, layout, channel_dim, wide):
    rng = np.random.default_rng(7)
    x = views(rng)[layout].astype(wide, order="K")
    f = views(rng)["dense"].astype(BFLOAT16)
    channel = rng.standard_normal(x.shape[channel_dim]).astype(wide)
    sample = rng.standard_normal(4).astype(wide)
    across = np.expand_dims(channel, [d for d in range(4) if d != channel_dim % 4])
    for by_channel, by_sample, k in itertools.product((channel, None), (sample, None), (5, None)):
        factor = (1 if by_channel is None else across) * (1 if by_sample is None else sample[:, None, None, None])
        branch = np.asarray(factor, wide) * f.astype(wide)
        if k is not None:
            branch = np.rint(branch * wide.type(2**k)) * wide.type(2**-k)
        options = Coupling(by_channel, by_sample, channel_dim, k)
        for kernel, sign in ((native.couple, 1), (native.uncouple, -1)):
            out = np.empty_like(x)
            kernel(out, x, f, options)
            assert_same_bits(out, x + sign * branch)
        y, dy = x.copy(order="K"), np.ones_like(x)
        native.reverse_step(y, f, dy, f, options)
        assert_same_bits(y, x - branch)
        assert_same_bits(dy, 1 + f.astype(wide))


@pytest.mark.parametrize("shape", [(1, 6, 5), (4, 1, 5), (1, 1, 5), (1, 1, 1), (3, 4, 1), (2, 3), (0, 3)])
def test_scales_along_a_dimension_of_one(shape):
    rng = np.random.default_rng(8)
    x, f = rng.standard_normal(shape), rng.standard_normal(shape)
    channel, sample = rng.standard_normal(shape[1]), rng.standard_normal(shape[0])
    tail = (None,) * (len(shape) - 2)
    want = x + (channel[(None, slice(None), *tail)] * sample[(slice(None), None, *tail)]) * f
    native.couple(x, x, f, Coupling(channel, sample))
    assert_same_bits(x, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "no_two_merge"])
def test_checksum_and_amax(isa, layout, dtype):
    rng = np.random.default_rng(9)
    shape_of = views(rng)[layout]
    strides = [s // 4 * dtype.itemsize for s in shape_of.strides]
    x = np.lib.stride_tricks.as_strided(np.zeros(10000, dtype), shape_of.shape, strides)
    x[...] = shape_of.astype(dtype)
    f = shape_of.astype("f4", order="K") * 3
    checksum, amax = np.array([5], "u8"), np.zeros(1, "f4")
    native.couple(x, x, f, Coupling(checksum=checksum, amax=amax))
    assert int(checksum[0]) == (checksum_of(x) + 5) % 2**64
    assert amax[0] == np.float32(np.abs(x.astype("f8")).max())


@pytest.mark.parametrize("layout", ["dense", "channels_last", "half", "channels_last_half"])
def test_checksum_counts_in_the_order_of_the_result(isa, layout):
    x, f = views(np.random.default_rng(9))[layout], views(np.random.default_rng(8))["dense"]
    checksum = np.zeros(1, "u8")
    native.uncouple(x, x, f, Coupling(sample_scale=np.ones(4, "f4"), checksum=checksum))
    assert int(checksum[0]) == checksum_of(x)


def test_checksum_is_refused_where_order_is_lost():
    x = views(np.random.default_rng(10))["no_two_merge"]
    before = x.copy()
    with pytest.raises(ValueError, match=r"x with shape .* checksum"):
        native.couple(x, x, np.ones_like(x), Coupling(checksum=np.zeros(1, "u8")))
    assert np.array_equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax_of_a_nan_is_nan(isa, dtype):
    x, amax = np.zeros(1000, dtype), np.array([3], "f4")
    native.couple(x, x, np.full(1000, -2, dtype), Coupling(amax=amax))
    assert amax[0] == 3
    f = np.zeros(1000, dtype)
    f[700] = np.nan
    native.couple(x, x, f, Coupling(amax=amax))
    assert np.isnan(amax[0])
    native.couple(x, x, np.zeros(1000, dtype), Coupling(amax=amax))
    assert np.isnan(amax[0])


def test_a_swap_changes_the_checksum():
    sums = []
    for values in ([1, 2, 3], [2, 1, 3]):
        checksum = np.zeros(1, "i8")
        x = np.array(values, "f4")
        native.couple(x, x, np.zeros(3, "f4"), Coupling(checksum=checksum))
        sums.append(int(checksum[0]))
    assert sums[0] != sums[1]
