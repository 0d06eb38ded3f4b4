# SPDX-License-Identifier: Apache-2.0
"""The custom calls with a norm; see `calls` for those without. Only the layout is checked."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax import Array

from revkernels.adapters.jax.calls import call
from revkernels.adapters.jax.plain_norm import Options
from revkernels.norm import ACTIVATIONS, KINDS, Norm

__all__ = ["check_layout", "norm_act", "norm_act_backward", "statistics_shape"]


def statistics_shape(options: Options, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of mean and rstd."""
    return Norm(options.kind, groups=options.groups, channel_dim=options.axis).statistics_shape(shape)


def norm_act(
    x: Array,
    f: Array | None,
    weight: Array | None,
    bias: Array | None,
    given: tuple[Array | None, Array] | None,
    options: Options,
    subtract: bool,
    dtype: Any,
    real: Any,
) -> tuple[Array | None, Array, Array | None, Array]:
    """(y, h, mean, rstd): y is x + f, or x - f in x's memory, or None without f; h = activation(norm) of y, or of x."""
    centered = options.kind != "rms"
    inputs = [array for array in (x, f, weight, bias, *(given or ())) if array is not None]
    results: list[Any] = [jax.ShapeDtypeStruct(x.shape, dtype)]
    if f is not None:
        results.insert(0, x)
    if given is None:
        results += [jax.ShapeDtypeStruct(statistics_shape(options, x.shape), real)] * (1 + centered)
    found = call(
        "norm_act",
        inputs,
        results,
        {0: 0} if f is not None and subtract else {},
        coupled=np.int64(0 if f is None else -1 if subtract else 1),
        given=np.int64(given is not None),
        **_attributes(options, x.shape, weight, bias),
    )
    y = None if f is None else found.pop(0)
    h = found.pop(0)
    mean, rstd = given or (found if centered else (None, *found))
    return y, h, mean, rstd


def norm_act_backward(
    base: Array | None,
    dh: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array | None,
    rstd: Array,
    options: Options,
    constant: bool,
    dtype: Any,
) -> tuple[Array, Array, Array]:
    """(dx, dweight, dbias): dx is base (whose memory it reuses) plus the gradient of x, dh that of h, of ``dtype``."""
    sums = jax.ShapeDtypeStruct((x.shape[options.axis],), rstd.dtype)
    inputs = [array for array in (base, dh, x, weight, bias, mean, rstd) if array is not None]
    dx, dweight, dbias = call(
        "norm_act_backward",
        inputs,
        [jax.ShapeDtypeStruct(x.shape, dtype), sums, sums],
        {} if base is None else {0: 0},
        base=np.int64(base is not None),
        constant=np.int64(constant),
        **_attributes(options, x.shape, weight, bias),
    )
    return dx, dweight, dbias


def check_layout(options: Options, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a group norm whose other dimensions do not merge into one besides the samples."""
    if options.kind == "group" and options.axis not in (1, len(shape) - 1):
        raise ValueError(
            f"channel_dim is {options.axis} of shape {shape}; a group norm's channels must be dimension 1 or the last"
        )


def _attributes(
    options: Options, shape: tuple[int, ...], weight: Array | None, bias: Array | None
) -> dict[str, np.integer | np.floating]:
    axis, last = options.axis, options.kind == "group" and options.axis != 1
    outer = math.prod(shape[:1] if options.kind == "group" else shape[:axis])
    inner = math.prod(shape[1:-1] if last else shape[axis + 1 :])
    integers = {
        "kind": KINDS.index(options.kind),
        "activation": ACTIVATIONS.index(options.activation),
        "groups": options.groups if options.kind == "group" else 0,
        "outer": outer,
        "channels": shape[axis],
        "inner": inner,
        "channels_last": last,
        "statistics": math.prod(statistics_shape(options, shape)),
        "weight": weight is not None,
        "bias": bias is not None,
    }
    return {name: np.int64(value) for name, value in integers.items()} | {"eps": np.float64(options.eps)}
