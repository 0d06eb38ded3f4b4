# SPDX-License-Identifier: Apache-2.0
"""The environment stamp of every result: what ran, on what, when."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from revkernels import native
from revkernels._version import __version__
from revkernels.threads import get_num_threads

__all__ = ["cpu_model", "device_model", "environment"]


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what is needed to interpret a result later.

    Keys: ``revkernels`` (version), ``commit`` (None outside a checkout; ends in "+changes" if tracked files differ),
    ``device`` (model of ``device``), ``cpu`` (model), ``threads``, ``system``, ``python``, ``numpy``, ``torch``,
    ``triton`` (versions or None), ``date`` (UTC, ISO 8601). No host name, user or path. Does not import torch.
    """
    return {
        "revkernels": __version__,
        "commit": commit(),
        "device": device_model(device),
        "cpu": cpu_model(),
        "threads": threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("numpy", "torch", "triton")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_model(device: str) -> str:
    """Return the model of "cpu" or "cuda[:n]". The latter needs torch or JAX to be imported already."""
    if device.partition(":")[0] != "cuda":
        return cpu_model()
    if "torch" not in sys.modules:
        return sys.modules["jax"].devices("cuda")[0].device_kind
    return sys.modules["torch"].cuda.get_device_name(device)


def cpu_model() -> str:
    """Return the processor's name as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def threads() -> int:
    """Return how many threads the CPU kernels use: torch's number if torch is loaded, else the number set.

    Set by `revkernels.set_num_threads`, by ``OMP_NUM_THREADS``, or else by the cores allowed.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        return torch.get_num_threads()
    told = get_num_threads() if native.missing() is None else None
    if told is not None:
        return told
    variable = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # further numbers are for nested regions
    if variable.isdigit() and int(variable) > 0:
        return int(variable)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version_of(distribution: str) -> str | None:
    """Return an installed distribution's version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit this package runs from, or None if it does not run from a checkout."""
    here = Path(__file__)
    # Only if this very file is tracked: an installed copy inside another checkout is not part of it.
    if _git(here, "ls-files", "--error-unmatch", here.name) is None:
        return None
    revision = _git(here, "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    return revision + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")


def _git(file: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=file.parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
