# SPDX-License-Identifier: Apache-2.0
"""A launch of `couple_kernel` without its pointers: all that shapes, strides and dtypes determine, computed once.

Nothing is autotuned. A tile is 1,024 elements: eight per thread, for 16-byte accesses of half types, or four if
operands of 4 and 2 bytes are mixed, which the compiler would otherwise redistribute through shared memory. A tile that
ends in an atomic (checksum, amax) is four times as large, for a quarter of the atomics on one address.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

from revkernels.arrays import compute_dtype
from revkernels.coupling import Coupling
from revkernels.triton_kernels.layout import Walk, memory_positions, plan

TILE = 1024
_REPORTING_TILE = 4096
_THREADS, _MOST_THREADS = 128, 256

# Which of a call's arrays are (out, x, f, dy, df); the call has (x, f), (out, x, f) or (y, dy, f, df).
_ROLES = {2: (0, 0, 1, None, None), 3: (0, 1, 2, None, None), 4: (0, 0, 2, 1, 3)}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` returns.

    Attributes:
        walk: how the elements are walked.
        count: number of elements.
        dense: the arrays are contiguous in one common order.
        spans: for every array, bytes from its first element to the end of its last.
        roles: see `_ROLES`.
        programs: the grid.
        geometry: the kernel's arguments after ``first``, without constexprs.
        options: constexprs and launch options.
        device: the torch.device of all arrays.
    """

    walk: Walk
    count: int
    dense: bool
    spans: tuple[int, ...]
    roles: tuple[int | None, ...]
    programs: int
    geometry: tuple[Any, ...]
    options: dict[str, Any]
    device: Any

    def launch(self, arrays: Sequence[Any], coupling: Coupling | None) -> None:
        """Run the kernel on arrays with the metadata that this was prepared for."""
        if self.count == 0:
            return
        pointers = [None if role is None else arrays[role] for role in self.roles]
        up, down, checksum, amax = None, None, None, None
        if coupling is None:
            pointers += (None, None, None)
        else:
            pointers += (coupling.value, coupling.channel_scale, coupling.sample_scale)
            checksum, amax = coupling.checksum, coupling.amax
            if coupling.grid_exponent is not None:
                up, down = 2.0**coupling.grid_exponent, 2.0**-coupling.grid_exponent
        kernel = _couple_kernel()[(self.programs,)]
        with on(self.device):
            for offsets in self.walk.offsets:
                if len(self.walk.offsets) > 1:
                    steps = iter(offsets)
                    here = [None if p is None else _moved(p, next(steps)) for p in pointers]
                else:
                    here = pointers
                kernel(*here, up, down, checksum, amax, offsets[-1], *self.geometry, **self.options)


def prepare(arrays: Sequence[Any], coupling: Coupling | None, subtract: bool) -> Prepared:
    """Plan the launch for checked arrays."""
    import triton.language as tl

    roles = _ROLES[len(arrays)]
    operands: list[Any] = [None if role is None else arrays[role] for role in roles]
    out, x, f, dy, df = operands
    shape = out.shape
    value = None if coupling is None else coupling.value
    operands.append(value)
    strides = [None if a is None else a.stride() for a in operands]
    strides += _scale_strides(coupling, len(shape))
    strides.append(memory_positions(shape, out.stride()))
    present = [s for s in strides if s is not None]
    checksum = coupling is not None and coupling.checksum is not None
    reporting = checksum or (coupling is not None and coupling.amax is not None)
    elements = _REPORTING_TILE if reporting else TILE
    walk = plan(shape, present, sum(s is not None for s in strides[:6]), elements)
    taken = iter(walk.strides)
    steps = [None if s is None else next(taken) for s in strides]
    if not checksum:
        steps[-1] = None
    wide = {"float64": tl.float64, "float32": tl.float32}
    most = threads(elements, *arrays, *(() if value is None else (value,)))
    return Prepared(
        walk=walk,
        count=out.numel(),
        dense=walk.rank == 1 and all(step == (1,) for step in walk.strides),
        spans=tuple(span(a) for a in arrays),
        roles=roles,
        programs=walk.programs,
        geometry=(walk.rows, walk.cols, walk.period, walk.col_tiles, *steps),
        options={
            "SUBTRACT": subtract,
            "WIDE": wide[compute_dtype(x, f)],
            "WIDE_GRADIENT": None if dy is None else wide[compute_dtype(dy, df)],
            "CHANNEL_VARIES": bool(steps[6] and steps[6][-1]),
            "SAMPLE_VARIES": bool(steps[7] and steps[7][-1]),
            "RANK": walk.rank,
            "ROWS": walk.tile[0],
            "COLS": walk.tile[1],
            # No more threads than elements: a warp repeating another's elements could, in place, read what that has
            # stored already, and put it into the checksum or the amax.
            "num_warps": max(1, min(most, math.prod(walk.tile)) // warp_width()),
            "enable_fp_fusion": False,  # a fused multiply-add skips a rounding that the other backends do
        },
        device=out.device,
    )


def interpreting() -> bool:
    """Whether Triton runs kernels on the host."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_place(name: str, array: Any) -> None:
    """The kernels can run where the array is."""
    if not array.is_cuda and not (array.is_cpu and interpreting()):
        raise ValueError(f"{name} is on {array.device}; the Triton kernels need it on a GPU")


def on(device: Any) -> Any:
    """Makes the tensors' device current: Triton launches on the current device."""
    import torch

    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def threads(elements: int, *arrays: Any) -> int:
    """Threads per program for ``elements`` elements of these arrays; see the module's docstring."""
    mixed = len({a.element_size() for a in arrays}) > 1
    return _MOST_THREADS if mixed or elements > TILE else _THREADS


@cache
def warp_width() -> int:
    """Threads per warp: 64 on AMD's CDNA, else 32."""
    import torch

    return 64 if torch.version.hip else 32


@cache
def _couple_kernel() -> Any:
    from revkernels.triton_kernels.coupling import couple_kernel

    return couple_kernel


def float_bits(number: float) -> int:
    """A float as an argument of a kernel, which gets it back with `arithmetic.double`."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _scale_strides(coupling: Coupling | None, dims: int) -> list[tuple[int, ...] | None]:
    """Strides of the scales as operands of the full shape, 0 along the other dimensions."""
    strides: list[tuple[int, ...] | None] = [None, None]
    if coupling is not None:
        for i, (scale, dim) in enumerate(((coupling.channel_scale, coupling.channel_dim), (coupling.sample_scale, 0))):
            if scale is not None:
                strides[i] = tuple(scale.stride(0) if d == dim % dims else 0 for d in range(dims))
    return strides


def span(array: Any) -> int:
    if array.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.stride(), strict=True))
    return (last + 1) * array.element_size()


def _moved(array: Any, offset: int) -> Any:
    """A pointer ``offset`` elements further; Triton uses only the data pointer."""
    return array.as_strided((1,), (1,), array.storage_offset() + offset)
