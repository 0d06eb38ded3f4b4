# SPDX-License-Identifier: Apache-2.0
"""One reversible block, forward and backward (Algorithm 1): shared by a chain and a scan of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from revkernels.adapters.jax.checks import is_array
from revkernels.adapters.jax.manual_axes import beyond, sharded_like, together
from revkernels.adapters.jax.streams import Exactly, Floating
from revkernels.adapters.jax.trees import split
from revkernels.arrays import FLOATS

__all__ = ["Block", "backward", "forward", "inverse"]

Streams = Floating | Exactly
Branch = Callable[..., Any]


class Block(NamedTuple):
    """A block's residual functions with their names in errors, and their parameters."""

    f: Branch
    g: Branch
    f_name: str
    g_name: str
    f_params: Any
    g_params: Any


def forward(keep: Streams, block: Block, s1: Array, s2: Array, args: Any) -> tuple[Array, Array, tuple[Any, Any]]:
    """y1 = x1 + F(x2); y2 = x2 + G(y1)   (eq. 6). Returns both and their reports."""
    s1, r1 = keep.couple(s1, _call(block.f_name, block.f, block.f_params, keep.value(s2), args, s1))
    s2, r2 = keep.couple(s2, _call(block.g_name, block.g, block.g_params, keep.value(s1), args, s2))
    return s1, s2, (r1, r2)


def inverse(keep: Streams, block: Block, s1: Array, s2: Array, args: Any) -> tuple[Array, Array]:
    """x2 = y2 - G(y1); x1 = y1 - F(x2)   (eq. 7)"""
    s2 = keep.uncouple(s2, _call(block.g_name, block.g, block.g_params, keep.value(s1), args, s2))
    s1 = keep.uncouple(s1, _call(block.f_name, block.f, block.f_params, keep.value(s2), args, s1))
    return s1, s2


class Undone(NamedTuple):
    """The result of a block's backward: its inputs, their gradients, and those of parameters and arguments."""

    s1: Array
    s2: Array
    d1: Array
    d2: Array
    df_params: list[Array]
    dg_params: list[Array]
    dargs: list[Array]
    reports: tuple[Any, Any]


def backward(keep: Streams, block: Block, s1: Array, s2: Array, d1: Array, d2: Array, args: Any) -> Undone:
    """Algorithm 1: one call of each branch gives its value and its pullback, one step uses both.

    A stream's reverse step and its gradient's accumulation are one `reverse_step_`, or two calls where XLA can run them
    in parallel.
    """
    s2, d1, dg, dargs_g, r2 = _undo(keep, block.g_name, block.g, block.g_params, args, s1, s2, d1, d2)
    s1, d2, df, dargs_f, r1 = _undo(keep, block.f_name, block.f, block.f_params, args, s2, s1, d2, d1)
    return Undone(s1, s2, d1, d2, df, dg, [a + b for a, b in zip(dargs_g, dargs_f, strict=True)], (r1, r2))


def _undo(
    keep: Streams, name: str, branch: Branch, params: Any, args: Any, source: Array, target: Array, dsource: Any, d: Any
) -> Any:
    """Subtract ``branch(source)`` from the target, and pull the target's gradient ``d`` back to the source's."""
    p, a = split(params), split(args)

    def call(p_floating: list[Array], a_floating: list[Array], x: Array) -> Array:
        return _call(name, branch, p.tree(p_floating, p.others), x, a.tree(a_floating, a.others), target)

    value, pullback = jax.vjp(call, p.floating, a.floating, keep.value(source))
    dp, da, through = pullback(d.astype(value.dtype))
    # After the parameters' gradients too: postponed, they would keep this branch's activations alive. Not after those
    # that vary along axes of `jax.shard_map` along which the streams do not: these would have to vary along them then.
    after = [gradient for gradient in dp + da if not beyond(gradient, target)]
    target, dsource, report = keep.reverse_step(target, value, dsource, through, after)
    return target, dsource, dp, da, report


def _call(name: str, branch: Branch, params: Any, x: Array, args: Any, stream: Array) -> Array:
    """A branch's result, checked to be an array that can be added to the stream."""
    result = branch(params, x, *args)
    if not is_array(result):
        raise TypeError(f"{name} returned a {type(result).__name__}; it must return an array")
    if result.shape != stream.shape:
        raise ValueError(f"{name} returned shape {result.shape}; its stream has {stream.shape}: they must be equal")
    if result.dtype.name not in FLOATS:
        raise TypeError(f"{name} returned {result.dtype.name}; it must return one of {', '.join(FLOATS)}")
    return sharded_like(together([jnp.asarray(result), stream])[0], stream)  # as its gradient will be the stream's
