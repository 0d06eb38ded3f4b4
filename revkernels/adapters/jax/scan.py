# SPDX-License-Identifier: Apache-2.0
"""A stack of equal reversible blocks as one loop: compiled once, at any depth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from revkernels.adapters.jax import blocks
from revkernels.adapters.jax.blocks import Block, Branch
from revkernels.adapters.jax.checks import check_backend
from revkernels.adapters.jax.reversible import checked_streams, without_activations
from revkernels.adapters.jax.streams import Exactly, Floating, kept_as
from revkernels.adapters.jax.trees import split

__all__ = ["Stack", "reversible_scan"]


def reversible_scan(f: Branch, g: Branch, *, coupling: Any = "float", backend: str | None = None) -> Stack:
    """Return ``apply(f_params, g_params, x1, x2, *args) -> (y1, y2)``, a stack of blocks with one f and one g.

    As `reversible`, except that every array in f_params and g_params has an additional first dimension over the blocks:
    f_params[k] there is ``jax.tree.map(lambda leaf: leaf[k], f_params)`` here. `jax.lax.scan` iterates over it, so
    tracing and compiling take as long as for one block.
    """
    keep = kept_as(coupling, check_backend(backend))
    for name, branch in (("f", f), ("g", g)):
        if not callable(branch):
            raise TypeError(f"{name} is a {type(branch).__name__}; it must be a function of (params, x)")
    return Stack(f, g, keep)


class Stack:
    """What `reversible_scan` returns."""

    def __init__(self, f: Branch, g: Branch, keep: Floating | Exactly) -> None:
        self._f, self._g, self._keep = f, g, keep

    def __call__(self, f_params: Any, g_params: Any, x1: Any, x2: Any, *args: Any) -> Any:
        """Return (y1, y2)."""
        x1, x2 = checked_streams("x", x1, x2, self._keep)
        _check_stacked(f_params, g_params)
        return without_activations(self._keep, self._run, self._run_one, self._undo, (f_params, g_params, args), x1, x2)

    def inverse(self, f_params: Any, g_params: Any, y1: Any, y2: Any, *args: Any) -> Any:
        """Return (x1, x2)."""
        y1, y2 = checked_streams("y", y1, y2, self._keep)
        _check_stacked(f_params, g_params)
        f_params, g_params, args, y1, y2 = self._keep.guard((f_params, g_params, args, y1, y2))
        arrays, block = self._sliced(f_params, g_params)
        (s1, _), (s2, _) = self._keep.enter(y1), self._keep.enter(y2)

        def step(streams: Any, of_block: Any) -> Any:
            s1, s2 = streams
            return blocks.inverse(self._keep, block(of_block), s1, s2, args), None

        (s1, s2), _ = lax.scan(step, (s1, s2), arrays, reverse=True)
        return self._keep.value(s1), self._keep.value(s2)

    def _run(self, tree: Any, s1: Array, s2: Array, entry: Any) -> Any:
        f_params, g_params, args = tree
        arrays, block = self._sliced(f_params, g_params)

        def step(streams: Any, of_block: Any) -> Any:
            s1, s2 = streams
            s1, s2, reports = blocks.forward(self._keep, block(of_block), s1, s2, args)
            return (s1, s2), reports

        (s1, s2), reports = lax.scan(step, (s1, s2), arrays)
        of_inputs = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), entry, reports)
        return s1, s2, (entry, reports), of_inputs

    def _run_one(self, tree: Any, s1: Array, s2: Array, entry: Any) -> Any:
        f_params, g_params, args = tree
        arrays, block = self._sliced(f_params, g_params)
        return blocks.forward(self._keep, block(jax.tree.map(lambda leaf: leaf[0], arrays)), s1, s2, args)

    def _undo(self, tree: Any, s1: Array, s2: Array, d1: Array, d2: Array) -> Any:
        f_params, g_params, args = tree
        arrays, block = self._sliced(f_params, g_params)

        def step(carry: Any, of_block: Any) -> Any:
            s1, s2, d1, d2, dargs = carry
            undone = blocks.backward(self._keep, block(of_block), s1, s2, d1, d2, args)
            dargs = [total + part for total, part in zip(dargs, undone.dargs, strict=True)]
            return (*undone[:4], dargs), (undone.df_params, undone.dg_params, undone.reports)

        no_gradient = [jnp.zeros_like(leaf) for leaf in split(args).floating]
        (_, _, d1, d2, dargs), (df, dg, reports) = lax.scan(step, (s1, s2, d1, d2, no_gradient), arrays, reverse=True)
        return d1, d2, df + dg + dargs, reports

    def _sliced(self, f_params: Any, g_params: Any) -> Any:
        """The arrays to scan over, and a function from a slice of them to a block."""
        f, g = split(f_params), split(g_params)

        def block(of_block: Any) -> Block:
            f_arrays, g_arrays = of_block
            return Block(self._f, self._g, "f", "g", f.tree(*f_arrays), g.tree(*g_arrays))

        return ((f.floating, f.others), (g.floating, g.others)), block


def _check_stacked(f_params: Any, g_params: Any) -> None:
    """Raise ValueError unless all arrays have the same number of blocks as their first dimension."""
    depth, first = None, ""
    for name, params in (("f_params", f_params), ("g_params", g_params)):
        leaves = split(params)
        for leaf in leaves.floating + leaves.others:
            if leaf.ndim == 0:
                raise ValueError(f"{name} has an array of shape (); it must have the number of blocks in front")
            if depth is None:
                depth, first = leaf.shape[0], f"{name} has an array of shape {leaf.shape}"
            if leaf.shape[0] != depth:
                raise ValueError(f"{name} has an array of shape {leaf.shape}, {first}: the first sizes must be equal")
    if depth is None:
        raise ValueError("f_params and g_params have no arrays, which would tell the number of blocks")
