# SPDX-License-Identifier: Apache-2.0
"""The checks of bad input, each written once. A message names the argument, what it got and what it needs."""

from __future__ import annotations

from typing import Any

import numpy as np

from revkernels.arrays import FLOATS, compute_dtype, device_name, dtype_name, kind_of
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
        if kind_of(array) == "numpy" and not array.dtype.isnative:
            raise TypeError(f"{name} is byte-swapped; it must be in the machine's byte order")


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
    entries = []
    for group, is_written in ((written, True), (read, False)):
        for name, array in group.items():
            if 0 not in array.shape:
                low, high = _byte_bounds(_as_extent(array))
                entries.append((low, high, name, array, is_written))
    entries.sort(key=lambda entry: entry[0])
    reaching: list[tuple[int, int, str, Any, bool]] = []  # of those before, the ones whose range goes on
    for entry in entries:
        reaching = [other for other in reaching if other[1] > entry[0]]
        for other in reaching:
            if (entry[4] or other[4]) and _share_memory(entry[3], other[3]):
                first, second = (entry, other) if entry[4] else (other, entry)
                raise ValueError(f"{first[2]} and {second[2]} overlap in memory: {first[2]} is written, so it must not")
        reaching.append(entry)


def check_operands(written: dict[str, Any], read: dict[str, Any]) -> None:
    """All of the above at once: for backends whose kernels do not check, and to word what a kernel refused."""
    arrays = written | read
    check_arrays(**arrays)
    check_float(**arrays)
    check_same_shape(**arrays)
    check_same_device(**arrays)
    check_writable(**written)
    check_disjoint(written, read)


def check_coupling(coupling: Coupling | None, x: Any, f: Any) -> None:
    """The options fit the operands: lengths, types, devices and the exponent's range."""
    if coupling is None:
        return
    if not isinstance(coupling, Coupling):
        raise TypeError(f"coupling is a {type(coupling).__name__}; it must be a revkernels.Coupling or None")
    rank = len(x.shape)
    if coupling.channel_scale is not None and not -rank <= coupling.channel_dim < rank:
        raise ValueError(f"channel_dim is {coupling.channel_dim}; x has {rank} dimensions")
    scales = {
        "channel_scale": (coupling.channel_scale, coupling.channel_dim),
        "sample_scale": (coupling.sample_scale, 0),
    }
    for name, (scale, dim) in scales.items():
        if scale is None:
            continue
        check_arrays(x=x, **{name: scale})
        check_same_device(x=x, **{name: scale})
        needs = compute_dtype(x, f)
        if dtype_name(scale) != needs:
            raise TypeError(f"{name} is {dtype_name(scale)}; it must be {needs}, the type these operands are added in")
        if rank == 0 or tuple(scale.shape) != (x.shape[dim],):
            size = f"({x.shape[dim]},), x's dimension {dim}" if rank else "absent, for x has no dimensions"
            raise ValueError(f"{name} has shape {tuple(scale.shape)}; it must be {size}")
    k = coupling.grid_exponent
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"grid_exponent is a {type(k).__name__}; it must be an int or None")
    if k is not None and k not in GRID_EXPONENTS:
        raise ValueError(f"grid_exponent is {k}; it must be {GRID_EXPONENTS[0]} to {GRID_EXPONENTS[-1]}")
    for name, cell_types in {"checksum": ("int64", "uint64"), "amax": ("float32",)}.items():
        cell = getattr(coupling, name)
        if cell is None:
            continue
        check_arrays(x=x, **{name: cell})
        check_same_device(x=x, **{name: cell})
        if dtype_name(cell) not in cell_types:
            raise TypeError(f"{name} is {dtype_name(cell)}; it must be {' or '.join(cell_types)}")
        if int(np.prod(tuple(cell.shape))) != 1:
            raise ValueError(f"{name} has shape {tuple(cell.shape)}; it must hold one element")


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


def _byte_bounds(array: np.ndarray) -> tuple[int, int]:
    steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    begin = array.__array_interface__["data"][0]
    return begin + sum(min(step, 0) for step in steps), begin + sum(max(step, 0) for step in steps) + array.itemsize


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
