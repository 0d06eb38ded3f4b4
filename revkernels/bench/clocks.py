# SPDX-License-Identifier: Apache-2.0
"""Times calls on a processor or a GPU; the size of its last-level cache; memory without page faults."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Clock", "CudaClock", "HostClock", "clock_for", "last_level_cache", "memory_kept"]

#: From glibc's malloc.h: parameters of mallopt, and their final values: those to which glibc raises them by itself,
#: which it stops doing once they have been set.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_DEFAULTS = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}
_UNKNOWN_CACHE = 32 << 20  # if the system does not report it


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
    """Time on the GPU between two events, after its L2 cache has been flushed."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._flush = torch.zeros(2 * last_level_cache(device), dtype=torch.float32, device=device)  # 8 times its bytes

    def time(self, function: Callable[..., Any], operands: Sequence[tuple[Any, ...]]) -> float:
        """Return the seconds between the first call's start and the last one's end on the current stream."""
        torch = self._torch
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            # Besides flushing the cache this keeps the GPU busy while the calls are enqueued, so the host's launch cost
            # is not part of a short kernel's time. It reads, because written data would be evicted to memory while the
            # calls are timed.
            self._flush.sum()
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
    """Return the bytes of the device's largest cache; 32 MiB if the system does not report it."""
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


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keep freed memory in the process meanwhile, as a GPU's allocator does, if the C library is glibc.

    glibc returns every large block to the system and gets the next one from there, page by page: a pass that allocates
    its output would mostly measure that, whoever computes it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    for parameter, value in _KEEPING.items():
        mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _DEFAULTS.items():
            mallopt(parameter, value)
