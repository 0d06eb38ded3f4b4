# SPDX-License-Identifier: Apache-2.0
"""Whether this thread runs a branch that rebuilds, and whether for the second time."""

from __future__ import annotations

import threading

_local = threading.local()


def is_recomputing() -> bool:
    """Whether this thread is inside the second run of a branch. For hooks and branches that keep count.

    A tensor that a branch keeps in its forward for the second run goes into a list or dictionary that stays. An
    attribute that it replaces is taken for a recurrent state, which is put back to what it was before the forward: of
    a branch that asks this and replaces one a `UserWarning` tells. Set ``revkernels_comes_back = True`` on the branch
    where it is to find in the second run what its forward has left: none of its attributes is put back then.
    """
    _local.asked = times_asked() + 1
    return recomputes()


def recomputes() -> bool:
    """The same, asked by this package and not by a branch or a hook."""
    return getattr(_local, "recomputing", False)


def times_asked() -> int:
    """How often this thread's branches and hooks have asked."""
    return getattr(_local, "asked", 0)


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
    return getattr(_local, "within", False) or recomputes()
