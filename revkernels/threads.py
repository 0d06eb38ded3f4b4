# SPDX-License-Identifier: Apache-2.0
"""The number of host threads for arrays of libraries that have no such setting."""

from __future__ import annotations

_LARGEST = 4096


def set_num_threads(number: int | None) -> None:
    """Set the host threads for NumPy arrays and other exporters, in all Python threads; None resets the default.

    The default is OpenMP's: ``OMP_NUM_THREADS`` as it was when the process started, else the cores that the process may
    use. Torch tensors always use ``torch.get_num_threads()``. Results never depend on the number, and small arrays use
    one thread in any case.

    Raises:
        TypeError: ``number`` is not an int.
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
    """Return the number last given to `set_num_threads`; None means OpenMP's default."""
    from revkernels import _native

    return _native.threads() or None
