# SPDX-License-Identifier: Apache-2.0
"""Modules of Flax and Equinox as branches."""

import numpy as np
import pytest
from jax_cases import furthest, gradients, jax, jnp, loss_of, plain_chain, stacked, stream_pair

import revkernels as rk
from revkernels.adapters import jax as rj

DEPTH, WIDTH = 2, 8
STREAMS = stream_pair((5, WIDTH))
KEYS = jax.random.split(jax.random.key(1), 2 * DEPTH)


@pytest.mark.slow
def test_flax_linen():
    """A module's apply with a dictionary of parameters, and dropout by a key that goes with them."""
    nn = pytest.importorskip("flax.linen", reason="flax is not installed")

    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
            return nn.Dense(WIDTH)(nn.Dropout(0.5, deterministic=False)(h))

    module = Branch()
    every = [module.init({"params": key, "dropout": key}, STREAMS[0])["params"] for key in KEYS]

    def branch(p, x, keys):
        return module.apply({"params": p}, x, rngs={"dropout": jax.random.fold_in(keys, x.size)})

    ours, plain = rj.reversible([branch] * DEPTH, [branch] * DEPTH), plain_chain([branch] * DEPTH, [branch] * DEPTH)
    args = (every[::2], every[1::2], *STREAMS, KEYS[0])
    assert furthest(gradients(ours, *args), gradients(plain, *args)) < 2e-6
    stack = rj.reversible_scan(branch, branch)
    got = gradients(stack, stacked(every[::2]), stacked(every[1::2]), *args[2:])
    f, g, *d = gradients(plain, *args)
    assert furthest(got, (stacked(f), stacked(g), *d)) < 2e-6


def test_flax_nnx():
    """A module's state is the tree of parameters, its graph definition is closed over."""
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

    class Branch(nnx.Module):
        def __init__(self, number):
            rngs = nnx.Rngs(number)
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.inner = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
            self.outer = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return self.outer(nnx.gelu(self.inner(self.norm(x))))

    split = [nnx.split(Branch(number)) for number in range(2 * DEPTH)]
    branches = [lambda state, x, graph=graph: nnx.merge(graph, state)(x) for graph, _ in split]
    states = [state for _, state in split]
    ours, plain = (make(branches[::2], branches[1::2]) for make in (rj.reversible, plain_chain))
    got, expected = (gradients(apply, states[::2], states[1::2], *STREAMS) for apply in (ours, plain))
    assert furthest(got, expected) < 2e-6


@pytest.mark.parametrize(
    "coupling", ["float", pytest.param(rk.Exact(k=16), marks=pytest.mark.slow)], ids=["float", "exact"]
)
def test_equinox(coupling):
    """Modules themselves are the parameters, functions and flags among their fields; `filter_grad` finds its arrays."""
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")

    class Branch(eqx.Module):
        mlp: eqx.nn.MLP
        dropout: eqx.nn.Dropout
        scale: float
        act: object

        def __init__(self, key):
            self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, key=key)
            self.dropout = eqx.nn.Dropout(0.3)
            self.scale, self.act = 0.5, jnp.tanh

        def __call__(self, x, key):
            return self.act(jax.vmap(self.mlp)(self.dropout(x, key=key))) * self.scale

    def call(module, x, key):
        return module(x, key)

    modules = [Branch(key) for key in KEYS]
    branches = [call] * DEPTH
    ours, plain = rj.reversible(branches, branches, coupling=coupling), plain_chain(branches, branches)

    def step(apply):
        def loss(both, x1, x2):
            return loss_of(apply)(*both, x1, x2, KEYS[0])

        return eqx.filter_jit(eqx.filter_grad(loss))((modules[::2], modules[1::2]), *STREAMS)

    got, expected = step(ours), step(plain)
    assert furthest(got, expected) < (2e-6 if coupling == "float" else 2.0**-14)
    assert isinstance(got[0][0], Branch)


def test_equinox_stacked():
    """As many modules as blocks in one, from `filter_vmap`."""
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")

    @eqx.filter_vmap
    def make(key):
        return eqx.nn.Linear(WIDTH, WIDTH, key=key)

    def call(module, x):
        return jnp.tanh(jax.vmap(module)(x))

    f, g = make(KEYS[:DEPTH]), make(KEYS[DEPTH:])
    apart = [[jax.tree.map(lambda leaf, k=k: leaf[k], module) for k in range(DEPTH)] for module in (f, g)]
    y = rj.reversible_scan(call, call)(f, g, *STREAMS)
    assert furthest(y, rj.reversible([call] * DEPTH, [call] * DEPTH)(*apart, *STREAMS)) < 1e-6
    assert np.isfinite(y[0]).all()
