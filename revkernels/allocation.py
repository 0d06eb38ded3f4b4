# SPDX-License-Identifier: Apache-2.0
"""Allocates arrays for results, from the library and on the device of an operand.

Torch, NumPy and CuPy allocate their own. A library with the array API's ``__array_namespace__`` is asked for ``empty``.
For any other exporter, which must be in host memory, the result is a NumPy array.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

from revkernels.arrays import Seen, device_name, kind_of, memory_order, seen

__all__ = ["empty", "empty_like"]


def empty_like(name: str, x: Any, dtype: Any = None) -> Any:
    """Return a new array of x's shape, dense in x's memory order, of ``dtype`` (None: x's own).

    A library used through its array namespace chooses the memory order itself. ``name`` is x's, for messages.

    Raises:
        TypeError: arrays of x's library cannot be written; or NumPy has no such dtype; or ``dtype`` is from another
            library.
        ValueError: x is on a CUDA device, and its library cannot allocate an array there.
    """
    kind = kind_of(x)
    if kind == "numpy":
        return np.empty_like(x, dtype, subok=False)
    if kind == "torch":
        torch = sys.modules["torch"]
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype is {dtype!r}; it must be a torch.dtype or None")
        return torch.empty_like(x, dtype=dtype)
    if kind == "cupy":
        with x.device:  # not the current device
            return sys.modules["cupy"].empty_like(x, dtype)
    if hasattr(x, "__array_namespace__"):
        return _writable(name, x.__array_namespace__().empty_like(x, dtype=dtype))
    look = _on_host(name, x)
    order = memory_order(look)
    memory = np.empty([look.shape[d] for d in order], _numpy_dtype(name, look.dtype if dtype is None else dtype))
    return memory.transpose(np.argsort(order)) if order else memory


def empty(shape: tuple[int, ...], name: str, like: Any, dtype: str) -> Any:
    """Return a new dense array of the named dtype, from the library and on the device of ``like``; see `empty_like`."""
    kind = kind_of(like)
    if kind == "numpy":
        return np.empty(shape, dtype)
    if kind == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if kind == "cupy":
        cupy = sys.modules["cupy"]
        with like.device:
            return cupy.empty(shape, dtype)
    if hasattr(like, "__array_namespace__"):
        library = like.__array_namespace__()
        return _writable(name, library.empty(shape, dtype=getattr(library, dtype), device=like.device))
    _on_host(name, like)
    return np.empty(shape, _numpy_dtype(name, dtype))


def _writable(name: str, new: Any) -> Any:
    look = seen(name, new)
    if isinstance(look, Seen) and look.frozen is not None:
        raise TypeError(
            f"{name}{look.frozen}, so that no result can be written into a new one; it must be of a library whose "
            f"arrays can be written, as numpy.asarray({name}) is"
        )
    return new


def _on_host(name: str, x: Any) -> Seen:
    look = seen(name, x)
    if look.device != "cpu":
        raise ValueError(
            f"{name} is a {type(x).__name__} on {device_name(look)}, and its library offers no way to make a new array "
            f"there; it must have an array namespace (__array_namespace__), or the call must be one in place"
        )
    return look


def _numpy_dtype(name: str, dtype: Any) -> np.dtype:
    if dtype == "bfloat16":
        try:
            return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        except ModuleNotFoundError:
            raise TypeError(
                f"{name} is bfloat16, for which NumPy needs ml_dtypes to hold the result: pip install ml_dtypes, or "
                f"call in place"
            ) from None
    return np.dtype(dtype)
