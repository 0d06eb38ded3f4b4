# SPDX-License-Identifier: Apache-2.0
"""Normalisation and activation in jax.numpy: backend "xla", and the second derivatives of the kernels.

Arithmetic as in `revkernels.Norm`, in the compute type of the statistics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from revkernels.norm import ActivationName, NormKind

__all__ = ["Options", "backward", "norm_act", "statistics"]

_ACTIVATIONS = {
    "none": lambda z: z,
    "relu": lambda z: jnp.where(z <= 0, 0, z),
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
    "silu": lambda z: z * lax.logistic(z),
}


class Options(NamedTuple):
    """The part of a `revkernels.Norm` that is known while JAX traces; ``axis`` is its non-negative channel_dim."""

    kind: NormKind
    activation: ActivationName
    eps: float
    groups: int
    axis: int


def statistics(x: Array, options: Options, real: Any) -> tuple[Array | None, Array]:
    """(mean, rstd) of the compute type ``real``, of shape `Norm.statistics_shape`; no mean for an RMS norm."""
    values, axis = x.astype(real), options.axis
    if options.kind == "group":
        values = values.reshape(*x.shape[:axis], options.groups, -1, *x.shape[axis + 1 :])
        along = tuple(d for d in range(values.ndim) if d not in (0, axis))
    elif options.kind == "batch":
        along = tuple(d for d in range(x.ndim) if d != axis)
    else:
        along = (axis,)
    if options.kind == "rms":
        return None, lax.rsqrt((values**2).mean(along) + jnp.asarray(options.eps, real))
    mean = values.mean(along)
    centered = values - jnp.expand_dims(mean, along)
    return mean, lax.rsqrt((centered**2).mean(along) + jnp.asarray(options.eps, real))


def norm_act(
    x: Array, weight: Array | None, bias: Array | None, mean: Array | None, rstd: Array, options: Options, dtype: Any
) -> Array:
    """activation((x - mean) * rstd * weight + bias), rounded to ``dtype``"""
    real = rstd.dtype
    z = x.astype(real)
    if mean is not None:
        z = z - _beside(mean, x, options)
    z = z * _beside(rstd, x, options)
    along = [1] * x.ndim
    along[options.axis] = -1
    if weight is not None:
        z = z * weight.astype(real).reshape(along)
    if bias is not None:
        z = z + bias.astype(real).reshape(along)
    return _ACTIVATIONS[options.activation](z).astype(dtype)


def backward(
    dh: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    given: tuple[Array | None, Array] | None,
    options: Options,
    real: Any,
) -> tuple[Array, Array, Array]:
    """(dx, dweight, dbias) of the compute type. ``given`` statistics are constants; None: they are x's."""
    one = jnp.ones(x.shape[options.axis], real)
    weight, bias = (one if weight is None else weight.astype(real)), (0 * one if bias is None else bias.astype(real))

    def h(x: Array, weight: Array, bias: Array) -> Array:
        mean, rstd = given or statistics(x, options, real)
        return norm_act(x, weight, bias, mean, rstd, options, real)

    return jax.vjp(h, x.astype(real), weight, bias)[1](dh.astype(real))


def _beside(statistic: Array, x: Array, options: Options) -> Array:
    """A statistic reshaped to broadcast with x."""
    axis = options.axis
    if options.kind in ("layer", "rms"):
        return jnp.expand_dims(statistic, axis)
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    if options.kind == "group":
        shape[0] = x.shape[0]
        statistic = jnp.repeat(statistic, x.shape[axis] // options.groups, axis=1)
    return statistic.reshape(shape)
