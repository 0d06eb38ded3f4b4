# SPDX-License-Identifier: Apache-2.0
"""Timing calls on a processor or a GPU, and the size of its last-level cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Clock", "CudaClock", "HostClock", "clock_for", "last_level_cache"]

_UNKNOWN_CACHE = 32 << 20  # where the system does not tell


class Clock(Protocol):
    """Times one call for each set of operands."""

    def time(self, function: Callable[..., Any], operands: Sequence[tuple[Any, ...]]) -> float:
        """Return the seconds that ``function(*set)`` took for all sets together."""
        ...


class HostClock:
    """Wall time on the processor."""

    def time(self, function: Callable[..., Any], operands: Sequence[tuple[Any, ...]]) -> float:
        """Return the seconds that the calls took."""
        start = time.perf_counter_ns()
        for one in operands:
            function(*one)
        return (time.perf_counter_ns() - start) * 1e-9


class CudaClock:
    """Time on the GPU between two events, after its L2 cache has been overwritten."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._flush = torch.empty(2 * last_level_cache(device), dtype=torch.uint8, device=device)

    def time(self, function: Callable[..., Any], operands: Sequence[tuple[Any, ...]]) -> float:
        """Return the seconds between the first call's start and the last one's end on the current stream."""
        torch = self._torch
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            # Besides emptying the cache this keeps the GPU busy while the calls are enqueued, so that the host's
            # launch cost is not part of a short kernel's time.
            self._flush.zero_()
            start.record()
            for one in operands:
                function(*one)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3


def clock_for(device: str) -> Clock:
    """Return the clock of "cpu" or "cuda[:n]"."""
    return CudaClock(device) if device.startswith("cuda") else HostClock()


def last_level_cache(device: str = "cpu") -> int:
    """Return the bytes of the device's largest cache; 32 MiB if the system does not tell."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * unit)
    return max(sizes, default=_UNKNOWN_CACHE)
