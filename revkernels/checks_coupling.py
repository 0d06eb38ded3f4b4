# SPDX-License-Identifier: Apache-2.0
"""Checks of a coupling's options, worded like those in `revkernels.checks`."""

from __future__ import annotations

import math
from typing import Any

from revkernels.arrays import INT16, compute_dtype, dtype_name, seen, strides_of
from revkernels.checks import (
    arrays_of,
    check_arrays,
    check_byte_order,
    check_disjoint,
    check_float,
    check_int,
    check_same_device,
    check_same_shape,
    check_writable,
)
from revkernels.coupling import GRID_EXPONENTS, Coupling


def check_coupling(coupling: Coupling | None, written: dict[str, Any], read: dict[str, Any]) -> None:
    """Check the options against the operands: types, lengths, devices, memory and the exponent's range.

    The stream is the first array of ``written``, or of ``read`` if the result is a new array; the branch is "f". Of the
    operands, only what the options depend on is checked.
    """
    if coupling is None:
        return
    if not isinstance(coupling, Coupling):
        raise TypeError(f"coupling is a {type(coupling).__name__}; it must be a revkernels.Coupling or None")
    written = {name: seen(name, array) for name, array in written.items()}
    read = {name: seen(name, array) for name, array in read.items()}
    operands = written | read
    check_arrays(**operands)
    own = {name: seen(name, array) for name, array in arrays_of(coupling).items()}
    scales = {name: array for name, array in own.items() if name in ("channel_scale", "sample_scale")}
    cells = {name: array for name, array in own.items() if name in ("checksum", "amax")}
    values = {name: array for name, array in own.items() if name == "value"}
    name, stream = next(iter(operands.items()))
    check_arrays(**{name: stream}, **scales, **cells, **values)
    check_same_device(**{name: stream}, **scales, **cells, **values)
    _check_grid(coupling.grid_exponent)
    _check_scales(coupling, scales, name, stream, compute_dtype(stream, read["f"]))
    _check_cells(cells)
    _check_value(values, name, stream)
    if scales or cells or values:
        check_disjoint(written | cells | values, read | scales)


def _check_grid(exponent: Any) -> None:
    if exponent is None:
        return
    check_int("grid_exponent", exponent, "an int or None")
    if exponent not in GRID_EXPONENTS:
        raise ValueError(f"grid_exponent is {exponent}; it must be {GRID_EXPONENTS[0]} to {GRID_EXPONENTS[-1]}")


def _check_scales(coupling: Coupling, scales: dict[str, Any], stream_name: str, stream: Any, needs: str) -> None:
    rank, channel_dim = len(stream.shape), coupling.channel_dim
    check_int("channel_dim", channel_dim, "an int")
    if "channel_scale" in scales and not -rank <= channel_dim < rank:
        raise ValueError(f"channel_dim is {channel_dim}; {stream_name} has {rank} dimensions")
    if len(scales) == 2 and channel_dim % rank == 0:
        raise ValueError(f"channel_dim is {channel_dim}; with a sample_scale it must be another dimension than 0")
    for name, scale in scales.items():
        if dtype_name(scale) != needs:
            raise TypeError(f"{name} is {dtype_name(scale)}; it must be {needs}, the type these operands are added in")
        check_byte_order(name, scale)
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
        check_byte_order(name, cell)
        if math.prod(cell.shape) != 1:
            raise ValueError(f"{name} has shape {tuple(cell.shape)}; it must hold one element")
        _check_without_grad(name, cell)
    check_writable(**cells)


def _check_value(values: dict[str, Any], stream_name: str, stream: Any) -> None:
    for name, value in values.items():
        if dtype_name(stream) != INT16:
            raise ValueError(
                f"{name} is given, and {stream_name} is {dtype_name(stream)}; it must be None but for an {INT16} stream"
            )
        check_float(**values)
        check_same_shape(**{stream_name: stream}, **values)
        _check_without_grad(name, value)
    check_writable(**values)


def _check_without_grad(name: str, written: Any) -> None:
    if getattr(written, "requires_grad", False):
        raise ValueError(f"{name} requires grad; it must not, for it is written and not differentiated")
