# SPDX-License-Identifier: Apache-2.0
"""Integers of other libraries as arguments."""

from __future__ import annotations

import operator
from typing import Any


def as_int(value: Any) -> Any:
    """Return the int of a value with ``__index__``, such as NumPy's integers.

    Any other value is returned unchanged, including bools of every library: the check that follows rejects it by name.
    """
    if isinstance(value, int) or not hasattr(type(value), "__index__") or "bool" in str(getattr(value, "dtype", "")):
        return value
    try:
        return operator.index(value)
    except TypeError:  # a float array, or an array of several elements
        return value
