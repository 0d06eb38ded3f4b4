# SPDX-License-Identifier: Apache-2.0
"""The bytes that a step has allocated, and a clock that leaves out how long it takes to ask."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from revkernels.autograd.planning.kept_ops import Stopwatch, overhead
from revkernels.autograd.planning.live_bytes import bytes_of, live_bytes

_FEW = 1024  # bytes that a tensor takes besides its data


class Level:
    """The bytes allocated now above what there was when the step began, gradients of parameters aside."""

    def __init__(self, device: torch.device, entered: int) -> None:
        self.device, self.clock = device, Stopwatch(device)
        self.cheap = device.type == "cuda"  # to ask; glibc looks at all that a process has freed and not used again
        overhead()  # torch imports for the first mode of a process what takes tens of megabytes of the host
        start = live_bytes(device)
        self.start = None if start is None else start - entered  # its input counts
        self._others = 0
        self._parameters: dict[torch.Tensor, bool] = {}
        self._gradients = 0

    def watch(self, parameters: Iterable[torch.Tensor]) -> None:
        """These may get gradients, which are not to count."""
        for parameter in parameters:
            self._parameters.setdefault(parameter, parameter.grad is not None)

    def recount(self) -> None:
        """See which of them have got some."""
        self._gradients = sum(bytes_of(p.grad) for p, had in self._parameters.items() if not had and p.grad is not None)

    def raw(self) -> int | None:
        """The bytes as the allocator has them; None if nobody tells."""
        if self.start is None:
            return None
        began = time.perf_counter()
        now = live_bytes(self.device)
        self.clock.beside += time.perf_counter() - began  # with a large heap the question takes its time
        return now

    def since(self) -> tuple[float, float]:
        """Before an operator and what is read of it."""
        return time.perf_counter(), self.clock.beside

    def aside(self, since: tuple[float, float], start: Any, end: Any) -> None:
        """Behind them: on the host only the operator itself, between two readings of the clock, is to count."""
        if self.device.type != "cuda":
            began, beside = since
            self.clock.beside = beside + time.perf_counter() - began - (end - start)

    def learn(self, before: int | None, now: int | None, made: int) -> int:
        """Of an operator, between two readings of `raw`: what it has allocated beyond what it made stays with a library
        (buffers of its threads, what it has compiled), which allocates it once. Not this step's. (What a backward does
        so is not seen.) Returns those bytes, as far as they are of torch's allocator.
        """
        if now is None or before is None:
            return 0
        more = now - before - made
        if abs(more) > _FEW:
            self._others = max(0, self._others + more)
        return max(0, more) if self.device.type == "cuda" else 0

    def read(self) -> int | None:
        """The bytes; None if nobody tells."""
        return self.count(self.raw())

    def count(self, now: int | None) -> int | None:
        """What of a reading of `raw` counts."""
        return None if now is None else max(0, now - self.start - self._gradients - self._others)  # type: ignore[operator]
