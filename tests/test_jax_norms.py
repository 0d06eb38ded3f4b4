# SPDX-License-Identifier: Apache-2.0
"""The norms as XLA custom calls: the bits of the CPU kernels, which others hold against the oracle, and derivatives."""

import itertools

import numpy as np
import pytest
from jax_cases import FLOATS, equal, furthest, jax, jnp, x64

import revkernels as rk
from revkernels import ops
from revkernels.adapters import jax as rj
from revkernels.norm import ACTIVATIONS

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed; jax brings it")

#: kind, shape, channel_dim, groups
KINDS = [
    ("batch", (3, 4, 5), 1, 1),
    ("batch", (3, 5, 4), -1, 1),
    ("layer", (3, 5, 4), -1, 1),
    ("layer", (3, 4, 5), 1, 1),
    ("rms", (7, 6), -1, 1),
    ("group", (3, 6, 2, 5), 1, 3),
    ("group", (3, 2, 5, 6), -1, 2),
]
IDS = [f"{kind}, channels {dim}" for kind, _, dim, _ in KINDS]
#: Those on which XLA is not slow to compile the comparison, or it is worth it.
QUICK = ("batch, channels 1", "layer, channels -1", "group, channels 1")
WITH_SLOW = [
    pytest.param(case, marks=() if name in QUICK else pytest.mark.slow, id=name)
    for case, name in zip(KINDS, IDS, strict=True)
]


def norm_of(case, weight=None, bias=None, activation="gelu"):
    kind, _, dim, groups = case
    return rk.Norm(kind, weight, bias, activation=activation, groups=groups, channel_dim=dim)


def operands(case, dtypes):
    """x, f, dh, dx, of these dtypes, and weight and bias, as NumPy arrays."""
    _, shape, dim, _ = case
    named = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in dtypes}
    arrays = [np.random.default_rng(n).standard_normal(shape).astype(named[d]) for n, d in enumerate(dtypes)]
    return *arrays, *(np.random.default_rng(9 + n).standard_normal(shape[dim]).astype("float32") for n in range(2))


def same(got, expected):
    """Trees of JAX's and NumPy's arrays."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert [a.dtype.name for a in got] == [a.dtype.name for a in expected]
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("case", KINDS, ids=IDS)
def test_bits(case):
    """Each of the four, on four dtypes, with and without weights, with statistics that are given and that are not."""
    for dtypes in (("float32",) * 4, ("bfloat16", "float32", "float16", "float32"), ("float64", *FLOATS[1:])):
        x, f, dh, dx, w, b = operands(case, dtypes)
        for weight, bias in ((None, None), (w, b), (w, None)):

            def everything(x, f, dh, dx, weight, bias):
                norm = norm_of(case, weight, bias)
                y, h, found = rj.couple_norm_act(x, f, norm)
                back = rj.uncouple_norm_act_(y, f, norm, statistics=found)
                plain, own = rj.norm_act(x, norm, dtype="float16")
                again, _ = rj.norm_act(x, norm, statistics=own)
                return y, h, found, back, plain, own, again, rj.norm_act_backward_(dx, dh, x, norm, own)

            with x64():
                got = jax.jit(everything)(*map(jnp.asarray, (x, f, dh, dx)), weight, bias)
            norm = norm_of(case, weight, bias)
            y, h, found = ops.couple_norm_act(x, f, norm)
            back = ops.uncouple_norm_act_(y.copy(), f, norm, statistics=found)
            plain, own = ops.norm_act(x, norm, dtype="float16")
            again, _ = ops.norm_act(x, norm, statistics=own)
            expected = y, h, found, back, plain, own, again, ops.norm_act_backward_(dx.copy(), dh, x, norm, own)
            for number, (one, right) in enumerate(zip(got, expected, strict=True)):
                assert same(one, right), f"result {number} of {dtypes}"


def test_no_elements_and_one_position():
    for kind, shape in (("layer", (0, 4)), ("batch", (0, 4)), ("layer", (4,)), ("batch", (3, 0)), ("rms", (3, 0, 4))):
        norm, x = rk.Norm(kind), np.ones(shape, "float32")
        h, statistics = rj.norm_act(x, norm)
        right, expected = ops.norm_act(x, norm)
        assert same((h, statistics), (right, expected)), (kind, shape)
        assert same(
            rj.norm_act_backward_(x, x, x, norm, statistics), ops.norm_act_backward_(x + 0, x, x, norm, expected)
        )


def formula(case, x, weight, bias, activation, statistics=None):
    """The norm once more, in jax.numpy and by hand."""
    kind, shape, dim, groups = case
    dim %= len(shape)
    seen = jnp.moveaxis(x, dim, -1).reshape(shape[0], -1, groups, shape[dim] // groups)  # sample, place, group, channel
    along = {"batch": (0, 1), "group": (1, 3)}.get(kind, (2, 3))
    center = 0 if kind == "rms" else seen.mean(along, keepdims=True)
    rstd = 1 / jnp.sqrt(((seen - center) ** 2).mean(along, keepdims=True) + 1e-5)
    if statistics is not None:
        center, rstd = (s.reshape(rstd.shape) for s in statistics)
    z = ((seen - center) * rstd).reshape(-1, shape[dim]) * weight + bias
    act = {"none": lambda z: z, "relu": jax.nn.relu, "silu": jax.nn.silu}.get(activation)
    h = jax.nn.gelu(z, approximate=activation == "gelu_tanh") if act is None else act(z)
    rest = [size for d, size in enumerate(shape) if d != dim]
    return jnp.moveaxis(h.reshape(*rest, shape[dim]), -1, dim)


@pytest.mark.parametrize("backend", ["kernels", pytest.param("xla", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", WITH_SLOW)
def test_derivatives(case, backend):
    """First ones against the formula's, and one of a derivative; in float64, where 1e-9 is some roundings' worth."""
    x, f, t, _, w, b = (a.astype("float64") for a in operands(case, ("float64",) * 4))
    activation = ACTIVATIONS[KINDS.index(case) % len(ACTIVATIONS)]

    def ours(x, f, w, b):
        y, h, _ = rj.couple_norm_act(x, f, norm_of(case, w, b, activation), backend=backend)
        alone, _ = rj.norm_act(x, norm_of(case, w, b, activation), backend=backend)
        z, other, _ = rj.uncouple_norm_act_(x, f, norm_of(case, w, b, activation), backend=backend)
        return jnp.vdot(y, t) + (h**2).sum() + jnp.vdot(alone, t) + (z**3).sum() + (other**2).sum()

    def plain(x, f, w, b):
        h, alone, other = (formula(case, v, w, b, activation) for v in (x + f, x, x - f))
        return jnp.vdot(x + f, t) + (h**2).sum() + jnp.vdot(alone, t) + ((x - f) ** 3).sum() + (other**2).sum()

    def both(function):
        first = jax.grad(function, (0, 1, 2, 3))
        return first(x, f, w, b), jax.grad(lambda x, w: sum(jnp.vdot(d, d) for d in first(x, f, w, b)), (0, 1))(x, w)

    with x64():
        got, expected = jax.jit(lambda: (both(ours), both(plain)))()
        assert furthest(got, expected) < 1e-9


def test_given_statistics_are_constants_for_a_batch_norm():
    case = KINDS[0]
    x, _, t, _, w, b = (a.astype("float64") for a in operands(case, ("float64",) * 4))
    with x64():
        _, statistics = rj.norm_act(x, norm_of(case, w, b))

        def ours(x, w, b):
            return jnp.vdot(rj.norm_act(x, norm_of(case, w, b), statistics=statistics)[0], t)

        def plain(x, w, b):
            return jnp.vdot(formula(case, x, w, b, "gelu", statistics), t)

        got, expected = (jax.jit(jax.grad(function, (0, 1, 2)))(x, w, b) for function in (ours, plain))
        assert furthest(got, expected) < 1e-12

        def of_statistics(given):
            return jnp.vdot(rj.norm_act(x, norm_of(case, w, b), statistics=given)[0], t)

        assert not any(map(np.any, jax.jit(jax.grad(of_statistics))(statistics)))


@pytest.mark.parametrize("case", WITH_SLOW)
def test_vmap(case):
    """Over x, over weights, and over both, gives what a loop gives."""
    x, f, _, _, w, b = operands(case, ("float32",) * 4)
    xs, ws = np.stack([x, f, x + f]), np.stack([w, b, w + b])

    def step(x, w):
        h, statistics = rj.norm_act(x, norm_of(case, w, w))
        return h, statistics, rj.norm_act_backward_(x, h, x, norm_of(case, w, w), statistics)

    alone = jax.jit(step)
    for axes, xs_at, ws_at in (((0, 0), xs, ws), ((0, None), xs, w), ((None, 0), x, ws)):
        got = jax.jit(jax.vmap(step, axes))(xs_at, ws_at)
        each = [alone(xs_at[i] if axes[0] == 0 else x, ws_at[i] if axes[1] == 0 else w) for i in range(3)]
        assert equal(got, jax.tree.map(lambda *parts: jnp.stack(parts), *each))


X = np.ones((2, 6, 5), "float32")
W = np.ones(6, "float32")
LAYER = rk.Norm("layer", channel_dim=1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rj.norm_act(X, "layer"), TypeError, "norm is a str"),
        (lambda: rj.norm_act(X.astype(int), LAYER), TypeError, "x is int"),
        (lambda: rj.norm_act(X, rk.Norm("batch", W[:5])), ValueError, r"weight has shape \(5,\); it must be \(6,\)"),
        (
            lambda: rj.norm_act(X, rk.Norm("batch", W, W.astype("float16"))),
            TypeError,
            "weight is float32, bias float16",
        ),
        (lambda: rj.norm_act(X, rk.Norm("batch", running_mean=W, running_var=W)), ValueError, "running_mean is given"),
        (lambda: rj.norm_act(X, rk.Norm("group", groups=4)), ValueError, "groups is 4; it must divide"),
        (lambda: rj.norm_act(X[None], rk.Norm("group", channel_dim=2)), ValueError, "must be dimension 1 or the last"),
        (lambda: rj.norm_act(X, LAYER, dtype="int8"), TypeError, "dtype is int8"),
        (lambda: rj.norm_act(X, LAYER, statistics=3), TypeError, "statistics is a int"),
        (lambda: rj.norm_act(X, LAYER, statistics=(None, W)), TypeError, "mean is None"),
        (lambda: rj.norm_act(X, LAYER, statistics=(W, W)), ValueError, r"mean is float32 of shape \(6,\); it must be"),
        (lambda: rj.couple_norm_act(X, X[:1], LAYER), ValueError, "f has shape"),
        (lambda: rj.uncouple_norm_act_(X, 1.0, LAYER), TypeError, "f is a float"),
        (lambda: rj.norm_act_backward_(X, X, X[0], LAYER, (W, W)), ValueError, "dh has shape"),
        (lambda: rj.norm_act_backward_(X, X, X, LAYER, (X[:, 0], X[:, 0]), constant=True), ValueError, "constant is"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_branch_of_wider_dtype():
    """x float32, f float64: statistics in float64, the gradient's arithmetic in float32, as the C library has it."""
    x, f = (np.random.default_rng(n).standard_normal((4, 6)) for n in range(2))
    x = x.astype("float32")
    with x64():
        norm = rk.Norm("layer")
        y, h, statistics = rj.couple_norm_act(x, f, norm)
        assert (y.dtype, h.dtype, statistics.rstd.dtype) == ("float32", "float32", "float64")
        dx, df = jax.grad(lambda x, f: (rj.couple_norm_act(x, f, norm)[1] * h).sum(), (0, 1))(x, f)
        assert (dx.dtype, df.dtype) == ("float32", "float64")
        assert np.array_equal(dx, df)


def test_under_a_loop():
    """`jax.lax.scan` through norms, in both directions."""
    x, w = np.random.default_rng(0).standard_normal((8, 6)).astype("float32"), np.ones((3, 6), "float32")

    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (rj.norm_act(x, rk.Norm("rms", w, activation="silu"))[0], None), x, w)[0]

    def unrolled(x, w):
        for row in w:
            x, _ = rj.norm_act(x, rk.Norm("rms", row, activation="silu"))
        return x

    found = [jax.jit(jax.grad(lambda *a, f=f: (f(*a) ** 3).sum(), (0, 1)))(x, w) for f in (scanned, unrolled)]
    assert furthest(*found) < 1e-5
    assert list(itertools.chain(*(a.shape for a in found[0]))) == [8, 6, 3, 6]


@pytest.mark.parametrize("backend", [None, "xla"])
def test_a_float64_result_is_for_the_x64_mode(backend):
    """Elsewhere a custom call would hand out an array of a type that JAX says it does not have."""
    x, norm = jnp.ones((2, 3), "float32"), rk.Norm("layer")
    with pytest.raises(TypeError, match="dtype is float64, which JAX has in its x64 mode alone"):
        rj.norm_act(x, norm, dtype="float64", backend=backend)
    with x64():
        assert rj.norm_act(x, norm, dtype="float64", backend=backend)[0].dtype == "float64"
