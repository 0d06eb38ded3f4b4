# SPDX-License-Identifier: Apache-2.0
"""norm_act_backward_: every backend against the oracle, and the gradients that autograd hands out.

Bits where sums cannot differ: where they are given, where the statistics are constant, and where all numbers are small
multiples of powers of two, so that every order of summation has the same exact result. A bound elsewhere.
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
    lattice,
    norm_for,
    normal,
    some_statistics,
    vector,
    wide_of,
)
from operands import FLOATS, as_float64, assert_same_bits, values_for  # noqa: E402

from revkernels import backends, ops  # noqa: E402
from revkernels.norm import SUMS_COMPUTED, Norm, Statistics  # noqa: E402

SAME = [(d, d, d) for d in FLOATS]
MIXED = [("float32", "float32", "bfloat16"), ("bfloat16", "float32", "bfloat16"), ("float16", "float16", "float32")]
MIXED += [("float64", "float32", "float32"), ("float32", "float64", "float32")]  # x alone says what is computed in


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


def operands(layout, dtypes, values):
    """dx, dh and x."""
    return [Operand(layout, dtype, values(n)) for n, dtype in enumerate(dtypes, 20)]


def check(layout, kind, activation, dtypes, backend, values, *, sums=None, **options):
    """Hold dx, dweight and dbias against the oracle, bit for bit; nothing else is written."""
    dx, dh, x = given = operands(layout, dtypes, values)
    wide = wide_of(dtypes[2])
    exact = lattice if values is small else normal
    norm = norm_for(kind, x.array, x.axis, activation, values=exact)
    statistics = some_statistics(norm, x.array, wide, values=exact)
    oracle = Oracle(norm, x.array.shape, wide)
    made = None if sums is None else tuple(vector(norm.weight.shape, wide, values(n)) for n in sums)
    told = options if made is None else options | {"sums": tuple(map(as_float64, made))}
    expected = oracle.gradients(dx.values, dh.values, x.values, statistics, dtypes[0], **told)
    told = options if made is None else options | {"sums": made}
    got = ops.norm_act_backward_(dx.array, dh.array, x.array, norm, statistics, **told, backend=backend)
    assert got[0] is dx.array
    compared = 1 if made is not None or values is not small else 3
    for name, result, right in zip(("dx", "dweight", "dbias")[:compared], got, expected, strict=False):
        assert_same_bits(as_float64(result), right, f"{name} of {kind} {activation} {layout} {dtypes}")
    for operand in given[1:]:
        assert_same_bits(as_float64(operand.memory), operand.before, "an operand that is only read")
    assert_same_bits(*dx.outside(), "memory beside dx")


def small(seed):
    return lattice(seed, 3, 0.5)


def special(seed):
    return lambda shape: values_for(shape, "float64", seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_given_sums(layout, activation, backend):
    """The second half of a batch norm over processes; the count is any number."""
    for dtypes, count in itertools.product(SAME + MIXED, (0, 12345)):
        check(layout, "batch", activation, dtypes, backend, normal, sums=(30, 31), count=count)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_constant_statistics(layout, activation, backend):
    """Evaluation: no sums come into dx. NaN, infinities and zeros of both signs among the operands."""
    for dtypes in SAME + MIXED:
        check(layout, "batch", activation, dtypes, backend, special, constant=True)


POWERS = {
    "rows": ((8, 32), lambda a: a, 1),
    "half of rows": ((16, 32), lambda a: a[:, 16:], 1),
    "tokens": ((2, 4, 64), lambda a: a, 2),
    "image": ((2, 8, 4, 8), lambda a: a, 1),
    "half of an image": ((2, 16, 4, 8), lambda a: a[:, 8:], 1),
    "channels last": ((2, 4, 8, 8), lambda a: a.transpose(2, 3).transpose(1, 2), 1),
    "half of channels last": ((2, 4, 8, 16), lambda a: a.transpose(2, 3).transpose(1, 2)[:, :8], 1),
    "one element": ((1, 1), lambda a: a, 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", POWERS)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_exact_sums(layout, kind, activation, backend, monkeypatch):
    """Every kind and layout, all three results, where no sum is rounded and no count but a power of two divides."""
    monkeypatch.setitem(LAYOUTS, layout, POWERS[layout])
    for dtypes in SAME + MIXED:
        check(layout, kind, activation, dtypes, backend, small)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", SMALL)
def test_base_of_its_own_or_none(layout, kind, backend):
    """The kernel's other ways: dx apart from base, and no base, into memory that held NaN; every dtype of base."""
    kernels = backends.select(torch.ones(1), backend)
    for base_dtype in (None, "float32", "bfloat16"):
        dx, dh, x = operands(layout, ("float32",) * 3, normal)
        dx.array.fill_(float("nan"))
        base = None if base_dtype is None else Operand(layout, base_dtype, normal(40))
        norm = norm_for(kind, x.array, x.axis, "silu")
        statistics = some_statistics(norm, x.array, "float32")
        into = torch.zeros_like(x.array) if base is None else base.array.float().clone()
        expected = ops.norm_act_backward_(into, dh.array, x.array, norm, statistics, backend=backend)
        sums = [torch.full_like(norm.weight, float("nan")) for _ in range(2)]
        kernels.norm_act_backward(
            dx.array, None if base is None else base.array, dh.array, x.array, norm, *statistics, *sums,
            SUMS_COMPUTED, 0, False,
        )  # fmt: skip
        for got, right in zip((dx.array, *sums), expected, strict=True):
            assert torch.equal(got, right)
        assert_same_bits(*dx.outside(), "memory beside dx")
        if base is not None:
            assert_same_bits(as_float64(base.memory), base.before, "base")


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_sums_that_nobody_wants(kind, backend):
    """A kernel without dweight and dbias, and with either: dx is the same."""
    kernels = backends.select(torch.ones(1), backend)
    _, dh, x = operands("tokens", ("float32",) * 3, normal)
    norm = norm_for(kind, x.array, x.axis, "gelu")
    statistics = some_statistics(norm, x.array, "float32")
    results = []
    for wanted in itertools.product((False, True), repeat=2):
        dx, sums = torch.zeros(x.array.shape), [torch.zeros(24) if want else None for want in wanted]
        arguments = (dh.array, x.array, norm, *statistics, *sums, SUMS_COMPUTED, 0, False)
        kernels.norm_act_backward(dx, None, *arguments)
        results.append((dx, *sums))
    for dx, dweight, dbias in results:
        assert torch.equal(dx, results[-1][0])
        assert dweight is None or torch.equal(dweight, results[-1][1])
        assert dbias is None or torch.equal(dbias, results[-1][2])


def bounds(norm, statistics, x, dh, base, wide, dx_dtype, backend, result):
    """How far dx, dweight and dbias may be from the oracle.

    Each dz is off by its derivative's own error and the product's rounding, together below 8 eps |dh| (16 for torch's
    erf), and |dz| <= 1.2 |dh|. A sum's terms bring that in, and a summation by blocks a few eps of the sum of
    magnitudes: 16 eps sum |dh| (1 + |xhat|) in all, 32 for torch. dx takes the two sums' errors, divided by their
    count, and some roundings of its own terms.
    """
    epsilon = EPSILON[wide] * (32 if backend == "eager" else 16)
    oracle = Oracle(norm, x.shape, wide)
    of, weight = oracle.of, np.abs(as_float64(norm.weight))[oracle.of.channel]
    mean, rstd = (0.0 if s is None else as_float64(s).ravel()[of.statistic] for s in statistics)
    xhat = np.abs((x - mean) * rstd)
    g = np.abs(dh) * 1.2
    dweight, dbias = (np.bincount(of.channel.ravel(), v.ravel(), of.channels) for v in (g * xhat, g))
    per_x = np.abs(rstd) * weight * g
    count = max(x.size // max(of.statistics, 1), 1)
    for by, factor in ((g * weight * xhat, xhat), (g * weight, 1.0)):
        means = np.bincount(of.statistic.ravel(), by.ravel(), of.statistics) / count
        per_x = per_x + np.abs(rstd) * means[of.statistic] * factor
    stored = EPSILON[dx_dtype] * 2 * np.abs(result)
    return epsilon * (per_x + np.abs(base)) + stored, epsilon * dweight, epsilon * dbias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_smooth_activations(layout, kind, backend):
    """The statistics are x's own, every sum is rounded."""
    for activation, dtypes in itertools.product((*SMOOTH, "relu"), SAME[:3]):
        dx, dh, x = operands(layout, dtypes, normal)
        wide = wide_of(dtypes[2])
        norm = norm_for(kind, x.array, x.axis, activation)
        _, statistics = ops.norm_act(x.array, norm, backend=backend)
        base = dx.values
        expected = Oracle(norm, base.shape, wide).gradients(base, dh.values, x.values, statistics, dtypes[0])
        limits = bounds(norm, statistics, x.values, dh.values, base, wide, dtypes[0], backend, expected[0])
        got = ops.norm_act_backward_(dx.array, dh.array, x.array, norm, statistics, backend=backend)
        for name, result, right, limit in zip(("dx", "dweight", "dbias"), got, expected, limits, strict=True):
            assert (np.abs(as_float64(result) - right) <= limit).all(), f"{name} of {activation} {dtypes}"


@pytest.mark.parametrize("layout", ["channels last", "image", "rows"])
def test_large_arrays_with_a_mean_far_from_zero(layout, backend):
    """1e5 elements of mean 1e4 and deviation 1: several blocks, and sums that xhat must keep small."""
    shape = {"rows": (2000, 40)}.get(layout, (4, 24, 33, 31))
    make = [torch.from_numpy(normal(n, mean)(shape)).float() for n, mean in ((50, 0.0), (51, 0.3), (52, 1e4))]
    dx, dh, x = (t.to(memory_format=torch.channels_last) if layout == "channels last" else t for t in make)
    for kind in KINDS:
        norm = norm_for(kind, x, 1, "silu")
        _, statistics = ops.norm_act(x, norm, backend=backend)
        base, total = as_float64(dx), dx.clone(memory_format=torch.preserve_format)
        expected = Oracle(norm, shape, "float32").gradients(base, as_float64(dh), as_float64(x), statistics, "float32")
        limits = bounds(
            norm, statistics, as_float64(x), as_float64(dh), base, "float32", "float32", backend, expected[0]
        )
        got = ops.norm_act_backward_(total, dh, x, norm, statistics, backend=backend)
        for name, result, right, limit in zip(("dx", "dweight", "dbias"), got, expected, limits, strict=True):
            assert (np.abs(as_float64(result) - right) <= limit).all(), f"{name} of {kind}"


# ---- a batch spread over processes


@pytest.mark.parametrize("layout", ["image", "channels last"])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_two_halves_of_a_batch(layout, activation, backend):
    """Sums of each half, added; then dx of each half from these. The numbers are such that nothing is rounded."""
    make = [torch.from_numpy(small(n)((4, 6, 4, 8))).float() for n in (60, 61, 62)]
    dx, dh, x = (t.to(memory_format=torch.channels_last) if layout == "channels last" else t for t in make)
    norm = norm_for("batch", x, 1, activation, values=lattice)
    statistics = some_statistics(norm, x, "float32", values=lattice)
    at_once = ops.norm_act_backward_(dx.clone(), dh, x, norm, statistics, backend=backend)
    halves = [slice(0, 1), slice(1, 4)]
    sums = [torch.zeros(6), torch.zeros(6)]
    for half in halves:
        none, *found = ops.norm_act_backward_(None, dh[half], x[half], norm, statistics, backend=backend)
        assert none is None
        sums = [a + b for a, b in zip(sums, found, strict=True)]
    kept = [s.clone() for s in sums]
    for half in halves:
        arguments = (dx[half], dh[half], x[half], norm, statistics)
        same, *returned = ops.norm_act_backward_(*arguments, sums=tuple(sums), count=4 * 4 * 8, backend=backend)
        assert same.data_ptr() == dx[half].data_ptr()
        assert all(a is b for a, b in zip(returned, sums, strict=True))
    for got, right in zip((dx, *sums), at_once, strict=True):
        assert torch.equal(got, right)
    assert all(torch.equal(a, b) for a, b in zip(kept, sums, strict=True)), "sums that are given are only read"


# ---- as nodes of a graph


GRADIENTS = [
    *itertools.product(["image"], KINDS, ["none", "relu", *SMOOTH]),
    *itertools.product(["channels last", "tokens"], KINDS, ["silu"]),
]


@pytest.mark.parametrize(("layout", "kind", "activation"), GRADIENTS)
@pytest.mark.parametrize("backend", ["cpu", "eager"])  # the oracle is held against finite differences on its own
def test_gradcheck(layout, kind, activation, backend, available):
    """Both differentiable functions in float64, by finite differences: every operand and parameter."""
    axis = 2 if layout == "tokens" else 1
    shape = {"image": (2, 4, 1, 3), "tokens": (2, 2, 4), "channels last": (2, 2, 2, 4)}[layout]
    made = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    if layout == "channels last":
        made = [t.permute(0, 3, 1, 2) for t in made]
    x, f = (t.requires_grad_() for t in made)
    weight, bias = (torch.randn(4, dtype=torch.float64).requires_grad_() for _ in range(2))

    def norm(weight, bias):
        return Norm(kind, weight, bias, 1e-3, activation, 2 if kind == "group" else 1, axis)

    def alone(x, weight, bias):
        return ops.norm_act(x, norm(weight, bias), backend=available(backend))[0]

    def coupled(x, f, weight, bias):
        return ops.couple_norm_act(x, f, norm(weight, bias), backend=available(backend))[:2]

    assert torch.autograd.gradcheck(alone, (x, weight, bias))
    assert torch.autograd.gradcheck(coupled, (x, f, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_second_derivatives(kind, backend, available):
    """create_graph gives a gradient that can be differentiated again."""
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x, weight, bias):
        norm = Norm(kind, weight, bias, 1e-1, "silu", 2 if kind == "group" else 1, 1)
        return ops.norm_act(x, norm, backend=available(backend))[0]

    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_gradcheck_with_given_statistics(backend):
    """Those of a batch norm are constants."""
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    statistics = Statistics(torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5)

    def call(x, weight, bias):
        return ops.norm_act(x, Norm("batch", weight, bias, activation="silu"), statistics=statistics, backend=backend)[
            0
        ]

    assert torch.autograd.gradcheck(call, (x, weight, bias))


@pytest.mark.parametrize("without", ["weight", "bias", "both"])
def test_gradcheck_without_parameters(without, backend):
    """What is not there has no gradient, and the others have theirs."""
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    parameter = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for kind in KINDS:
        groups = 2 if kind == "group" else 1

        def call(x, parameter, kind=kind, groups=groups):
            weight = parameter if without == "bias" else None
            bias = parameter if without == "weight" else None
            norm = Norm(kind, weight, bias, 1e-3, "silu", groups, 1)
            return ops.norm_act(x, norm, backend=backend)[0] * parameter.sum()

        assert torch.autograd.gradcheck(call, (x, parameter))


def test_gradients_of_mixed_dtypes(backend):
    """Each operand's gradient has its own dtype; a float64 branch makes the norm float64."""
    x, f = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, dtype=torch.bfloat16, requires_grad=True)
    y, h, statistics = ops.couple_norm_act(x, f, Norm("layer", weight), dtype=torch.float16, backend=backend)
    assert (y.dtype, h.dtype, statistics.rstd.dtype) == (torch.float32, torch.float16, torch.float64)
    (y.sum() + h.float().square().sum()).backward()
    assert (x.grad.dtype, f.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_any_strides(kind, backend):
    """What comes after decides the strides of dh: a sum's is expanded, a concatenation's a crop that does not merge."""
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    results = []
    for tail in (lambda h: torch.cat([h, torch.ones_like(h)], 3), lambda h: torch.stack([h, torch.ones_like(h)], 4)):
        for name in (backend, "eager"):
            given = x.clone().requires_grad_()
            norm = Norm(kind, channel_dim=1, activation="silu", groups=2 if kind == "group" else 1)
            h, _ = ops.norm_act(given, norm, backend=name)
            joined = tail(h)
            joined.backward(torch.linspace(-1, 1, joined.numel(), dtype=torch.float64).view(joined.shape))
            results.append(given.grad)
            given.grad = None
        torch.testing.assert_close(results[-2], results[-1], rtol=1e-12, atol=1e-13)
    given = x.clone().requires_grad_()
    ops.norm_act(given, norm, backend=backend)[0].sum().backward()
    assert given.grad is not None
