# SPDX-License-Identifier: Apache-2.0
"""Normalisation and activation, one operation at a time, and the gradient by the explicit chain rule.

Values are float64 arrays that their dtype represents exactly. Every element-wise operation rounds in the compute type
``wide``; sums and activations are computed in NumPy's longest type and rounded once. Index tables tell which elements
share a statistic and which a channel, so no layout or kind is a special case.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from revkernels.reference.rounding import round_to

_TWO, _PI, _CUBE = np.longdouble(2), 4 * np.arctan(np.longdouble(1)), np.longdouble("0.044715")
_ERFC = np.vectorize(math.erfc, otypes=[np.float64])  # keeps the digits of small probabilities, which 1 + erf loses


class Owners(NamedTuple):
    """For each element the index of its statistic (in row-major order) and of its channel, and their numbers."""

    statistic: np.ndarray
    channel: np.ndarray
    statistics: int
    channels: int


def owners(shape: tuple[int, ...], kind: str, axis: int, groups: int = 1) -> Owners:
    """Which elements share a statistic in a norm of that kind, with channels along ``axis``."""
    index, channels = np.indices(shape), shape[axis]
    channel = index[axis]
    if kind == "batch":
        return Owners(channel, channel, channels, channels)
    if kind == "group":
        group = channel // max(channels // groups, 1)
        return Owners(index[0] * groups + group, channel, shape[0] * groups, channels)
    rest = (*shape[:axis], *shape[axis + 1 :])
    positions = np.arange(math.prod(rest)).reshape(rest)
    return Owners(np.broadcast_to(np.expand_dims(positions, axis), shape), channel, positions.size, channels)


def statistics_of(
    x: np.ndarray, of: Owners, eps: float = 0.0, wide: Any = np.float64, *, center: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, rstd, variance); without ``center`` the mean is 0, as in an RMS norm. Without elements all sums are 0."""
    with np.errstate(all="ignore"):
        mean = _mean(x, of) if center else np.zeros(of.statistics, np.longdouble)
        variance = _mean((x - mean[of.statistic]) ** 2, of)
        return mean.astype(wide), (1 / np.sqrt(variance + eps)).astype(wide), variance.astype(np.float64)


def norm_act(
    x: np.ndarray,
    of: Owners,
    mean: np.ndarray | None,
    rstd: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    activation: str = "none",
    wide: Any = np.float64,
    h_dtype: str = "float64",
) -> np.ndarray:
    """activation((x - mean) * rstd * weight + bias)"""
    with np.errstate(all="ignore"):
        _, z = _normalised(x, of, mean, rstd, weight, bias, wide)
        return round_to(activate(z, activation), h_dtype)


def norm_act_backward(
    base: np.ndarray | None,
    dh: np.ndarray,
    x: np.ndarray,
    of: Owners,
    mean: np.ndarray | None,
    rstd: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    activation: str = "none",
    wide: Any = np.float64,
    dx_dtype: str = "float64",
    *,
    kind: str = "batch",
    sums: tuple[np.ndarray, np.ndarray] | None = None,
    count: int = 0,
    constant: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(base + dx, dweight, dbias)"""
    with np.errstate(all="ignore"):
        xhat, z = _normalised(x, of, mean, rstd, weight, bias, wide)
        dz = derivative(z, dh.astype(wide), activation)
        w = wide(1) if weight is None else weight.astype(wide)[of.channel]
        r = rstd.astype(wide)[of.statistic]
        if sums is None:
            sums = _total(dz * xhat, of.channel, of.channels), _total(dz, of.channel, of.channels)
        dweight, dbias = (s.astype(wide) for s in sums)
        if kind == "batch" and constant:
            gradient = (w * r) * dz
        elif kind == "batch":
            n = wide(count or x.size // max(of.channels, 1))
            gradient = (w * r) * (dz - (dbias / n)[of.channel] - xhat * (dweight / n)[of.channel])
        else:
            g = dz * w
            slope = _mean(g * xhat, of).astype(wide)[of.statistic]
            middle = g if kind == "rms" else g - _mean(g, of).astype(wide)[of.statistic]
            gradient = r * (middle - xhat * slope)
        total = gradient if base is None else base.astype(wide) + gradient
        return round_to(total, dx_dtype), dweight, dbias


def activate(z: np.ndarray, activation: str) -> np.ndarray:
    """activation(z): computed in NumPy's longest type, rounded once to z's"""
    v = z.astype(np.longdouble)
    with np.errstate(all="ignore"):
        if activation == "relu":
            v = np.where(v <= 0, 0, v)
        elif activation == "gelu":
            v = v * _normal(v)
        elif activation == "gelu_tanh":
            v = v / (1 + np.exp(-2 * _inner(v)))  # 1 + tanh(u) = 2 / (1 + exp(-2u))
        elif activation == "silu":
            v = v / (1 + np.exp(-v))
        return v.astype(z.dtype)


def derivative(z: np.ndarray, dh: np.ndarray, activation: str) -> np.ndarray:
    """dh * activation'(z): the factor is computed in NumPy's longest type and rounded, then the product"""
    v = z.astype(np.longdouble)
    if activation == "none":
        return dh
    if activation == "relu":
        return np.where(v <= 0, dh.dtype.type(0), dh)
    with np.errstate(all="ignore"):
        if activation == "gelu":
            slope = _normal(v) + v * np.exp(-(v**2) / 2) / np.sqrt(2 * _PI)
        elif activation == "gelu_tanh":
            s = 1 / (1 + np.exp(-2 * _inner(v)))
            slope = s + v * 2 * s * (1 - s) * np.sqrt(2 / _PI) * (1 + 3 * _CUBE * v**2)
        else:
            s = 1 / (1 + np.exp(-v))
            slope = s * (1 + v * (1 - s))
        return dh * slope.astype(dh.dtype)


def _normalised(
    x: np.ndarray,
    of: Owners,
    mean: np.ndarray | None,
    rstd: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    wide: Any,
) -> tuple[np.ndarray, np.ndarray]:
    xhat = x.astype(wide)
    if mean is not None:
        xhat = xhat - mean.astype(wide)[of.statistic]
    xhat = xhat * rstd.astype(wide)[of.statistic]
    z = xhat if weight is None else xhat * weight.astype(wide)[of.channel]
    return xhat, z if bias is None else z + bias.astype(wide)[of.channel]


def _normal(v: np.ndarray) -> np.ndarray:
    """Phi(v) = erfc(a) / 2 with a = -v / sqrt(2). The part of a beyond float64 is added by erfc's derivative."""
    a = -v / np.sqrt(_TWO)
    near = a.astype(np.float64)
    rest = np.where(np.isfinite(a), a - near, 0)
    return (_ERFC(near) - rest * 2 / np.sqrt(_PI) * np.exp(-(near.astype(np.longdouble) ** 2))) / 2


def _inner(v: np.ndarray) -> np.ndarray:
    return np.sqrt(2 / _PI) * (v + _CUBE * v**3)


def _total(values: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    total = np.zeros(count, np.longdouble)
    np.add.at(total, owner.ravel(), values.ravel().astype(np.longdouble))
    return total


def _mean(values: np.ndarray, of: Owners) -> np.ndarray:
    return _total(values, of.statistic, of.statistics) / max(values.size // max(of.statistics, 1), 1)
