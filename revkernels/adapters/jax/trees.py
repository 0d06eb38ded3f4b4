# SPDX-License-Identifier: Apache-2.0
"""The arrays in a tree of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from revkernels.adapters.jax.checks import is_array

__all__ = ["Leaves", "split"]


class Leaves(NamedTuple):
    """The arrays of a tree: those with gradients, the others, and a function that rebuilds the tree.

    Non-arrays, such as an activation function among a module's fields, stay as they are.
    """

    floating: list[Array]
    others: list[Array]
    tree: Callable[[list[Any], list[Any]], Any]


def split(tree: Any) -> Leaves:
    """Return a tree's arrays by kind."""
    leaves, structure = jax.tree.flatten(tree)
    floating = [is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    others = [is_array(leaf) and not has_gradient for leaf, has_gradient in zip(leaves, floating, strict=True)]

    def join(floats: list[Any], rest: list[Any]) -> Any:
        take_float, take_other = iter(floats), iter(rest)
        filled = []
        for leaf, is_float, is_other in zip(leaves, floating, others, strict=True):
            filled.append(next(take_float) if is_float else next(take_other) if is_other else leaf)
        return jax.tree.unflatten(structure, filled)

    return Leaves(
        [leaf for leaf, chosen in zip(leaves, floating, strict=True) if chosen],
        [leaf for leaf, chosen in zip(leaves, others, strict=True) if chosen],
        join,
    )
