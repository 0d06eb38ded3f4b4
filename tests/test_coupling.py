# SPDX-License-Identifier: Apache-2.0
"""couple, uncouple and reverse_step: every backend against the oracle, bit for bit, on every dtype and layout."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from operands import (  # noqa: E402
    FLOATS,
    LAYOUTS,
    MIXED_LAYOUTS,
    MIXED_PAIRS,
    NUMPY_PAIRS,
    Operand,
    as_float64,
    assert_same_bits,
    check,
    dtypes_of,
    operands,
    oracle,
    pairs_for,
    rounds_twice,
    run,
    values_for,
)

import revkernels as rk  # noqa: E402
from revkernels import ops, reference  # noqa: E402

OPERATIONS = ["couple", "uncouple", "couple_", "uncouple_", "reverse_step_"]


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


@pytest.fixture(params=["cpu", "reference"])
def numpy_backend(request, available):
    return available(request.param)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch(operation, layout, backend):
    """Every pair of dtypes, on this layout."""
    for pair in pairs_for(backend):
        dtypes = dtypes_of(operation, pair)
        check(operation, "torch", [layout] * len(dtypes), dtypes, backend)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy(operation, layout, numpy_backend):
    """NumPy arrays, bfloat16 too where ml_dtypes gives NumPy that type."""
    for pair in NUMPY_PAIRS:
        dtypes = dtypes_of(operation, pair)
        check(operation, "numpy", [layout] * len(dtypes), dtypes, numpy_backend)


def test_numpy_bfloat16(numpy_backend):
    """ml_dtypes.bfloat16 is told by its name."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    for x_dtype, f_dtype in (("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")):
        x, f = values_for((7, 5), x_dtype, 0), values_for((7, 5), f_dtype, 1)
        arrays = [a.astype(bfloat16 if d == "bfloat16" else d) for a, d in ((x, x_dtype), (f, f_dtype))]
        y = ops.couple(*arrays, backend=numpy_backend)
        assert y.dtype.name == x_dtype
        assert_same_bits(y.astype(np.float64), reference.couple(x, f, x_dtype, f_dtype), "couple")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layouts", MIXED_LAYOUTS, ids=" and ".join)
def test_operands_of_different_strides(operation, layouts, backend):
    """Each operand has strides of its own."""
    for pair in MIXED_PAIRS:
        dtypes = dtypes_of(operation, pair)
        check(operation, "torch", (layouts * 2)[: len(dtypes)], dtypes, backend)


def test_all_four_dtypes_of_reverse_step_differ(backend):
    """y, f, dy and df are four dtypes of their own."""
    for dtypes in itertools.permutations(FLOATS):
        if rounds_twice(backend, dtypes[:2]) or rounds_twice(backend, dtypes[2:]):
            continue
        check("reverse_step_", "torch", ["half of rows"] * 4, dtypes, backend)


LAID_OUT = {  # what couple and uncouple return of each: dense, the dimensions in the order that x has them in memory
    "image": (210, 35, 7, 1),
    "channels last": (210, 1, 42, 6),
    "transposed": (1, 17),
    "half of an image": (210, 35, 7, 1),
    "half of channels last": (210, 1, 42, 6),
    "half of rows": (17, 1),
    "every third": (7, 1),
}


@pytest.mark.parametrize("layout", LAID_OUT)
def test_result_is_dense_in_the_memory_order_of_x(layout, backend):
    """Never in f's, and never with the gaps of a view."""
    x, f = Operand("torch", layout, "float32", 0).array, Operand("torch", layout, "float32", 1).array.contiguous()
    for function in (ops.couple, ops.uncouple):
        assert function(x, f, backend=backend).stride() == LAID_OUT[layout]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_eager_rounds_twice_where_torch_does(dtype):
    """float64 onto a half type: within one unit in the last place. Only there is eager not the oracle to the bit."""
    x, f = Operand("torch", "prime", dtype, 0), Operand("torch", "prime", "float64", 1)
    x.array.nan_to_num_(0.0, 1.0, -1.0)
    f.array.nan_to_num_(0.0, 1.0, -1.0)
    right = reference.couple(x.values, f.values, dtype, "float64")
    got = as_float64(ops.couple(x.array, f.array, backend="eager"))
    unit = {"bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
    np.testing.assert_allclose(got, right, rtol=unit, atol=2.0**-24)
    assert_same_bits(got, as_float64((x.array.double() + f.array).to(x.array.dtype)), "torch's own conversion")


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_large(backend, available):
    """Past any block, thread or tile: 1,000,003 elements, and 3 rows of 400,001."""
    available(backend)
    for shape in ((1_000_003,), (3, 400_001)):
        y, f, dy, df = (torch.randn(shape) for _ in range(4))
        expected = y - f, dy + df
        ops.reverse_step_(y, f, dy, df, backend=backend)
        assert torch.equal(y, expected[0])
        assert torch.equal(dy, expected[1])


# ---- the coupling's options

COUPLINGS = {
    "channel scale": {"channels": True},
    "channel scale, last dimension": {"channels": True, "channel_dim": -1},
    "channel scale, first dimension": {"channels": True, "channel_dim": 0},
    "sample scale": {"samples": True},
    "both scales": {"channels": True, "samples": True},
    "grid": {"grid_exponent": 4},
    "coarse grid": {"grid_exponent": -3},
    "everything": {"channels": True, "samples": True, "grid_exponent": 9},
}


@pytest.mark.parametrize("layout", ["image", "channels last", "half of an image", "half of rows", "five dimensions"])
@pytest.mark.parametrize("name", COUPLINGS)
def test_options_of_the_coupling(name, layout, backend):
    """Scales, grid, checksum and amax together, against the oracle, for every pair of dtypes."""
    options = dict(COUPLINGS[name])
    channels, samples = options.pop("channels", False), options.pop("samples", False)
    for pair in pairs_for(backend):
        for operation in ("couple", "uncouple_", "reverse_step_"):
            dtypes = dtypes_of(operation, pair)
            given = operands("torch", [layout] * len(dtypes), dtypes)
            for operand in given:
                operand.array.nan_to_num_(1.0, 2.0, -2.0)
            x = given[0].array
            wide = torch.float64 if "float64" in pair else torch.float32
            dim = options.get("channel_dim", 1)
            scales = {
                "channel_scale": torch.rand(x.shape[dim]).to(wide) if channels else None,
                "sample_scale": torch.rand(x.shape[0]).to(wide) if samples else None,
            }
            # A kernel walks three dimensions at most: one it cannot merge leaves no memory order to number elements by.
            ordered = dim == 1 or layout not in ("half of an image", "five dimensions")
            checksum, amax = torch.full((1,), 5, dtype=torch.int64) if ordered else None, torch.zeros(1)
            coupling = rk.Coupling(**scales, **options, checksum=checksum, amax=amax)
            plain = {key: None if scale is None else scale.double().numpy() for key, scale in scales.items()}
            expected = oracle(operation, [o.values for o in given], dtypes, **plain, **options)
            results = run(operation, [o.array for o in given], backend, coupling=coupling)
            for result, right in zip(results, expected, strict=True):
                assert_same_bits(as_float64(result), right, f"{operation} {dtypes}")
            first = expected[0]
            in_memory = np.transpose(first, sorted(range(first.ndim), key=lambda d, r=results[0]: -r.stride(d)))
            if ordered:
                total = 5 + reference.checksum_of(in_memory, pair[0])
                assert int(checksum) % 2**64 == total % 2**64, f"checksum of {operation} {dtypes}"
            assert float(amax) == reference.amax_of(first)


def test_checksum_and_amax_accumulate_over_calls(backend):
    """They are added to and raised, never set."""
    checksum, amax = torch.zeros(1, dtype=torch.int64), torch.full((1,), 100.0)
    coupling = rk.Coupling(checksum=checksum, amax=amax)
    x, f = torch.ones(3), torch.ones(3)
    ops.couple(x, f, coupling=coupling, backend=backend)
    once = int(checksum)
    ops.couple(x, f, coupling=coupling, backend=backend)
    assert int(checksum) == 2 * once != 0
    assert float(amax) == 100.0
    ops.couple(x, torch.full((3,), torch.nan), coupling=coupling, backend=backend)
    assert torch.isnan(amax).all()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_thread_counts_do_not_change_results(backend, available):
    """1, 2 and 4 threads, one result, checksum included."""
    available(backend)
    before = torch.get_num_threads()
    x, f = torch.randn(100_003), torch.randn(100_003)
    seen = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            checksum, amax = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
            y = ops.couple(x, f, coupling=rk.Coupling(checksum=checksum, amax=amax), backend=backend)
            seen.append((y, checksum, amax))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in seen[1:] for a, b in zip(one, seen[0], strict=True))
