# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, each written once. A message names the argument, what it got and what it needs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from revkernels.arrays import (
    FLOATS,
    INT16,
    Seen,
    address_of,
    device_name,
    dtype_name,
    family_of,
    itemsize_of,
    kind_of,
    not_an_array,
    strides_of,
)
from revkernels.coupling import Coupling

_STREAMS = ("x", "y", "out")  # the arguments that are streams in a coupling


def check_arrays(**arrays: Any) -> None:
    """Every argument is a dense, unmasked array, and all are from libraries that go together."""
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
    """Every argument is a torch tensor or a NumPy array, as the backends need that are not compiled."""
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
    """Every array has a layout that the kernels can read: aligned, strides not negative and of whole elements."""
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
    """No written array shares an element with another array. (Interleaved halves of one buffer share none.)"""
    if not written:
        return
    ranges = []
    for order, (name, array) in enumerate([*written.items(), *read.items()]):
        if 0 not in array.shape and not _has_no_memory(array):
            ranges.append((*_byte_bounds(array), order, name, array))
    reaching: list[tuple[int, int, int, str, Any]] = []  # earlier ranges that are still open
    for current in sorted(ranges, key=lambda entry: entry[0]):
        reaching = [other for other in reaching if other[1] > current[0]]
        for other in reaching:
            (order, name, array), (_, other_name, other_array) = sorted((current[2:], other[2:]), key=lambda e: e[0])
            if order < len(written) and share_memory(array, other_array):
                raise ValueError(f"{name} and {other_name} overlap in memory: {name} is written, so it must not")
        reaching.append(current)


def check_stream(coupling: Coupling | None, **arrays: Any) -> None:
    """The stream and its result are of float types, or both int16 with a grid in the coupling; the rest are floats."""
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
    """All of the above: for backends whose kernels do not check, and to word an error of a kernel.

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


def check_int(name: str, value: Any, needs: str) -> None:
    """The value is an int and not a bool."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be {needs}")


def check_byte_order(name: str, array: Any) -> None:
    """The array is in the machine's byte order."""
    if kind_of(array) == "numpy" and not array.dtype.isnative:
        raise TypeError(f"{name} is byte-swapped; it must be in the machine's byte order")


def _has_no_memory(array: Any) -> bool:
    return kind_of(array) == "torch" and array.is_meta  # shapes only: nothing to overlap


class _Extent:
    """An array's memory for NumPy: address, shape and strides. It is never read."""

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
    """Whether the arrays have an element in common; True if that is too hard to tell."""
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
    in_bytes = kind_of(array) == "numpy"  # a record field's stride need not be a multiple of its size
    strides, reach = (array.strides, array.itemsize) if in_bytes else (strides_of(array), 1)
    for stride, size in sorted((abs(s), n) for s, n in zip(strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False
