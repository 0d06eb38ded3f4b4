# SPDX-License-Identifier: Apache-2.0
"""The public kernels: every backend against the oracle, bit for bit, on every dtype and layout."""

import itertools
import os

import numpy as np
import pytest

import revkernels as rk
from revkernels import ops, reference
from revkernels.backends import BACKENDS

torch = pytest.importorskip("torch")

FLOATS = ["float64", "float32", "bfloat16", "float16"]
PAIRS = list(itertools.product(FLOATS, repeat=2))
NUMPY_FLOATS = ["float64", "float32", "float16"]
OPERATIONS = ["couple", "uncouple", "couple_", "uncouple_", "reverse_step_", "accumulate_"]


def available(name):
    reason = BACKENDS[name].missing()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(f"backend {name!r} must be there in CI: {reason}")
        pytest.skip(f"backend {name!r}: {reason}")
    return name


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request):
    return available(request.param)


@pytest.fixture(params=["cpu", "reference"])
def numpy_backend(request):
    return available(request.param)


# ---- values and layouts. A layout is (shape of the memory, how to view it); it serves torch and NumPy alike.

LAYOUTS = {
    "scalar": ((), lambda a: a),
    "empty": ((3, 0, 4), lambda a: a),
    "one": ((1,), lambda a: a),
    "prime": ((1009,), lambda a: a),
    "image": ((2, 6, 5, 7), lambda a: a),
    "channels last": ((2, 5, 7, 6), lambda a: a.transpose(2, 3).transpose(1, 2)),
    "half of an image": ((2, 12, 5, 7), lambda a: a[:, 6:]),
    "half of channels last": ((2, 5, 7, 12), lambda a: a.transpose(2, 3).transpose(1, 2)[:, :6]),
    "half of rows": ((9, 34), lambda a: a[:, 17:]),
    "transposed": ((13, 17), lambda a: a.transpose(0, 1)),
    "every third": ((33, 21), lambda a: a[::3, ::3]),
    "misaligned": ((1030,), lambda a: a[3:]),
    "five dimensions": ((2, 3, 4, 5, 3), lambda a: a.transpose(1, 3)[:, :, ::2]),
}


def values_for(shape, dtype, number):
    """Float64 values that ``dtype`` holds exactly; some of them zeros of both signs, tiny, huge, infinite or NaN."""
    random = np.random.default_rng(number)
    values = random.standard_normal(shape) * np.exp2(random.integers(-12, 12, shape))
    special = random.random(shape)
    for share, value in (
        (0.02, 0.0),
        (0.04, -0.0),
        (0.05, np.inf),
        (0.06, -np.inf),
        (0.07, np.nan),
        (0.09, 6e-8),
        (0.11, 6e4),
    ):
        values = np.where(special < share, value, values)
        special = np.where(special < share, 2.0, special)
    return reference.round_to(values, dtype)


class Operand:
    """One array of one library, laid out in a larger memory whose rest must not change."""

    def __init__(self, library, layout, dtype, number, requires_grad=False):
        shape, view = LAYOUTS[layout]
        memory = values_for(shape, dtype, number)
        self.dtype, self.view = dtype, view
        if library == "torch":
            self.memory = torch.from_numpy(memory).to(getattr(torch, dtype))
            self.array = view(self.memory)
        else:
            self.memory = memory.astype(dtype)
            self.array = view(Transposable(self.memory)).array
        self.before = as_float64(self.memory)

    @property
    def values(self):
        return as_float64(self.array)

    def outside(self):
        """The memory as it is now and as it was, where the view does not reach."""
        marked = np.zeros(self.before.shape, bool)
        Transposable(marked).apply(self.view)[...] = True
        return as_float64(self.memory)[~marked], self.before[~marked]


class Transposable:
    """NumPy with torch's ``transpose(i, j)``, so that one function describes a layout in both."""

    def __init__(self, array):
        self.array = array

    def transpose(self, i, j):
        return Transposable(self.array.swapaxes(i, j))

    def __getitem__(self, key):
        return Transposable(self.array[key])

    def apply(self, view):
        return view(self).array


def as_float64(array):
    if isinstance(array, torch.Tensor):
        return array.detach().double().numpy().copy()
    return array.astype(np.float64)


def assert_same_bits(got, expected, what):
    assert got.shape == expected.shape
    same = (np.isnan(got) & np.isnan(expected)) | ((got == expected) & (np.signbit(got) == np.signbit(expected)))
    assert same.all(), f"{what}: {(~same).sum()} of {same.size} differ, {got[~same][0]!r} for {expected[~same][0]!r}"


def operands(library, layouts, dtypes):
    return [Operand(library, layout, d, number) for number, (layout, d) in enumerate(zip(layouts, dtypes, strict=True))]


def run(operation, arrays, backend, **options):
    """Call the operation; return the arrays that hold its results."""
    x, f, *more = arrays
    function = getattr(ops, operation)
    if operation == "reverse_step_":
        returned = function(x, f, *more, backend=backend, **options)
        assert returned[0] is x and returned[1] is more[0]
        return list(returned)
    returned = function(x, f, backend=backend, **options)
    assert (returned is x) is operation.endswith("_")
    return [returned]


def rounds_twice(backend, pair):
    """Torch converts float64 to a half type by way of float32; so does "eager", which is torch's own calls."""
    return backend == "eager" and pair[0] in ("bfloat16", "float16") and pair[1] == "float64"


def pairs_for(backend):
    return [pair for pair in PAIRS if not rounds_twice(backend, pair)]


def oracle(operation, values, dtypes, **options):
    if operation == "reverse_step_":
        return list(reference.reverse_step(*values, dtypes=dtypes, **options))
    function = getattr(reference, operation.rstrip("_"))
    return [function(*values[:2], *dtypes[:2], **options)]


def check(operation, library, layouts, dtypes, backend):
    given = operands(library, layouts, dtypes)
    expected = oracle(operation, [o.values for o in given], dtypes)
    read = given[1::2] if operation.endswith("_") else given
    results = run(operation, [o.array for o in given], backend)
    for number, (result, right) in enumerate(zip(results, expected, strict=True)):
        assert str(result.dtype).removeprefix("torch.") == dtypes[2 * number]
        assert_same_bits(as_float64(result), right, f"{operation} {dtypes} result {number}")
    for operand in read:
        assert_same_bits(as_float64(operand.memory), operand.before, "an operand that is only read")
    for operand in given:
        assert_same_bits(*operand.outside(), "memory beside the view")


def dtypes_of(operation, pair):
    x, f = pair
    return (x, f, x, f) if operation == "reverse_step_" else (x, f)


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
    for pair in itertools.product(NUMPY_FLOATS, repeat=2):
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


MIXED = [("image", "channels last"), ("channels last", "half of an image"), ("half of channels last", "image")]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layouts", MIXED, ids=" and ".join)
def test_operands_of_different_strides(operation, layouts, backend):
    """Each operand has strides of its own."""
    for pair in (("float32", "float32"), ("float32", "bfloat16"), ("float16", "float32")):
        dtypes = dtypes_of(operation, pair)
        check(operation, "torch", (layouts * 2)[: len(dtypes)], dtypes, backend)


def test_all_four_dtypes_of_reverse_step_differ(backend):
    """y, f, dy and df are four dtypes of their own."""
    for dtypes in itertools.permutations(FLOATS):
        if rounds_twice(backend, dtypes[:2]) or rounds_twice(backend, dtypes[2:]):
            continue
        check("reverse_step_", "torch", ["half of rows"] * 4, dtypes, backend)


@pytest.mark.parametrize("layout", ["image", "channels last", "transposed"])
def test_result_has_the_strides_of_x(layout, backend):
    """couple and uncouple return x's strides, never f's."""
    x, f = Operand("torch", layout, "float32", 0).array, Operand("torch", layout, "float32", 1).array.contiguous()
    for function in (ops.couple, ops.uncouple):
        assert function(x, f, backend=backend).stride() == x.stride()


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
def test_large(backend):
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


# ---- lists


def test_accumulate_lists(backend):
    """Arrays of any shapes and dtypes, in one call."""
    layouts = ["image", "prime", "half of rows", "empty", "scalar"]
    totals, parts = [], []
    for number, (layout, pair) in enumerate(zip(layouts, PAIRS[1:6], strict=True)):
        totals.append(Operand("torch", layout, pair[0], number))
        parts.append(Operand("torch", layout, pair[1], number + 50))
    expected = [reference.accumulate(t.values, p.values, t.dtype, p.dtype) for t, p in zip(totals, parts, strict=True)]
    given = [t.array for t in totals]
    assert ops.accumulate_(given, [p.array for p in parts], backend=backend) is given
    for total, right in zip(totals, expected, strict=True):
        assert_same_bits(total.values, right, "total")
        assert_same_bits(*total.outside(), "memory beside the view")


def test_accumulate_the_empty_list(backend):
    """Nothing to do is done."""
    assert ops.accumulate_([], [], backend=backend) == []


def test_accumulate_many(backend):
    """More arrays than any launch takes at once; one part given twice."""
    totals, part = [torch.full((n % 7,), float(n)) for n in range(300)], torch.ones(6)
    ops.accumulate_(totals, [part[: n % 7] for n in range(300)], backend=backend)
    assert all(torch.equal(total, torch.full((n % 7,), n + 1.0)) for n, total in enumerate(totals))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_thread_counts_do_not_change_results(backend):
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
