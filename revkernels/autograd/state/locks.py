# SPDX-License-Identifier: Apache-2.0
"""Locks for branches that a recompute temporarily changes."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["turn_of"]

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_EVERYBODY = contextlib.nullcontext()


def turn_of(modules: Sequence[nn.Module]) -> contextlib.AbstractContextManager[Any]:
    """The lock to run these modules, which have buffers, or items in lists or dictionaries: one thread at a time.

    A recompute replaces their buffers by throw-away copies, where another thread's forward would lose its statistics.
    """
    return _Turn(modules) if modules else _EVERYBODY


class _Turn(contextlib.AbstractContextManager[None]):
    __slots__ = ("locks",)

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # In the same order in all threads, to avoid deadlocks.
        self.locks = [_locks.setdefault(module, threading.RLock()) for module in sorted(modules, key=id)]

    def __enter__(self) -> None:
        count = 0
        try:
            for lock in self.locks:
                lock.acquire()
                count += 1
        except BaseException:  # an interrupt while waiting
            for lock in self.locks[:count]:
                lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        for lock in self.locks:
            lock.release()
