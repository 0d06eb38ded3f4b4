# SPDX-License-Identifier: Apache-2.0
"""The normalising functions as pure functions of JAX arrays. See also `revkernels.adapters.jax.ops`.

They take a `revkernels.Norm`, whose weight and bias are JAX arrays (inside a transformed function, traced ones: make
the `Norm` there), and return `revkernels.Statistics`. Running statistics are not supported, because pure functions have
no memory to update: ``running_mean`` and ``running_var`` must be None; the returned statistics are those of the batch.

First derivatives, in reverse mode, use the fused kernel; second derivatives use the formulas. Statistics carry no
gradient. Given statistics count as constants for a batch norm, as in evaluation, and as x's own for any other norm.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from revkernels.adapters.jax import calls_norm, manual_axes, plain, plain_norm
from revkernels.adapters.jax.checks import arrays_of, check_backend, check_float, check_same_shape
from revkernels.adapters.jax.plain_norm import Options
from revkernels.arrays import FLOATS
from revkernels.checks_norm import check_norm_options
from revkernels.norm import Norm, Statistics

__all__ = ["couple_norm_act", "norm_act", "norm_act_backward_", "uncouple_norm_act_"]


def norm_act(
    x: Any, norm: Norm, *, statistics: Statistics | None = None, dtype: Any = None, backend: str | None = None
) -> tuple[Array, Statistics]:
    """Return (h, statistics) with h = activation(norm(x)), by the formulas of `Norm`.

    h has ``dtype`` (None: x's own). Given statistics are used and returned.
    """
    _, h, found = _forward("x", x, None, norm, statistics, dtype, backend, subtract=False)
    return h, found


def couple_norm_act(
    x: Any, f: Any, norm: Norm, *, statistics: Statistics | None = None, dtype: Any = None, backend: str | None = None
) -> tuple[Array, Array, Statistics]:
    """Return (y, h, statistics) with y = x + f (eq. 6) and h = activation(norm(y)), from y as rounded."""
    return _forward("x", x, f, norm, statistics, dtype, backend, subtract=False)


def uncouple_norm_act_(
    y: Any, f: Any, norm: Norm, *, statistics: Statistics | None = None, dtype: Any = None, backend: str | None = None
) -> tuple[Array, Array, Statistics]:
    """Return (x, h, statistics) with x = y - f (eq. 7), in y's memory if that is free, and h = activation(norm(x)).

    A batch norm needs the forward's statistics here.
    """
    return _forward("y", y, f, norm, statistics, dtype, backend, subtract=True)


def norm_act_backward_(
    dx: Any, dh: Any, x: Any, norm: Norm, statistics: Statistics, *, constant: bool = False, backend: str | None = None
) -> tuple[Array, Array, Array]:
    """Return (dx plus the gradient of x, dweight, dbias), the first in dx's memory if that is free.

        dz      = dh * activation'(z)           z = xhat * weight + bias
        dweight = sum of dz * xhat              dbias = sum of dz, per channel
        g       = weight * dz                   m(.) the mean over the elements that share the statistics
        dx      = dx + rstd * (g - m(g) - xhat * m(g * xhat))       an RMS norm drops m(g)

    dx, dh and x have one shape. The statistics are the forward's. dweight and dbias are ``[channels]``, of the compute
    type, float64 if x is float64, else float32. ``constant=True``: a batch norm's statistics do not depend on x, as in
    evaluation, and dx = dx + rstd * g.

    Raises:
        TypeError, ValueError: while tracing, for what `revkernels.adapters.jax.ops` lists, a norm or statistics that do
            not fit x, and ``constant`` for another norm than a batch norm.
    """
    kernels = check_backend(backend)
    named = arrays_of(x=x, dh=dh, dx=dx)
    check_float(named)
    check_same_shape(named)
    x, dh, dx = named.values()
    real = plain.wide(x)
    options, weight, bias = _checked_norm("x", x, norm)
    mean, rstd = _checked_statistics(statistics, options, x.shape, real)
    if constant and options.kind != "batch":
        raise ValueError(f"constant is True for a {options.kind} norm, whose statistics depend on x")
    return _backward(_Static(options, False, dx.dtype, kernels, constant), dx, dh, x, weight, bias, mean, rstd)


def _forward(
    name: str,
    x: Any,
    f: Any,
    norm: Norm,
    statistics: Statistics | None,
    dtype: Any,
    backend: str | None,
    *,
    subtract: bool,
) -> Any:
    kernels = check_backend(backend)
    named = arrays_of(**({name: x} if f is None else {name: x, "f": f}))
    check_float(named)
    check_same_shape(named)
    x, f = named[name], named.get("f")
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if dtype.name not in FLOATS:
        raise TypeError(f"dtype is {dtype.name}; it must be one of {', '.join(FLOATS)}")
    if dtype != x.dtype and dtype != jax.dtypes.canonicalize_dtype(dtype):  # a custom call would make it anyway
        raise TypeError("dtype is float64, which JAX has in its x64 mode alone (jax_enable_x64)")
    options, weight, bias = _checked_norm(name, x, norm)
    given = None
    if statistics is not None:
        given = _checked_statistics(statistics, options, x.shape, plain.wide(*named.values()))
    static = _Static(options, subtract, dtype, kernels, constant=given is not None and options.kind == "batch")
    # Before the derivative rule, so that JAX itself sums the gradients of weights that are replicated across devices.
    operands, structure = jax.tree.flatten((x, f, weight, bias, given))
    x, f, weight, bias, given = jax.tree.unflatten(structure, manual_axes.together(operands))
    y, h, mean, rstd = _fused(static, x, f, weight, bias, given)
    return y, h, Statistics(*map(lax.stop_gradient, (mean, rstd)))


# ---- checks


def _checked_norm(name: str, x: Array, norm: Norm) -> tuple[Options, Array | None, Array | None]:
    check_norm_options(norm, name, x)
    for running in ("running_mean", "running_var"):
        if getattr(norm, running) is not None:
            raise ValueError(f"{running} is given; under JAX it must be None: the statistics are returned")
    options = Options(norm.kind, norm.activation, float(norm.eps), norm.groups, norm.channel_axis(x.ndim))
    calls_norm.check_layout(options, x.shape)
    named = {key: getattr(norm, key) for key in ("weight", "bias") if getattr(norm, key) is not None}
    parameters = arrays_of(**named)
    check_float(parameters)
    for key, parameter in parameters.items():
        if parameter.shape != (x.shape[options.axis],):
            raise ValueError(f"{key} has shape {parameter.shape}; it must be {(x.shape[options.axis],)}, a channel's")
    if len({parameter.dtype for parameter in parameters.values()}) > 1:
        raise TypeError(f"weight is {named['weight'].dtype.name}, bias {named['bias'].dtype.name}; they must be equal")
    return options, parameters.get("weight"), parameters.get("bias")


def _checked_statistics(
    statistics: Any, options: Options, shape: tuple[int, ...], real: Any
) -> tuple[Array | None, Array]:
    if not isinstance(statistics, tuple) or len(statistics) != 2:
        raise TypeError(f"statistics is a {type(statistics).__name__}; it must be a revkernels.Statistics")
    mean, rstd = statistics
    if (mean is None) != (options.kind == "rms"):
        needs = "None" if options.kind == "rms" else "an array"
        raise TypeError(f"mean is {'None' if mean is None else 'an array'}; for a {options.kind} norm it is {needs}")
    named = {name: array for name, array in (("mean", mean), ("rstd", rstd)) if array is not None}
    expected = calls_norm.statistics_shape(options, shape)
    for name, array in arrays_of(**named).items():
        if array.shape != expected or array.dtype != real:
            raise ValueError(
                f"{name} is {array.dtype.name} of shape {array.shape}; it must be {jnp.dtype(real).name} of {expected}"
            )
    return mean, rstd


# ---- unchecked, with derivatives


class _Static(NamedTuple):
    options: Options
    subtract: bool
    dtype: Any  # of h, or of dx
    kernels: bool
    constant: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static: _Static, x: Array, f: Any, weight: Any, bias: Any, given: Any) -> Any:
    """(y, h, mean, rstd); y is None without f"""
    real = plain.wide(*(array for array in (x, f) if array is not None))
    if static.kernels:
        return calls_norm.norm_act(x, f, weight, bias, given, static.options, static.subtract, static.dtype, real)
    y = None if f is None else plain.couple(x, f, subtract=static.subtract, k=None)
    seen = x if y is None else y
    mean, rstd = given or plain_norm.statistics(seen, static.options, real)
    return y, plain_norm.norm_act(seen, weight, bias, mean, rstd, static.options, static.dtype), mean, rstd


def _fused_forward(static: _Static, x: Array, f: Any, weight: Any, bias: Any, given: Any) -> Any:
    y, h, mean, rstd = _fused(static, x, f, weight, bias, given)
    f_like = None if f is None else jnp.zeros(0, f.dtype)
    return (y, h, mean, rstd), (x if y is None else y, f_like, weight, bias, mean, rstd)


def _fused_backward(static: _Static, residuals: Any, cotangents: Any) -> Any:
    x, f_like, weight, bias, mean, rstd = residuals
    dy, dh, _, _ = cotangents
    mean, rstd = (None if s is None else s.astype(plain.wide(x)) for s in (mean, rstd))  # f alone may be float64
    dx, dweight, dbias = _backward(static._replace(dtype=x.dtype), dy, dh, x, weight, bias, mean, rstd)
    df = None
    if f_like is not None:
        df = (-dx if static.subtract else dx).astype(f_like.dtype)
    parameters = [None if p is None else d.astype(p.dtype) for p, d in ((weight, dweight), (bias, dbias))]
    return dx, df, *parameters, None


_fused.defvjp(_fused_forward, _fused_backward)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(
    static: _Static, base: Any, dh: Array, x: Array, weight: Any, bias: Any, mean: Any, rstd: Array
) -> tuple[Array, Array, Array]:
    """(base + the gradient, dweight, dbias); base None is 0"""
    if static.kernels:
        return calls_norm.norm_act_backward(
            base, dh, x, weight, bias, mean, rstd, static.options, static.constant, static.dtype
        )
    return _formulas(static, base, dh, x, weight, bias, (mean, rstd))


@_backward.defjvp
def _backward_jvp(static: _Static, primals: Any, tangents: Any) -> Any:
    # Not through mean and rstd: if they depend on x, the formulas recompute them from x.
    *operands, mean, rstd = primals

    def formulas(base: Any, dh: Array, x: Array, weight: Any, bias: Any) -> Any:
        return _formulas(static, base, dh, x, weight, bias, (mean, rstd))

    _, changes = jax.jvp(formulas, tuple(operands), tuple(tangents[:5]))
    return _backward(static, *primals), changes


def _formulas(
    static: _Static, base: Any, dh: Array, x: Array, weight: Any, bias: Any, statistics: tuple[Any, Array]
) -> tuple[Array, Array, Array]:
    real = statistics[1].dtype
    given = tuple(map(lax.stop_gradient, statistics)) if static.constant else None
    dx, dweight, dbias = plain_norm.backward(dh, x, weight, bias, given, static.options, real)
    return (dx if base is None else base.astype(real) + dx).astype(static.dtype), dweight, dbias
