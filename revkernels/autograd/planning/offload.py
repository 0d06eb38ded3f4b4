# SPDX-License-Identifier: Apache-2.0
"""Keeps saved tensors in host memory: pinned, and copied by a separate CUDA stream in parallel with the computation.

An offloaded half-step keeps what one that keeps everything does, in host memory. On the way out the tensors stay on the
device until the copy is done, and the next half-step's wait for them, so that at most two half-steps' are in flight; on
the way back those of the previous half-step are fetched while one runs its backward. Writes in place after a tensor was
saved are not detected here (nor are they by ``torch.autograd.graph.save_on_cpu``).
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

_PROBE = 64 << 20  # bytes copied to measure the speed in both directions


class OffloadedTensor:
    """A tensor's copy in host memory."""

    __slots__ = ("back", "copy", "device", "done")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device = tensor.device
        self.back: torch.Tensor | None = None  # the copy on the device
        self.done: Any = None  # the event after that copy
        pin = self.device.type == "cuda"
        self.copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=pin)
        if not pin:
            self.copy.copy_(tensor)
            return
        mover = _mover(self.device)
        mover.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(mover):
            self.copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(mover)

    def fetch(self) -> None:
        """Start the copy back to the device."""
        if self.back is not None:
            return
        if self.device.type != "cuda":
            self.back = self.copy.clone()
            return
        here, mover = torch.cuda.current_stream(self.device), _mover(self.device)
        self.back = torch.empty_strided(self.copy.shape, self.copy.stride(), dtype=self.copy.dtype, device=self.device)
        mover.wait_stream(here)  # its memory may have been in use until now
        with torch.cuda.stream(mover):
            self.back.copy_(self.copy, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record(mover)
        self.back.record_stream(mover)

    def here(self) -> torch.Tensor:
        """The tensor on the device."""
        self.fetch()
        tensor: torch.Tensor = self.back  # type: ignore[assignment]
        if self.done is not None:  # each time: several nodes may unpack it, on their own streams
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.done)
            tensor.record_stream(stream)
        return tensor

    def let_go(self) -> None:
        """Free its memory on the device."""
        self.back = self.done = None


class OffloadGroup:
    """What one half-step has sent to host memory: each piece of memory once, however often it was saved."""

    def __init__(self, at_home: frozenset[int]) -> None:
        self.at_home = at_home  # addresses of parameters and buffers, which stay
        self._sent: dict[Any, OffloadedTensor] = {}
        self._held: list[torch.Tensor] = []  # while the half-step runs, so that addresses stay unique
        self._left: Any = None  # the event after the last copy

    def send(self, tensor: torch.Tensor) -> torch.Tensor | OffloadedTensor:
        """Send the tensor to host memory, unless it stays."""
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return tensor
        if tensor.untyped_storage().data_ptr() in self.at_home:
            return tensor
        if tensor.numel() > tensor.untyped_storage().nbytes() // tensor.element_size():  # expanded: less memory
            return tensor
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if key not in self._sent:
            self._sent[key] = OffloadedTensor(tensor)
            self._held.append(tensor)
        return self._sent[key]

    def sealed(self, last: OffloadGroup | None) -> None:
        """The half-step's forward is over: from now on other tensors may reuse its addresses. ``last``: the previous
        group, whose copies the device now waits for."""
        self._sent, self._held = dict(enumerate(self._sent.values())), []
        device = next((away.device for away in self._sent.values()), torch.device("cpu"))
        if device.type == "cuda":
            self._left = torch.cuda.Event()
            self._left.record(_mover(device))
            if last is not None and last._left is not None:
                torch.cuda.current_stream(device).wait_event(last._left)

    def fetch(self) -> None:
        """Start to copy all of it back."""
        for away in self._sent.values():
            away.fetch()

    def let_go(self) -> None:
        """Its backward is over: free its memory on the device."""
        for away in self._sent.values():
            away.let_go()


class Prefetcher:
    """Holds the current half-step's tensors on the device, and fetches those of the half-step before it."""

    def __init__(self) -> None:
        self._now: OffloadGroup | None = None

    def come(self, offloaded: OffloadGroup | None, following: OffloadGroup | None) -> None:
        """Fetch ``offloaded``, if there is any, in place of the previous group, and start to fetch ``following``."""
        if offloaded is None or offloaded is self._now:
            return
        self.let_go()
        self._now = offloaded
        offloaded.fetch()
        if following is not None:
            following.fetch()

    def let_go(self) -> None:
        """Free the current group."""
        if self._now is not None:
            self._now.let_go()
            self._now = None


@functools.cache
def _mover(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def way_of(device: torch.device) -> tuple[float, float] | None:
    """Seconds per byte to host memory and back, measured once a device; None for the host itself."""
    if device.type != "cuda":
        return None
    there = torch.empty(_PROBE, dtype=torch.uint8, device=device)
    host = torch.empty(_PROBE, dtype=torch.uint8, device="cpu", pin_memory=True)
    found = []
    for to, source in ((host, there), (there, host)):
        best = float("inf")
        for _ in range(3):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            to.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        found.append(best / _PROBE)
    return found[0], found[1]
