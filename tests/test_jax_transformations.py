# SPDX-License-Identifier: Apache-2.0
"""The couplings under JAX's transformations: derivatives of any order, vmap, and loops."""

import numpy as np
import pytest
from jax_cases import equal, furthest, jax, jnp, mlp, mlp_params, plain_chain, stream_pair

import revkernels as rk
from revkernels.adapters import jax as rj

X, F, DX, DF = (np.random.default_rng(n).standard_normal((4, 6)).astype("float32") for n in range(4))
OPTIONS = [{}, {"backend": "xla"}, {"coupling": rk.Coupling(grid_exponent=3)}]
IDS = ["kernels", "xla", "grid"]
SLOW_OPTIONS = [
    pytest.param(options, marks=pytest.mark.slow if options else (), id=name)
    for options, name in zip(OPTIONS, IDS, strict=True)
]


def functions(options):
    """The calls as functions of (x, f), with plain JAX beside them; gradients pass the rounding as if it were none."""
    sums = {"backend": options.get("backend")}

    def on_the_grid(f):
        rounded = f if "coupling" not in options else jnp.rint(f * 8) / 8
        return f + jax.lax.stop_gradient(rounded - f)

    return [
        (lambda x, f: rj.couple(x, f, **options), lambda x, f: x + on_the_grid(f)),
        (lambda x, f: rj.uncouple_(x, f, **options), lambda x, f: x - on_the_grid(f)),
        (
            lambda x, f: rj.reverse_step_(x, f, f, x * f, **options),
            lambda x, f: (x - on_the_grid(f), f + x * f),
        ),
        (lambda x, f: rj.accumulate_([x, f], [f, x * x], **sums), lambda x, f: [x + f, f + x * x]),
    ]


def total(tree):
    return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_derivatives(options):
    """Reverse, forward, and forward over reverse."""

    def everything(x, f):
        found = []
        for pair in functions(options):
            each = []
            for function in pair:
                first = jax.grad(lambda x, f, function=function: total(function(x, f)), (0, 1))
                pushed = jax.jvp(function, (x, f), (DX, DF))[1]
                each.append((first(x, f), list(jax.tree.leaves(pushed)), jax.jvp(first, (x, f), (DX, DF))[1]))
            found.append(each)
        return found

    for ours, plain in jax.jit(everything)(X, F):
        assert furthest(ours, plain) < 2e-6


def test_derivatives_of_mixed_dtypes():
    """A gradient has its operand's dtype."""
    x, f = X, jnp.asarray(F, "bfloat16")
    dx, df = jax.grad(lambda x, f: (rj.couple(x, f) * DX).sum(), (0, 1))(x, f)
    assert (dx.dtype, df.dtype) == ("float32", "bfloat16")
    assert equal((dx, df), (jnp.asarray(DX), jnp.asarray(DX, "bfloat16")))


@pytest.mark.parametrize("options", SLOW_OPTIONS)
def test_vmap(options):
    """Over both operands, over either, and twice."""
    xs, fs = np.stack([X, DX, F]), np.stack([F, DF, X])
    most = 1e-6 if options.get("backend") == "xla" else 0  # XLA makes x * x + f one operation here and two there
    for function, _ in functions(options):
        alone = jax.jit(function)
        for axes, x, f in (((0, 0), xs, fs), ((0, None), xs, F), ((None, 0), X, fs), ((2, 2), xs, fs)):
            got = jax.jit(jax.vmap(function, axes))(x, f)
            parts = [
                alone(*(a if axis is None else np.take(a, i, axis) for a, axis in zip((x, f), axes, strict=True)))
                for i in range(6 if axes[0] == 2 else 3)
            ]
            assert furthest(got, jax.tree.map(lambda *each: jnp.stack(each), *parts)) <= most
        twice = jax.jit(jax.vmap(jax.vmap(function, (0, None)), (None, 0)))(xs, fs)
        assert furthest(jax.tree.map(lambda a: a[2, 1], twice), alone(xs[1], fs[2])) <= most


def test_int16_under_vmap_and_grad():
    """Streams are coupled example by example; no gradient comes through them."""
    grid = rk.Coupling(grid_exponent=8)
    q = np.arange(24, dtype="int16").reshape(4, 6)
    got = jax.vmap(lambda q, f: rj.couple(q, f, coupling=grid))(q, F)
    assert equal(got, rj.couple(q, F, coupling=grid))
    df = jax.grad(lambda f: rj.couple(q, f, coupling=grid).astype("float32").sum())(F)
    assert not df.any()


def test_loops_and_checkpoint():
    """`jax.lax.scan`, `fori_loop` and `jax.checkpoint` give what a Python loop gives."""

    def scanned(x):
        return jax.lax.scan(lambda x, f: (rj.couple_(x, jnp.sin(x) * f), None), x, jnp.stack([F, DF]))[0]

    def looped(x):
        for f in (F, DF):
            x = rj.couple_(x, jnp.sin(x) * f)
        return x

    checkpointed = jax.checkpoint(looped)
    rounds = jax.lax.fori_loop(0, 2, lambda _, x: rj.couple_(x, F), X)
    assert equal(rounds, rj.couple(rj.couple(X, F), F))
    expected = jax.jit(jax.value_and_grad(lambda x: total(looped(x))))(X)
    for function in (scanned, checkpointed):
        got = jax.jit(jax.value_and_grad(lambda x, function=function: total(function(x))))(X)
        assert furthest(got, expected) < 1e-6


@pytest.mark.slow
def test_the_plain_chain_of_couplings():
    """Without `reversible` they are an ordinary chain."""
    params = [mlp_params(n, 6) for n in range(4)]
    x1, x2 = stream_pair((8, 6))
    for options in OPTIONS[:2]:
        ours = plain_chain([mlp] * 2, [mlp] * 2, lambda x, f, options=options: rj.couple(x, f, **options))
        plain = plain_chain([mlp] * 2, [mlp] * 2)
        got, expected = (
            jax.jit(jax.grad(lambda x, c=c: total(c(params[::2], params[1::2], x, x2))))(x1) for c in (ours, plain)
        )
        assert furthest(got, expected) < 1e-6
