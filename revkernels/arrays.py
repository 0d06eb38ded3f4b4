# SPDX-License-Identifier: Apache-2.0
"""Distinguishes arrays without importing the libraries that made them.

An array's kind is the first that fits: "torch" for a torch.Tensor, "numpy" for a numpy.ndarray, "cupy" for a
cupy.ndarray, "dlpack" for any other object with ``__dlpack__`` and ``__dlpack_device__``, "buffer" for any other
exporter of Python's buffer protocol. In one call torch tensors, and CuPy arrays, go only with their own kind, because
each of these libraries orders its work on its own stream; all others may be mixed on one device.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

#: The element types that every kernel supports.
FLOATS = ("float64", "float32", "bfloat16", "float16")
#: A fixed-point stream, which the couplings also support.
INT16 = "int16"

#: DLPack's device types by device name. Pinned memory is host memory; managed memory belongs to its device.
_DLPACK_DEVICES = {
    1: "cpu",
    2: "cuda",
    3: "cpu",
    4: "opencl",
    7: "vulkan",
    8: "metal",
    9: "vpi",
    10: "rocm",
    11: "rocm_host",
    12: "ext_dev",
    13: "cuda",
    14: "oneapi",
    15: "webgpu",
    16: "hexagon",
    17: "maia",
}


class Seen(NamedTuple):
    """The description that a "dlpack" or "buffer" array exports, for the checks made in Python.

    Attributes:
        address: of the first element; 0 if there is none.
        shape: sizes.
        strides: in elements.
        dtype: its plain name.
        device: "cpu", "cuda:0" ...
        frozen: why it must not be written, to follow its name in a message; None if it may be written.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str
    frozen: str | None


_KINDS: dict[type, str] = {np.ndarray: "numpy", Seen: "seen"}


def kind_of(array: Any) -> str | None:
    """Return "torch", "numpy", "cupy", "dlpack", "buffer", "seen" (see `seen`), or None if it is not an array."""
    kind = _KINDS.get(type(array))
    if kind is None:
        kind = _first_fit(array)
        if kind is not None:
            _KINDS[type(array)] = kind
    return kind


def _first_fit(array: Any) -> str | None:
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(array, torch.Tensor):
        return "torch"
    if isinstance(array, np.ndarray):
        return "numpy"
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        return "cupy"
    if hasattr(type(array), "__dlpack__") and hasattr(type(array), "__dlpack_device__"):
        return "dlpack"
    try:
        memoryview(array)
    except TypeError:
        return None
    except (BufferError, ValueError):  # exports buffers, but not now: the reader will tell the reason
        pass
    return "buffer"


def not_an_array(name: str, given: Any) -> TypeError:
    """Return the error for an argument that is not an array."""
    kind = type(given).__name__
    hint = ": a capsule serves once, so pass the array that makes it" if kind == "PyCapsule" else ""
    return TypeError(
        f"{name} is a {kind}; it must be a torch.Tensor or a numpy.ndarray, or export DLPack or a buffer{hint}"
    )


def family_of(array: Any) -> str | None:
    """Return "torch" or "cupy", which mix with no other library in a call; "any" for other arrays; None for none."""
    kind = kind_of(array)
    return "any" if kind in ("numpy", "dlpack", "buffer", "seen") else kind


def seen(name: str, array: Any) -> Any:
    """Return the array itself if it has a shape and dtype, else the description from its export (`Seen`).

    Raises:
        TypeError: the export fails, or its dtype is not supported by any kernel.
        ValueError: the memory cannot be addressed; the message begins with ``name``.
    """
    if kind_of(array) not in ("dlpack", "buffer"):
        return array
    from revkernels import _native

    return Seen(*_native.describe(name, array))


def device_kind(name: str, array: Any) -> str:
    """Return "cpu", "cuda" ..., the kind of device that any array is on.

    Raises:
        TypeError: its ``__dlpack_device__`` does not return a device.
    """
    kind = kind_of(array)
    if kind == "torch":
        return "cpu" if array.is_cpu else array.device.type
    if kind == "cupy":
        return "rocm" if sys.modules["cupy"].cuda.runtime.is_hip else "cuda"
    if kind != "dlpack":
        return "cpu"
    try:
        device_type = int(array.__dlpack_device__()[0])
    except Exception as error:
        raise TypeError(
            f"{name} is a {type(array).__name__} whose __dlpack_device__ failed: {type(error).__name__}: {error}"
        ) from error
    return _DLPACK_DEVICES.get(device_type, f"DLPack's device type {device_type}")


_torch_names: dict[Any, str] = {}


def dtype_name(array: Any) -> str:
    """Return the dtype's plain name: "float32", "bfloat16", "int64" ..."""
    array = seen("array", array)
    if kind_of(array) == "torch":
        name = _torch_names.get(array.dtype)
        if name is None:
            name = _torch_names[array.dtype] = str(array.dtype).removeprefix("torch.")
        return name
    return array.dtype if isinstance(array, Seen) else array.dtype.name


def device_name(array: Any) -> str:
    """Return "cpu", "cuda:0" ...; NumPy arrays are on "cpu"."""
    array = seen("array", array)
    kind = kind_of(array)
    if kind == "cupy":
        return f"cuda:{array.device.id}"
    if kind == "seen":
        return array.device
    return str(array.device) if kind == "torch" else "cpu"


def compute_dtype(*arrays: Any) -> str:
    """Return the type of the arithmetic: float64 if any operand is float64, else float32."""
    for array in arrays:
        if dtype_name(array) == "float64":
            return "float64"
    return "float32"


def itemsize_of(array: Any) -> int:
    """Return the bytes of one element."""
    if isinstance(array, Seen):
        return {"float64": 8, "int64": 8, "float32": 4}.get(array.dtype, 2)
    return array.element_size() if kind_of(array) == "torch" else array.itemsize


def strides_of(array: Any) -> tuple[int, ...]:
    """Return strides counted in elements."""
    array = seen("array", array)
    if isinstance(array, Seen):
        return array.strides
    if kind_of(array) == "torch":
        return tuple(array.stride())
    return tuple(s // array.itemsize for s in array.strides)


def address_of(array: Any) -> int:
    """Return the address of the first element."""
    kind = kind_of(array)
    if kind == "torch":
        return array.data_ptr()
    if kind == "cupy":
        return array.data.ptr
    return array.address if kind == "seen" else array.__array_interface__["data"][0]


def memory_order(array: Any) -> tuple[int, ...]:
    """Return the dimensions from the outermost in memory to the innermost; ties keep their order."""
    strides = strides_of(array)
    return tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))
