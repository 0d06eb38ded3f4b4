# SPDX-License-Identifier: Apache-2.0
"""Measures a training step: peak bytes, multiply-adds, branch calls; and the angle between gradients.

Nothing here is derived from the network's shape. Bytes come from the allocator, because counting tensors would miss
what an operator allocates internally: the CPU figure sums the allocator's events (torch.profiler records every one, in
forward and backward alike), the CUDA figure is the caching allocator's peak.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["angle", "branch_calls", "multiply_adds", "peak_bytes"]


def peak_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Peak of the bytes that ``fn()`` allocates and still holds, above the level at entry.

        peak = max over time t of (bytes allocated by fn up to t - bytes of those freed up to t)

    ``fn`` is called once, without arguments; its result is dropped. Memory that existed before the call counts neither
    when it is read nor when it is freed, so parameters and existing gradients are excluded: run one backward first, and
    a second one measures activations only. Memory outside PyTorch's allocator is not seen (NumPy arrays, a library's
    private workspace).

    Args:
        fn: the step to measure, usually forward and backward.
        device: where ``fn`` allocates, "cpu" or a CUDA device.

    Returns:
        Bytes, at least 0.

    Raises:
        TypeError: ``fn`` is not callable.
        ValueError: ``device`` is neither a CPU nor a CUDA device.
        RuntimeError: a profiler is already running in this thread (CPU).
    """
    if not callable(fn):
        raise TypeError(f"fn is a {type(fn).__name__}; it must be callable without arguments")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; it must be 'cpu' or a CUDA device")
    gc.collect()  # garbage of earlier work must not be freed during the measurement
    return _cpu_peak(fn) if device.type == "cpu" else _cuda_peak(fn, device)


def peak_bytes_from(fn: Callable[[Callable[[], None]], Any], device: torch.device) -> int | None:
    """`peak_bytes` from a point inside ``fn`` on: where ``fn`` calls the function passed to it, once.

    None if it does not call it.
    """
    gc.collect()
    if device.type == "cuda":
        begun, at_entry = False, 0

        def begin() -> None:
            nonlocal begun, at_entry
            begun, at_entry = True, torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)

        fn(begin)
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - at_entry) if begun else None

    def mark() -> None:
        torch.empty(_MARK, dtype=torch.uint8, device="cpu")

    sizes = _events(lambda: fn(mark))
    return _peak(sizes[sizes.index(_MARK) :]) if _MARK in sizes else None


_MARK = 7919  # bytes: a size that nothing else allocates


def _cpu_peak(fn: Callable[[], Any]) -> int:
    return _peak(_events(fn))


def _peak(sizes: Iterable[int]) -> int:
    return max(itertools.accumulate(sizes, initial=0))


def _events(fn: Callable[[], Any]) -> list[int]:
    """The bytes that the host's allocator allocated, and freed (negative), in order."""
    # Kineto reports each start and stop on stderr at its default level; a user who set a level keeps it.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        fn()
    results = session.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    events.sort(key=lambda e: e.start_ns())  # stable: events of one thread keep their order
    return [event.nbytes() for event in events]


def _cuda_peak(fn: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    at_entry = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - at_entry)


def multiply_adds(fn: Callable[[], Any]) -> int:
    """Multiply-adds of the convolutions and matrix products that ``fn()`` runs, including backward and recompute.

    Counted by torch.utils.flop_counter from the operators that reach the dispatcher, two operations each.
    """
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops() // 2


def branch_calls(branches: Iterable[nn.Module], fn: Callable[[], Any]) -> int:
    """How many times ``fn()`` calls the ``branches``, in total; a recompute counts as a call."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hooks = [branch.register_forward_pre_hook(count) for branch in branches]
    try:
        fn()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def angle(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Angle in degrees between two gradients, each a list of tensors taken as one long vector.

        angle = 2 atan2(|u - v|, |u + v|),   u = a / |a|,   v = b / |b|

    In float64, and accurate for small angles too, where the arc cosine of the inner product would round to 0 or to 1e-6
    degrees (Kahan, "How Futile are Mindless Assessments of Roundoff", 2006, section 12).

    Raises:
        ValueError: the two differ in their number of elements, or one of them is zero or not finite.
    """
    u, v = (torch.cat([t.detach().to_dense().flatten().double() for t in tensors]) for tensors in (a, b))
    if u.numel() != v.numel():
        raise ValueError(f"b has {v.numel()} elements, a has {u.numel()}: they must be equal")
    for name, vector in (("a", u), ("b", v)):
        norm = vector.norm().item()
        if not math.isfinite(norm) or norm == 0:
            raise ValueError(f"{name} has norm {norm}; it must be finite and not zero, to have a direction")
        vector /= norm
    return math.degrees(2 * math.atan2((u - v).norm().item(), (u + v).norm().item()))
