# SPDX-License-Identifier: Apache-2.0
"""The backends: what each supports, why one is missing, and how one is chosen.

The order of choice: the call's ``backend=``, the innermost `use_backend`, the environment variable
``REVKERNELS_BACKEND``, then the first in `DEFAULTS` that is available for the array's device. A named backend is used
or rejected with the reason, never replaced.

The environment variable is read when arrays of a library first meet a device, and the choice is cached: a lookup at
every call would cost a third of a small kernel. To change the choice while a program runs, use `use_backend`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from revkernels.arrays import device_kind, kind_of, not_an_array
from revkernels.errors import BackendError

#: The functions that every backend's module defines and `ops` calls.
KERNELS = (
    "couple",
    "uncouple",
    "reverse_step",
    "accumulate",
    "norm_act",
    "couple_norm_act",
    "uncouple_norm_act",
    "norm_act_backward",
)

#: For each device, the backends in order of preference. A device not listed uses "eager".
DEFAULTS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of every kernel.

    Attributes:
        name: the value of `backend=`.
        module: defines the functions in `KERNELS`; ``missing(name)``, why it cannot run here or None; and
            ``CHECKS_OPERANDS``, whether its kernels check their operands or leave that to `ops`.
        devices: the devices whose arrays it supports; None is all.
        kinds: the kinds of arrays it supports, as in `revkernels.arrays`.
        about: one line for people.
    """

    name: str
    module: str
    devices: tuple[str, ...] | None
    kinds: tuple[str, ...]
    about: str

    def load(self) -> Any:
        """Return the module that holds the kernels."""
        return importlib.import_module(self.module)

    def missing(self) -> str | None:
        """Return why this backend cannot run here, or None if it can."""
        reason: str | None = self.load().missing(self.name)
        return reason

    def refuses(self, kind: str, device: str) -> str | None:
        """Return why this backend does not support such an array, or None if it does."""
        if kind not in self.kinds:
            return f"it takes {_words(self.kinds)} arrays, not {kind}"
        if self.devices is None or device in self.devices:
            return None
        extra = ""
        if self.name == "triton":
            if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
                return None
            extra = ", and CPU tensors under TRITON_INTERPRET=1"
        return f"it takes arrays on {_words(self.devices)}{extra}, not on {device}"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "revkernels.reference.backend", None, ("torch", "numpy"), "the NumPy oracle, slow"),
        Backend("eager", "revkernels.eager", None, ("torch",), "plain torch calls, the unfused baseline"),
        Backend(
            "cpu",
            "revkernels.native",
            ("cpu",),
            ("torch", "numpy", "dlpack", "buffer"),
            "C++, OpenMP, AVX2 and AVX-512",
        ),
        Backend("cuda", "revkernels.native", ("cuda",), ("torch", "cupy", "dlpack"), "CUDA C++"),
        Backend("triton", "revkernels.triton_kernels.backend", ("cuda",), ("torch",), "Triton"),
    )
}

_chosen: ContextVar[str | None] = ContextVar("revkernels_backend", default=None)
_cache: dict[tuple[str, str, str | None], Any] = {}


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Use one backend for every call inside the ``with``, in this thread or task; None restores the default choice.

    Raises:
        BackendError: the name is unknown, or the backend cannot run here.
    """
    if name is not None:
        require(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def require(name: Any, source: str = "backend") -> Backend:
    """Return the backend of that name, or raise BackendError saying which exist and why the others are missing."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise BackendError(f"{source} is {name!r}; it must be one of: {_listing()}")
    reason = BACKENDS[name].missing()
    if reason is not None:
        raise BackendError(f"{source}={name!r} cannot run here: {reason}. Available: {_listing()}")
    return BACKENDS[name]


def select(array: Any, name: str | None = None, argument: str = "x") -> Any:
    """Return the module whose kernels support ``array``.

    Raises:
        TypeError: ``array`` is not an array that any backend knows.
        BackendError: the backend named, or every default one, does not support it; the message says why.
    """
    kind = kind_of(array)
    if kind is None:
        raise not_an_array(argument, array)
    device = "cpu" if kind == "numpy" else device_kind(argument, array)
    if name is None:
        name = _chosen.get()
    if name is not None and not isinstance(name, str):
        require(name)
    found = _cache.get((kind, device, name))
    if found is None:
        found = _cache[(kind, device, name)] = _choose(kind, device, name)
    return found


def describe() -> dict[str, dict[str, Any]]:
    """Return, for every backend, whether it is available, and if not why."""
    table = {}
    for name, backend in BACKENDS.items():
        reason = backend.missing()
        table[name] = {"available": reason is None, "reason": reason, "about": backend.about}
    return table


def _choose(kind: str, device: str, name: str | None) -> Any:
    source = "backend"
    if name is None:
        name, source = os.environ.get("REVKERNELS_BACKEND") or None, "REVKERNELS_BACKEND"
    if name is not None:
        backend = require(name, source)
        reason = backend.refuses(kind, device)
        if reason is not None:
            raise BackendError(f"{source}={name!r} cannot take this array: {reason}. Available: {_listing()}")
        return backend.load()
    reasons = []
    for candidate in DEFAULTS.get(device, ("eager",)):
        reason = BACKENDS[candidate].refuses(kind, device) or BACKENDS[candidate].missing()
        if reason is None:
            return BACKENDS[candidate].load()
        reasons.append(f"{candidate}: {reason}")
    raise BackendError(f"no backend for {kind} arrays on {device} ({'; '.join(reasons)}). Available: {_listing()}")


def _words(names: tuple[str, ...]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _listing() -> str:
    return "; ".join(
        name if entry["available"] else f"{name} (missing: {entry['reason']})" for name, entry in describe().items()
    )
