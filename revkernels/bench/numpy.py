# SPDX-License-Identifier: Apache-2.0
"""The four kernels on NumPy arrays against the NumPy expressions they replace: beyond the cache, and call cost.

NumPy adds on one thread, and half types through float32, one element at a time; written as ``y = x + f`` it also
allocates a new array. Each expression is measured in place (``np.add(x, f, out=x)``) and with temporaries, against the
kernel in place. Needs no torch; bfloat16 needs ml_dtypes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from revkernels import ops
from revkernels.bench.clocks import last_level_cache
from revkernels.bench.harness import Goal, Suite, Trial, rotation

__all__ = ["SUITE", "Setup"]

SUITE = Suite("numpy")
_DTYPES = ("float32", "float64", "float16", *(("bfloat16",) if importlib.util.find_spec("ml_dtypes") else ()))
_CASES = (*_DTYPES, *(f"{dtype}, temporaries" for dtype in _DTYPES))
_IN_PLACE, _WITH_TEMPORARIES = 0.75, 0.6  # of NumPy's time, with two threads
_SMALL, _CALLS = 1_000, 1_000  # elements, and calls per sample


@dataclass(frozen=True)
class Setup:
    """Size and number of threads.

    Attributes:
        megabytes: of the stream; 2^20 bytes each.
        threads: of the kernels.
    """

    megabytes: int = 64
    threads: int = 2

    def operands(self, *dtypes: str) -> list[tuple[np.ndarray, ...]]:
        """Return sets of random arrays of these dtypes and equal shape, enough to rotate past the cache."""
        sizes = [_dtype(name).itemsize for name in dtypes]
        elements = (self.megabytes << 20) // sizes[0]
        count = rotation(elements * sum(sizes), last_level_cache())
        return [tuple(_random(elements, name) for name in dtypes) for _ in range(count)]

    def trial(
        self,
        case: str,
        kernel: Callable[..., Any],
        in_place: Callable[..., Any],
        with_temporaries: Callable[..., Any],
        *dtypes: str,
    ) -> Trial:
        """Return the expression against the kernel; each written operand is also read."""
        temporaries = case.endswith("temporaries")
        operands = self.operands(*dtypes)
        moved = sum(array.nbytes for array in operands[0]) + sum(array.nbytes for array in operands[0][::2])
        past = self.megabytes << 20 > last_level_cache()
        goal = Goal("ratio", _WITH_TEMPORARIES if temporaries else _IN_PLACE)
        return Trial(
            "numpy",
            {"numpy": with_temporaries if temporaries else in_place, "cpu": kernel},
            operands,
            moved,
            {"cpu": goal} if past and self.threads == 2 else {},
        )


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@cache
def _chunk(dtype: str) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 18, np.float32).astype(_dtype(dtype))


def _random(elements: int, dtype: str) -> np.ndarray:
    """Random numbers: zeros would flatter every clock and power limit. A repeated chunk: drawing all takes long."""
    return np.resize(_chunk(dtype), elements)


def _add(x: np.ndarray, f: np.ndarray) -> None:
    np.add(x, f, out=x)


def _subtract(y: np.ndarray, f: np.ndarray) -> None:
    np.subtract(y, f, out=y)


def _reverse(y: np.ndarray, f: np.ndarray, dy: np.ndarray, df: np.ndarray) -> None:
    np.subtract(y, f, out=y)
    np.add(dy, df, out=dy)


@SUITE.benchmark(cases=_CASES)
def couple_(setup: Setup, case: str) -> Trial:
    """x <- x + f."""
    return setup.trial(case, ops.couple_, _add, lambda x, f: x + f, *[case.partition(",")[0]] * 2)


@SUITE.benchmark(cases=_CASES)
def uncouple_(setup: Setup, case: str) -> Trial:
    """y <- y - f."""
    return setup.trial(case, ops.uncouple_, _subtract, lambda y, f: y - f, *[case.partition(",")[0]] * 2)


@SUITE.benchmark(cases=_CASES)
def accumulate_(setup: Setup, case: str) -> Trial:
    """total <- total + part."""
    return setup.trial(case, ops.accumulate_, _add, lambda t, p: t + p, *[case.partition(",")[0]] * 2)


@SUITE.benchmark(cases=_CASES)
def reverse_step_(setup: Setup, case: str) -> Trial:
    """y <- y - f, dy <- dy + df."""
    both = lambda y, f, dy, df: (y - f, dy + df)  # noqa: E731
    return setup.trial(case, ops.reverse_step_, _reverse, both, *[case.partition(",")[0]] * 4)


@SUITE.benchmark(cases=("float32 += float16", "float32 += float16, temporaries"))
def mixed(setup: Setup, case: str) -> Trial:
    """A wide stream and a narrow branch; NumPy in place casts in pieces, with temporaries before it adds."""
    return setup.trial(case, ops.couple_, _add, lambda x, f: x + f.astype(np.float32), "float32", "float16")


@SUITE.benchmark(cases=("couple_", "reverse_step_"))
def call(setup: Setup, kernel: str) -> Trial:
    """The cost of one call on 1,000 float32 elements, compared with NumPy in place."""
    count, by_numpy = (2, _add) if kernel == "couple_" else (4, _reverse)
    operands = [tuple(_random(_SMALL, "float32") for _ in range(count))]
    return Trial("numpy", {"numpy": by_numpy, "cpu": getattr(ops, kernel)}, operands, calls=_CALLS)
