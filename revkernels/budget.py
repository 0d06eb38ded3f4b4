# SPDX-License-Identifier: Apache-2.0
"""A memory budget: how much of what could be reconstructed may be stored instead."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from revkernels.integers import as_int

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{prefix}i": 2 ** (10 * power) for power, prefix in enumerate("kmgt", 1)}
_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(?:(%)|([kmgt]?i?)b)\s*", re.IGNORECASE)


class MemoryBudget:
    """``activations=MemoryBudget(amount)``: store what saves most time within a peak of memory, reconstruct the rest.

    The peak is that of the live bytes from the entry of the first chain to the end of all chains' backward. It includes
    their inputs and outputs, but not the gradients of parameters or anything outside the chains. It counts what
    operators of the branches allocate internally, as far as the measured step sees it (not on the host while a profiler
    runs; see docs/planner.md). The first step with inputs of a new shape reconstructs everything and measures; from the
    second step on the plan applies (`net.plan()` prints it). Chains with the same budget object share it. Plans rest on
    measured times: two runs may plan differently, and then differ by the rounding of what they reconstruct
    (`coupling="exact"` has none).

    Args:
        amount: an int is bytes; a float from 0 to 1 is the share of the way from reconstructing to storing; a string
            has a unit, "2GiB", "500 MB", or is such a share, "25%". 0 of any kind reconstructs, infinity stores.
        offload: on a GPU, stored tensors may also wait in pinned host memory, if the transfers are faster than
            reconstructing.

    Raises:
        TypeError, ValueError: amount is none of these. In a step, a ValueError for bytes that even reconstructing
            exceeds; it names the smallest possible amount.
    """

    __slots__ = ("__weakref__", "amount", "bytes", "offload", "planner", "share")

    def __init__(self, amount: int | float | str, *, offload: bool = False) -> None:
        if not isinstance(offload, bool):
            raise TypeError(f"offload is a {type(offload).__name__}; it must be a bool")
        amount = as_int(amount)
        self.amount, self.offload = amount, offload
        self.bytes: float | None = None
        self.share: float | None = None
        self.planner: Any = None  # a `revkernels.autograd.planning.planner` object, made in the first step
        value = _parsed(amount)
        if isinstance(value, float):
            self.share = value
        else:
            self.bytes = value

    @property
    def stores(self) -> bool:
        """Whether everything may be stored, for any step."""
        return self.share == math.inf

    @property
    def reconstructs(self) -> bool:
        """Whether nothing may be stored, for any step."""
        return self.share == 0 or self.bytes == 0

    def limit(self, reconstructing: float, storing: float) -> float:
        """The peak in bytes, given the peaks of steps that reconstruct everything and that store everything."""
        if self.reconstructs:
            return reconstructing
        if self.bytes is not None:
            return self.bytes
        return math.inf if self.stores else reconstructing + self.share * (storing - reconstructing)  # type: ignore[operator]

    def __repr__(self) -> str:
        return f"MemoryBudget({self.amount!r}{', offload=True' if self.offload else ''})"

    def __reduce__(self) -> Any:  # a copy measures for itself
        return functools.partial(MemoryBudget, offload=self.offload), (self.amount,)


def _parsed(amount: Any) -> int | float:
    """Bytes as an int, a share as a float."""
    if isinstance(amount, bool) or not isinstance(amount, (int, float, str)):
        raise TypeError(f"amount is a {type(amount).__name__}; it must be an int (bytes), a float (share) or a string")
    if isinstance(amount, str):
        found = _AMOUNT.fullmatch(amount)
        if found is None and amount.strip().startswith("-"):
            raise ValueError(f"amount is {amount!r}; a budget must not be negative")
        if found is None:
            raise ValueError(
                f"amount is {amount!r}; it must be a number with a unit (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB) or "
                f"with %, such as '2GiB' or '25%'"
            )
        number, percent, unit = found.groups()
        if percent is None:
            count = float(number) * _UNITS[unit.lower()]
            if count == math.inf:
                raise ValueError(f"amount is {amount!r}; it must be finite (float('inf') stores everything)")
            return round(count)
        amount = float(number) / 100
    if isinstance(amount, int):
        if amount < 0:
            raise ValueError(f"amount is {amount}; bytes must not be negative")
        return amount
    if not (0 <= amount <= 1 or amount == math.inf):
        raise ValueError(f"amount is {amount}; a share must be from 0 to 1 (bytes are given as an int)")
    return float(amount)


def words(count: float) -> str:
    """Bytes for people: '1.5 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError  # not reached
