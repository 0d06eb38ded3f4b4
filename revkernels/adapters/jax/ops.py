# SPDX-License-Identifier: Apache-2.0
"""The couplings and sums as pure functions of JAX arrays.

All shapes in a call are equal; dtypes (float64, float32, bfloat16, float16) may differ. The arithmetic is in float64 if
either operand of a sum is float64, else in float32, and is rounded once to the first operand's dtype. A function whose
name ends in ``_`` puts its result into its first operand's memory: under `jax.jit`, if that operand is not needed
afterwards and, if it is an argument, is donated; otherwise XLA copies it first, and the values are the same.

All of them work under `jax.jit`, `jax.vmap`, `jax.grad` (and `jax.jvp`, to any order), `jax.checkpoint` and `jax.lax`'s
loops. Every function takes ``backend``: None or "kernels" for this library's, "xla" for the same formulas in jax.numpy,
which XLA may fuse with adjacent operations.

A coupling takes a `revkernels.Coupling` with only a ``grid_exponent`` k: f is rounded to multiples of 2^-k, and the
gradient of the rounding is taken as the identity. With a grid_exponent the stream may be int16, in fixed point, which
carries no gradient.

Raised while JAX traces: TypeError (not an array, an integer dtype), ValueError (unequal shapes, an option that does not
exist or does not fit), BackendError (a ValueError: the handlers cannot be compiled, no such backend). What the C
library rejects while XLA runs, such as a CUDA device in a build without CUDA, is XLA's own error with the library's
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from revkernels.adapters.jax import calls, plain
from revkernels.adapters.jax.checks import arrays_of, check_backend, check_float, check_same_shape, grid_exponent_of
from revkernels.coupling import Coupling

__all__ = ["accumulate_", "couple", "couple_", "reverse_step_", "uncouple", "uncouple_"]


def couple(x: Any, f: Any, *, coupling: Coupling | None = None, backend: str | None = None) -> Array:
    """Return y = x + f, the additive coupling (Gomez et al. 2017, eq. 6), in new memory."""
    return _checked_couple("x", x, f, coupling, backend, subtract=False, in_place=False)


def couple_(x: Any, f: Any, *, coupling: Coupling | None = None, backend: str | None = None) -> Array:
    """Return y = x + f (eq. 6), in x's memory if that is free."""
    return _checked_couple("x", x, f, coupling, backend, subtract=False, in_place=True)


def uncouple(y: Any, f: Any, *, coupling: Coupling | None = None, backend: str | None = None) -> Array:
    """Return x = y - f, the inverse of `couple` (eq. 7), in new memory."""
    return _checked_couple("y", y, f, coupling, backend, subtract=True, in_place=False)


def uncouple_(y: Any, f: Any, *, coupling: Coupling | None = None, backend: str | None = None) -> Array:
    """Return x = y - f (eq. 7), in y's memory if that is free."""
    return _checked_couple("y", y, f, coupling, backend, subtract=True, in_place=True)


def reverse_step_(
    y: Any, f: Any, dy: Any, df: Any, *, coupling: Coupling | None = None, backend: str | None = None
) -> tuple[Array, Array]:
    """Reverse one half of a block and add its gradient, in one pass (Algorithm 1, lines 3 to 6).

        x = y - f      dx = dy + df

    ``coupling`` acts on f only. Returns (x, dx), in the memory of y and dy if that is free.
    """
    kernels = check_backend(backend)
    named = arrays_of(y=y, f=f, dy=dy, df=df)
    check_float(named, stream="y")
    check_same_shape(named)
    y, f, dy, df = named.values()
    x, dx = reverse_step_arrays(y, f, dy, df, grid_exponent_of(coupling, "y", y.dtype), kernels)
    return x, dx


def accumulate_(total: Any, part: Any, *, backend: str | None = None) -> Any:
    """Return total + part: adds a second contribution to a gradient (Algorithm 1, lines 5 and 6).

    Both may be lists (or tuples) of arrays of equal length, each pair with its own shape; a CUDA device then uses as
    few launches as possible, and the result is a list. In the totals' memory if that is free.
    """
    kernels = check_backend(backend)
    several = isinstance(total, list | tuple), isinstance(part, list | tuple)
    if several == (False, False):
        return _accumulate(kernels, *_operands("", [total], [part]))[0]
    if several != (True, True):
        raise TypeError("total and part must both be arrays, or both lists of arrays")
    if len(total) != len(part):
        raise ValueError(f"part has {len(part)} arrays, total has {len(total)}: they must be equal")
    return _accumulate(kernels, *_operands("[{}]", total, part)) if total else []


def _operands(suffix: str, totals: Sequence[Any], parts: Sequence[Any]) -> tuple[list[Array], list[Array]]:
    pairs = []
    for index, (total, part) in enumerate(zip(totals, parts, strict=True)):
        place = suffix.format(index)
        named = arrays_of(**{f"total{place}": total, f"part{place}": part})
        check_float(named)
        check_same_shape(named)
        pairs.append(named.values())
    return [total for total, _ in pairs], [part for _, part in pairs]


def _checked_couple(
    name: str, x: Any, f: Any, coupling: Coupling | None, backend: str | None, *, subtract: bool, in_place: bool
) -> Array:
    kernels = check_backend(backend)
    named = arrays_of(**{name: x, "f": f})
    check_float(named, stream=name)
    check_same_shape(named)
    x, f = named.values()
    return couple_arrays(x, f, subtract, grid_exponent_of(coupling, name, x.dtype), in_place, kernels)


# ---- unchecked, with derivatives


def couple_arrays(
    x: Array, f: Array, subtract: bool, k: int | None, in_place: bool, kernels: bool, reports: bool = False
) -> Any:
    """x + f, or x - f; with ``reports`` a pair of that and its `Reports`. An int16 stream carries no gradient."""
    static = _Static(subtract, k, in_place, kernels, reports)
    if x.dtype == jnp.int16:
        return _sum(static, x, lax.stop_gradient(f))
    return _couple(static, x, f)


def reverse_step_arrays(
    y: Array,
    f: Array,
    dy: Array,
    df: Array,
    k: int | None,
    kernels: bool,
    reports: bool = False,
    after: Sequence[Array] = (),
) -> Any:
    """(y - f, dy + df); with ``reports`` those of y - f come third. The arrays ``after`` are computed before."""
    static = _Static(True, k, True, kernels, reports)
    if y.dtype == jnp.int16:
        return _step(static, y, lax.stop_gradient(f), dy, df, list(after))
    return _reverse_step(static, y, f, dy, df, list(after))


class _Static(NamedTuple):
    subtract: bool
    k: int | None
    in_place: bool
    kernels: bool
    reports: bool


def _sum(static: _Static, x: Array, f: Array) -> Any:
    subtract, k, in_place, kernels, reports = static
    if kernels:
        return calls.couple(x, f, subtract=subtract, k=k, in_place=in_place, reports=reports)
    result = plain.couple(x, f, subtract=subtract, k=k)
    return (result, plain.reports(result, x, f, subtract, k)) if reports else result


def _step(static: _Static, y: Array, f: Array, dy: Array, df: Array, after: list[Array]) -> Any:
    if static.kernels:
        return calls.reverse_step(y, f, dy, df, k=static.k, reports=static.reports, after=after)
    # All at once: a stream reconstructed long before its gradient exists would have to be kept until then.
    y, f, dy, df, *_ = lax.optimization_barrier((y, f, dy, df, *after))
    x = _sum(static, y, f)
    x, reports = x if static.reports else (x, None)
    x, dx = lax.optimization_barrier((x, plain.accumulate(dy, df)))
    return (x, dx, reports) if static.reports else (x, dx)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _couple(static: _Static, x: Array, f: Array) -> Any:
    return _sum(static, x, f)


@_couple.defjvp
def _couple_jvp(static: _Static, primals: Any, tangents: Any) -> Any:
    result = _couple(static, *primals)
    change = plain.couple(*tangents, subtract=static.subtract, k=None)
    return result, (change, _no_change(result[1])) if static.reports else change


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _reverse_step(static: _Static, y: Array, f: Array, dy: Array, df: Array, after: list[Array]) -> Any:
    return _step(static, y, f, dy, df, after)


@_reverse_step.defjvp
def _reverse_step_jvp(static: _Static, primals: Any, tangents: Any) -> Any:
    y, f, dy, df, _ = tangents
    result = _reverse_step(static, *primals)
    changes = plain.couple(y, f, subtract=True, k=None), plain.accumulate(dy, df)
    return result, (*changes, _no_change(result[2])) if static.reports else changes


def _no_change(reports: calls.Reports) -> calls.Reports:
    """The tangent of reports: zero."""
    nothing: Any = np.zeros(reports.checksum.shape, jax.dtypes.float0)  # what JAX requires for integers
    return calls.Reports(jnp.zeros_like(reports.amax), nothing)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _accumulate(kernels: bool, totals: list[Array], parts: list[Array]) -> list[Array]:
    if kernels:
        return calls.accumulate(totals, parts)
    return [plain.accumulate(total, part) for total, part in zip(totals, parts, strict=True)]


@_accumulate.defjvp
def _accumulate_jvp(kernels: bool, primals: Any, tangents: Any) -> Any:
    sums = [plain.accumulate(total, part) for total, part in zip(*tangents, strict=True)]
    return _accumulate(kernels, *primals), sums
