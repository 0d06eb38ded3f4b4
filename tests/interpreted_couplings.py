# SPDX-License-Identifier: Apache-2.0
"""What couplings in Triton's interpreter are compared with: the oracle, and how, bit for bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import BF16, F64

from revkernels.arrays import dtype_name, memory_order
from revkernels.reference import coupling as oracle


@triton.jit
def to_bfloat16(source, target):
    tl.store(target, tl.load(source).to(tl.bfloat16))


@pytest.fixture(scope="module", name="truncates")
def whether_it_truncates():
    """Triton 3.9's interpreter cuts float32 off to bfloat16; every GPU rounds to nearest even. So, in the interpreter
    only, bfloat16 results are compared with an oracle that cuts off too, if this version still does it."""
    target = torch.zeros(1, dtype=BF16)
    to_bfloat16[(1,)](torch.tensor([1.0 + 1.5 * 2.0**-8]), target)
    return target.item() == 1.0


def numbers(tensor):
    return tensor.double().numpy().copy()


def expected(operation, x, f, truncates, **options):
    """The oracle's x + f' or y - f', as float64 numbers that x's dtype holds exactly."""
    if x.dtype != BF16 or not truncates:
        return operation(numbers(x), numbers(f), dtype_name(x), dtype_name(f), **options)
    wide = "float64" if f.dtype == F64 else "float32"
    exact = operation(numbers(x), numbers(f), wide, wide, **options)
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32)
    near = np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    return (near.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def assert_same(tensor, values):
    """Bit for bit, the sign of zero included; one NaN is as good as another."""
    got = numbers(tensor)
    np.testing.assert_array_equal(got, values)
    np.testing.assert_array_equal(np.signbit(got)[~np.isnan(got)], np.signbit(values)[~np.isnan(values)])


def surroundings(view):
    """The buffer around a view, the view's own elements blanked."""
    base = (view if view._base is None else view._base).clone(memory_format=torch.preserve_format)
    base.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return base


def for_oracle(coupling):
    scales = {"channel_scale": coupling.channel_scale, "sample_scale": coupling.sample_scale}
    return {name: None if scale is None else numbers(scale) for name, scale in scales.items()} | {
        "channel_dim": coupling.channel_dim,
        "grid_exponent": coupling.grid_exponent,
    }


def assert_same_value(value, stored, k, truncates):
    """What an int16 stream stands for; see `truncates`."""
    if value.dtype == BF16 and truncates:
        near = (stored * 2.0**-k).astype(np.float32)
        assert_same(value, (near.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64))
    else:
        assert_same(value, oracle.value_of(stored, k, dtype_name(value)))


def assert_reports(coupling, out, truth, amax=None):
    """The checksum goes on from 7 and the amax from 0.25, as `some_coupling` left them."""
    if coupling.checksum is not None:
        added = oracle.checksum_of(truth.transpose(memory_order(out)), dtype_name(out))
        assert coupling.checksum.item() % 2**64 == (7 + added) % 2**64
    if coupling.amax is not None:
        assert coupling.amax.item() == max(oracle.amax_of(truth) if amax is None else amax, 0.25)
