# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments while JAX traces: shapes and dtypes are known, values are not."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from revkernels.arrays import FLOATS, INT16
from revkernels.coupling import GRID_EXPONENTS, Coupling
from revkernels.errors import BackendError

__all__ = ["arrays_of", "check_backend", "check_float", "check_same_shape", "grid_exponent_of", "is_array"]

#: "kernels" are this library's; "xla" are the same formulas in jax.numpy, which XLA may fuse.
BACKENDS = ("kernels", "xla")


def is_array(value: Any) -> bool:
    """Whether ``value`` is a JAX array, traced or not, or a NumPy array."""
    return isinstance(value, jax.Array | np.ndarray)


def arrays_of(**named: Any) -> dict[str, jax.Array]:
    """Return the arguments as JAX arrays by name; TypeError if one is not an array, or not supported by JAX."""
    for name, value in named.items():
        if not is_array(value):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a jax.Array or a numpy.ndarray")
        if isinstance(value, np.ndarray) and not value.dtype.isnative:
            raise TypeError(f"{name} is byte-swapped ({value.dtype.str}); it must be in the machine's byte order")
    return {name: jax.numpy.asarray(value) for name, value in named.items()}


def check_float(named: dict[str, Any], stream: str | None = None) -> None:
    """Raise TypeError for an array that is not floating point; the one called ``stream`` may be int16."""
    for name, array in named.items():
        if array.dtype.name not in FLOATS and not (name == stream and array.dtype.name == INT16):
            also = " (or int16, with a grid_exponent)" if name == stream else ""
            raise TypeError(f"{name} is {array.dtype.name}; it must be one of {', '.join(FLOATS)}{also}")


def check_same_shape(named: dict[str, Any]) -> None:
    """Raise ValueError if shapes differ; nothing is broadcast."""
    (first, like), *others = named.items()
    for name, array in others:
        if array.shape != like.shape:
            raise ValueError(f"{name} has shape {array.shape}, {first} has {like.shape}: they must be equal")


def grid_exponent_of(coupling: Any, stream: str, dtype: Any) -> int | None:
    """Return the coupling's grid_exponent; reject its other options, and an exponent that does not fit the stream."""
    if coupling is None:
        coupling = Coupling()
    if not isinstance(coupling, Coupling):
        raise TypeError(f"coupling is a {type(coupling).__name__}; it must be a revkernels.Coupling or None")
    for name, instead in (
        ("channel_scale", "multiply f by it"),
        ("sample_scale", "multiply f by it"),
        ("checksum", "results are returned under JAX, not written to arguments"),
        ("amax", "results are returned under JAX, not written to arguments"),
        ("value", "the number is stream * 2.0**-grid_exponent"),
    ):
        if getattr(coupling, name) is not None:
            raise ValueError(f"{name} is given; under JAX a coupling takes grid_exponent alone ({instead})")
    exponent = coupling.grid_exponent
    if exponent is None:
        if dtype == INT16:
            raise ValueError(f"{stream} is int16, which needs a coupling with a grid_exponent")
        return None
    if isinstance(exponent, bool) or not isinstance(exponent, int):
        raise TypeError(f"grid_exponent is a {type(exponent).__name__}; it must be an int or None")
    if exponent not in GRID_EXPONENTS:
        raise ValueError(f"grid_exponent is {exponent}; it must be {GRID_EXPONENTS[0]} to {GRID_EXPONENTS[-1]}")
    return exponent


def check_backend(backend: Any) -> bool:
    """Return whether ``backend`` means the kernels; BackendError for an unknown name."""
    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; under JAX it must be {' or '.join(map(repr, BACKENDS))}, or None")
    return backend != "xla"
