# SPDX-License-Identifier: Apache-2.0
"""Reversible chains under JAX: gradients equal to plain JAX's, in every dtype and under every transformation."""

import pytest
from jax_cases import (
    chain_params,
    conv,
    conv_params,
    equal,
    furthest,
    gradients,
    jax,
    jnp,
    loss_of,
    mlp,
    mlp_params,
    plain_chain,
    stacked,
    stream_pair,
    x64,
)

from revkernels.adapters import jax as rj

DEPTH, WIDTH, SHAPE = 2, 6, (10, 6)
#: What a float32 gradient may be off by, of its largest number: half a unit for each term of a half-step's longest sum,
#: which every machine adds up in an order of its own.
FLOAT32 = 2 * WIDTH * 2 * DEPTH * 2.0**-24
BACKENDS = [None, pytest.param("xla", marks=pytest.mark.slow)]


def both(backend=None, branch=mlp, depth=DEPTH):
    """The chain, and plain JAX."""
    branches = [branch] * depth
    return rj.reversible(branches, branches, backend=backend), plain_chain(branches, branches)


@pytest.mark.parametrize(
    ("dtype", "most"), [("float64", 1e-13), pytest.param("float32", FLOAT32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_gradients_and_inputs(backend, dtype, most):
    """Of a chain of MLPs; the inverse gives the inputs back."""
    with x64():
        params = chain_params(mlp_params, DEPTH, WIDTH, dtype)
        streams = stream_pair(SHAPE, dtype)
        ours, plain = both(backend)
        y = jax.jit(ours)(*params, *streams)
        assert furthest(y, jax.jit(plain)(*params, *streams)) < most
        assert furthest(gradients(ours, *params, *streams), gradients(plain, *params, *streams)) < most
        assert furthest(jax.jit(ours.inverse)(*params, *y), streams) < most


def test_a_scan_is_the_chain():
    """To the bit, forward and inverse; XLA compiles a loop's backward its own way."""
    params, streams = chain_params(mlp_params, DEPTH, WIDTH), stream_pair(SHAPE)
    stacks = [stacked(p) for p in params]
    chain, _ = both()
    stack = rj.reversible_scan(mlp, mlp)
    y = jax.jit(stack)(*stacks, *streams)
    assert equal(y, jax.jit(chain)(*params, *streams))
    assert equal(jax.jit(stack.inverse)(*stacks, *y), jax.jit(chain.inverse)(*params, *y))
    f, g, *d = gradients(chain, *params, *streams)
    assert furthest(gradients(stack, *stacks, *streams), (stacked(f), stacked(g), *d)) < FLOAT32


def test_numbers_of_python_among_the_parameters():
    """They have gradients as in plain JAX, without jit too."""

    def scaled(p, x):
        return mlp(p["p"], x) * p["scale"]

    params = chain_params(mlp_params, 1, WIDTH)
    f, g = ([{"p": p, "scale": 0.5} for p in each] for each in params)
    streams = stream_pair(SHAPE)
    got, expected = (
        jax.grad(loss_of(apply), (0, 1, 2, 3))(f, g, *streams)
        for apply in (rj.reversible([scaled], [scaled]), plain_chain([scaled], [scaled]))
    )
    assert furthest(got, expected) < FLOAT32


@pytest.mark.slow
def test_convolutions():
    params, streams = chain_params(conv_params, 2, 4), stream_pair((2, 8, 8, 4))
    ours, plain = both(branch=conv, depth=2)
    # a norm divides by what may be small, and so do its errors grow
    assert furthest(gradients(ours, *params, *streams), gradients(plain, *params, *streams)) < 16 * FLOAT32


@pytest.mark.usefixtures("half_step_calls")
def test_operation_by_operation():
    """Without jit."""
    params, streams = chain_params(mlp_params, 1, WIDTH), stream_pair(SHAPE)
    ours, plain = both(depth=1)
    got, expected = (jax.grad(loss_of(apply), (0, 1, 2, 3))(*params, *streams) for apply in (ours, plain))
    assert furthest(got, expected) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types(dtype):
    """Streams of a half type; and float32 streams whose branches compute in it, as mixed precision has it."""
    unit = float(jnp.finfo(dtype).eps)
    params, streams = chain_params(mlp_params, DEPTH, WIDTH), stream_pair(SHAPE)

    def mixed(p, x):
        return mlp(jax.tree.map(lambda leaf: leaf.astype(dtype), p), x.astype(dtype))

    ours, plain = both(branch=mixed)
    y, got = jax.jit(ours)(*params, *streams), gradients(ours, *params, *streams)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((y, got))} == {"float32"}
    assert furthest(got, gradients(plain, *params, *streams)) < 16 * unit  # a branch rounds to it that often
    halves = [x.astype(dtype) for x in streams]
    y, got = jax.jit(ours)(*params, *halves), gradients(ours, *params, *halves)
    assert [leaf.dtype for leaf in (*y, *got[2:])] == [dtype] * 4
    # every half-step rounds both streams to the half type, forward and backward
    assert furthest(got, gradients(ours, *params, *(x.astype("float32") for x in halves))[:2] + got[2:]) < 64 * unit


def test_heterogeneous_branches():
    """Every branch its own function, its parameters a tree of its own; one has none."""
    fs = [mlp, lambda p, x: jnp.sin(x) * p, lambda p, x: x * 0.5]
    gs = [lambda p, x: x @ p[0], mlp, lambda p, x: jnp.tanh(x) + p["a"]["b"]]
    f_params = [mlp_params(0, WIDTH), jnp.float32(0.3), None]
    g_params = [(jnp.eye(WIDTH) * 0.2,), mlp_params(1, WIDTH), {"a": {"b": jnp.ones(WIDTH)}}]
    streams = stream_pair(SHAPE)
    got = gradients(rj.reversible(fs, gs), f_params, g_params, *streams)
    assert jax.tree.structure(got[:2]) == jax.tree.structure((f_params, g_params))
    assert furthest(got, gradients(plain_chain(fs, gs), f_params, g_params, *streams)) < FLOAT32
    assert equal(rj.reversible([], [])([], [], *streams), streams)


def test_side_arguments_whole_numbers_and_keys():
    """``args`` reach every branch; those of floats have gradients, gathered over all half-steps, the others none."""

    def branch(p, x, scale, step, options):
        kept = jax.random.bernoulli(jax.random.fold_in(p["key"], step), 0.7, x.shape)
        return options["act"](x @ p["w"]) * scale["a"] * kept + scale["b"]

    keys = jax.random.split(jax.random.key(0), 2 * DEPTH)
    every = [{"key": key, "w": mlp_params(n, WIDTH, hidden=WIDTH)["w"]} for n, key in enumerate(keys)]
    params, streams = (every[::2], every[1::2]), stream_pair(SHAPE)
    scale, options = {"a": jnp.float32(0.5), "b": jnp.ones(WIDTH)}, {"act": jnp.tanh}

    def gradient(apply, f_params, g_params):
        def loss(weights, scale, x1, x2):
            f, g = (
                [p | {"w": w} for p, w in zip(params, of_params, strict=True)]
                for params, of_params in zip((f_params, g_params), weights, strict=True)
            )
            return loss_of(apply)(f, g, x1, x2, scale, jnp.int32(3), options)

        weights = tuple([p["w"] for p in ps] for ps in (f_params, g_params))
        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(weights, scale, *streams)

    ours, plain = both(branch=branch)
    expected = gradient(plain, *params)
    assert furthest(gradient(ours, *params), expected) < FLOAT32
    stack = rj.reversible_scan(branch, branch)

    def stacked_loss(f, g, scale, x1, x2):
        return loss_of(stack)(f, g, x1, x2, scale, jnp.int32(3), options)

    stacks = [stacked(p) for p in params]
    dscale = jax.jit(jax.grad(stacked_loss, 2))(*stacks, scale, *streams)
    assert furthest(dscale, expected[1]) < FLOAT32


@pytest.mark.slow
def test_part_of_the_gradient():
    """By one stream, or one tree of parameters; what is not asked for is not there."""
    params, streams = chain_params(mlp_params, DEPTH, WIDTH), stream_pair(SHAPE)
    ours, plain = both()
    for by in ((0,), (3,)):
        got, expected = (gradients(apply, *params, *streams, by=by) for apply in (ours, plain))
        assert furthest(got, expected) < FLOAT32
    only_first = jax.jit(jax.grad(lambda x: ours(*params, x, streams[1])[0].sum()))(streams[0])
    expected = jax.jit(jax.grad(lambda x: plain(*params, x, streams[1])[0].sum()))(streams[0])
    assert furthest(only_first, expected) < FLOAT32


# ---- transformations of a chain


def test_vmap():
    """Gradients example by example, and a chain of an ensemble's parameters."""
    params, (x1, x2) = chain_params(mlp_params, DEPTH, WIDTH), stream_pair(SHAPE)
    ours, plain = both()

    def each(apply):
        return jax.jit(jax.vmap(jax.grad(loss_of(apply), (0, 1, 2, 3)), (None, None, 0, 0)))(*params, x1, x2)

    assert furthest(each(ours), each(plain)) < FLOAT32
    more = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 0.5]), params)

    def ensemble(apply):
        return jax.jit(jax.vmap(jax.grad(loss_of(apply), (0, 1, 2, 3)), (0, 0, None, None)))(*more, x1, x2)

    assert furthest(ensemble(ours), ensemble(plain)) < FLOAT32


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend):
    """A derivative of the gradient is one of the steps that rebuild, by streams and by parameters."""
    params, (x1, x2) = chain_params(mlp_params, DEPTH, WIDTH), stream_pair(SHAPE)

    def second(apply):
        def slope(f, x1):
            d = jax.grad(loss_of(apply), (0, 1, 2))(f, params[1], x1, x2)
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(d))

        return jax.jit(jax.grad(slope, (0, 1)))(params[0], x1)

    ours, plain = both(backend)
    assert furthest(second(ours), second(plain)) < 4 * FLOAT32  # a sum of squares, and through twice as much


@pytest.mark.slow
def test_inside_other_transformations():
    """A chain in `jax.checkpoint`, in `jax.lax.scan`, and in another chain's branch."""
    params, (x1, x2) = chain_params(mlp_params, DEPTH, WIDTH), stream_pair(SHAPE)
    ours, plain = both()

    def scanned(apply):
        def run(f, g, x1, x2):
            return jax.lax.scan(lambda x, _: (apply(f, g, *x), None), (x1, x2), None, length=2)[0]

        return run

    def nested(apply):
        def inner(p, x):
            return apply(*p, x, jnp.cos(x))[0] * 0.1

        outer = (plain_chain if apply is plain else rj.reversible)([inner], [inner])
        return lambda f, g, x1, x2: outer([(f, g)], [(g, f)], x1, x2)

    for around in (jax.checkpoint, scanned, nested):
        got, expected = (gradients(around(apply), *params, x1, x2) for apply in (ours, plain))
        assert furthest(got, expected) < 4 * FLOAT32  # runs through more half-steps


def test_one_more_call_of_every_branch():
    """Traced twice, once forward and once with its pullback; and so many multiplications that XLA counts them."""
    calls = [0] * 2 * DEPTH

    def counting(number):
        def branch(p, x):
            calls[number] += 1
            return mlp(p, x)

        return branch

    branches = [counting(n) for n in range(2 * DEPTH)]
    params, streams = chain_params(mlp_params, DEPTH, 64), stream_pair((256, 64))

    def flops(apply):
        step = jax.jit(jax.grad(loss_of(apply), (0, 1, 2, 3)))
        return step.lower(*params, *streams).compile().cost_analysis()["flops"]

    ours = flops(rj.reversible(branches[::2], branches[1::2]))
    assert calls == [2] * 2 * DEPTH
    forward = 2 * 2 * 256 * 64 * 128 * 2 * DEPTH  # two products a branch, two operations a multiply-add
    extra = (ours - flops(plain_chain([mlp] * DEPTH, [mlp] * DEPTH))) / forward
    # The last branch's recompute is what the forward did just before on the same input: XLA does it once. And nobody
    # reads the inputs that come back in the end: it may leave out the second product of the branch that they lack.
    assert (2 * DEPTH - 1.5) / (2 * DEPTH) * 0.95 < extra < 1.05
