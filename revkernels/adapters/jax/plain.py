# SPDX-License-Identifier: Apache-2.0
"""The kernels' formulas in jax.numpy: backend "xla", and the derivatives of the kernels.

The arithmetic is the kernels': float64 if either operand is float64, else float32, and one rounding to the result's
dtype.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from revkernels.adapters.jax.calls import Reports

__all__ = ["accumulate", "couple", "reports", "wide"]


def wide(*arrays: Any) -> Any:
    """The compute type of the operands."""
    return jnp.float64 if any(array.dtype == jnp.float64 for array in arrays) else jnp.float32


def couple(x: Any, f: Any, *, subtract: bool, k: int | None) -> Array:
    """x + f, or x - f, of x's dtype; f is first rounded to multiples of 2^-k."""
    if k is not None and f.dtype.itemsize == 2:
        # XLA may leave out the rounding to a half type, and in one of a branch's two calls alone: other bits.
        f = lax.optimization_barrier(f)
    if x.dtype == jnp.int16:
        return _couple_int16(x, f, subtract, k or 0)
    real = wide(x, f)
    f = f.astype(real)
    if k is not None:
        f = jnp.rint(f * _power(k, real)) * _power(-k, real)
    x_wide = x.astype(real)
    return (x_wide - f if subtract else x_wide + f).astype(x.dtype)


def accumulate(total: Any, part: Any) -> Array:
    """total + part, of total's dtype."""
    return couple(total, part, subtract=False, k=None)


def reports(result: Any, x: Any, f: Any, subtract: bool, k: int | None) -> Reports:
    """The reports of a coupling that wrote ``result``; the checksum depends on bits and positions, in 32 bits."""
    if result.dtype == jnp.int16:
        real = wide(f)
        n = jnp.rint(f.astype(real) * _power(k or 0, real))
        reach = jnp.abs(x.astype(real) - n if subtract else x.astype(real) + n) * _power(-(k or 0), real)
    else:
        reach = jnp.abs(result)
    width = {8: jnp.uint64, 4: jnp.uint32, 2: jnp.uint16}[result.dtype.itemsize]
    bits = lax.bitcast_convert_type(result, width).ravel()
    places = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
    total = jnp.sum(bits.astype(jnp.uint32) * places, dtype=jnp.uint32)
    return Reports(jnp.max(reach, initial=0).astype(jnp.float32), jnp.stack([total, jnp.zeros_like(total)]))


def _couple_int16(q: Any, f: Any, subtract: bool, k: int) -> Array:
    real = wide(f)
    n = jnp.rint(f.astype(real) * _power(k, real))
    # m as in revkernels.h; the sum wraps in 32 bits and is truncated to 16
    m = jnp.where(jnp.isnan(n), 0, jnp.clip(n, -(2.0**23), 2.0**23)).astype(jnp.int32)
    total = q.astype(jnp.int32) - m if subtract else q.astype(jnp.int32) + m
    return lax.bitcast_convert_type(total.astype(jnp.uint32).astype(jnp.uint16), jnp.int16)


def _power(k: int, real: Any) -> Any:
    return jnp.asarray(2.0**k, real)
