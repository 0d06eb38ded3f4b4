# SPDX-License-Identifier: Apache-2.0
"""Memory: results in their operands' place, and training steps that need as much of it at any depth."""

import re

import numpy as np
import pytest
from jax_cases import (
    chain_params,
    conv,
    conv_params,
    jax,
    jnp,
    loss_of,
    mlp,
    mlp_params,
    plain_chain,
    stacked,
    stream_pair,
)

import revkernels as rk
from revkernels.adapters import jax as rj

X, F, DX, DF = (np.random.default_rng(n).standard_normal((4, 6)).astype("float32") for n in range(4))


def compiled(function, *arrays, donate=()):
    return jax.jit(function, donate_argnums=donate).lower(*arrays).compile()


def copies(text, array):
    """How many copies of such an array a compiled program makes."""
    shape = f"f32[{','.join(map(str, array.shape))}]"
    return len(re.findall(re.escape(shape) + r"\{[\d,]*\} copy\(", text))


@pytest.mark.parametrize(
    ("function", "donated"),
    [(rj.couple_, (0,)), (rj.uncouple_, (0,)), (rj.accumulate_, (0,)), (rj.reverse_step_, (0, 2))],
)
def test_donated_operands_hold_the_results(function, donated):
    """One address before and after, no copy in the program, and the operand is gone."""
    arrays = [jnp.asarray(a) for a in ((X, F, DX, DF) if function is rj.reverse_step_ else (X, F))]
    program = compiled(function, *arrays, donate=donated)
    assert copies(program.as_text(), X) == 0
    assert "output_to_operand_aliasing={" in program.as_text()
    before = [arrays[i].unsafe_buffer_pointer() for i in donated]
    results = jax.tree.leaves(program(*arrays))
    assert [r.unsafe_buffer_pointer() for r in results] == before
    assert all(arrays[i].is_deleted() for i in donated)


def test_kept_operands_are_copied_first():
    x = jnp.asarray(X)
    program = compiled(rj.couple_, x, F)
    assert copies(program.as_text(), X) == 1
    assert program(x, F).unsafe_buffer_pointer() != x.unsafe_buffer_pointer()
    assert np.array_equal(x, X)
    assert copies(compiled(rj.couple, x, F).as_text(), X) == 0  # it has memory of its own


def test_a_chain_of_couplings_needs_one_stream():
    """Each in the memory of the one before, where the branch reads the stream too."""

    def chain(x):
        for _ in range(5):
            x = rj.couple_(x, jnp.sin(x))
        return x

    assert copies(compiled(chain, X, donate=(0,)).as_text(), X) == 0


def test_a_step_copies_what_it_must_not_lose_alone(half_step_calls):
    """The inputs, which are the caller's, and the outputs, which are returned: four copies, however deep.

    Where a half-step is two calls, it may also copy a stream that its branch's backward still reads.
    """
    found = []
    for depth in (2, 6):
        params = [mlp_params(n, 6) for n in range(2 * depth)]
        apply = rj.reversible([mlp] * depth, [mlp] * depth)

        def step(f, g, x1, x2, apply=apply):
            y, pull = jax.vjp(apply, f, g, x1, x2)
            return y, pull(y)

        streams = stream_pair((64, 6))
        found.append(copies(compiled(step, params[::2], params[1::2], *streams).as_text(), streams[0]))
    more = 2 * (half_step_calls - 1)  # a block
    assert found[0] <= 6 + 2 * more
    assert found[1] - found[0] <= 4 * more


def test_results_may_be_read_after_their_place_is_used_again():
    """A stream that is returned, or read later, is not lost to the coupling that comes after it."""

    def function(x, f):
        y = rj.couple_(x, f)
        z = rj.couple_(y, f)
        return x, y, z, x * y

    x, y, z, product = jax.jit(function)(X, F)
    assert np.array_equal(x, X)
    assert np.array_equal(y, X + F)
    assert np.array_equal(z, (X + F) + F)
    assert np.array_equal(product, X * (X + F))


# ---- depth


def temporary_bytes(apply, params, streams):
    """What XLA plans for a training step beside arguments and results."""
    step = jax.jit(jax.grad(loss_of(apply), (0, 1, 2, 3)))
    return step.lower(*params, *streams).compile().memory_analysis().temp_size_in_bytes


CASES = {
    "mlp": (mlp, mlp_params, (16,), (1024, 16)),
    "conv": (conv, conv_params, (8,), (8, 16, 16, 8)),
}


def growth_a_block(make, case, depths):
    """Bytes that a block more adds, in streams."""
    branch, params, args, shape = CASES[case]
    streams = stream_pair(shape)
    found = [
        temporary_bytes(make(branch, depth), chain_params(params, depth, *args), streams) / streams[0].nbytes
        for depth in depths
    ]
    return (found[-1] - found[0]) / (depths[-1] - depths[0]), found


def chain(branch, depth, **options):
    return rj.reversible([branch] * depth, [branch] * depth, **options)


WAYS = {
    "kernels": {},
    "xla": {"backend": "xla"},
    "exact": {"coupling": rk.Exact(k=14)},
    "int16": {"coupling": rk.Exact(storage="int16", k=8)},
}


#: The quick ones go through the kernels with and without reports.
WITH_SLOW = [pytest.param(way, marks=() if way in ("kernels", "exact") else pytest.mark.slow) for way in WAYS]


@pytest.mark.parametrize("way", WITH_SLOW)
def test_memory_does_not_grow_with_depth(way):
    """By no hundredth of a stream a block: what is left are the checksums, and copies of vectors of weights."""
    growth, found = growth_a_block(lambda branch, depth: chain(branch, depth, **WAYS[way]), "mlp", (4, 16))
    assert growth < 0.01, found
    assert found[-1] < 10


def test_plain_memory_grows_with_depth():
    """Which is what the others are held against: the streams and what the branches keep, six streams a block."""
    growth, found = growth_a_block(lambda branch, depth: plain_chain([branch] * depth, [branch] * depth), "mlp", (4, 8))
    assert growth > 5, found


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_memory_of_convolutions_at_depth_64(way):
    """A block more adds less than its weights: turned over for the gradient, these wait from the beginning."""
    growth, found = growth_a_block(lambda branch, depth: chain(branch, depth, **WAYS[way]), "conv", (4, 16, 64))
    weights = 4 * 9 * 8 * 8 * 4 / stream_pair((8, 16, 16, 8))[0].nbytes
    assert growth < weights < 0.15, found


@pytest.mark.slow
def test_plain_memory_of_convolutions():
    growth, found = growth_a_block(
        lambda branch, depth: plain_chain([branch] * depth, [branch] * depth), "conv", (4, 16)
    )
    assert growth > 10, found


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way != "exact" else ()) for way in WAYS])
def test_memory_of_a_scan(way):
    """A loop's is that of one block, and what it keeps for a block are two checksums."""
    apply, streams, found = rj.reversible_scan(mlp, mlp, **WAYS[way]), stream_pair((1024, 16)), []
    for depth in (4, 64):
        params = [stacked(p) for p in chain_params(mlp_params, depth, 16)]
        found.append(temporary_bytes(apply, params, streams))
    assert found[1] - found[0] < 60 * 64 * (way in ("exact", "int16")) + 1, found
