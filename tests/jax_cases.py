# SPDX-License-Identifier: Apache-2.0
"""What the tests of the JAX adapter share: values, comparison by bits, and small reversible networks."""

from contextlib import contextmanager

import numpy as np
import pytest

from revkernels import reference

jax = pytest.importorskip("jax", minversion="0.6", reason="jax is not installed: pip install 'revkernels[jax]'")
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402

FLOATS = ["float64", "float32", "bfloat16", "float16"]
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 6e-8, 6e4]


@contextmanager
def x64():
    """float64 inside; JAX makes it float32 otherwise."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def values(shape, dtype, number):
    """Float64 numbers that ``dtype`` holds exactly, one in ten of them special."""
    random = np.random.default_rng(number)
    if dtype == "int16":
        return random.integers(-32768, 32768, shape).astype(np.float64)
    found = random.standard_normal(shape) * np.exp2(random.integers(-12, 12, shape))
    found = np.where(random.random(shape) < 0.1, random.choice(SPECIAL, shape), found)
    return reference.round_to(found, dtype)


def to_jax(numbers, dtype):
    """The same as a JAX array."""
    return jnp.asarray(numbers).astype(dtype)


def same_bits(got, expected, what):
    """``got``, an array, holds the numbers ``expected``, the sign of a zero included; a NaN is a NaN."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == expected.shape, what
    same = (np.isnan(got) & np.isnan(expected)) | ((got == expected) & (np.signbit(got) == np.signbit(expected)))
    assert same.all(), f"{what}: {(~same).sum()} of {same.size} differ, {got[~same][0]!r} for {expected[~same][0]!r}"


def equal(got, expected):
    """Two trees of arrays are equal, bit for bit but for NaN and zeros."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))


def furthest(got, expected):
    """The largest difference between two trees, each array's against its own largest number."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in wide)


# ---- branches of (params, x), and plain chains of them


def mlp(p, x):
    """tanh(x w) v + b"""
    return jnp.tanh(x @ p["w"]) @ p["v"] + p["b"]


def conv(p, x):
    """Two 3x3 convolutions with a norm and a ReLU in front of each, channels last."""
    for w in p:
        center = x.mean((0, 1, 2))
        x = (x - center) * lax.rsqrt(((x - center) ** 2).mean((0, 1, 2)) + 1e-5)
        x = lax.conv_general_dilated(jax.nn.relu(x), w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x


def mlp_params(number, width, dtype="float32", hidden=None):
    hidden = hidden or 2 * width
    keys = jax.random.split(jax.random.key(number), 3)
    return {
        "w": jax.random.normal(keys[0], (width, hidden), dtype) / np.sqrt(width).astype(dtype),
        "v": jax.random.normal(keys[1], (hidden, width), dtype) / np.sqrt(hidden).astype(dtype),
        "b": jax.random.normal(keys[2], (width,), dtype) / 4,
    }


def conv_params(number, width):
    keys = jax.random.split(jax.random.key(number), 2)
    return [jax.random.normal(key, (3, 3, width, width)) / np.sqrt(9 * width).astype("float32") for key in keys]


def chain_params(make, depth, *args):
    """(f_params, g_params) of ``depth`` blocks."""
    every = [make(number, *args) for number in range(2 * depth)]
    return every[::2], every[1::2]


def stream_pair(shape, dtype="float32", number=99):
    return tuple(jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(number)))


def stacked(params):
    """A list of equal trees as one, the blocks counted in front."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def plain_chain(fs, gs, couple=lambda x, f: x + f):
    """What `reversible` computes, written down: JAX's own derivative keeps every activation."""

    def apply(f_params, g_params, x1, x2, *args):
        for f, g, p, q in zip(fs, gs, f_params, g_params, strict=True):
            x1 = couple(x1, f(p, x2, *args))
            x2 = couple(x2, g(q, x1, *args))
        return x1, x2

    return apply


def loss_of(apply):
    """A scalar of both outputs, in whose gradient they have different parts."""

    def loss(*args):
        y1, y2 = apply(*args)
        return (y1.astype("float32") ** 2).mean() + 2 * (y2.astype("float32") ** 3).mean()

    return loss


def gradients(apply, *args, by=(0, 1, 2, 3)):
    return jax.jit(jax.grad(loss_of(apply), by))(*args)
