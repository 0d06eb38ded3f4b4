# SPDX-License-Identifier: Apache-2.0
"""The checks of bad input, each written once. A message names the argument, what it got and what it needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from revkernels.arrays import FLOATS, compute_dtype, device_name, dtype_name, kind_of, strides_of
from revkernels.coupling import GRID_EXPONENTS, Coupling


def check_arrays(**arrays: Any) -> None:
    """Every argument is an array that the kernels know, all of the same library."""
    kinds = {}
    for name, array in arrays.items():
        kinds[name] = kind_of(array)
        if kinds[name] is None:
            raise TypeError(f"{name} is a {type(array).__name__}; it must be a torch.Tensor or a numpy.ndarray")
    if len(set(kinds.values())) > 1:
        raise TypeError(f"{_listing(kinds)}: all arrays of a call must come from one library")


def check_float(**arrays: Any) -> None:
    """Every array is float64, float32, bfloat16 or float16, in the machine's byte order."""
    for name, array in arrays.items():
        if dtype_name(array) not in FLOATS:
            raise TypeError(f"{name} is {dtype_name(array)}; it must be one of {', '.join(FLOATS)}")
        _check_byte_order(name, array)


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
        if kind_of(array) == "numpy" and not array.flags.writeable:
            raise ValueError(f"{name} is read-only; it must be writable, for the result is written there")
        if _overlaps_itself(array):
            raise ValueError(
                f"{name} has several elements in one place (an expanded view); it must have its own memory"
            )


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
            if order < len(written) and _share_memory(array, other_array):
                raise ValueError(f"{name} and {other_name} overlap in memory: {name} is written, so it must not")
        reaching.append(current)


def check_operands(written: dict[str, Any], read: dict[str, Any]) -> None:
    """All of the above at once: for backends whose kernels do not check, and to word what a kernel refused."""
    arrays = written | read
    check_arrays(**arrays)
    check_float(**arrays)
    check_same_shape(**arrays)
    check_same_device(**arrays)
    check_writable(**written)
    check_disjoint(written, read)


def check_coupling(coupling: Coupling | None, written: dict[str, Any], read: dict[str, Any]) -> None:
    """The options fit the operands: types, lengths, devices, memory and the exponent's range.

    The stream is the first array of ``written``, or of ``read`` where the result is a new array; the branch is "f".
    Of the operands only what the options are held against is checked.
    """
    if coupling is None:
        return
    if not isinstance(coupling, Coupling):
        raise TypeError(f"coupling is a {type(coupling).__name__}; it must be a revkernels.Coupling or None")
    operands = written | read
    check_arrays(**operands)
    scales = {"channel_scale": coupling.channel_scale, "sample_scale": coupling.sample_scale}
    scales = {name: scale for name, scale in scales.items() if scale is not None}
    cells = {"checksum": coupling.checksum, "amax": coupling.amax}
    cells = {name: cell for name, cell in cells.items() if cell is not None}
    name, stream = next(iter(operands.items()))
    check_arrays(**{name: stream}, **scales, **cells)
    check_same_device(**{name: stream}, **scales, **cells)
    _check_grid(coupling.grid_exponent)
    _check_scales(coupling, scales, name, stream, compute_dtype(stream, read["f"]))
    _check_cells(cells)
    if scales or cells:
        check_disjoint(written | cells, read | scales)


def _check_grid(exponent: Any) -> None:
    if exponent is None:
        return
    _check_int("grid_exponent", exponent, "an int or None")
    if exponent not in GRID_EXPONENTS:
        raise ValueError(f"grid_exponent is {exponent}; it must be {GRID_EXPONENTS[0]} to {GRID_EXPONENTS[-1]}")


def _check_scales(coupling: Coupling, scales: dict[str, Any], stream_name: str, stream: Any, needs: str) -> None:
    rank, channel_dim = len(stream.shape), coupling.channel_dim
    _check_int("channel_dim", channel_dim, "an int")
    if "channel_scale" in scales and not -rank <= channel_dim < rank:
        raise ValueError(f"channel_dim is {channel_dim}; {stream_name} has {rank} dimensions")
    if len(scales) == 2 and channel_dim % rank == 0:
        raise ValueError(f"channel_dim is {channel_dim}; with a sample_scale it must be another dimension than 0")
    for name, scale in scales.items():
        if dtype_name(scale) != needs:
            raise TypeError(f"{name} is {dtype_name(scale)}; it must be {needs}, the type these operands are added in")
        _check_byte_order(name, scale)
        dim = channel_dim if name == "channel_scale" else 0
        if rank == 0 or tuple(scale.shape) != (stream.shape[dim],):
            absent = f"absent, for {stream_name} has no dimensions"
            size = f"({stream.shape[dim]},), {stream_name}'s dimension {dim}" if rank else absent
            raise ValueError(f"{name} has shape {tuple(scale.shape)}; it must be {size}")
        (stride,) = strides_of(scale)
        if scale.shape[0] > 1 and stride != 1:
            raise ValueError(f"{name} has stride {stride}; it must be dense")


def _check_cells(cells: dict[str, Any]) -> None:
    for name, cell in cells.items():
        types = ("int64", "uint64") if name == "checksum" else ("float32",)
        if dtype_name(cell) not in types:
            raise TypeError(f"{name} is {dtype_name(cell)}; it must be {' or '.join(types)}")
        _check_byte_order(name, cell)
        if math.prod(cell.shape) != 1:
            raise ValueError(f"{name} has shape {tuple(cell.shape)}; it must hold one element")
        if getattr(cell, "requires_grad", False):
            raise ValueError(f"{name} requires grad; it must not, for it is written and not differentiated")
    check_writable(**cells)


def _check_int(name: str, value: Any, needs: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be {needs}")


def _check_byte_order(name: str, array: Any) -> None:
    if kind_of(array) == "numpy" and not array.dtype.isnative:
        raise TypeError(f"{name} is byte-swapped; it must be in the machine's byte order")


def _has_no_memory(array: Any) -> bool:
    return kind_of(array) == "torch" and array.is_meta  # shapes alone: nothing to overlap


class _Extent:
    """An array's memory as NumPy sees it: address, shape and strides, never read."""

    def __init__(self, array: Any) -> None:
        size = array.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "shape": tuple(array.shape),
            "strides": tuple(s * size for s in array.stride()),
            "data": (array.data_ptr(), True),
        }


def _as_extent(array: Any) -> np.ndarray:
    return array if kind_of(array) == "numpy" else np.asarray(_Extent(array))


def _byte_bounds(array: Any) -> tuple[int, int]:
    if kind_of(array) == "torch":
        begin, size = array.data_ptr(), array.element_size()
    else:
        begin, size = array.__array_interface__["data"][0], array.itemsize
    steps = [(n - 1) * stride * size for n, stride in zip(array.shape, strides_of(array), strict=True)]
    return begin + sum(step for step in steps if step < 0), begin + sum(step for step in steps if step > 0) + size


def _share_memory(a: Any, b: Any) -> bool:
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
    strides = array.stride() if kind_of(array) == "torch" else array.strides
    reach = 1 if kind_of(array) == "torch" else array.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * size
    return False


def _listing(kinds: dict[str, str | None]) -> str:
    return ", ".join(f"{name} is from {kind}" for name, kind in kinds.items())
