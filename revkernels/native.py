# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels: C++ and OpenMP for "cpu", CUDA C++ for "cuda".

The kernels (`backends.KERNELS`) are the extension's functions without a Python wrapper: on small arrays a Python frame
costs as much as the kernel. They take torch tensors and NumPy arrays of any rank, check everything before they write,
and call the C library (``revkernels/include/revkernels/revkernels.h``) with the tensor's CUDA stream or torch's thread
count. Torch is used if it is already imported, and never imported from here.

`module_tree` and `is_module_tree` are not kernels: with them `autograd.state.known_branch` tests whether a torch
module's layers are unchanged.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from revkernels.backends import KERNELS
from revkernels.errors import BackendError

__all__ = [
    "ABI_VERSION",
    "accumulate",
    "cmake_dir",
    "couple",
    "couple_norm_act",
    "cpu_isa",
    "cuda_architectures",
    "include_dir",
    "is_module_tree",
    "library",
    "missing",
    "module_tree",
    "norm_act",
    "norm_act_backward",
    "pkgconfig_dir",
    "reverse_step",
    "uncouple",
    "uncouple_norm_act",
    "version",
]

CHECKS_OPERANDS = True

#: REVK_ABI_VERSION of the C library that this package is built with; the library's file name ends in it.
ABI_VERSION = 1

_broken: str | None = None
try:
    from revkernels._native import (
        accumulate,
        couple,
        couple_norm_act,
        is_module_tree,
        module_tree,
        norm_act,
        norm_act_backward,
        reverse_step,
        uncouple,
        uncouple_norm_act,
    )
except ImportError as error:  # the package stays usable: other backends run, and missing() tells the reason
    if isinstance(error, ModuleNotFoundError):
        _broken = "the compiled extension is not there: build it with `pip install .`"
    else:
        _broken = f"the compiled extension does not load: {error}"
        if "libgomp" in str(error):  # wheels do not bundle it: a second copy would be a second thread pool
            _broken += " (GCC's OpenMP library; Debian, Ubuntu: apt install libgomp1; Fedora: dnf install libgomp)"

    def _refuse(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError(str(_broken))

    globals().update(dict.fromkeys(KERNELS, _refuse))

    def module_tree(branch: Any, rows: Any) -> Any:
        return None

    def is_module_tree(branch: Any, rows: Any, modules: Any, children: Any) -> bool:
        return False


def missing(name: str = "cpu") -> str | None:
    """Return why the backend "cpu" or "cuda" cannot run here, or None if it can."""
    if _broken is not None:
        return _broken
    if name == "cpu":
        return None
    from revkernels import _native

    reason: str | None = _native.cuda_missing()
    return reason


def version() -> str | None:
    """Return the C library's version, or None if the extension is missing."""
    if _broken is not None:
        return None
    from revkernels import _native

    return str(_native.version())


def cpu_isa() -> str | None:
    """Return the instruction set in use: "avx512", "avx2" or "baseline"; None if the extension is missing."""
    if _broken is not None:
        return None
    from revkernels import _native

    return str(_native.cpu_isa())


def cuda_architectures() -> list[str]:
    """Return the architectures compiled in, such as ["80", "90", "100", "ptx100"]; [] without CUDA."""
    if _broken is not None:
        return []
    from revkernels import _native

    return [arch for arch in _native.cuda_archs().split(";") if arch]


def include_dir() -> str:
    """Return the folder of ``revkernels/revkernels.h``, as an absolute path. Raises BackendError if it is not built."""
    return _built("include")


def cmake_dir() -> str:
    """Return the value for ``-Drevkernels_DIR=``, for CMake's ``find_package(revkernels CONFIG)`` to find this package.

    An absolute path. Raises BackendError if it is not built.
    """
    return _built("cmake")


def pkgconfig_dir() -> str:
    """Return the value for ``PKG_CONFIG_PATH``, an absolute path. Raises BackendError if it is not built."""
    return _built("pkgconfig")


def library() -> str:
    """Return the path of the C library, for linkers, ctypes and dlopen; an absolute path.

    Raises BackendError if it is not built. Does not check that it loads: see `missing`.
    """
    suffix = f"{ABI_VERSION}.dylib" if sys.platform == "darwin" else f"so.{ABI_VERSION}"
    return _built(f"librevkernels.{suffix}")


def _built(name: str) -> str:
    path = Path(__file__).absolute().parent / name
    if not path.exists():
        raise BackendError(f"there is no {path}: the compiled extension is not built; `pip install .` builds it")
    return str(path)


def _torch_stream(device: int) -> int:
    """Return the handle of torch's current stream on a device. The extension calls this once per CUDA call."""
    torch = sys.modules["torch"]
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # as torch's own compiler; saves a microsecond
    return int(raw(device) if raw is not None else torch.cuda.current_stream(device).cuda_stream)


def _cupy_stream(device: int) -> int:
    """Return the handle of CuPy's current stream on a device."""
    cupy = sys.modules["cupy"]
    with cupy.cuda.Device(device):  # CuPy's current stream is per device, and only new versions take its index
        return int(cupy.cuda.get_current_stream().ptr)


def _torch_workspace(size: int, device: int) -> Any:
    """Return a tensor of that many bytes on a CUDA device, for a norm's partial results."""
    torch = sys.modules["torch"]
    return torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")


def _workspace(name: str, array: Any, size: int, device: int) -> Any:
    """Return an array of that many bytes on a CUDA device, from the library of ``array``."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        with cupy.cuda.Device(device):
            return cupy.empty(size, cupy.uint8)
    if not hasattr(array, "__array_namespace__"):
        raise ValueError(
            f"{name} is a {type(array).__name__}; for a norm on a CUDA device it must have an array namespace "
            f"(__array_namespace__), whose empty() makes memory for partial results"
        )
    library = array.__array_namespace__()
    return library.empty(size, dtype=library.uint8, device=array.device)
