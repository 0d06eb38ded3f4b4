# SPDX-License-Identifier: Apache-2.0
"""Measures the bytes that an operator allocates inside and frees before it ends: a convolution's columns, say.

Readings of the allocator before and after it do not show them. On the host torch reports every allocation to its
profilers, so a profiler runs around a single operator of the measured step, or a single node of its backward. On CUDA
the allocator counts the total ever allocated: its increase over a span of few allocations is an upper bound.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from revkernels.autograd.ownership import PLAIN
from revkernels.autograd.planning.memory_meter import Level

_FEW = 8  # allocations: with more, their sum is far above their peak

_autograd: Any = torch._C._autograd
# The legacy profiler takes 10 us to start and stop, kineto's 1 ms; if torch no longer has it, nothing is measured.
_begin: Any = getattr(_autograd, "_enable_profiler_legacy", None)
_end: Any = getattr(_autograd, "_disable_profiler_legacy", None)
_local = threading.local()


class _OnHost:
    """A span of one thread's work. Spans may be nested.

    ``now``: bytes allocated in it and not freed. ``most``: their peak.
    """

    def __init__(self) -> None:
        self.now = self.most = 0

    @staticmethod
    def begin() -> _OnHost | None:
        running = _running()
        if running:
            _turn(running)
        elif _begin is None or _autograd._profiler_enabled():  # another profiler runs
            return None
        stretch = _OnHost()
        running.append(stretch)
        _start(running)
        return stretch if running else None

    def end(self) -> int:
        """The peak of its allocations, above the level when it began."""
        running = _running()
        if self in running:
            _turn(running)
            del running[running.index(self) :]
            if running:
                _start(running)
        return self.most


def _running() -> list[_OnHost]:
    """The active spans of this thread, the innermost last."""
    running: list[_OnHost] | None = getattr(_local, "running", None)
    if running is None:
        running = _local.running = []
    # If an exception leaves a node, the engine restores the thread's earlier state, without our profiler.
    if running and _autograd._profiler_type() != torch._C._profiler.ActiveProfilerType.LEGACY:
        running.clear()
    return running


def _start(running: list[_OnHost]) -> None:
    profiler, experimental = torch._C._profiler, torch._C._profiler._ExperimentalConfig()
    kind = profiler.ProfilerState.CPU
    try:
        _begin(profiler.ProfilerConfig(kind, False, True, False, False, False, experimental))  # True: profile memory
    except (RuntimeError, TypeError):
        running.clear()


def _turn(running: list[_OnHost]) -> None:
    """Stop the profiler, and add its events to the spans."""
    events = itertools.chain.from_iterable(_end())
    sizes = [event.cpu_memory_usage() for event in events if event.kind() == "memory_alloc"]
    most = max(itertools.accumulate(sizes, initial=0))
    for stretch in running:
        stretch.most = max(stretch.most, stretch.now + most)
        stretch.now += sum(sizes)


class _OnDevice:
    """The same on CUDA. No statistic is reset, since they belong to the user."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.at, self.now = device, torch.cuda.memory_allocated(device), 0
        self.before = self._counters()

    def _counters(self) -> tuple[int, int, int]:
        told = torch.cuda.memory_stats(self.device)
        names = "allocation.all.allocated", "allocated_bytes.all.allocated", "allocated_bytes.all.peak"
        return told.get(names[0], 0), told.get(names[1], 0), told.get(names[2], 0)

    def end(self) -> int:
        self.now = torch.cuda.memory_allocated(self.device) - self.at
        (count, total, peak), (more, larger, now) = self.before, self._counters()
        if now > peak:  # a new peak, reached in this span
            return max(0, now - self.at)
        return min(larger - total, now - self.at) if more - count <= _FEW else 0


def begin(device: torch.device) -> _OnHost | _OnDevice | None:
    """Begin a span, whose ``end()`` returns its peak; None if it cannot be measured."""
    if device.type == "cpu":
        return _OnHost.begin()
    # With cuDNN's benchmark, the workspaces to try its algorithms are allocated only once: do not measure them.
    return _OnDevice(device) if device.type == "cuda" and not torch.backends.cudnn.benchmark else None


class Inside:
    """What was measured inside the operators of a call's branches, and inside the nodes of their backward.

    ``found``: by half-step, the peak bytes there, as ``count`` converts a reading of the level, plus what came on top.
    ``most``: only what came on top.
    """

    def __init__(self, level: Level, count: Callable[[int | None], int | None]) -> None:
        self.level, self.count = level, count
        self.found: dict[int, int] = {}
        self.most: dict[int, int] = {}
        self.operators: dict[int, list[tuple[Any, int]]] = {}  # of the forward, in order
        self._node: tuple[int, int, int] | None = None  # the current node: half-step, thread, backward
        self._stretch: _OnHost | _OnDevice | None = None
        self._went_on = False
        self._handles: list[Any] = []

    def operator(self, k: int, before: int | None, most: int) -> None:
        """An operator of half-step k had ``most`` on top of a level of ``before``."""
        self.most[k] = max(most, self.most.get(k, 0))
        level = self.count(before)
        if level is not None:
            self.found[k] = max(level + most, self.found.get(k, 0))

    def watch(self, k: int, f: Any, since: int) -> None:
        """Measure inside the graph nodes of half-step k's branch, whose sequence numbers begin at ``since``."""
        for node in _nodes(f, since):
            self._handles.append(node.register_prehook(lambda _, k=k: self._begins(k)))
            self._handles.append(node.register_hook(lambda *_, k=k: self._ends(k)))

    def over(self) -> None:
        """Nothing is left to measure."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begins(self, k: int) -> None:
        self._node, self._stretch = (k, *_here()), None
        self.resume()
        self._went_on = False

    def _ends(self, k: int) -> None:
        if self._node == (k, *_here()):
            self.pause()
            self._node = None

    def pause(self) -> None:
        """The driver works in the middle of a node."""
        stretch, self._stretch = self._stretch, None
        if stretch is not None and self._node is not None and self._node[1:] == _here():
            began = time.perf_counter()
            most = stretch.end()
            self.level.clock.beside += time.perf_counter() - began
            if most > max(0, stretch.now):  # else other readings suffice: with a large heap this is slow
                now = self.level.raw()
                self.operator(self._node[0], None if now is None else now - stretch.now, most)

    def resume(self) -> bool:
        """The node continues. Returns whether the level may have changed since the last time it did."""
        if self._node is None or self._node[1:] != _here():
            return True
        began = time.perf_counter()
        self._stretch = begin(self.level.device)
        self.level.clock.beside += time.perf_counter() - began
        before, self._went_on = self._went_on, True
        return not before


def _here() -> tuple[int, int]:
    return threading.get_ident(), torch._C._current_graph_task_id()


def _nodes(f: Any, since: int) -> Iterator[Any]:
    """The nodes behind a branch's output that are not older than ``since``. Excluded are our own, which like a hook may
    write over gradients that nobody else holds, and those that accumulate gradients."""
    outputs = f if type(f) is tuple else (f,)
    left = [t.grad_fn for t in outputs if type(t) in PLAIN and t.grad_fn is not None]
    seen = set(left)
    while left:
        node: Any = left.pop()
        if node.name().endswith("AccumulateGrad") or node._sequence_nr() < since:
            continue
        if not getattr(getattr(type(node), "_forward_cls", None), "__module__", "").startswith("revkernels."):
            yield node
        following = {behind for behind, _ in node.next_functions if behind is not None and behind not in seen}
        seen |= following
        left.extend(following)
