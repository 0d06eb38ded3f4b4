# SPDX-License-Identifier: Apache-2.0
"""The compiled host kernels: rounding, layouts, instruction sets, options and refusals, against NumPy."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from native_oracle import BFLOAT16, DTYPES, LAYOUTS, assert_same_bits, each_isa, expected, operands, rounded, views

from revkernels import native
from revkernels.coupling import Coupling

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)
isa = each_isa


@pytest.mark.parametrize("f_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_rounds_once(isa, x_dtype, f_dtype):
    x, f = operands(x_dtype, f_dtype, np.random.default_rng(0))
    for kernel, sign in ((native.couple, 1), (native.uncouple, -1)):
        want = expected(x, f, sign)
        out = np.empty_like(x)
        kernel(out, x, f, None)
        assert_same_bits(out, want)
        for start in (0, 1, 5):  # the vector loop's tail and unaligned head
            y = x[start:].copy()
            kernel(y, y, f[start:], None)
            assert_same_bits(y, want[start:])


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype("f2")], ids=str)
def test_every_half_value_widens_exactly(isa, dtype, out_dtype):
    x = np.arange(1 << 16, dtype="u2").view(dtype)
    zero = np.full(x.shape, -0.0, dtype="f4")  # x + -0.0 is x, the sign of zero included
    out = np.empty(x.shape, out_dtype)
    native.couple(out, x, zero, None)
    with np.errstate(all="ignore"):
        assert_same_bits(out, rounded(x.astype("f4"), out_dtype))


@pytest.mark.parametrize("wide", [np.dtype("f4"), np.dtype("f8")], ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype("f2")], ids=str)
def test_every_half_value_rounds_from_between(isa, dtype, wide):
    """The midpoint between each half value and the next, and its neighbours on both sides."""
    half = np.arange(1 << 16, dtype="u2")
    with np.errstate(all="ignore"):
        low, high = half.view(dtype).astype("f8"), (half + 1).astype("u2").view(dtype).astype("f8")
        usable = np.isfinite(low) & np.isfinite(high) & (np.sign(low) * np.sign(high) >= 0)
        middle = ((low + high) / 2)[usable].astype(wide)
        x = np.concatenate([middle, np.nextafter(middle, wide.type(np.inf)), np.nextafter(middle, wide.type(-np.inf))])
    out = np.empty(x.shape, dtype)
    native.couple(out, x, np.full(x.shape, -0.0, wide), None)
    assert_same_bits(out, rounded(x, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reverse_step_and_accumulate(isa, dtype):
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((3, 50, 7)).astype(d) for d in (dtype, "f4", "f4", dtype)]
    y, f, dy, df = (a.copy() for a in arrays)
    native.reverse_step(y, f, dy, df, None)
    assert_same_bits(y, expected(arrays[0], f, -1))
    assert_same_bits(dy, expected(arrays[2], df, 1))
    sizes = [(), (0, 4), (1,), (70000,), (5, 3), (1025,)]
    totals = [np.asarray(rng.standard_normal(s)).astype("f4") for s in sizes]
    parts = [np.asarray(rng.standard_normal(s)).astype(dtype) for s in sizes]
    wants = [expected(t, p, 1) for t, p in zip(totals, parts, strict=True)]
    native.accumulate(totals, parts)
    for total, want in zip(totals, wants, strict=True):
        assert_same_bits(total, want)


# Layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x_layout", "f_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(x_layout, f_layout):
    rng = np.random.default_rng(2)
    x, f = views(rng)[x_layout], views(rng)[f_layout]
    want = expected(x, f, 1)
    native.couple(x, x, f, None)
    assert_same_bits(x, want)
    want = expected(x, f, -1)
    native.uncouple(x, x, f, None)
    assert_same_bits(x, want)
    dy, df = views(rng)[f_layout], views(rng)[x_layout]
    want_y, want_dy = expected(x, f, -1), expected(dy, df, 1)
    native.reverse_step(x, f, dy, df, None)
    assert_same_bits(x, want_y)
    assert_same_bits(dy, want_dy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_written_between_the_elements(layout):
    x = views(np.random.default_rng(3))[layout]
    root = x if x.base is None else x.base
    before = root.copy()
    mask = np.zeros(root.shape, bool)
    offset = x.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    inside = np.ndarray(x.shape, bool, mask, offset // 4, [s // 4 for s in x.strides])
    inside[...] = True
    native.couple(x, x, np.ones_like(x), None)
    assert np.array_equal(root[~mask], before[~mask])
    assert (root[mask] != before[mask]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1), (2, 3, 4, 2, 3), (2,) * 12, (40000,), (3, 1, 33001)])
def test_shapes(shape, dtype):
    rng = np.random.default_rng(4)
    x, f = (np.asarray(rng.standard_normal(shape)).astype(dtype) for _ in range(2))
    want = expected(x, f, 1)
    native.couple(x, x, f, None)
    assert_same_bits(x, want)


def test_more_dimensions_than_the_library_takes():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((4, 6, 4, 6, 4, 6))[::2, ::3, ::2, ::3, ::2, ::3]
    f = rng.standard_normal((2, 2, 2, 2, 2, 2)).transpose(3, 1, 5, 0, 4, 2)
    want = x + f
    native.couple(x, x, f, None)
    assert np.array_equal(x, want)
    total, part = np.zeros_like(x), f.astype("f4")
    native.accumulate([total, x], [part, f])
    assert np.array_equal(total, part) and np.array_equal(x, want + f)


def test_an_expanded_branch_is_read_where_it_is():
    x, f = np.zeros((5, 7)), np.broadcast_to(np.arange(7.0), (5, 7))
    native.couple(x, x, f, None)
    assert np.array_equal(x, f)


def test_threads_do_not_matter():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    x, f = (rng.standard_normal((7, 64, 301)).astype("f4") for _ in range(2))
    seen, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, checksum, amax = torch.tensor(x), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
            options = Coupling(channel_scale=torch.linspace(0, 1, 64), grid_exponent=7, checksum=checksum, amax=amax)
            native.couple(y, y, torch.tensor(f).bfloat16(), options)
            seen.append((y, checksum, amax))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


# torch, and its absence ----------------------------------------------------------------------------------------------


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, f = torch.randn(2, 8, 5, 4).to(dtype), torch.randn(2, 4, 5, 4).to(dtype)
        half, want = x[:, 4:], x[:, 4:] + f
        native.couple(half, half, f.to(memory_format=torch.channels_last), None)
        assert torch.equal(half, want)
        total = torch.zeros(2, 4, 5, 4)
        native.accumulate([total], [f])
        assert torch.equal(total, f.float())


def test_tensors_are_read_alike_by_their_attributes():
    """As in a torch before 2.10, which has no table of C functions that describes a tensor: what is read and refused is
    the same."""
    code = "import sys, torch, pytest; name = '__dlpack_c_exchange_api__'; name in vars(torch.Tensor) and delattr("
    code += "torch.Tensor, name); sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    here = Path(__file__).parent
    tests = ["test_native.py::test_torch_tensors", "test_native_refusals.py::test_torch_refusals"]
    tests += ["test_norm_act_refusals.py", "test_ownership.py::test_a_chain_accumulates_its_gradients_in_place"]
    done = subprocess.run(
        [sys.executable, "-c", code, *(here / test for test in tests)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_never_imports_torch():
    code = "import sys, numpy as n; from revkernels import native; x = n.ones(5); native.couple(x, x, n.ones(5), None)"
    assert python(code + "; print(x.sum(), 'torch' in sys.modules)") == "10.0 False"


def test_without_the_extension():
    code = "import sys; sys.modules['revkernels._native'] = None; import revkernels; from revkernels import native;"
    said = python(code + "print(native.missing(), '|', native.missing('cuda'), native.cuda_architectures())")
    assert "pip install" in said.split("|")[0] and said.endswith("[]")
