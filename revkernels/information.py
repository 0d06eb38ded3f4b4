# SPDX-License-Identifier: Apache-2.0
"""Information about this installation."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from revkernels._version import __version__
from revkernels.backends import DEFAULTS, describe


def info() -> dict[str, Any]:
    """Return version, backends (with the reason for a missing one), compiled architectures and library versions.

    Keys: ``version``, ``python``, ``platform``, ``libraries`` (name to version or None), ``backends`` (name to
    ``{"available", "reason", "about"}``), ``defaults`` (device to the backends tried in order), ``cpu_isa`` (the vector
    width in use), ``cuda_architectures`` (as compiled; empty without CUDA). Imports neither torch nor triton.
    """
    from revkernels import native

    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in ("numpy", "torch", "triton", "jax", "cupy")},
        "backends": describe(),
        "defaults": {device: list(names) for device, names in DEFAULTS.items()},
        "cpu_isa": native.cpu_isa(),
        "cuda_architectures": native.cuda_architectures(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
