# SPDX-License-Identifier: Apache-2.0
"""Whole numbers of other libraries among the arguments."""

from __future__ import annotations

import operator
from typing import Any


def as_int(value: Any) -> Any:
    """Return the int that a value stands for by its ``__index__``, as NumPy's integers do.

    Any other is returned as it is, bools of every library among them: the check that follows refuses it by its name.
    """
    if isinstance(value, int) or not hasattr(type(value), "__index__") or "bool" in str(getattr(value, "dtype", "")):
        return value
    try:
        return operator.index(value)
    except TypeError:  # an array of floats, or of several
        return value
