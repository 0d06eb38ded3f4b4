# SPDX-License-Identifier: Apache-2.0
"""norm_act, couple_norm_act, uncouple_norm_act_: every backend against the oracle.

With statistics given and an activation without transcendental functions every operation is fixed, so bits are compared.
Computed statistics, and the smooth activations, have bounds, each with its derivation beside it.
"""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from norm_cases import (  # noqa: E402
    EPSILON,
    KINDS,
    LAYOUTS,
    SMALL,
    SMOOTH,
    Operand,
    Oracle,
    norm_for,
    normal,
    some_statistics,
    vector,
    wide_of,
)
from operands import FLOATS, NUMPY_PAIRS, PAIRS, as_float64, assert_same_bits, rounds_twice, values_for  # noqa: E402

from revkernels import backends, ops  # noqa: E402
from revkernels.norm import Norm  # noqa: E402

EXACT = ("none", "relu")


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


def special(seed):
    """Zeros of both signs, NaN, infinities, tiny and huge numbers among others."""
    return lambda shape: values_for(shape, "float64", seed)


# ---- given statistics: bits


def check_given(layout, kind, activation, dtypes, backend, library="torch"):
    x_dtype, h_dtype = dtypes
    x = Operand(layout, x_dtype, special(1), library)
    wide = wide_of(x_dtype)
    norm = norm_for(kind, x.array, x.axis, activation, library=library)
    statistics = some_statistics(norm, x.array, wide, library=library)
    dtype = getattr(torch, h_dtype) if library == "torch" else h_dtype
    h, same = ops.norm_act(x.array, norm, statistics=statistics, dtype=dtype, backend=backend)
    assert all(a is b for a, b in zip(same, statistics, strict=True))
    assert str(h.dtype).removeprefix("torch.") == h_dtype
    expected = Oracle(norm, x.array.shape, wide).h(x.values, statistics, h_dtype)
    assert_same_bits(as_float64(h), expected, f"h of {kind} {activation} {dtypes} {layout}")
    assert_same_bits(as_float64(x.memory), x.before, "x")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_statistics(layout, kind, backend):
    """Every layout; x and h of the same dtype, and of two."""
    for dtypes in [*((d, d) for d in FLOATS), ("bfloat16", "float32"), ("float32", "float16")]:
        check_given(layout, kind, "relu", dtypes, backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", EXACT)
def test_every_pair_of_dtypes(kind, activation, backend):
    """x of any type, h of any type."""
    for pair in PAIRS:
        if not rounds_twice(backend, (pair[1], pair[0])):
            check_given("half of channels last", kind, activation, pair, backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_numpy(layout, kind, backend, available):
    """NumPy arrays."""
    for pair in NUMPY_PAIRS:
        check_given(layout, kind, "relu", pair, available(backend), "numpy")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameters", list(itertools.product([None, *FLOATS], repeat=2)), ids=str)
def test_parameters(kind, parameters, backend):
    """Without weight or bias, and with each dtype: they are rounded to the compute type before they are used."""
    weight_dtype, bias_dtype = parameters
    if None not in parameters and weight_dtype != bias_dtype:
        with pytest.raises(TypeError, match=rf"bias is .*{bias_dtype}.* must .*{weight_dtype}"):
            norm = Norm(
                kind,
                torch.ones(6, dtype=getattr(torch, weight_dtype)),
                torch.ones(6).double().to(getattr(torch, bias_dtype)),
                channel_dim=1,
            )
            ops.norm_act(torch.ones(2, 6, 3), norm, backend=backend)
        return
    for layout, x_dtype in itertools.product(("image", "channels last"), ("float32", "float64", "bfloat16")):
        x = Operand(layout, x_dtype, special(2))
        made = [None if d is None else vector((6,), d, normal(n)) for n, d in enumerate(parameters)]
        norm = Norm(kind, *made, groups=3 if kind == "group" else 1, channel_dim=1)
        statistics = some_statistics(norm, x.array, wide_of(x_dtype))
        h, _ = ops.norm_act(x.array, norm, statistics=statistics, backend=backend)
        expected = Oracle(norm, x.array.shape, wide_of(x_dtype)).h(x.values, statistics, x_dtype)
        assert_same_bits(as_float64(h), expected, f"h of {kind} {x_dtype} {layout}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations(kind, activation, backend):
    """Given statistics, z from -100 to 100, its bits the oracle's.

    The kernels' functions are within 4 last places, 8 eps |h|; those of float64 are the C library's, whose argument is
    rounded first, which erfc magnifies by z^2 and exp by 2u. Torch's gelu is z/2 (1 + erf) with an erf of 5e-7 or 8
    eps: 16 |z| eps in all. Either way h is then rounded to its own dtype: eps' |h|, or half its smallest number.
    """
    for x_dtype, h_dtype in [(d, d) for d in FLOATS] + [("float32", "bfloat16"), ("bfloat16", "float32")]:
        wide = wide_of(x_dtype)
        x = Operand("tokens", x_dtype, lambda shape: np.linspace(-30, 30, np.prod(shape)).reshape(shape))
        plain = norm_for(kind, x.array, 2)
        norm = norm_for(kind, x.array, 2, activation)
        statistics = some_statistics(norm, x.array, wide)
        h, _ = ops.norm_act(x.array, norm, statistics=statistics, dtype=getattr(torch, h_dtype), backend=backend)
        expected = Oracle(norm, x.array.shape, wide).h(x.values, statistics, h_dtype)
        z = Oracle(plain, x.array.shape, wide).h(x.values, statistics, wide)
        twice_u = np.abs(1.596 * z + 0.0714 * z**3)
        magnified = {"gelu": 2 * z**2, "gelu_tanh": 4 * twice_u, "silu": 0 * z}[activation] * (wide == "float64")
        function = 16 * np.abs(z) if backend == "eager" else (8 + magnified) * np.abs(expected)
        smallest = 2.0**-24 if h_dtype == "float16" else 2.0**-126
        bound = EPSILON[wide] * function + 2 * EPSILON[h_dtype] * np.abs(expected) + smallest
        assert (np.abs(as_float64(h) - expected) <= bound).all()


# ---- computed statistics


def assert_statistics(norm, values, found, wide, what):
    """mean and rstd against sums in extended precision.

    A sum over blocks in the compute type, each of which begins near its own mean, is off by a few roundings of the
    deviation; and both means are rounded: eps (2 |mean| + 16 deviation), and 16 eps for rstd. The blocks' means are
    merged in float64, which where x is float64 itself takes a rounding of eps |mean| each time: a walk of no more steps
    than elements, sqrt(n) eps |mean|, and that over the deviation in rstd. Sums of x and of x^2 as they are would be
    off by (mean / deviation)^2 eps.
    """
    mean, rstd, variance = (s.astype(np.float64) for s in Oracle(norm, values.shape, wide).statistics(values))
    epsilon, deviation = EPSILON[wide], np.sqrt(variance + norm.eps)
    steps = np.sqrt(values.size / max(mean.size, 1)) if wide == "float64" else 0
    merged = steps * np.abs(mean)
    if found.mean is not None:
        off = np.abs(as_float64(found.mean).ravel() - mean)
        assert (off <= epsilon * (2.01 * np.abs(mean) + 16 * deviation + merged)).all(), f"mean of {what}"
    else:
        assert norm.kind == "rms"
    off = np.abs(as_float64(found.rstd).ravel() - rstd)
    assert (off <= epsilon * (16 + merged / deviation) * rstd).all(), f"rstd of {what}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_computed_statistics(layout, kind, backend):
    """They are x's own; and h is what it would be with these given, bit for bit, whatever the activation."""
    for x_dtype, activation in zip(FLOATS, ("relu", "gelu", "none", "silu"), strict=True):
        x = Operand(layout, x_dtype, normal(3, 0.5))
        norm = norm_for(kind, x.array, x.axis, activation)
        h, statistics = ops.norm_act(x.array, norm, backend=backend)
        assert statistics.rstd.dtype == getattr(torch, wide_of(x_dtype))
        assert tuple(statistics.rstd.shape) == norm.statistics_shape(tuple(x.array.shape))
        assert_statistics(norm, x.values, statistics, wide_of(x_dtype), f"{layout} {x_dtype}")
        again, _ = ops.norm_act(x.array, norm, statistics=statistics, backend=backend)
        assert_same_bits(as_float64(h), as_float64(again), f"h of {layout} {x_dtype}")


FAR = {
    "channels last": ((2, 24, 33, 31), lambda a: a.to(memory_format=torch.channels_last), 1),
    "image": ((2, 24, 33, 31), lambda a: a, 1),
    "rows": ((3000, 8), lambda a: a, 1),
    "wide rows": ((6, 3001), lambda a: a, 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", FAR)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_mean_far_from_zero(layout, kind, dtype, backend):
    """Mean 1e4, deviation 1: in float32 the squares alone would lose every digit of the variance."""
    shape, view, axis = FAR[layout]
    x = view(torch.from_numpy(normal(4, 1e4)(shape)).to(getattr(torch, dtype)))
    norm = norm_for(kind, x, axis)
    _, statistics = ops.norm_act(x, norm, backend=backend)
    assert_statistics(norm, as_float64(x), statistics, dtype, f"{kind} {layout}")


def test_channels_that_start_far_out(backend):
    """A first value that is far from all others is no reason to lose the others' digits."""
    x = torch.from_numpy(normal(5)((4, 6, 40, 30))).float()
    x[0, :, 0, 0] = 1e3
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        for kind in ("batch", "group", "layer"):
            norm = norm_for(kind, given, 1)
            _, statistics = ops.norm_act(given, norm, backend=backend)
            assert_statistics(norm, as_float64(given), statistics, "float32", kind)


def test_constant_input(backend):
    """A variance of exactly 0: rstd is 1 / sqrt(eps), h the bias."""
    x = torch.full((4, 6, 5), 3.7)
    for kind in ("batch", "layer", "group"):
        norm = norm_for(kind, x, 1)
        h, statistics = ops.norm_act(x, norm, backend=backend)
        torch.testing.assert_close(statistics.rstd, torch.full_like(statistics.rstd, 1e-5**-0.5), rtol=2e-7, atol=0)
        assert torch.equal(h, norm.bias[:, None].expand_as(h)), kind


# ---- running statistics


@pytest.mark.parametrize("running_dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics(running_dtype, momentum, backend):
    """running <- (1 - momentum) running + momentum batch, the variance unbiased; within their own rounding."""
    for call in (ops.norm_act, lambda x, *a, **k: ops.couple_norm_act(x, torch.zeros_like(x), *a, **k)[1:]):
        x = torch.from_numpy(normal(6, 2.0)((4, 6, 5, 3))).float()
        running = [vector((6,), running_dtype, normal(n, 1.0)) for n in (7, 8)]
        before = [as_float64(r) for r in running]
        options = dict(zip(("running_mean", "running_var"), running, strict=True), momentum=momentum)
        norm = norm_for("batch", x, 1, **options)
        _, statistics = call(x, norm, backend=backend)
        values = as_float64(x).transpose(1, 0, 2, 3).reshape(6, -1)
        batch = (values.mean(1), values.var(1, ddof=1))
        for got, old, new in zip(running, before, batch, strict=True):
            expected = (1 - momentum) * old + momentum * new
            epsilon = max(EPSILON[running_dtype], 4 * EPSILON["float32"])  # the batch's own are float32
            assert (np.abs(as_float64(got) - expected) <= 2 * epsilon * (np.abs(old) + np.abs(new))).all()
        kept = [as_float64(r) for r in running]
        call(x, norm, statistics=statistics, backend=backend)
        for got, old in zip(running, kept, strict=True):
            assert_same_bits(as_float64(got), old, "running statistics where the batch's were given")


def test_running_statistics_of_nothing_stay(backend):
    """An empty batch says nothing."""
    running = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    norm = Norm("batch", running_mean=running[0], running_var=running[1])
    h, statistics = ops.norm_act(torch.zeros(0, 2, 3), norm, backend=backend)
    assert h.shape == (0, 2, 3)
    assert running[0].tolist() == [1, 2]
    assert running[1].tolist() == [3, 4]
    assert statistics.mean.tolist() == [0, 0]
    torch.testing.assert_close(statistics.rstd, torch.full((2,), 1e-5**-0.5))


def test_running_statistics_of_one_element(backend):
    """Its variance is 0, not 0 / 0."""
    running = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    norm = Norm("batch", running_mean=running[0], running_var=running[1], momentum=0.5)
    h, _ = ops.norm_act(torch.tensor([[5.0, 6.0]]), norm, backend=backend)
    assert h.tolist() == [[0, 0]]
    assert running[0].tolist() == [3, 4]
    assert running[1].tolist() == [1.5, 2]


# ---- the coupling in front


COUPLED = [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float32"),
           ("float64", "float64"), ("float32", "float64")]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_couple_norm_act(layout, kind, backend):
    """y has `couple`'s bits. h is made of y as it was stored: bits of the oracle, and of norm_act, in this backend."""
    for dtypes in COUPLED:
        x, f = (Operand(layout, d, normal(n)) for n, d in enumerate(dtypes))
        wide = wide_of(*dtypes)
        norm = norm_for(kind, x.array, x.axis, "relu")
        expected_y = ops.couple(x.array, f.array, backend=backend)
        y, h, statistics = ops.couple_norm_act(x.array, f.array, norm, backend=backend)
        assert y.stride() == expected_y.stride()
        assert_same_bits(as_float64(y), as_float64(expected_y), "y")
        assert statistics.rstd.dtype == getattr(torch, wide)
        assert_statistics(norm, as_float64(y), statistics, wide, f"{layout} {dtypes}")
        expected = Oracle(norm, x.array.shape, wide).h(as_float64(y), statistics, dtypes[0])
        assert_same_bits(as_float64(h), expected, "h")
        if wide == wide_of(dtypes[0]):
            alone, statistics_alone = ops.norm_act(y, norm, backend=backend)
            assert_same_bits(as_float64(h), as_float64(alone), "h and norm_act(y)")
            assert_same_bits(as_float64(statistics.rstd), as_float64(statistics_alone.rstd), "rstd and norm_act's")
        for operand in (x, f):
            assert_same_bits(as_float64(operand.memory), operand.before, "an operand that is only read")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_uncouple_norm_act(layout, kind, backend):
    """y <- y - f has `uncouple_`'s bits; h is that of the statistics given; nothing beside y's view is written."""
    for dtypes in COUPLED:
        y, f = (Operand(layout, d, normal(n)) for n, d in enumerate(dtypes))
        wide = wide_of(*dtypes)
        norm = norm_for(kind, y.array, y.axis, "relu")
        statistics = some_statistics(norm, y.array, wide)
        expected_x = ops.uncouple(y.array, f.array, backend=backend)
        same, h, _ = ops.uncouple_norm_act_(y.array, f.array, norm, statistics=statistics, backend=backend)
        assert same is y.array
        assert_same_bits(y.values, as_float64(expected_x), "y")
        expected = Oracle(norm, y.array.shape, wide).h(y.values, statistics, dtypes[0])
        assert_same_bits(as_float64(h), expected, "h")
        assert_same_bits(*y.outside(), "memory beside the view")
        assert_same_bits(as_float64(f.memory), f.before, "f")
        _, h, computed = ops.uncouple_norm_act_(y.array, f.array, norm, backend=backend)
        assert_statistics(norm, y.values, computed, wide, f"{layout} {dtypes}")
        expected = Oracle(norm, y.array.shape, wide).h(y.values, computed, dtypes[0])
        assert_same_bits(as_float64(h), expected, "h with computed statistics")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", SMALL)
def test_strided_results_of_the_kernels(layout, kind, backend):
    """What the driver asks of a kernel beyond the functions: every result a view of more memory, y in x's own place."""
    kernels = backends.select(torch.ones(1), backend)
    for subtract, in_place, given in itertools.product((False, True), repeat=3):
        x, f, h, y = (Operand(layout, "float32", normal(n)) for n in range(4))
        norm = norm_for(kind, x.array, x.axis, "relu")
        statistics = some_statistics(norm, x.array, "float32")
        y = x if in_place else y
        call, alone = (kernels.uncouple_norm_act, ops.uncouple) if subtract else (kernels.couple_norm_act, ops.couple)
        expected_y = alone(x.array, f.array, backend=backend)
        call(h.array, y.array, x.array, f.array, norm, *statistics, given)
        assert_same_bits(y.values, as_float64(expected_y), "y")
        if not given:
            assert_statistics(norm, y.values, statistics, "float32", layout)
        expected = Oracle(norm, x.array.shape, "float32").h(y.values, statistics, "float32")
        assert_same_bits(h.values, expected, "h")
        for operand in (x, f, h, y):
            assert_same_bits(*operand.outside(), "memory beside a view")


# ---- the same bits for any number of threads

THREADED = {
    "channels last": ((3, 24, 65, 64), lambda a: a.to(memory_format=torch.channels_last), 1),
    "image": ((3, 24, 65, 64), lambda a: a, 1),
    "rows": ((1501, 200), lambda a: a, 1),
    "wide rows": ((5, 60001), lambda a: a, 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", THREADED)
@pytest.mark.parametrize("backend", ["cpu"])
def test_threads(layout, kind, backend, available):
    """One, two, three and five threads, forward and backward, float32 and bfloat16."""
    available(backend)
    shape, view, axis = THREADED[layout]
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        x, f, dh = (view(torch.randn(shape, dtype=dtype)) for _ in range(3))
        norm = norm_for(kind, x, axis, "gelu")
        seen = []
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                y, h, statistics = ops.couple_norm_act(x, f, norm, backend=backend)
                dx, *sums = ops.norm_act_backward_(torch.ones_like(y), dh, y, norm, statistics, backend=backend)
                seen.append([t for t in (y, h, *statistics, dx, *sums) if t is not None])
        finally:
            torch.set_num_threads(threads)
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
