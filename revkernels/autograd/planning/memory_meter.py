# SPDX-License-Identifier: Apache-2.0
"""Reads the bytes that a step has allocated, and excludes the time that this takes from the clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from typing import Any

import torch

from revkernels.autograd.planning.kept_ops import Stopwatch, overhead
from revkernels.autograd.planning.live_bytes import bytes_of, live_bytes

_FEW = 1024  # bytes that a tensor takes besides its data


class Level:
    """The bytes allocated now above the level when the step began, without gradients of parameters.

    Args:
        entered: bytes of the step's input.
        measured: the step's peaks will be read.
    """

    def __init__(self, device: torch.device, entered: int, measured: bool) -> None:
        self.device, self.clock = device, Stopwatch(device)
        self.cheap = device.type == "cuda"  # to read; glibc visits all memory that was freed and not reused
        overhead()  # a process's first mode makes torch import tens of megabytes
        if measured:  # else garbage from before the step, collected in it, would count as memory that it gives back
            gc.collect()
        start = live_bytes(device)
        self.start = None if start is None else start - entered  # its input counts
        self._others = 0
        self._parameters: dict[torch.Tensor, bool] = {}
        self._gradients = 0

    def watch(self, parameters: Iterable[torch.Tensor]) -> None:
        """Exclude the gradients that these parameters may receive: none if they are computed (by `functional_call`, or
        views of FSDP's flat parameters), and torch warns where those are read."""
        for parameter in parameters:
            if parameter.is_leaf:
                self._parameters.setdefault(parameter, parameter.grad is not None)

    def recount(self) -> None:
        """Update the size of these gradients."""
        self._gradients = sum(bytes_of(p.grad) for p, had in self._parameters.items() if not had and p.grad is not None)

    def raw(self) -> int | None:
        """The bytes as the allocator counts them; None if not available."""
        if self.start is None:
            return None
        began = time.perf_counter()
        now = live_bytes(self.device)
        self.clock.beside += time.perf_counter() - began  # slow with a large heap
        return now

    def since(self) -> tuple[float, float]:
        """To be called before an operator and the readings around it."""
        return time.perf_counter(), self.clock.beside

    def aside(self, since: tuple[float, float], start: Any, end: Any) -> None:
        """To be called after them: on the host only the operator itself, between two readings of the clock, counts."""
        if self.device.type != "cuda":
            began, beside = since
            self.clock.beside = beside + time.perf_counter() - began - (end - start)

    def learn(self, before: int | None, now: int | None, made: int) -> int:
        """For an operator, between two readings of `raw`: what it allocated beyond its outputs is held by a library
        (buffers of its threads, compiled code), which allocates it once; it does not count for this step. (Not detected
        in a backward.) Returns those bytes, if they are from torch's allocator.
        """
        if now is None or before is None:
            return 0
        more = now - before - made
        if abs(more) > _FEW:
            self._others = max(0, self._others + more)
        return max(0, more) if self.device.type == "cuda" else 0

    def read(self) -> int | None:
        """The bytes; None if not available."""
        return self.count(self.raw())

    def count(self, now: int | None) -> int | None:
        """The part of a reading of `raw` that counts."""
        return None if now is None else max(0, now - self.start - self._gradients - self._others)  # type: ignore[operator]
