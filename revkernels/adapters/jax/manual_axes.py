# SPDX-License-Identifier: Apache-2.0
"""What an array's type says of devices: axes of `jax.shard_map` along which it varies, and explicit shardings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["as_sums", "beyond", "result", "sharded_like", "together"]


def together(arrays: Sequence[Any]) -> list[Any]:
    """Return the arrays, all varying along every axis along which one of them varies."""
    axes = frozenset().union(*map(_varying, arrays))
    return [_vary(array, axes - _varying(array)) for array in arrays]


def beyond(array: Any, like: Any) -> bool:
    """Whether the array varies along an axis along which ``like`` does not."""
    return not _varying(array) <= _varying(like)


def as_sums(add: Callable[..., Sequence[Any]], streams: Sequence[Any], arrays: Sequence[Any]) -> tuple[Any, Any]:
    """Return the streams, varying along the axes of the sums ``add(*streams)``, and the arrays, varying at least so.

    ``add`` adds functions of the streams and the arrays to the streams. Where a function sums over an axis along which
    its parameters are distributed (`jax.lax.psum`), the sums do not vary along it, though parameters do.
    """
    streams = together(streams)
    if any(beyond(array, streams[0]) for array in arrays):
        axes = frozenset().union(*map(_varying, [*streams, *jax.eval_shape(add, *streams)]))
        streams = [_vary(stream, axes - _varying(stream)) for stream in streams]
    return streams, [_vary(array, _varying(streams[0]) - _varying(array)) for array in arrays]


def result(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Describe a result of that shape and dtype that varies as ``like`` does."""
    if not _varying(like):
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(lambda array: jnp.broadcast_to(jnp.sum(array).astype(dtype), shape), like)


def sharded_like(array: Any, like: Any) -> Any:
    """Return the array sharded as ``like`` in its type, where types tell shardings.

    They do on a mesh with explicit axes, and a derivative must have its primal's type, a loop's result its input's. JAX
    takes the results of a custom call for replicated, and a branch may return another sharding than its stream's.
    """
    sharding: Any
    own: Any
    sharding, own = (getattr(jax.typeof(one), "sharding", None) for one in (like, array))
    reshard = getattr(jax.sharding, "reshard", None)  # since JAX 0.7
    if reshard is None or sharding is None or array.shape != like.shape or own.spec == sharding.spec:
        return array
    if sharding.mesh.empty:  # replicated, on any mesh
        sharding = sharding.update(mesh=own.mesh)
    return reshard(array, sharding)


def _varying(array: Any) -> frozenset[Any]:
    # JAX 0.6 has no such type; 0.7 to 0.9 call it vma
    kind = jax.typeof(array)
    axes: frozenset[Any] = kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", frozenset())
    return axes


def _vary(array: Any, axes: frozenset[Any]) -> Any:
    known: Any = lax  # lax has pcast since JAX 0.8, pvary before
    if not axes:
        return array
    return known.pcast(array, tuple(axes), to="varying") if hasattr(lax, "pcast") else known.pvary(array, tuple(axes))
