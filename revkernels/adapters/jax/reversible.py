# SPDX-License-Identifier: Apache-2.0
"""Chains of reversible blocks whose memory does not grow with depth, as `jax.custom_vjp` functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from revkernels.adapters.jax import blocks
from revkernels.adapters.jax.blocks import Block, Branch
from revkernels.adapters.jax.checks import arrays_of, check_backend, check_float, check_same_shape
from revkernels.adapters.jax.manual_axes import as_sums
from revkernels.adapters.jax.streams import Exactly, Floating, kept_as
from revkernels.adapters.jax.trees import split

__all__ = ["Chain", "reversible"]


def reversible(
    fs: Sequence[Branch], gs: Sequence[Branch], *, coupling: Any = "float", backend: str | None = None
) -> Chain:
    """Return ``apply(f_params, g_params, x1, x2, *args) -> (y1, y2)``, a chain of ``len(fs)`` reversible blocks.

        for every k:    x1 = x1 + fs[k](f_params[k], x2, *args)
                        x2 = x2 + gs[k](g_params[k], x1, *args)

    Its backward keeps only the outputs and the parameters, and reconstructs everything else (Gomez et al. 2017,
    Algorithm 1): one more call of every branch per training step, and memory that does not grow with ``len(fs)``.
    ``apply.inverse(f_params, g_params, y1, y2, *args)`` returns the inputs.

    x1 and x2 share one shape and one dtype (float64, float32, bfloat16, float16), and every branch returns that shape;
    its dtype may differ, the sum is rounded once to the stream's. Parameters and ``args`` are trees of any kind: their
    float arrays have gradients, other arrays (steps, masks, random keys) have none, and non-arrays are left alone, so a
    Flax dictionary or an Equinox module can be passed as it is. A branch must be a function of its arguments: it draws
    random numbers from a key in its parameters or in ``args``, and everything that needs a gradient is passed there
    (closed over, it makes JAX raise an UnexpectedTracerError).

    Args:
        fs, gs: residual functions, called as ``fs[k](f_params[k], x, *args)``.
        coupling: "float", or a `revkernels.Exact` with a k: the streams are kept on the grid of multiples of 2^-k (x1
            and x2 are rounded to it; bfloat16 and float16 are widened, the outputs are float32) and reconstructed bit
            for bit. Outputs that left the grid's range are NaN, and so are all gradients if a stream was reconstructed
            with other bits, as with a branch that is not the same function twice.
        backend: None or "kernels" for this library's kernels, "xla" for the same formulas in jax.numpy.

    Raises:
        TypeError, ValueError: while tracing; the message names the argument or the branch.
    """
    keep = kept_as(coupling, check_backend(backend))
    for name, branches in (("fs", fs), ("gs", gs)):
        if not isinstance(branches, list | tuple):
            raise TypeError(f"{name} is a {type(branches).__name__}; it must be a list or tuple of functions")
        for k, branch in enumerate(branches):
            if not callable(branch):
                raise TypeError(f"{name}[{k}] is a {type(branch).__name__}; it must be a function of (params, x)")
    if len(fs) != len(gs):
        raise ValueError(f"gs has {len(gs)} functions, fs has {len(fs)}: they must be equal")
    return Chain(tuple(fs), tuple(gs), keep)


class Chain:
    """What `reversible` returns."""

    def __init__(self, fs: Sequence[Branch], gs: Sequence[Branch], keep: Floating | Exactly) -> None:
        self._fs, self._gs, self._keep = fs, gs, keep

    def __call__(self, f_params: Sequence[Any], g_params: Sequence[Any], x1: Any, x2: Any, *args: Any) -> Any:
        """Return (y1, y2)."""
        x1, x2 = checked_streams("x", x1, x2, self._keep)
        self._check_params(f_params, g_params)
        tree = list(f_params), list(g_params), args
        return without_activations(self._keep, self._run, self._run, self._undo, tree, x1, x2)

    def inverse(self, f_params: Sequence[Any], g_params: Sequence[Any], y1: Any, y2: Any, *args: Any) -> Any:
        """Return (x1, x2)."""
        y1, y2 = checked_streams("y", y1, y2, self._keep)
        self._check_params(f_params, g_params)
        f_params, g_params, args, y1, y2 = self._keep.guard((f_params, g_params, args, y1, y2))
        (s1, _), (s2, _) = self._keep.enter(y1), self._keep.enter(y2)
        for block in reversed(self._blocks(f_params, g_params)):
            s1, s2 = blocks.inverse(self._keep, block, s1, s2, args)
        return self._keep.value(s1), self._keep.value(s2)

    def _run(self, tree: Any, s1: Array, s2: Array, entry: Any) -> Any:
        f_params, g_params, args = tree
        reports = [entry]
        for block in self._blocks(f_params, g_params):
            s1, s2, found = blocks.forward(self._keep, block, s1, s2, args)
            reports.append(found)
        return s1, s2, reports, reports[:-1]

    def _undo(self, tree: Any, s1: Array, s2: Array, d1: Array, d2: Array) -> Any:
        f_params, g_params, args = tree
        df: list[Array] = []
        dg: list[Array] = []
        dargs = [jnp.zeros_like(leaf) for leaf in split(args).floating]
        reports: list[Any] = []
        for block in reversed(self._blocks(f_params, g_params)):
            undone = blocks.backward(self._keep, block, s1, s2, d1, d2, args)
            s1, s2, d1, d2 = undone[:4]
            df, dg = undone.df_params + df, undone.dg_params + dg
            dargs = [total + part for total, part in zip(dargs, undone.dargs, strict=True)]
            reports.insert(0, undone.reports)
        return d1, d2, df + dg + dargs, reports

    def _blocks(self, f_params: Sequence[Any], g_params: Sequence[Any]) -> list[Block]:
        return [
            Block(f, g, f"fs[{k}]", f"gs[{k}]", f_params[k], g_params[k])
            for k, (f, g) in enumerate(zip(self._fs, self._gs, strict=True))
        ]

    def _check_params(self, f_params: Any, g_params: Any) -> None:
        for name, params, branches in (("f_params", f_params, "fs"), ("g_params", g_params, "gs")):
            if not isinstance(params, list | tuple):
                raise TypeError(
                    f"{name} is a {type(params).__name__}; it must be a list or tuple, one entry for each function"
                )
            if len(params) != len(self._fs):
                raise ValueError(
                    f"{name} has {len(params)} entries, {branches} has {len(self._fs)}: they must be equal"
                )


def checked_streams(name: str, x1: Any, x2: Any, keep: Floating | Exactly) -> list[Array]:
    """Return both streams as JAX arrays, if they can be coupled."""
    named = arrays_of(**{f"{name}1": x1, f"{name}2": x2})
    check_float(named)
    check_same_shape(named)
    x1, x2 = named.values()
    if x1.dtype != x2.dtype:
        raise ValueError(f"{name}1 is {x1.dtype.name}, {name}2 is {x2.dtype.name}: they must be equal")
    if isinstance(keep, Exactly) and x1.dtype.name == "float64":
        raise ValueError(
            f"{name}1 is float64; an exact coupling keeps float32 or int16 streams (bfloat16 and float16 are widened)"
        )
    return [x1, x2]


def without_activations(
    keep: Floating | Exactly,
    run: Callable[[Any, Array, Array, Any], Any],
    run_one: Callable[[Any, Array, Array, Any], Any],
    undo: Callable[[Any, Array, Array, Array, Array], Any],
    tree: Any,
    x1: Array,
    x2: Array,
) -> tuple[Array, Array]:
    """Return the outputs of ``run`` with ``undo`` as its backward, with only the outputs and the tree as residuals.

    ``run(tree, s1, s2, entry)`` returns the final streams, all reports (``entry`` are those of s1 and s2), and those of
    the blocks' inputs. ``run_one`` does the same for all blocks or for one that stands for all. ``undo(tree, s1, s2,
    d1, d2)`` returns the gradients of the inputs, those of the tree's floating leaves, and the reports of the blocks'
    inputs as reconstructed.
    """
    leaves = split(tree)

    @jax.custom_vjp
    def apply(floating: list[Array], others: list[Array], x1: Array, x2: Array) -> tuple[Array, Array]:
        return forward(floating, others, x1, x2)[0]

    def forward(floating: list[Array], others: list[Array], x1: Array, x2: Array) -> Any:
        floating, x1, x2 = keep.guard((floating, x1, x2))
        (s1, r1), (s2, r2) = keep.enter(x1), keep.enter(x2)
        s1, s2, reports, of_inputs = run(leaves.tree(floating, others), s1, s2, (r1, r2))
        outputs = _nan_unless(keep.in_range(reports), (keep.value(s1), keep.value(s2)))
        return outputs, (floating, others, s1, s2, of_inputs)

    def backward(residuals: Any, cotangents: Any) -> Any:
        floating, others, s1, s2, expected = residuals
        floating = [jnp.asarray(leaf) for leaf in floating]  # outside jit a leaf may be a Python number again
        d1, d2, gradients, found = undo(leaves.tree(floating, others), s1, s2, *cotangents)
        gradients = gradients, d1.astype(x1.dtype), d2.astype(x2.dtype)
        gradients, d1, d2 = _nan_unless(keep.unchanged(found, expected), gradients)
        return gradients, None, d1, d2

    apply.defvjp(forward, backward)

    def added(x1: Array, x2: Array) -> Any:
        (s1, r1), (s2, r2) = keep.enter(x1), keep.enter(x2)
        return run_one(tree, s1, s2, (r1, r2))[:2]

    # Before the derivative rule, so that JAX itself sums the gradients of what is replicated across devices.
    (x1, x2), floating = as_sums(added, [x1, x2], leaves.floating)
    return apply(floating, leaves.others, x1, x2)


def _nan_unless(condition: Array | None, tree: Any) -> Any:
    if condition is None:
        return tree
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, jnp.asarray(jnp.nan, leaf.dtype)), tree)
