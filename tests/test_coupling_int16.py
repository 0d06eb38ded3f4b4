# SPDX-License-Identifier: Apache-2.0
"""Couplings of int16 streams, in fixed point: every backend against the oracle, bit for bit."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from operands import (  # noqa: E402
    FLOATS,
    LAYOUTS,
    Operand,
    as_float64,
    assert_same_bits,
    operands,
    oracle,
    run,
    values_for,
)

import revkernels as rk  # noqa: E402
from revkernels import ops, reference  # noqa: E402

OPERATIONS = ["couple", "uncouple", "couple_", "uncouple_", "reverse_step_"]
K = 4  # 6e4, which is among the values of `operands`, leaves the int16 far behind, 1 does not


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


@pytest.fixture(params=["cpu", "reference"])
def numpy_backend(request, available):
    return available(request.param)


def cells(library="torch"):
    if library == "numpy":
        return {"checksum": np.full(1, 5), "amax": np.zeros(1, np.float32)}
    return {"checksum": torch.full((1,), 5), "amax": torch.zeros(1)}


def dtypes_of(operation, f):
    return ("int16", f, "float32", "bfloat16") if operation == "reverse_step_" else ("int16", f)


def check(operation, library, layouts, f_dtype, value, backend, k=K, ordered=True, finite=False, **scales):
    """One call with everything it can report. ``value`` is (layout, dtype), or None."""
    dtypes = dtypes_of(operation, f_dtype)
    if library == "numpy":
        dtypes = [d.replace("bfloat16", "float16") for d in dtypes]
    given = operands(library, (list(layouts) * 2)[: len(dtypes)], dtypes)
    if finite:  # an amax that is NaN hides every other
        given[1].array[...] = given[1].array.clip(-6e4, 6e4)
        given[1].array[given[1].array != given[1].array] = -3
        given[1].before = as_float64(given[1].memory)
    number = None if value is None else Operand(library, *value, 9)
    plain = {name: scale if name == "channel_dim" else as_float64(scale) for name, scale in scales.items()}
    q, f = given[0].values, given[1].values
    expected = oracle(operation, [o.values for o in given], dtypes, grid_exponent=k, **plain)
    subtract = operation not in ("couple", "couple_")
    largest = reference.amax_before_wrapping(q, f, subtract, f_dtype, grid_exponent=k, **plain)

    report = cells(library)
    if not ordered:
        del report["checksum"]
    coupling = rk.Coupling(grid_exponent=k, **scales, **report, value=None if value is None else number.array)
    results = run(operation, [o.array for o in given], backend, coupling=coupling)
    what = f"{operation} {f_dtype} {layouts} {value} k={k}"
    for result, right, dtype in zip(results, expected, dtypes[::2], strict=True):
        assert str(result.dtype).removeprefix("torch.") == dtype
        assert_same_bits(as_float64(result), right, what)
    stored = expected[0]
    if ordered:
        strides = results[0].stride() if library == "torch" else results[0].strides
        in_memory = stored.transpose(sorted(range(stored.ndim), key=lambda d: -strides[d]))
        assert report["checksum"].item() % 2**64 == 5 + reference.checksum_of(in_memory, "int16"), what
    amax = report["amax"].item()
    assert np.isfinite(amax) or not finite
    assert amax == largest or (np.isnan(amax) and np.isnan(largest)), f"{what}: amax {amax}, not {largest}"
    if value is not None:
        assert_same_bits(number.values, reference.value_of(stored, k, value[1]), f"value of {what}")
        assert_same_bits(*number.outside(), "memory beside value")
    for operand in given:
        assert_same_bits(*operand.outside(), "memory beside the view")
    for operand in given[1::2] if operation.endswith("_") else given:
        assert_same_bits(as_float64(operand.memory), operand.before, "an operand that is only read")


# ---- the oracle, against whole numbers and fractions


def test_oracle_by_hand():
    """Halves to even, -0, both ends, wrapping both ways, and what is no number."""
    q = np.array([0, 0, 0, 0, 0, 32767, -32768, 5, 5, 5, 7, 7])
    f = np.array([0.5, 1.5, -0.5, -2.5, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 2.0**30, 2.0**23 - 1])
    after = [0, 2, 0, -2, 0, -32768, 32767, 5, 5, 5, 7, 6]
    assert reference.couple(q, f, "int16", "float64", grid_exponent=0).tolist() == after
    back = reference.uncouple(np.array(after), f, "int16", "float64", grid_exponent=0)
    assert back.tolist() == q.tolist()
    amax = reference.amax_before_wrapping
    assert amax(np.array([32767]), np.array([3.0]), False, "float32", grid_exponent=2) == np.float32((32767 + 12) / 4)
    assert amax(np.array([-5]), np.array([3.0]), True, "float32", grid_exponent=0) == 8
    assert amax(np.array([1, 1]), np.array([1.0, -np.inf]), True, "float32", grid_exponent=0) == np.inf
    assert np.isnan(amax(np.array([1, 1]), np.array([np.inf, np.nan]), True, "float32", grid_exponent=0))
    assert reference.value_of(np.array([-32768.0, 257.0]), 3, "bfloat16").tolist() == [-4096.0, 32.0]


@given(st.integers(-32768, 32767), st.floats(width=32), st.integers(-126, 126))
def test_oracle_in_fractions(q, f, k):
    """q + rint(f 2^k), exactly, wherever 2^k f is a float32 that is not limited."""
    scaled = Fraction(0) if not np.isfinite(f) else Fraction(f) * Fraction(2) ** k
    if not np.isfinite(f) or abs(scaled) >= 2**23 or (scaled and abs(scaled) < Fraction(2) ** -126):
        return
    whole = q + round(scaled)  # a Fraction rounds half to even
    one, stored = np.array([f]), np.array([q], np.float64)
    got = reference.couple(stored, one, "int16", "float32", grid_exponent=k)
    assert int(got[0]) % 2**16 == whole % 2**16 and -(2**15) <= got[0] < 2**15
    largest = reference.amax_before_wrapping(stored, one, False, "float32", grid_exponent=k)
    exact = abs(whole) * Fraction(2) ** -k
    assert largest == (np.inf if exact >= 2**128 else float(exact)) or abs(whole) * 2.0**-k < 2.0**-126


# ---- every backend against it


@pytest.mark.parametrize("layout", ["image", "half of channels last", "every third", "misaligned", "prime"])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa, layout, available):
    """The loops of each that this machine has."""
    available("cpu")
    from revkernels import _native

    before = _native.cpu_isa()
    try:
        if not _native.set_isa(isa):
            pytest.skip(f"no {isa} here")
        for operation, f_dtype, v_dtype in itertools.product(("couple", "uncouple_"), FLOATS, FLOATS):
            for finite in (False, True):
                check(operation, "torch", [layout] * 2, f_dtype, (layout, v_dtype), "cpu", finite=finite)
    finally:
        _native.set_isa(before)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch(operation, layout, backend):
    """Every type of the branch and, in turn, of value."""
    for turn, f_dtype in enumerate(FLOATS):
        for value in (None, (layout, FLOATS[turn])):
            ordered = layout != "five dimensions" or value is None
            check(operation, "torch", [layout] * 2, f_dtype, value, backend, ordered=ordered, finite=turn % 2 == 0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy(operation, layout, numpy_backend):
    for f_dtype, v_dtype in (("float64", "float32"), ("float32", "float16"), ("float16", "float64")):
        check(operation, "numpy", [layout] * 2, f_dtype, (layout, v_dtype), numpy_backend, ordered=layout == "image")


MIXED = ["image", "channels last", "half of an image", "half of channels last"]


@pytest.mark.parametrize("layouts", list(itertools.permutations(MIXED, 3)), ids=" and ".join)
def test_operands_of_different_strides(layouts, backend):
    """Stream, branch and value lie in memory each in its own way."""
    for operation, v_dtype in zip(OPERATIONS, [*FLOATS, "bfloat16"], strict=True):
        check(operation, "torch", layouts[:2], "float32", (layouts[2], v_dtype), backend, ordered=False)


@pytest.mark.parametrize("v_dtype", FLOATS)
@pytest.mark.parametrize("k", [-126, -113, -100, -17, 0, 14, 126])
def test_every_value(k, v_dtype, backend):
    """All 65,536 of them, in each type: rounded once, infinite where the type ends."""
    q = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    value = torch.full(q.shape, 7.0, dtype=getattr(torch, v_dtype))
    kept = q.clone()
    ops.couple_(q, torch.zeros(q.shape), coupling=rk.Coupling(grid_exponent=k, value=value), backend=backend)
    assert torch.equal(q, kept)
    with np.errstate(over="ignore"):
        assert_same_bits(as_float64(value), reference.round_to(as_float64(kept) * 2.0**-k, v_dtype), "value")


def edges(dtype):
    """Ties and their neighbours, the ends of int16 and of 2^23, what float types hold at most, and no numbers."""
    wide = np.arange(-6, 7) / 2
    ends = np.array([32766.5, 32767, 32767.5, 32768, 65535.5, 65536, 2**22 + 0.5, 2**23 - 1, 2**23 - 0.5, 2**23])
    huge = np.array([2**23 + 1, 2**24 + 2, 2**31, 2**31 + 2**10, 2**32, 2**63, 1e19, 65504, 3e38, 1.7e308, np.inf])
    tiny = np.array([0.0, 0.3, 0.49999997, 0.50000003, 6e-8, 1e-45, 5e-324])
    some = np.concatenate([wide, ends, huge, tiny])
    near = np.nextafter(some.astype(np.float32), np.float32(np.inf)).astype(np.float64)
    every = np.concatenate([some, near, np.nextafter(some, 0), [np.nan]])
    return reference.round_to(np.concatenate([every, -every]), dtype)


@pytest.mark.parametrize("f_dtype", FLOATS)
@pytest.mark.parametrize("subtract", [False, True], ids=["couple", "uncouple"])
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_edges(subtract, f_dtype, backend):
    """Every edge of f against every edge of the stream, one call each, so that every amax is seen."""
    fs = edges(f_dtype)
    qs = np.array([-32768, -32767, -1, 0, 1, 2, 32767])
    f, q = (a.ravel() for a in np.meshgrid(fs, qs))
    function, operation = (ops.uncouple, reference.uncouple) if subtract else (ops.couple, reference.couple)
    tensors = torch.from_numpy(q).to(torch.int16), torch.from_numpy(f).to(getattr(torch, f_dtype))
    for k in (0, 1, -3, 20, 126, -126):
        amax = torch.zeros(1)
        got = function(*tensors, coupling=rk.Coupling(grid_exponent=k, amax=amax), backend=backend)
        right = operation(q.astype(np.float64), f, "int16", f_dtype, grid_exponent=k)
        assert_same_bits(as_float64(got), right, f"k={k}")
        assert torch.isnan(amax).all()
        for at in range(0, len(f), 5):  # NaN would hide the others
            amax = torch.zeros(1)
            one = [t[at : at + 1] for t in tensors]
            function(*one, coupling=rk.Coupling(grid_exponent=k, amax=amax), backend=backend)
            largest = reference.amax_before_wrapping(q[at : at + 1], f[at : at + 1], subtract, f_dtype, grid_exponent=k)
            assert_same_bits(as_float64(amax), np.array([np.float64(largest)]), f"amax of {q[at]}, {f[at]}, k={k}")


SCALES = {
    "channel scale": {"channels": 1},
    "channel scale, last dimension": {"channels": -1},
    "sample scale": {"samples": True},
    "both scales": {"channels": 1, "samples": True},
}


@pytest.mark.parametrize("layout", ["image", "channels last", "half of an image", "half of rows", "five dimensions"])
@pytest.mark.parametrize("name", SCALES)
def test_scales(name, layout, backend):
    shape = Operand("torch", layout, "float32", 0).array.shape
    for operation, f_dtype in itertools.product(("couple", "uncouple_", "reverse_step_"), FLOATS):
        wide = torch.float64 if f_dtype == "float64" else torch.float32
        scales = {}
        if "channels" in SCALES[name]:
            dim = SCALES[name]["channels"]
            scales |= {"channel_scale": torch.rand(shape[dim]).to(wide), "channel_dim": dim}
        if "samples" in SCALES[name]:
            scales["sample_scale"] = torch.rand(shape[0]).to(wide)
        ordered = SCALES[name].get("channels") == 1 and layout in ("image", "channels last", "half of rows")
        value = layout, "float16"
        check(operation, "torch", [layout] * 2, f_dtype, value, backend, ordered=ordered, finite=True, **scales)


@pytest.mark.parametrize("f_dtype", FLOATS)
def test_large(f_dtype, backend):
    """Past any block, thread or tile, with both cells; one result for any number of threads."""
    if backend == "reference":
        pytest.skip("one element at a time")
    before = torch.get_num_threads()
    f = (torch.randn(3, 100_003) * 300).to(getattr(torch, f_dtype))
    q = torch.randint(-(2**15), 2**15, f.shape, dtype=torch.int16)
    n = torch.round(f.to(torch.float64) * 2.0**6).to(torch.int64)
    seen = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            value, report = torch.empty(f.shape), cells()
            coupling = rk.Coupling(grid_exponent=6, value=value, **report)
            y = ops.couple(q, f, coupling=coupling, backend=backend)
            assert torch.equal(y, (q + n).to(torch.int32).to(torch.int16))
            assert torch.equal(value, y * 2.0**-6)
            assert float(report["amax"]) == (q + n).abs().max() * 2.0**-6
            seen.append(int(report["checksum"]))
    finally:
        torch.set_num_threads(before)
    assert len(set(seen)) == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_uncoupling_gives_back_every_bit(data):
    """Whatever f is and however often the stream wraps, by the compiled kernels and by plain torch calls."""
    k, depth = data.draw(st.integers(-126, 126)), data.draw(st.integers(1, 4))
    f_dtype = data.draw(st.sampled_from(FLOATS))
    bits = {"float64": np.uint64, "float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}[f_dtype]
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    start = torch.from_numpy(random.integers(-(2**15), 2**15, (7, 33)).astype(np.int16))
    signed = {8: torch.int64, 4: torch.int32, 2: torch.int16}[np.dtype(bits).itemsize]
    fs = []
    for _ in range(depth):
        any_bits = random.integers(0, np.iinfo(bits).max, (7, 33), dtype=bits, endpoint=True)
        fs.append(torch.from_numpy(any_bits.view(f"i{any_bits.itemsize}")).to(signed).view(getattr(torch, f_dtype)))
    for backend in ("cpu", "eager"):
        x = start.clone()
        for f in fs:
            ops.couple_(x, f, coupling=rk.Coupling(grid_exponent=k), backend=backend)
        for f in reversed(fs):
            ops.uncouple_(x, f, coupling=rk.Coupling(grid_exponent=k), backend=backend)
        assert torch.equal(x, start)


def test_reverse_step_undoes_couple(backend):
    """y is x again, wrapped or not, and the value of it comes in the same pass."""
    q, f = torch.from_numpy(values_for((5, 77), "int16", 0)).to(torch.int16), torch.randn(5, 77) * 1e4
    y = ops.couple(q, f, coupling=rk.Coupling(grid_exponent=3), backend=backend)
    assert (y.int() - q.int()).abs().max() > 2**15, "nothing has wrapped"
    dy, df, value = torch.randn(5, 77), torch.randn(5, 77).bfloat16(), torch.empty(5, 77)
    total = dy + df
    ops.reverse_step_(y, f, dy, df, coupling=rk.Coupling(grid_exponent=3, value=value), backend=backend)
    assert torch.equal(y, q)
    assert torch.equal(value, q / 8)
    assert torch.equal(dy, total)


def test_cells_accumulate(backend):
    """The checksum is added to, the amax raised and never lowered."""
    report = cells()
    coupling = rk.Coupling(grid_exponent=0, **report)
    x = torch.full((3,), -300, dtype=torch.int16)
    ops.couple(x, torch.zeros(3), coupling=coupling, backend=backend)
    once = int(report["checksum"]) - 5
    ops.couple(x, torch.full((3,), 299.0), coupling=coupling, backend=backend)
    assert once == (65536 - 300) * 9
    assert int(report["checksum"]) == 5 + once + 65535 * 9
    assert float(report["amax"]) == 300
