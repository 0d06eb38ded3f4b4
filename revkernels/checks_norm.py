# SPDX-License-Identifier: Apache-2.0
"""Checks of a norm, its statistics and sums, worded like those in `revkernels.checks`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from revkernels.arrays import compute_dtype, dtype_name, strides_of
from revkernels.checks import (
    check_arrays,
    check_disjoint,
    check_float,
    check_int,
    check_plain,
    check_same_device,
    check_writable,
)
from revkernels.norm import ACTIVATIONS, KINDS, Norm


def check_norm_options(norm: Any, x_name: str, x: Any) -> None:
    """Check a norm's options, by themselves and for an array of x's shape."""
    if not isinstance(norm, Norm):
        raise TypeError(f"norm is a {type(norm).__name__}; it must be a revkernels.Norm")
    for name, choices in (("kind", KINDS), ("activation", ACTIVATIONS)):
        if getattr(norm, name) not in choices:
            raise ValueError(f"{name} is {getattr(norm, name)!r}; it must be one of {', '.join(choices)}")
    for name in ("eps", "momentum"):
        value = getattr(norm, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a float")
        if not 0 <= value <= sys.float_info.max:  # an int may be larger, but not infinite
            raise ValueError(f"{name} is {value}; it must be finite and not negative")
    check_int("groups", norm.groups, "an int")
    if norm.channel_dim is not None:
        check_int("channel_dim", norm.channel_dim, "an int or None")
    rank = len(x.shape)
    needs = 2 if norm.kind == "group" or (norm.kind == "batch" and norm.channel_dim is None) else 1
    if rank < needs:
        raise ValueError(f"{x_name} has shape {tuple(x.shape)}; a {norm.kind} norm needs {needs} dimensions or more")
    if norm.channel_dim is not None and not -rank <= norm.channel_dim < rank:
        raise ValueError(f"channel_dim is {norm.channel_dim}; {x_name} has {rank} dimensions")
    axis = norm.channel_axis(rank)
    if norm.kind != "group":
        if norm.groups != 1:
            raise ValueError(f"groups is {norm.groups}; it must be 1 for a {norm.kind} norm")
    elif axis == 0:
        raise ValueError("channel_dim is 0; a group norm's samples lie there, so it must be another dimension")
    elif norm.groups < 1 or x.shape[axis] % norm.groups:
        raise ValueError(f"groups is {norm.groups}; it must divide {x_name}'s {x.shape[axis]} channels")


def check_norm(
    norm: Norm,
    x_name: str,
    x: Any,
    f: Any = None,
    h: Any = None,
    statistics: tuple[Any, Any] = (None, None),
    given: bool = False,
    *,
    sums: dict[str, Any] | None = None,
    writes: tuple[str, ...] = ("h",),
    **others: Any,
) -> None:
    """A norm, its parameters and statistics fit x; the arrays' dimensions merge; written arrays overlap nothing.

    x, f, h and ``others`` have passed `check_operands`; ``writes`` names the written ones. ``sums`` are read.
    """
    check_norm_options(norm, x_name, x)
    arrays = {name: a for name, a in ({x_name: x, "f": f, "h": h} | others).items() if a is not None}
    wide = compute_dtype(x, *(() if f is None else (f,)))
    parameters = {"weight": norm.weight, "bias": norm.bias}
    running = {"running_mean": norm.running_mean, "running_var": norm.running_var}
    if (running["running_mean"] is None) != (running["running_var"] is None):
        raise ValueError("running_mean and running_var must both be arrays, or both None")
    if running["running_mean"] is not None and norm.kind != "batch":
        raise ValueError(f"running_mean is given; it must be None for a {norm.kind} norm")
    own = dict(zip(("mean", "rstd"), statistics, strict=True))
    if (own["mean"] is None) != (norm.kind == "rms"):
        raise TypeError(f"mean is a {type(own['mean']).__name__}; it must be {_needs_mean(norm)}")
    read = {name: a for name, a in (parameters | running | own | (sums or {})).items() if a is not None}
    check_plain(**{x_name: x}, **read)
    check_same_device(**{x_name: x}, **read)
    check_float(**read)
    channels = (x.shape[norm.channel_axis(len(x.shape))],)
    for name, array in read.items():
        of_statistics = name in own
        _check_dense(name, array, norm.statistics_shape(tuple(x.shape)) if of_statistics else channels, x_name)
        if (of_statistics or name in (sums or {})) and dtype_name(array) != wide:
            raise TypeError(f"{name} is {dtype_name(array)}; it must be {wide}, the type this norm is computed in")
    for first, second in (("weight", "bias"), ("running_mean", "running_var")):
        if first in read and second in read and dtype_name(read[first]) != dtype_name(read[second]):
            raise TypeError(f"{second} is {dtype_name(read[second])}; it must be {dtype_name(read[first])} as {first}")
    _check_merging(norm, arrays)
    written = {name: a for name, a in arrays.items() if name in writes}
    if not given:
        computed = {name: read.pop(name) for name in (*own, *running) if name in read}
        check_writable(**computed)
        written |= computed
    if given:
        read = {name: a for name, a in read.items() if name not in running}
    check_disjoint(written, {name: a for name, a in arrays.items() if name not in writes} | read)


def check_sums(norm: Norm, dx: Any, sums: Any, count: Any, constant: Any) -> None:
    """Check that a backward's options about sums are consistent."""
    if sums is not None:
        if not isinstance(sums, tuple | list) or len(sums) != 2:
            raise TypeError(f"sums is a {type(sums).__name__}; it must be a pair (dweight, dbias) or None")
        check_arrays(dweight=sums[0], dbias=sums[1])
    check_int("count", count, "an int")
    if norm.kind != "batch":
        for name, told in (
            ("dx is None", dx is None),
            ("sums is given", sums is not None),
            ("constant is True", constant),
        ):
            if told:
                raise ValueError(f"{name}; that is for a batch norm alone, and this is a {norm.kind} norm")
    if dx is None and sums is not None:
        raise ValueError("dx is None and sums is given; at least one of them is to be computed")
    if count < 0 or (count and sums is None):
        raise ValueError(f"count is {count}; it must be 0, or with sums the number of elements behind them")


def statistics_pair(statistics: Any) -> tuple[Any, Any]:
    """Return (mean, rstd)."""
    if not isinstance(statistics, tuple) or len(statistics) != 2:
        raise TypeError(f"statistics is a {type(statistics).__name__}; it must be a revkernels.Statistics")
    mean, rstd = statistics
    if rstd is None:
        raise TypeError("rstd is a NoneType; it must be an array")
    return mean, rstd


def _needs_mean(norm: Norm) -> str:
    return "None for an rms norm" if norm.kind == "rms" else "an array"


def _check_dense(name: str, array: Any, shape: tuple[int, ...], x_name: str) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)}; it must be {shape} for this {x_name}")
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides_of(array)), strict=True):
        if size > 1 and stride != expected and 0 not in shape:
            raise ValueError(f"{name} has strides {strides_of(array)}; it must be dense")
        expected *= size


def merges(norm: Norm, arrays: Sequence[Any]) -> bool:
    """Whether merging adjacent dimensions leaves two besides the channels; for a group norm, dim 0 and one more.

    Row statistics are indexed in the arrays' own order. Those of channels and groups are not, so there the first
    array's memory order also works.
    """
    shape, strides = arrays[0].shape, [strides_of(array) for array in arrays]
    if 0 in shape:
        return True
    apart = {norm.channel_axis(len(shape)), *((0,) if norm.kind == "group" else ())}
    kept = [d for d, size in enumerate(shape) if size > 1 and d not in apart]
    orders = [kept]
    if norm.kind in ("batch", "group"):
        orders.append(sorted(kept, key=lambda d: -abs(strides[0][d])))
    for order in orders:
        joints = (all(of[a] == of[b] * shape[b] for of in strides) for a, b in itertools.pairwise(order))
        if len(order) - sum(joints) <= 3 - len(apart):
            return True
    return False


def _check_merging(norm: Norm, arrays: dict[str, Any]) -> None:
    if merges(norm, list(arrays.values())):
        return
    (name, x), *_ = arrays.items()
    shown = ", ".join(f"{name} has strides {strides_of(array)}" for name, array in arrays.items())
    raise ValueError(
        f"{name} has shape {tuple(x.shape)}, {shown}: the dimensions other than the channels', "
        f"{norm.channel_axis(len(x.shape))}, must merge into {'one and the samples' if norm.kind == 'group' else 'two'}"
    )
