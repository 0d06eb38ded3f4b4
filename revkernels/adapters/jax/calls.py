# SPDX-License-Identifier: Apache-2.0
"""The custom calls: shapes and attributes for XLA, arrays in the order of handlers.cpp. Nothing is checked.

XLA is told which result shares which operand's memory. If that operand is needed afterwards, or is an argument that is
not donated, XLA copies it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from revkernels.adapters.jax import build, manual_axes

__all__ = ["Reports", "accumulate", "couple", "reverse_step"]

_NO_GRID = np.int64(np.iinfo(np.int32).min)


class Reports(NamedTuple):
    """What a coupling reports of the stream that it wrote.

    Attributes:
        amax: float32, the largest |stream|, NaN if there is a NaN; for an int16 stream, before wrapping.
        checksum: ``[2]`` uint32, equal for equal bits.
    """

    amax: Array
    checksum: Array


def couple(x: Any, f: Any, *, subtract: bool, k: int | None, in_place: bool, reports: bool = False) -> Any:
    """x + f, or x - f, of x's dtype; with ``reports`` a pair of that and its `Reports`."""
    attributes = {"subtract": np.int64(subtract), "grid_exponent": _grid(k)}
    aliases = {0: 0} if in_place else {}
    if not reports:
        (result,) = call("couple", [x, f], [x], aliases, **attributes)
        return result
    zeros = _no_reports()
    result, *found = call("couple", [x, f, *zeros], [x, *zeros], aliases | {2: 1, 3: 2}, **attributes)
    return result, Reports(*found)


def reverse_step(
    y: Any, f: Any, dy: Any, df: Any, *, k: int | None, reports: bool = False, after: Sequence[Any] = ()
) -> Any:
    """(y - f, dy + df), each in its first operand's memory; with ``reports`` also the reports of y - f.

    ``after`` are arrays that must be computed before: then everything that reads y or dy for them is done when these
    are overwritten, and XLA needs no copies. They are operands for the compiler; the kernel ignores them.
    """
    zeros = _no_reports() if reports else ()
    x, dx, *found = call(
        "reverse_step",
        [y, f, dy, df, *zeros, *after],
        [y, dy, *zeros],
        {0: 0, 2: 1} | ({4: 2, 5: 3} if reports else {}),
        grid_exponent=_grid(k),
    )
    return (x, dx, Reports(*found)) if reports else (x, dx)


def accumulate(totals: Sequence[Any], parts: Sequence[Any]) -> list[Any]:
    """totals + parts, in the totals' memory."""
    return call("accumulate", [*totals, *parts], totals, {index: index for index in range(len(totals))})


def call(kernel: str, operands: Sequence[Any], results: Sequence[Any], aliases: dict[int, int], **given: Any) -> Any:
    """Make the custom call of that name; ``results`` give its results' shapes and dtypes, ``given`` are attributes."""
    build.load()
    operands = manual_axes.together(operands)
    described = [manual_axes.result(operands[0], result.shape, result.dtype) for result in results]
    found = jax.ffi.ffi_call(
        f"revkernels_{kernel}", described, vmap_method="broadcast_all", input_output_aliases=aliases
    )(*operands, **given)
    return [manual_axes.sharded_like(array, operands[0]) for array in found]


def _grid(k: int | None) -> np.int64:
    return _NO_GRID if k is None else np.int64(k)


def _no_reports() -> Reports:
    return Reports(jnp.zeros((), jnp.float32), jnp.zeros(2, jnp.uint32))
