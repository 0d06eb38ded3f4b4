# SPDX-License-Identifier: Apache-2.0
"""The four kernels against the torch calls they replace: tensors larger than the cache, mixed dtypes, call cost.

A pointwise add moves the same bytes fused or not, so the goal is parity with torch's in-place call, and `reverse_step_`
saves at most one call of two. Mixed dtypes save bytes: torch writes the cast branch and reads it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from revkernels import ops
from revkernels.backends import BACKENDS
from revkernels.bench.clocks import last_level_cache
from revkernels.bench.harness import Goal, Suite, Trial, rotation

__all__ = ["SUITE", "Setup"]

SUITE = Suite("coupling")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SMALL = 1_000  # elements: measures the call's own cost, not memory
_CALLS = 1_000  # such calls per sample


@dataclass(frozen=True)
class Setup:
    """Device and size.

    Attributes:
        device: "cpu" or "cuda[:n]".
        megabytes: of the stream; 2^20 bytes each.
    """

    device: str = "cpu"
    megabytes: int = 64

    def backends(self) -> list[str]:
        """Return the fused backends that run on the device."""
        kind = self.device.partition(":")[0]
        fused = [backend for name, backend in BACKENDS.items() if name not in ("reference", "eager")]
        return [b.name for b in fused if b.refuses("torch", kind) is None and b.missing() is None]

    def goal(self, at_most: float) -> Goal | None:
        """Return a limit on the ratio if the tensors exceed the cache, for which it was set."""
        past = self.megabytes << 20 > last_level_cache(self.device)
        return Goal("ratio", at_most) if self.device == "cpu" and past else None

    def operands(self, *dtypes: str) -> list[tuple[torch.Tensor, ...]]:
        """Return sets of random tensors of these dtypes and equal shape, enough to rotate past the cache."""
        sizes = [getattr(torch, dtype).itemsize for dtype in dtypes]
        elements = (self.megabytes << 20) // sizes[0]
        count = rotation(elements * sum(sizes), last_level_cache(self.device))
        return [tuple(self.random(elements, dtype) for dtype in dtypes) for _ in range(count)]

    def random(self, elements: int, dtype: str) -> torch.Tensor:
        """Return a vector of random numbers: zeros would flatter every clock and power limit."""
        return torch.randn(elements, device=self.device, dtype=torch.float32).to(getattr(torch, dtype))

    def trial(
        self,
        by_torch: Callable[..., Any],
        by_ops: Callable[..., Any],
        operands: list[tuple[torch.Tensor, ...]],
        at_most: float,
    ) -> Trial:
        """Return torch against every fused backend; each written operand is also read."""
        contenders = {"torch": by_torch}
        for name in self.backends():
            contenders[name] = _bind(by_ops, name)
        goal = self.goal(at_most)
        read_and_written = sum(t.nbytes for t in operands[0]) + sum(t.nbytes for t in operands[0][::2])
        goals = {} if goal is None else dict.fromkeys(self.backends(), goal)
        return Trial("torch", contenders, operands, read_and_written, goals)


def _bind(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return lambda *operands: function(*operands, backend=backend)


def _torch_reverse_step(y: torch.Tensor, f: torch.Tensor, dy: torch.Tensor, df: torch.Tensor) -> None:
    y.sub_(f)
    dy.add_(df)


@SUITE.benchmark(cases=_DTYPES)
def couple_(setup: Setup, dtype: str) -> Trial:
    """x <- x + f against ``x.add_(f)``."""
    return setup.trial(lambda x, f: x.add_(f), ops.couple_, setup.operands(dtype, dtype), at_most=1.05)


@SUITE.benchmark(cases=_DTYPES)
def uncouple_(setup: Setup, dtype: str) -> Trial:
    """y <- y - f against ``y.sub_(f)``."""
    return setup.trial(lambda y, f: y.sub_(f), ops.uncouple_, setup.operands(dtype, dtype), at_most=1.05)


@SUITE.benchmark(cases=_DTYPES)
def accumulate_(setup: Setup, dtype: str) -> Trial:
    """total <- total + part against ``total.add_(part)``."""
    return setup.trial(lambda t, p: t.add_(p), ops.accumulate_, setup.operands(dtype, dtype), at_most=1.05)


@SUITE.benchmark(cases=_DTYPES)
def reverse_step_(setup: Setup, dtype: str) -> Trial:
    """y <- y - f, dy <- dy + df against the two torch calls."""
    return setup.trial(_torch_reverse_step, ops.reverse_step_, setup.operands(*[dtype] * 4), at_most=1.0)


@SUITE.benchmark(cases=("float32 += bfloat16", "float32 += float16"))
def mixed(setup: Setup, dtypes: str) -> Trial:
    """A wide stream and a narrow branch, as under autocast, against torch's cast followed by add."""
    operands = setup.operands(*dtypes.split(" += "))
    return setup.trial(lambda x, f: x.add_(f.float()), ops.couple_, operands, at_most=0.7)


#: kernel to its operands' number, the torch calls it replaces, and the microseconds it may cost above them
_SHORT_CALLS: dict[str, tuple[int, Callable[..., Any], float]] = {
    "couple_": (2, lambda x, f: x.add_(f), 5.0),
    "reverse_step_": (4, _torch_reverse_step, 8.0),
}


@SUITE.benchmark(cases=_SHORT_CALLS)
def call(setup: Setup, kernel: str) -> Trial:
    """The cost of one call on 1,000 float32 elements, above torch's."""
    count, by_torch, at_most = _SHORT_CALLS[kernel]
    operands = [tuple(setup.random(_SMALL, "float32") for _ in range(count))]
    contenders: dict[str, Callable[..., Any]] = {"torch": by_torch}
    contenders |= {name: _bind(getattr(ops, kernel), name) for name in setup.backends()}
    goals = {name: Goal("extra_us", at_most) for name in setup.backends()} if setup.device == "cpu" else {}
    return Trial("torch", contenders, operands, goals=goals, calls=_CALLS)
