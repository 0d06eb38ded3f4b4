# SPDX-License-Identifier: Apache-2.0
"""The additive coupling, one operation at a time.

Values are float64 arrays that their dtype represents exactly; dtype names are separate arguments. The arithmetic is in
float64 if either operand is float64, else in float32, and is rounded once to the written dtype.

An int16 stream is in fixed point: its values are integers, which stand for multiples of 2^-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from revkernels.reference.accumulate import accumulate
from revkernels.reference.rounding import bits_of, round_to, wide_type


def couple(
    x: np.ndarray, f: np.ndarray, x_dtype: str = "float64", f_dtype: str = "float64", **options: Any
) -> np.ndarray:
    """y = x + f   (paper eq. 6)"""
    wide = wide_type(x_dtype, f_dtype)
    if x_dtype == "int16":
        return _wrapped([int(q) + m for q, m in _whole_numbers(x, _steps(f, wide, **options))], x.shape)
    with np.errstate(all="ignore"):
        return round_to(x.astype(wide) + _on_its_way(f, wide, **options), x_dtype)


def uncouple(
    y: np.ndarray, f: np.ndarray, y_dtype: str = "float64", f_dtype: str = "float64", **options: Any
) -> np.ndarray:
    """x = y - f   (paper eq. 7)"""
    wide = wide_type(y_dtype, f_dtype)
    if y_dtype == "int16":
        return _wrapped([int(q) - m for q, m in _whole_numbers(y, _steps(f, wide, **options))], y.shape)
    with np.errstate(all="ignore"):
        return round_to(y.astype(wide) - _on_its_way(f, wide, **options), y_dtype)


def reverse_step(
    y: np.ndarray,
    f: np.ndarray,
    dy: np.ndarray,
    df: np.ndarray,
    dtypes: Sequence[str] = ("float64",) * 4,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """(y - f, dy + df)   (one half of Algorithm 1)"""
    return uncouple(y, f, dtypes[0], dtypes[1], **options), accumulate(dy, df, dtypes[2], dtypes[3])


def checksum_of(stored: np.ndarray, dtype: str) -> int:
    """sum over i of bits(stored[i]) * (2*i + 1), modulo 2^64, with Python integers"""
    return sum(int(b) * (2 * i + 1) for i, b in enumerate(bits_of(stored.ravel(), dtype))) % 2**64


def amax_of(stored: np.ndarray) -> np.float32:
    """max |stored|, NaN if any is NaN, 0 if there are no elements"""
    return np.float32(np.max(np.abs(stored), initial=0.0))


def amax_before_wrapping(
    q: np.ndarray, f: np.ndarray, subtract: bool, f_dtype: str = "float64", **options: Any
) -> np.float32:
    """max |q + n| * 2^-k, or |q - n| * 2^-k, of an int16 stream: the results before wrapping"""
    wide, unit = wide_type(f_dtype), 2.0 ** -options["grid_exponent"]
    with np.errstate(all="ignore"):
        n = _steps(f, wide, **options)
        reach = np.abs(q.astype(wide) - n if subtract else q.astype(wide) + n) * wide(unit)
        return np.max(reach.astype(np.float32), initial=np.float32(0.0))


def value_of(stored: np.ndarray, grid_exponent: int, dtype: str) -> np.ndarray:
    """The numbers that an int16 stream represents, in a dtype"""
    return round_to(stored * 2.0**-grid_exponent, dtype)


def _steps(f: np.ndarray, wide: Any, grid_exponent: int, **scales: Any) -> np.ndarray:
    """f in multiples of 2^-k"""
    with np.errstate(all="ignore"):
        return np.rint(_on_its_way(f, wide, **scales) * wide(2.0**grid_exponent))


def _whole_numbers(q: np.ndarray, n: np.ndarray) -> Iterator[tuple[float, int]]:
    """(q, m) for every element: m is n limited to +-2^23, and 0 for NaN"""
    for stored, steps in zip(q.ravel(), n.ravel(), strict=True):
        yield stored, 0 if np.isnan(steps) else int(min(max(steps, -(2.0**23)), 2.0**23))


def _wrapped(sums: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Modulo 2^16, into -2^15..2^15-1"""
    return np.array([(s + 2**15) % 2**16 - 2**15 for s in sums], dtype=np.float64).reshape(shape)


def _on_its_way(
    f: np.ndarray,
    wide: Any,
    channel_scale: np.ndarray | None = None,
    sample_scale: np.ndarray | None = None,
    channel_dim: int = 1,
    grid_exponent: int | None = None,
) -> np.ndarray:
    f = f.astype(wide)
    if channel_scale is not None or sample_scale is not None:
        scale = np.ones((1,) * f.ndim, dtype=wide)
        if channel_scale is not None:
            shape = [1] * f.ndim
            shape[channel_dim] = -1
            scale = scale * channel_scale.astype(wide).reshape(shape)
        if sample_scale is not None:
            scale = scale * sample_scale.astype(wide).reshape([-1] + [1] * (f.ndim - 1))
        f = scale * f
    if grid_exponent is not None:
        f = np.rint(f * wide(2.0**grid_exponent)) * wide(2.0**-grid_exponent)
    return f
