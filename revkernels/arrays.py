# SPDX-License-Identifier: Apache-2.0
"""Telling arrays apart without importing the library that made them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

#: The element types that every kernel takes.
FLOATS = ("float64", "float32", "bfloat16", "float16")
#: A stream in fixed point, which the couplings take besides.
INT16 = "int16"

_KINDS: dict[type, str] = {np.ndarray: "numpy"}


def kind_of(array: Any) -> str | None:
    """Return "torch", "numpy", or None for anything else."""
    kind = _KINDS.get(type(array))
    if kind is None:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(array, torch.Tensor):
            kind = "torch"
        elif isinstance(array, np.ndarray):
            kind = "numpy"
        else:
            return None
        _KINDS[type(array)] = kind
    return kind


def dtype_name(array: Any) -> str:
    """Return the dtype's plain name: "float32", "bfloat16", "int64" ..."""
    if kind_of(array) == "torch":
        return str(array.dtype).removeprefix("torch.")
    return array.dtype.name


def device_name(array: Any) -> str:
    """Return "cpu", "cuda:0" ...; NumPy arrays are on "cpu"."""
    return str(array.device) if kind_of(array) == "torch" else "cpu"


def compute_dtype(*arrays: Any) -> str:
    """Return the type the arithmetic is done in: float64 if any operand is, else float32."""
    return "float64" if any(dtype_name(a) == "float64" for a in arrays) else "float32"


def strides_of(array: Any) -> tuple[int, ...]:
    """Return strides counted in elements."""
    if kind_of(array) == "torch":
        return tuple(array.stride())
    return tuple(s // array.itemsize for s in array.strides)


def memory_order(array: Any) -> tuple[int, ...]:
    """Return the dimensions from the outermost in memory to the innermost; ties keep their order."""
    strides = strides_of(array)
    return tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))
