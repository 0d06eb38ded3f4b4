# SPDX-License-Identifier: Apache-2.0
"""The launches of norm_act: what shapes, strides and dtypes determine is computed once; then only pointers change.

Nothing is autotuned, nothing synchronises, and memory for partial results comes from torch's allocator, so a graph can
capture everything. The partition of sums depends on shapes, strides and dtypes of all operands: equal calls give equal
bits; a call for sums only may differ in the last bits from one that also has a dx of another layout.

A tile is 1,024 elements, eight per thread, or four if they have 8 bytes or if operands of several sizes are mixed (see
launch.py). A row's tile may be larger. If there are many tiles, a program processes several in sequence: it loads
parameters once and writes fewer partial results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from revkernels.norm import SUMS_GIVEN, SUMS_ONLY, Norm
from revkernels.triton_kernels import launch
from revkernels.triton_kernels.norm_layout import Plane, plane

_MOST_THREADS = 512
_ROW_TILE, _ROW_GRADIENT_TILE = 8192, 4096  # most elements of a row norm's tile; fewer for float64
_PROGRAMS = 2048  # enough to fill a device; beyond that, a program takes more tiles
_MOST_TILES, _MOST_SUMMED = 4, 64
_MERGED = {"CHUNKS": 64, "CHANNELS": 16}  # a tile of partial results, always the same: one variant


@dataclass(frozen=True, slots=True)
class Walk:
    """How one kernel walks a plane.

    Attributes:
        sizes: the kernel's argument of that name.
        programs: the grid.
        chunks: programs that share one sample's positions.
        options: constexprs and launch options.
    """

    sizes: tuple[int, ...]
    programs: int
    chunks: int
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Empty:
    """A norm over no elements: all sums are 0, and running statistics stay unchanged."""

    spans: tuple[int, ...]

    def norm_act(
        self, h: Any, out: Any, x: Any, f: Any, subtract: bool, norm: Norm, mean: Any, rstd: Any, given: bool
    ) -> None:
        """The statistics of no elements."""
        if not given:
            rstd.fill_(1 / math.sqrt(norm.eps) if norm.eps else math.inf)
            if mean is not None:
                mean.zero_()

    def norm_act_backward(
        self, dx: Any, base: Any, dh: Any, x: Any, norm: Norm, mean: Any, rstd: Any, dweight: Any, dbias: Any,
        sums: int, count: int, constant: bool,
    ) -> None:  # fmt: skip
        """Sums of no elements."""
        for array in (dweight, dbias):
            if array is not None and sums != SUMS_GIVEN:
                array.zero_()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A norm over arrays of known metadata. Operands are (x, out, f, h) forward and (x, dx, base, dh) backward.

    Attributes:
        plane: the arrays as kernels view them.
        strides, statistic: the plane's, encoded for kernels.
        kind, activation, group_size: of the norm; group_size is encoded.
        summed: the walk for sums over positions.
        applied: the element-wise walk.
        by_rows: the walk for sums over channels, of layer and RMS norms.
        whole_rows: its tile holds all channels.
        spans: for every array of the call, bytes from its first element to the end of its last.
        device, wide: the torch.device of all arrays, and the torch.dtype of the arithmetic.
    """

    plane: Plane
    strides: tuple[Any, ...]
    statistic: tuple[int, ...]
    kind: str
    activation: str
    group_size: int
    summed: Walk
    applied: Walk
    by_rows: Walk | None
    whole_rows: bool
    spans: tuple[int, ...]
    device: Any
    wide: Any

    def norm_act(
        self, h: Any, out: Any, x: Any, f: Any, subtract: bool, norm: Norm, mean: Any, rstd: Any, given: bool
    ) -> None:
        """h <- activation(norm(x)); with f, out <- x + f (x - f) first, and h from that."""
        with launch.on(self.device):
            if given:
                self._apply(h, out, x, f, subtract, norm, mean, rstd)
            elif self.by_rows is not None and self.whole_rows:
                self._rows(self.by_rows, h, out, x, f, subtract, norm, mean, rstd)
            else:
                if self.by_rows is None:
                    self._measure(out, x, f, subtract, norm, mean, rstd)
                else:
                    self._measure_rows(self.by_rows, out, x, f, subtract, norm, mean, rstd)
                self._apply(h, None, x, None, False, norm, mean, rstd, out if f is not None else None)

    def _measure(self, out: Any, x: Any, f: Any, subtract: bool, norm: Norm, mean: Any, rstd: Any) -> None:
        shape, walk = self.plane, self.summed
        partial, size = self._scratch(4, shape.samples * walk.chunks * shape.channels)
        x_strides, out_strides, f_strides, _ = self.strides
        _run("norm_act", "statistics_kernel", walk)(
            partial, out, x, f, size, walk.sizes, x_strides, out_strides, f_strides, SUBTRACT=subtract, **walk.options
        )
        _run("norm_act", "merge_statistics_kernel", self._groups())(
            mean, rstd, norm.running_mean, norm.running_var, partial, size, code(walk.chunks), code(shape.channels),
            self.group_size, launch.float_bits(norm.eps), launch.float_bits(norm.momentum),
            GROUPED=self.kind == "group", **_MERGED, enable_fp_fusion=False,
        )  # fmt: skip

    def _measure_rows(
        self, walk: Walk, out: Any, x: Any, f: Any, subtract: bool, norm: Norm, mean: Any, rstd: Any
    ) -> None:
        _run("norm_act", "wide_rows_kernel", walk)(
            out, x, f, mean, rstd, launch.float_bits(norm.eps), walk.sizes, *self.strides[:3], self.statistic,
            SUBTRACT=subtract, **walk.options,
        )  # fmt: skip

    def _rows(
        self, walk: Walk, h: Any, out: Any, x: Any, f: Any, subtract: bool, norm: Norm, mean: Any, rstd: Any
    ) -> None:
        x_strides, out_strides, f_strides, h_strides = self.strides
        _run("norm_act", "rows_kernel", walk)(
            h, out, x, f, mean, rstd, norm.weight, norm.bias, launch.float_bits(norm.eps), walk.sizes,
            h_strides, x_strides, out_strides, f_strides, self.statistic,
            ACTIVATION=self.activation, SUBTRACT=subtract, **walk.options,
        )  # fmt: skip

    def _apply(
        self, h: Any, out: Any, x: Any, f: Any, subtract: bool, norm: Norm, mean: Any, rstd: Any, stored: Any = None
    ) -> None:
        """h from known statistics, of x (with f: of x + f), or of what a first pass has stored."""
        walk, options = self.applied, self.applied.options
        x_strides, out_strides, f_strides, h_strides = self.strides
        if stored is not None:
            minors = options["MINORS"]
            x, x_strides, options = stored, out_strides, options | {"MINORS": (minors[1], "none", "none", minors[3])}
        if f is None:
            out_strides = f_strides = None
        _run("norm_act", "apply_kernel", walk)(
            h, out, x, f, mean, rstd, norm.weight, norm.bias, self.group_size, walk.sizes,
            h_strides, x_strides, out_strides, f_strides, self.statistic,
            KIND=self.kind, ACTIVATION=self.activation, SUBTRACT=subtract, **options,
        )  # fmt: skip

    def norm_act_backward(
        self, dx: Any, base: Any, dh: Any, x: Any, norm: Norm, mean: Any, rstd: Any, dweight: Any, dbias: Any,
        sums: int, count: int, constant: bool,
    ) -> None:  # fmt: skip
        """dx <- base + gradient; dweight and dbias are written, or read if the sums are given."""
        shape = self.plane
        wanted = dweight is not None or dbias is not None
        slope, level, elements = dweight, dbias, count or shape.rows * shape.positions
        known = (mean, rstd, norm.weight, norm.bias)
        with launch.on(self.device):
            if self.by_rows is not None and self.whole_rows:
                self._rows_gradient(self.by_rows, dx, base, dh, x, known, dweight, dbias)
                return
            if sums != SUMS_GIVEN and (wanted or self.kind == "group"):
                partial, size = self._sums(dh, x, known)
                if wanted:
                    self._merge_sums(partial, size, shape.samples * self.summed.chunks, dweight, dbias)
            if sums == SUMS_ONLY:
                return
            if self.kind == "group":
                slope, level = self._group_moments(partial, size, norm.weight, rstd)
            elif self.by_rows is not None:
                slope, level = self._row_moments(self.by_rows, dh, x, known, rstd)
            x_strides, dx_strides, base_strides, dh_strides = self.strides
            walk = self.applied
            _run("norm_act_backward", "gradient_kernel", walk)(
                dx, base, x, dh, *known, slope, level, self.group_size, code(elements), walk.sizes,
                x_strides, dx_strides, base_strides, dh_strides, self.statistic,
                KIND=self.kind, CONSTANT=bool(constant), ACTIVATION=self.activation, **walk.options,
            )  # fmt: skip

    def _rows_gradient(
        self, walk: Walk, dx: Any, base: Any, dh: Any, x: Any, known: Any, dweight: Any, dbias: Any
    ) -> None:
        wanted = dweight is not None or dbias is not None
        partial, size = self._scratch(2, walk.chunks * self.plane.channels) if wanted else (None, code(0))
        x_strides, dx_strides, base_strides, dh_strides = self.strides
        _run("norm_act_backward", "rows_gradient_kernel", walk)(
            dx, base, x, dh, *known, partial, size, walk.sizes,
            x_strides, dx_strides, base_strides, dh_strides, self.statistic,
            ACTIVATION=self.activation, **walk.options,
        )  # fmt: skip
        if wanted:
            self._merge_sums(partial, size, walk.chunks, dweight, dbias)

    def _sums(self, dh: Any, x: Any, known: Any) -> tuple[Any, int]:
        walk = self.summed
        partial, size = self._scratch(2, self.plane.samples * walk.chunks * self.plane.channels)
        x_strides, _, _, dh_strides = self.strides
        _run("norm_act_backward", "sums_kernel", walk)(
            partial, x, dh, *known, size, self.group_size, walk.sizes, x_strides, dh_strides, self.statistic,
            KIND=self.kind, ACTIVATION=self.activation, **walk.options,
        )  # fmt: skip
        return partial, size

    def _merge_sums(self, partial: Any, size: int, rows: int, dweight: Any, dbias: Any) -> None:
        channels = self.plane.channels
        merged = _MERGED["CHANNELS"]
        _run("norm_act_backward", "merge_sums_kernel", -(-channels // merged))(
            dweight, dbias, partial, size, code(rows), code(channels),
            ROWS=_MERGED["CHUNKS"], CHANNELS=merged, enable_fp_fusion=False,
        )  # fmt: skip

    def _group_moments(self, partial: Any, size: int, weight: Any, rstd: Any) -> tuple[Any, Any]:
        shape, moments = self.plane, self._scratch(2, rstd.numel())
        _run("norm_act_backward", "merge_moments_kernel", self._groups())(
            moments[0], partial, weight, size, moments[1], code(self.summed.chunks), code(shape.channels),
            self.group_size, code(shape.rows * shape.positions * (self.group_size >> 2)),
            **_MERGED, enable_fp_fusion=False,
        )  # fmt: skip
        return moments[0][0], moments[0][1]

    def _row_moments(self, walk: Walk, dh: Any, x: Any, known: Any, rstd: Any) -> tuple[Any, Any]:
        slope, level = rstd.new_empty(rstd.numel()), None if known[0] is None else rstd.new_empty(rstd.numel())
        x_strides, _, _, dh_strides = self.strides
        _run("norm_act_backward", "wide_rows_moments_kernel", walk)(
            slope, level, x, dh, *known, walk.sizes, x_strides, dh_strides, self.statistic,
            ACTIVATION=self.activation, **walk.options,
        )  # fmt: skip
        return slope, level

    def _groups(self) -> int:
        """Number of programs that merge the partial results."""
        if self.kind == "group":
            return self.plane.samples * (self.plane.channels // (self.group_size >> 2))
        return -(-self.plane.channels // _MERGED["CHANNELS"])

    def _scratch(self, planes: int, size: int) -> tuple[Any, int]:
        import torch

        return torch.empty((planes, size), dtype=self.wide, device=self.device), code(size)


def prepare(norm: Norm, operands: Sequence[Any], arrays: Sequence[Any], wide: Any, backward: bool) -> Prepared | Empty:
    """Plan the launches for checked ``operands``, x first; ``arrays`` are all of the call's."""
    import torch
    import triton.language as tl

    x = operands[0]
    shape, axis = tuple(x.shape), norm.channel_axis(x.dim())
    spans = tuple(launch.span(array) for array in arrays)
    if 0 in shape:
        return Empty(spans)
    fields = {
        "kind": norm.kind if norm.kind != "rms" else "layer",
        "activation": norm.activation,
        "group_size": code(shape[axis] // norm.groups if norm.kind == "group" else 1),
        "spans": spans,
        "device": x.device,
        "wide": wide,
    }
    over = plane(norm.kind, axis, shape, [None if a is None else a.stride() for a in operands])
    sizes = {array.element_size() for array in operands if array is not None}
    common = {
        "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
        "MINORS": over.minors,
        "UNIT": over.unit,
        "C_UNIT": over.channel_unit,
        "B_UNIT": over.position_unit,
        "enable_fp_fusion": False,  # as in launch.py
    }
    each = 4 if len(sizes) > 1 or 8 in sizes else 8
    by_rows, whole = None, False
    if norm.kind in ("layer", "rms"):
        most = _ROW_GRADIENT_TILE if backward else _ROW_TILE
        if wide == torch.float64:
            most //= 4 if backward else 2
        tile = over.row_tile(launch.TILE, most)
        whole = tile[1] >= over.channels
        threads = 256 if backward and wide == torch.float64 else _MOST_THREADS  # fewer threads have more registers each
        of_row = min(each, 16 // max(sizes) if backward else each)  # more values are live than in the other kernels
        by_rows = _walk(over, tile, of_row, _MOST_SUMMED if whole else 1, common, threads, by_rows=True)
    return Prepared(
        plane=over,
        strides=tuple(None if strides is None else tuple(map(code, strides)) for strides in over.strides),
        statistic=tuple(map(code, over.statistic)),
        summed=_walk(over, over.tile(launch.TILE), each, _MOST_SUMMED, common),
        applied=_walk(over, over.tile(launch.TILE), each, _MOST_TILES, common),
        by_rows=by_rows,
        whole_rows=whole,
        **fields,
    )


def code(n: int) -> int:
    """An integer encoded for the kernels; see norm_arithmetic.py."""
    return 4 * n + 2


def _walk(
    over: Plane, tile: tuple[int, int], each: int, most: int, common: dict[str, Any],
    most_threads: int = _MOST_THREADS, by_rows: bool = False,
) -> Walk:  # fmt: skip
    positions, channels = tile
    tiles = over.rows * -(-over.positions // positions)
    beside = 1 if by_rows else over.samples * -(-over.channels // channels)
    taken = max(1, min(most, tiles, tiles * beside // _PROGRAMS))
    chunks = -(-tiles // taken)
    if tiles * beside >= 2**31:
        raise ValueError(f"{tiles * beside} tiles of {tile}: the kernels count them in 32 bits")
    threads = min(most_threads, max(1, positions * channels // each))
    return Walk(
        sizes=(
            code(over.rows),
            code(over.positions // over.position_unit),
            code(over.channels // over.channel_unit),
            code(taken),
        ),
        programs=chunks * beside,
        chunks=chunks,
        options=common
        | {"POSITIONS": positions, "CHANNELS": channels, "num_warps": max(1, threads // launch.warp_width())},
    )


def _run(module: str, name: str, walk: Walk | int) -> Any:
    return _kernel(module, name)[(walk if isinstance(walk, int) else walk.programs,)]


@cache
def _kernel(module: str, name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"revkernels.triton_kernels.{module}"), name)
