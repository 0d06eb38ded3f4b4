# SPDX-License-Identifier: Apache-2.0
"""The bit-exact coupling: the storage of its streams, and their grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

from revkernels.integers import as_int

#: Bits below the sign: a stream is exact while |s| < 2^(bits - k).
BITS = {"float32": 24, "int16": 15}
#: The values of k for which 2^-k and 2^(bits - k) are normal float32 numbers.
EXPONENTS = {name: range(bits - 126, 127) for name, bits in BITS.items()}


@dataclass(frozen=True, slots=True)
class Exact:
    """``coupling=Exact(...)``: streams that the backward reconstructs bit for bit, at any depth.

        f' = rint(f * 2^k) * 2^-k        y = x + f'        x = y - f'

    Let x and f' be multiples of 2^-k. While |y| < 2^(24 - k), no float32 sum of them rounds, so y - f' is x, bit for
    bit. The input is rounded to the grid once (`net.to_grid`), -0 becomes 0, bfloat16 and float16 are widened. The
    gradient of rounding is taken as the identity. Every coupling also computes a checksum and the largest |y|: a
    recompute that differs, or a stream that leaves the range, raises `ReconstructionError`, which names the half-step.

    Attributes:
        storage: how streams are stored. "float32": range 2^(24 - k); "int16": fixed point, half the bytes, range
            2^(15 - k).
        k: the grid's exponent; None chooses it from the first batches and keeps it in the chain's state dict.

    Raises:
        ValueError, TypeError: the storage does not exist, or k is not an integer in its range.
    """

    storage: str = "float32"
    k: int | None = None

    def __post_init__(self) -> None:
        if self.storage not in BITS:
            raise ValueError(f"storage is {self.storage!r}; it must be {' or '.join(map(repr, BITS))}")
        if self.k is None:
            return
        object.__setattr__(self, "k", as_int(self.k))
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise TypeError(f"k is a {type(self.k).__name__}; it must be an int, or None")
        allowed = EXPONENTS[self.storage]
        if self.k not in allowed:
            raise ValueError(
                f"k is {self.k}; for {self.storage} streams it must be from {allowed.start} to {allowed.stop - 1}"
            )


def limit(storage: str, k: int) -> float:
    """The bound on streams, exclusive: 2^(bits - k)."""
    return math.ldexp(1.0, BITS[storage] - k)


def exponent_for(storage: str, largest: float, spare_bits: int) -> int:
    """The finest k for which ``largest`` times 2^spare_bits stays in range. A stream of zeros counts as 1."""
    _, above = math.frexp(largest or 1.0)  # largest < 2^above
    k = BITS[storage] - spare_bits - above
    allowed = EXPONENTS[storage]
    return min(max(k, allowed.start), allowed.stop - 1)
