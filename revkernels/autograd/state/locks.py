# SPDX-License-Identifier: Apache-2.0
"""Locks for branches that a recompute temporarily changes."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["leave_turns", "turn_of", "turns_taken"]

_locks: weakref.WeakKeyDictionary[nn.Module, _Lock] = weakref.WeakKeyDictionary()
_EVERYBODY = contextlib.nullcontext()
_LOOK = 0.01  # seconds between two looks at a lock's owner
_graph_task = torch._C._current_graph_task_id
_into_the_engine = torch.autograd.graph._engine_run_backward.__code__  # the last Python frame of whoever calls it


def turn_of(modules: Sequence[nn.Module]) -> contextlib.AbstractContextManager[Any]:
    """The lock to run these modules, which have buffers, or items in lists or dictionaries: one thread at a time.

    A recompute replaces their buffers by throw-away copies, where another thread's forward would lose its statistics.
    """
    return _Turn(modules) if modules else _EVERYBODY


class _Lock(type(threading.RLock())):  # type: ignore[misc]
    """A lock that a thread may acquire again, and that does not make torch's engine wait for itself.

    A branch that differentiates while it runs has its turn, and waits for the engine, which may compute the gradient in
    a thread of its own: on a device always, on the host beyond 60 backwards within each other. What is recomputed there
    is part of the branch's run, and must not wait for the end of it.
    """

    __slots__ = ("owner",)  # the thread that acquired it last

    def wait(self) -> bool:
        """Acquire it. False if its owner waits for the engine, in one of whose threads this is called."""
        if not _is_the_engines():
            return bool(self.acquire())
        while not self.acquire(timeout=_LOOK):
            if _waits_for_the_engine(getattr(self, "owner", 0)):  # 0: it is about to set it
                return False
        return True


def _is_the_engines() -> bool:
    """Whether this thread runs a backward, and was started by torch's engine: Python knows its own threads."""
    return _graph_task() != -1 and isinstance(threading.current_thread(), threading._DummyThread)


def _waits_for_the_engine(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    return frame is not None and frame.f_code is _into_the_engine


class _Turn(contextlib.AbstractContextManager[None]):
    __slots__ = ("locks",)

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # In the same order in all threads, to avoid deadlocks.
        self.locks = [_locks.setdefault(module, _Lock()) for module in sorted(modules, key=id)]

    def __enter__(self) -> None:
        thread, count = threading.get_ident(), turns_taken()
        try:
            _here.turns.append(self)  # before the locks, so that `leave_turns` finds all that it has
            for lock in self.locks:
                if lock.acquire(False) or lock.wait():
                    lock.owner = thread
        except BaseException:  # an interrupt while waiting
            leave_turns(count)
            raise

    def __exit__(self, *_: object) -> None:
        for lock in self.locks:
            if lock._is_owned():  # else its owner waits for this thread
                lock.release()
        _here.turns.pop()


class _Here(threading.local):
    def __init__(self) -> None:
        self.turns: list[_Turn] = []  # that this thread has, the first one first


_here = _Here()


def turns_taken() -> int:
    """How many turns this thread has."""
    return len(_here.turns)


def leave_turns(count: int) -> None:
    """End all turns of this thread but the first ``count``, if an interrupt has kept them from ending."""
    turns = _here.turns
    kept = [lock for turn in turns[:count] for lock in turn.locks]
    for lock in {lock for turn in turns[count:] for lock in turn.locks}:
        for _ in range(_times_acquired(lock) - kept.count(lock)):
            lock.release()
    del turns[count:]


def _times_acquired(lock: _Lock) -> int:
    """By this thread. Not for every half-step: Python 3.10 says it in the lock's words alone."""
    found = re.search(r"count=(\d+)", repr(lock)) if lock._is_owned() else None
    return 0 if found is None else int(found[1])
