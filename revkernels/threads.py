# SPDX-License-Identifier: Apache-2.0
"""How many host threads a kernel uses on arrays of libraries that have no such setting of their own."""

from __future__ import annotations

_LARGEST = 4096


def set_num_threads(number: int | None) -> None:
    """Set the host threads for NumPy arrays and other exporters, in all Python threads; None is the default again.

    The default is OpenMP's: the variable ``OMP_NUM_THREADS`` as it was when the process started, else the cores that
    the process may use. Torch tensors always take ``torch.get_num_threads()``. Results never depend on the number, and
    small arrays take one thread whatever it is.

    Raises:
        TypeError: ``number`` is no int.
        ValueError: it is not 1 to 4096.
    """
    from revkernels import _native
    from revkernels.checks import check_int
    from revkernels.integers import as_int

    if number is None:
        _native.set_threads(0)
        return
    number = as_int(number)
    check_int("number", number, "an int or None")
    if not 1 <= number <= _LARGEST:
        raise ValueError(f"number is {number}; it must be 1 to {_LARGEST}, or None")
    _native.set_threads(number)


def get_num_threads() -> int | None:
    """Return what `set_num_threads` was told last; None is OpenMP's default."""
    from revkernels import _native

    return _native.threads() or None
