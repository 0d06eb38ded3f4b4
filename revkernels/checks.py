# SPDX-License-Identifier: Apache-2.0
"""The checks of bad input, each written once. A message names the argument, what it got and what it needs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from revkernels.arrays import (
    FLOATS,
    INT16,
    Seen,
    address_of,
    compute_dtype,
    device_name,
    dtype_name,
    family_of,
    itemsize_of,
    kind_of,
    not_an_array,
    strides_of,
)
from revkernels.coupling import Coupling
from revkernels.norm import ACTIVATIONS, KINDS, Norm

_STREAMS = ("x", "y", "out")  # the arguments that are one in a coupling


def check_arrays(**arrays: Any) -> None:
    """Every argument is an array, no sparse or masked one, and all are from libraries whose arrays go together."""
    for name, array in arrays.items():
        kind = kind_of(array)
        if kind is None:
            raise not_an_array(name, array)
        if kind == "torch" and array.layout is not sys.modules["torch"].strided:
            raise TypeError(f"{name} has layout {array.layout}; it must be a dense (strided) tensor")
        if kind == "numpy" and type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name} is a {type(array).__name__}; it must be a plain array, such as its .data or .filled()"
            )
    if len({family_of(array) for array in arrays.values()}) > 1:
        listing = ", ".join(f"{name} is from {kind_of(array)}" for name, array in arrays.items())
        raise TypeError(f"{listing}: all arrays of a call must come from one library")


def check_plain(**arrays: Any) -> None:
    """Every argument is a torch tensor or a NumPy array: what backends take that are not compiled."""
    check_arrays(**arrays)
    for name, array in arrays.items():
        if kind_of(array) not in ("torch", "numpy"):
            raise TypeError(
                f"{name} is a {type(array).__name__}; for this backend it must be a torch.Tensor or a numpy.ndarray"
            )


def check_float(**arrays: Any) -> None:
    """Every array is float64, float32, bfloat16 or float16, in the machine's byte order."""
    for name, array in arrays.items():
        if dtype_name(array) not in FLOATS:
            raise TypeError(f"{name} is {dtype_name(array)}; it must be one of {', '.join(FLOATS)}")
        check_byte_order(name, array)


def check_same_shape(**arrays: Any) -> None:
    """All arrays have the first one's shape."""
    (first, leader), *rest = arrays.items()
    for name, array in rest:
        if array.shape != leader.shape:
            raise ValueError(
                f"{name} has shape {tuple(array.shape)}, {first} has {tuple(leader.shape)}: they must be equal"
            )


def check_same_device(**arrays: Any) -> None:
    """All arrays lie on the first one's device."""
    (first, leader), *rest = arrays.items()
    for name, array in rest:
        if device_name(array) != device_name(leader):
            raise ValueError(
                f"{name} is on {device_name(array)}, {first} is on {device_name(leader)}: they must share a device"
            )


def check_writable(**arrays: Any) -> None:
    """No array is read-only, and none has two elements in one place."""
    for name, array in arrays.items():
        frozen = array.frozen if isinstance(array, Seen) else None
        if kind_of(array) == "numpy" and not array.flags.writeable:
            frozen = " is read-only"
        if frozen is not None:
            raise ValueError(f"{name}{frozen}; it must be writable, for the result is written there")
        if _overlaps_itself(array):
            raise ValueError(
                f"{name} has several elements in one place (an expanded view); it must have its own memory"
            )


def check_layout(**arrays: Any) -> None:
    """Every array lies as the kernels read it: aligned to its dtype, its strides not negative and whole elements."""
    for name, array in arrays.items():
        size = itemsize_of(array)
        in_bytes = array.strides if kind_of(array) == "numpy" else [s * size for s in strides_of(array)]
        for dimension, (stride, count) in enumerate(zip(in_bytes, array.shape, strict=True)):
            if count > 1 and stride < 0:
                raise ValueError(f"{name} has a negative stride in dimension {dimension}; it must be copied first")
            if count > 1 and stride % size:
                raise ValueError(
                    f"{name} has a stride of {stride} bytes in dimension {dimension}; it must be a multiple of the "
                    f"element's size"
                )
        if 0 not in array.shape and address_of(array) % size:
            raise ValueError(f"{name} is not aligned to its dtype; it must be")


def check_disjoint(written: dict[str, Any], read: dict[str, Any]) -> None:
    """No written array shares an element with another one. (Interleaved halves of one buffer share none.)"""
    if not written:
        return
    ranges = []
    for order, (name, array) in enumerate([*written.items(), *read.items()]):
        if 0 not in array.shape and not _has_no_memory(array):
            ranges.append((*_byte_bounds(array), order, name, array))
    reaching: list[tuple[int, int, int, str, Any]] = []  # of those that begin before, the ones that go on
    for current in sorted(ranges, key=lambda entry: entry[0]):
        reaching = [other for other in reaching if other[1] > current[0]]
        for other in reaching:
            (order, name, array), (_, other_name, other_array) = sorted((current[2:], other[2:]), key=lambda e: e[0])
            if order < len(written) and share_memory(array, other_array):
                raise ValueError(f"{name} and {other_name} overlap in memory: {name} is written, so it must not")
        reaching.append(current)


def check_stream(coupling: Coupling | None, **arrays: Any) -> None:
    """The stream and its result are of float types, or both int16 and the coupling has a grid; the rest is floats."""
    streams = {name: dtype_name(array) for name, array in arrays.items() if name in _STREAMS}
    fixed = [name for name, dtype in streams.items() if dtype == INT16]
    check_float(**{name: array for name, array in arrays.items() if name not in fixed})
    for name in fixed:
        if getattr(coupling, "grid_exponent", None) is None:
            raise TypeError(
                f"{name} is {INT16}; it must be one of {', '.join(FLOATS)}, or {INT16} with a Coupling that has a "
                f"grid_exponent"
            )
        check_byte_order(name, arrays[name])
    if fixed and len(fixed) < len(streams):
        listing = ", ".join(f"{name} is {dtype}" for name, dtype in streams.items())
        raise TypeError(f"{listing}: they must both be {INT16}, or neither")


def check_operands(
    written: dict[str, Any], read: dict[str, Any], coupling: Coupling | None = None, *, coupled: bool = False
) -> None:
    """All of the above at once: for backends whose kernels do not check, and to word what a kernel refused.

    ``coupled``: this is a coupling, whose stream may be int16.
    """
    arrays = written | read
    check_plain(**arrays, **arrays_of(coupling))
    if coupled:
        check_stream(coupling, **arrays)
    else:
        check_float(**arrays)
    check_same_shape(**arrays)
    check_same_device(**arrays)
    check_writable(**written)
    check_disjoint(written, read)


def arrays_of(coupling: Coupling | None) -> dict[str, Any]:
    """Return a coupling's own arrays by name."""
    names = ("channel_scale", "sample_scale", "checksum", "amax", "value")
    found = {name: getattr(coupling, name, None) for name in names}
    return {name: array for name, array in found.items() if array is not None}


def check_norm_options(norm: Any, x_name: str, x: Any) -> None:
    """The options of a norm are right in themselves and for an array of x's shape."""
    if not isinstance(norm, Norm):
        raise TypeError(f"norm is a {type(norm).__name__}; it must be a revkernels.Norm")
    for name, choices in (("kind", KINDS), ("activation", ACTIVATIONS)):
        if getattr(norm, name) not in choices:
            raise ValueError(f"{name} is {getattr(norm, name)!r}; it must be one of {', '.join(choices)}")
    for name in ("eps", "momentum"):
        value = getattr(norm, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a float")
        if not 0 <= value <= sys.float_info.max:  # an int may be larger, and no infinity
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
    """A norm, its parameters and statistics fit x; the arrays' dimensions merge; what is written overlaps nothing.

    x, f, h and ``others`` have passed `check_operands`; ``writes`` names those that are written. ``sums`` are read.
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
    """What a backward is told of its sums goes together."""
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
    """Whether two dimensions are left beside the channels when neighbours are merged; of a group norm, one and dim 0.

    Row statistics are indexed in the arrays' own order. Those of channels and groups do not care, so that there the
    order of the memory, the first array's, will do as well.
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


def check_int(name: str, value: Any, needs: str) -> None:
    """The value is an int and no bool."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be {needs}")


def check_byte_order(name: str, array: Any) -> None:
    """The array is in the machine's byte order."""
    if kind_of(array) == "numpy" and not array.dtype.isnative:
        raise TypeError(f"{name} is byte-swapped; it must be in the machine's byte order")


def _has_no_memory(array: Any) -> bool:
    return kind_of(array) == "torch" and array.is_meta  # shapes alone: nothing to overlap


class _Extent:
    """An array's memory as NumPy sees it: address, shape and strides, never read."""

    def __init__(self, array: Any) -> None:
        size = itemsize_of(array)
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "shape": tuple(array.shape),
            "strides": tuple(s * size for s in strides_of(array)),
            "data": (address_of(array), True),
        }


def _as_extent(array: Any) -> np.ndarray:
    return array if kind_of(array) == "numpy" else np.asarray(_Extent(array))


def _byte_bounds(array: Any) -> tuple[int, int]:
    begin, size = address_of(array), itemsize_of(array)
    steps = [(n - 1) * stride * size for n, stride in zip(array.shape, strides_of(array), strict=True)]
    return begin + sum(step for step in steps if step < 0), begin + sum(step for step in steps if step > 0) + size


def share_memory(a: Any, b: Any) -> bool:
    """Whether the arrays have an element in common; True where that is too hard to tell."""
    if 0 in a.shape or 0 in b.shape:
        return False
    if kind_of(a) == "torch" and a.device != b.device:
        return False
    first, second = _as_extent(a), _as_extent(b)
    if not np.may_share_memory(first, second):
        return False
    try:
        return np.shares_memory(first, second, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(array: Any) -> bool:
    if 0 in array.shape:
        return False
    in_bytes = kind_of(array) == "numpy"  # a field of records has a stride that is no number of elements
    strides, reach = (array.strides, array.itemsize) if in_bytes else (strides_of(array), 1)
    for stride, size in sorted((abs(s), n) for s, n in zip(strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * size
    return False
