# SPDX-License-Identifier: Apache-2.0
"""Whether this thread runs a branch that rebuilds, and whether for the second time."""

from __future__ import annotations

import threading

_local = threading.local()


def is_recomputing() -> bool:
    """Whether this thread is inside the second run of a branch. For hooks and branches that keep count.

    A tensor that a branch keeps in its forward for the second run goes into a list or dictionary that stays. An
    attribute that it replaces is a recurrent state, which is put back to what it was before the forward.
    """
    return getattr(_local, "recomputing", False)


def set_recomputing(flag: bool) -> None:
    """Say so of this thread."""
    _local.recomputing = flag


class within_a_branch:  # noqa: N801, as a function it would be a generator, and slow
    """While a branch runs that may be run again."""

    __slots__ = ("outer",)

    def __enter__(self) -> None:
        self.outer, _local.within = getattr(_local, "within", False), True

    def __exit__(self, *_: object) -> None:
        _local.within = self.outer


def is_within_a_branch() -> bool:
    """Whether this thread runs a branch of a chain that rebuilds, for the first or for the second time."""
    return getattr(_local, "within", False) or is_recomputing()
