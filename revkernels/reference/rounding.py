# SPDX-License-Identifier: Apache-2.0
"""Rounding to the element types, to nearest even, by exact arithmetic in float64 instead of bit manipulation."""

from __future__ import annotations

import numpy as np

# digits of the significand, smallest normal exponent, largest finite value
_HALF_TYPES = {
    "bfloat16": (8, -126, (2.0 - 2.0**-7) * 2.0**127),
    "float16": (11, -14, 65504.0),
}


def wide_type(*dtypes: str) -> type[np.floating]:
    """Return the compute type of operands of these dtypes: float64 if one of them is float64, else float32."""
    return np.float64 if "float64" in dtypes else np.float32


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return ``values`` rounded once to ``dtype``, as float64 numbers that ``dtype`` represents exactly."""
    values = np.asarray(values, dtype=np.float64)
    if dtype == "float64":
        return values.copy()
    if dtype == "float32":
        with np.errstate(over="ignore"):
            return values.astype(np.float32).astype(np.float64)
    digits, smallest, largest = _HALF_TYPES[dtype]
    finite = np.isfinite(values) & (values != 0)
    _, exponent = np.frexp(np.where(finite, values, 1.0))  # |values| = m * 2^exponent, 1/2 <= m < 1
    place = np.maximum(exponent - 1, smallest) - (digits - 1)  # the exponent of the last digit kept
    rounded = np.ldexp(np.rint(np.ldexp(np.where(finite, values, 0.0), -place)), place)
    rounded = np.where(np.abs(rounded) > largest, np.copysign(np.inf, values), rounded)
    return np.where(finite, np.copysign(rounded, values), values)


def bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the stored bits, as uint64, of float64 ``values`` that ``dtype`` represents exactly (no NaN)."""
    values = np.asarray(values, dtype=np.float64)
    if dtype == "int16":
        return values.astype(np.int16).view(np.uint16).astype(np.uint64)
    if dtype == "float64":
        return values.view(np.uint64)
    if dtype == "float32":
        return values.astype(np.float32).view(np.uint32).astype(np.uint64)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint64)
    return values.astype(np.float32).view(np.uint32).astype(np.uint64) >> np.uint64(16)
