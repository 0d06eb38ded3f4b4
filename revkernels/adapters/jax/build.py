# SPDX-License-Identifier: Apache-2.0
"""The handlers of the custom calls: compiled at first use against the installed jaxlib, cached, loaded.

XLA's FFI is a set of C++ headers in jaxlib whose structures may change between jaxlib versions. So the handlers cannot
be in revkernels' own wheel, which serves every framework: they are source files beside this one, and one run of the
machine's C++ compiler (a few seconds) builds a library from them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jaxlib

from revkernels import native
from revkernels.errors import BackendError

__all__ = ["KERNELS", "cache_folder", "load"]

#: The handlers, as handlers.cpp names them.
KERNELS = ("couple", "reverse_step", "accumulate", "norm_act", "norm_act_backward")

_HERE = Path(__file__).parent
_SOURCES = ("handlers.cpp", "call.h", "threads.h")
_FLAGS = ("-std=c++17", "-O2", "-DNDEBUG", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")
_COMPILERS = ("c++", "g++", "clang++")

_lock = threading.Lock()
_loaded: ctypes.CDLL | None = None


def load() -> None:
    """Compile the handlers if needed, load them, and register them with XLA.

    Every function here does this at its first call. Call it yourself if a compiler is available only while an image is
    built, or before running an exported computation.

    Raises:
        BackendError: there is no C++ compiler, it fails, or revkernels' own library is missing; the message has the
            reason and what to install.
    """
    global _loaded
    if _loaded is not None:
        return
    with _lock:
        if _loaded is None:
            library = _open(_compiled())
            for kernel in KERNELS:
                for place, xla_platform in (("cpu", "cpu"), ("cuda", "CUDA")):
                    handler = jax.ffi.pycapsule(getattr(library, f"revk_jax_{kernel}_{place}"))
                    jax.ffi.register_ffi_target(f"revkernels_{kernel}", handler, platform=xla_platform)
            _loaded = library


def cache_folder() -> Path:
    """Return the folder of compiled handlers: ``$XDG_CACHE_HOME/revkernels/jax``, by default under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "revkernels" / "jax"


def _compiled() -> Path:
    """The compiled handlers, from the cache or newly built."""
    c_library = _c_library()
    compiler = _compiler()
    command = [
        *compiler,
        *_FLAGS,
        # -isystem: no warnings about these headers
        *("-isystem", jax.ffi.include_dir()),
        *("-I", native.include_dir()),
        str(_HERE / "handlers.cpp"),
        str(c_library),
        f"-Wl,-rpath,{c_library.parent}",
    ]
    folder = cache_folder()
    path = folder / f"handlers-jaxlib{jaxlib.__version__}-{_key(command)}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            _compile([*command, "-o", str(made)])
            made.replace(path)  # atomic: another process sees all of it or nothing
    except OSError as error:
        raise BackendError(
            f"the handlers for JAX cannot be kept in {folder}: {error}. Set XDG_CACHE_HOME to a folder that is writable"
        ) from error
    return path


def _c_library() -> Path:
    reason = native.missing("cpu")
    package = Path(native.__file__).parent
    found = sorted(package.glob("librevkernels.*"))
    if reason is None and not found:
        reason = f"there is no librevkernels in {package}"
    if reason is not None:
        raise BackendError(f"the kernels cannot run under JAX: {reason}")
    return found[0]


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [[name] for name in _COMPILERS]:
        program = shutil.which(words[0])
        if program is not None:
            return [program, *words[1:]]
    raise BackendError(
        f"the kernels under JAX are compiled at first use, and there is no C++ compiler "
        f"({' '.join(named) or ', '.join(_COMPILERS)} not found). Install one (Debian, Ubuntu: apt-get install g++; "
        "conda: conda install cxx-compiler) or name one in CXX"
    )


def _key(command: list[str]) -> str:
    """A hash of all that the library is built from: sources, headers (jaxlib's by version), compiler, flags, paths."""
    header = Path(native.include_dir()) / "revkernels" / "revkernels.h"
    parts = [jaxlib.__version__, platform.machine(), str(native.version()), *command]
    contents = [part.encode() for part in parts] + [(_HERE / name).read_bytes() for name in _SOURCES]
    digest = hashlib.sha256()
    for content in [*contents, header.read_bytes()]:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines[-3:]
        raise BackendError(
            f"the handlers for JAX do not compile with jaxlib {jaxlib.__version__} ({shlex.join(command)}): "
            + ("\n".join(errors[:3]) or f"the compiler ended with status {done.returncode} and said nothing")
        )


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(
            f"the handlers for JAX do not load: {error}. If {path} comes from another machine, delete it"
        ) from error
