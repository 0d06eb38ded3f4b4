# SPDX-License-Identifier: Apache-2.0
"""The exact coupling under JAX: streams rebuilt to the bit, and NaN where that does not hold."""

import functools
import itertools

import numpy as np
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

import revkernels as rk
from revkernels.adapters import jax as rj

DEPTH, WIDTH, SHAPE, K = 3, 6, (10, 6), 14
EXACT, FIXED = rk.Exact(k=K), rk.Exact(storage="int16", k=10)
PARAMS, STREAMS = chain_params(mlp_params, DEPTH, WIDTH), stream_pair(SHAPE)
GRID = tuple(np.rint(np.asarray(x) * 2.0**K).astype("float32") * np.float32(2.0**-K) for x in STREAMS)


def chain(coupling=EXACT, branch=mlp, depth=DEPTH, **options):
    return rj.reversible([branch] * depth, [branch] * depth, coupling=coupling, **options)


def stored(branch=mlp, depth=DEPTH, backend=None):
    """The same chain with every stream kept: plain blocks, coupled on the grid, and JAX's own derivative."""
    coupling = rk.Coupling(grid_exponent=K)
    couple = functools.partial(rj.couple, coupling=coupling, backend=backend)
    return plain_chain([branch] * depth, [branch] * depth, couple)


@pytest.mark.parametrize("coupling", [EXACT, FIXED], ids=["float32", "int16"])
def test_no_block_rounds_to_the_grid(coupling):
    """There is nothing to rebuild, so nothing to compare: the gradient is the identity's."""
    y1, y2 = chain(coupling, depth=0)([], [], *STREAMS)
    grid = np.float32(2.0**-coupling.k)
    assert equal((y1, y2), [np.rint(x / grid) * grid for x in map(np.asarray, STREAMS)])
    got = jax.grad(lambda x1: (chain(coupling, depth=0)([], [], x1, STREAMS[1])[0] * STREAMS[1]).sum())(STREAMS[0])
    assert equal(got, STREAMS[1])


@pytest.mark.parametrize("backend", [None, pytest.param("xla", marks=pytest.mark.slow)])
def test_outputs_and_inputs_to_the_bit(backend):
    """Outputs are the stored chain's; the inverse gives back what was rounded to the grid."""
    y = jax.jit(chain(backend=backend))(*PARAMS, *STREAMS)
    assert equal(y, jax.jit(stored(backend=backend))(*PARAMS, *map(jnp.asarray, GRID)))
    assert equal(jax.jit(chain(backend=backend).inverse)(*PARAMS, *y), GRID)
    for storage in (EXACT, FIXED):
        stack = rj.reversible_scan(mlp, mlp, coupling=storage, backend=backend)
        stacks = [stacked(p) for p in PARAMS]
        assert equal(jax.jit(stack)(*stacks, *STREAMS), jax.jit(chain(storage, backend=backend))(*PARAMS, *STREAMS))


@pytest.mark.usefixtures("half_step_calls")
def test_gradients_to_the_bit():
    """Those of the stored chain, operation by operation, where XLA has no choice how to compile either."""
    x1, x2 = map(jnp.asarray, GRID)
    got, expected = (
        jax.grad(loss_of(apply), (0, 1, 2, 3))(PARAMS[0][:1], PARAMS[1][:1], x1, x2)
        for apply in (chain(depth=1), stored(depth=1))
    )
    assert equal(got, expected)


def test_gradients_are_those_of_the_stored_chain():
    """Under jit; a compiler may order the sums of a gradient otherwise, and that alone."""
    got, expected = gradients(chain(), *PARAMS, *GRID), gradients(stored(), *PARAMS, *GRID)
    assert furthest(got, expected) < 2.0**-21


@pytest.mark.slow
@pytest.mark.parametrize("coupling", [EXACT, FIXED], ids=["float32", "int16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_branches_without_the_kernels(dtype, coupling):
    # XLA must round what a branch returns both times: left out in the forward, the backward finds other bits
    def branch(p, x):
        return mlp(jax.tree.map(lambda leaf: leaf.astype(dtype), p), x.astype(dtype))

    step = jax.jit(jax.grad(loss_of(chain(coupling, branch, backend="xla")), (0, 1, 2, 3)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step(*PARAMS, *STREAMS)))


@pytest.mark.parametrize("scan", [False, True], ids=["chain", "scan"])
def test_bfloat16_convolutions_at_depth_24(scan):
    """The stored chain's gradient; without a grid, streams drift and take the gradient along."""

    def half(p, x):
        return conv([w.astype("bfloat16") for w in p], x.astype("bfloat16"))

    params, streams = chain_params(conv_params, 24, 8), stream_pair((4, 8, 8, 8))
    params, streams = jax.tree.map(lambda leaf: leaf * 0.3, params), [jnp.rint(x * 2.0**K) * 2.0**-K for x in streams]
    own = [stacked(p) for p in params] if scan else params
    plain = stored(half, 1 if scan else 24)

    def one(streams, p):
        return plain(*([of] for of in p), *streams), None

    def scanned(f, g, *streams):  # by a scan as well, in which XLA may compile a convolution to round otherwise
        return jax.lax.scan(one, streams, (f, g))[0]

    expected = gradients(scanned if scan else plain, *own, *streams)
    errors = []
    for coupling in (EXACT, "float"):
        apply = rj.reversible_scan(half, half, coupling=coupling) if scan else chain(coupling, half, 24)
        errors.append(furthest(gradients(apply, *own, *streams), expected))
    assert errors[0] < 1e-6 < 0.1 < errors[1]


@pytest.mark.usefixtures("half_step_calls")
def test_int16_streams():
    """Gradients in the precision of the grid, from half the bytes; float16 inputs come back widened."""
    y, got = jax.jit(chain(FIXED))(*PARAMS, *STREAMS), gradients(chain(FIXED), *PARAMS, *STREAMS)
    plain = plain_chain([mlp] * DEPTH, [mlp] * DEPTH)
    assert furthest(y, plain(*PARAMS, *STREAMS)) < 2.0**-6
    assert furthest(got, gradients(plain, *PARAMS, *STREAMS)) < 2.0**-5
    halves = [x.astype("float16") for x in STREAMS]
    assert [a.dtype for a in jax.jit(chain(FIXED))(*PARAMS, *halves)] == ["float32"] * 2
    assert [d.dtype for d in gradients(chain(FIXED), *PARAMS, *halves)[2:]] == ["float16"] * 2


@pytest.mark.slow
def test_convolutions_and_vmap():
    params, (x1, x2) = chain_params(conv_params, 2, 4), stream_pair((2, 3, 8, 8, 4))
    apply = chain(branch=conv, depth=2)
    each = jax.jit(jax.vmap(jax.value_and_grad(loss_of(apply), (0, 1, 2, 3)), (None, None, 0, 0)))(*params, x1, x2)
    plain = jax.value_and_grad(loss_of(plain_chain([conv] * 2, [conv] * 2)), (0, 1, 2, 3))
    expected = jax.jit(jax.vmap(plain, (None, None, 0, 0)))(*params, x1, x2)
    assert furthest(each, expected) < 2.0**-8  # the grid's steps of 2^-14, through norms


# ---- what is not right is NaN


@pytest.mark.parametrize("coupling", [rk.Exact(k=22), rk.Exact(storage="int16", k=14)], ids=["float32", "int16"])
@pytest.mark.parametrize("backend", [None, "xla"])
def test_a_stream_out_of_range(coupling, backend):
    """Inputs beyond 2^(24 - k) or 2^(15 - k), and NaN: all outputs are NaN, and under vmap those of that example."""
    apply = jax.jit(jax.vmap(chain(coupling, backend=backend), (None, None, 0, 0)))
    x = jnp.stack([STREAMS[0] / 8, STREAMS[0] / 8 + 3, jnp.full(SHAPE, jnp.nan)])
    y1, y2 = apply(*jax.tree.map(lambda leaf: leaf * 0.1, PARAMS), x, jnp.stack([STREAMS[1] / 8] * 3))
    inside = [np.isfinite(np.asarray(y)).all((1, 2)).tolist() for y in (y1, y2)]
    outside = [np.isnan(np.asarray(y)).all((1, 2)).tolist() for y in (y1, y2)]
    fits = coupling.storage == "float32"
    assert inside == [[True, fits, False]] * 2
    assert outside == [[False, not fits, True]] * 2


def test_a_stream_that_leaves_the_range_within_the_chain():
    def away(p, x):
        return x + 600

    apply = rj.reversible([mlp, away, mlp], [mlp, away, mlp], coupling=EXACT)
    back = rj.reversible([mlp, away], [mlp, lambda p, x: x * 0], coupling=EXACT)
    assert np.isnan(jax.jit(apply)(*PARAMS, *STREAMS)).all()
    assert np.isfinite(jax.jit(back)(PARAMS[0][:2], PARAMS[1][:2], *STREAMS)).all()


def mlp_of_what_a_host_counts(step):
    counter = itertools.count()

    def host(x):
        return np.asarray(x) + np.float32(next(counter) * step)

    @jax.custom_jvp
    def ask(x):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    ask.defjvp(lambda primals, tangents: (ask(*primals), tangents[0]))
    return lambda p, x: mlp(p, ask(x))


@pytest.mark.parametrize("scan", [False, True], ids=["chain", "scan"])
@pytest.mark.parametrize("coupling", [EXACT, pytest.param(FIXED, marks=pytest.mark.slow)], ids=["float32", "int16"])
def test_a_branch_that_is_not_the_same_twice(coupling, scan):
    """It asks its host, who counts: streams are rebuilt with other bits, and every gradient is NaN. Else none is."""
    params = [stacked(p) for p in PARAMS] if scan else PARAMS
    for step in (0.0, 0.125):
        branch = mlp_of_what_a_host_counts(step)
        apply = rj.reversible_scan(branch, branch, coupling=coupling) if scan else chain(coupling, branch)
        found = [np.isnan(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradients(apply, *params, *STREAMS))]
        assert all(found) if step else not any(found)


def test_int16_streams_have_first_derivatives_alone():
    """Any other would be wrong without a word."""
    apply = chain(FIXED)

    def slope(x):
        return jax.grad(loss_of(apply), 2)(*PARAMS, x, STREAMS[1]).sum()

    for call in (
        lambda: jax.grad(slope)(STREAMS[0]),
        lambda: jax.grad(lambda y: apply.inverse(*PARAMS, y, STREAMS[1])[0].sum())(STREAMS[0]),
    ):
        with pytest.raises(NotImplementedError, match="int16 streams carry no gradient"):
            call()
    assert jax.jit(jax.grad(lambda y: chain().inverse(*PARAMS, y, STREAMS[1])[0].sum()))(STREAMS[0]).any()


def test_float64_is_refused():
    with x64(), pytest.raises(ValueError, match="x1 is float64; an exact coupling keeps float32"):
        chain()(*PARAMS, *(x.astype("float64") for x in STREAMS))
