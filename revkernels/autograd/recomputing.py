# SPDX-License-Identifier: Apache-2.0
"""Whether this thread runs a branch whose saved tensors are recomputed, and whether this is the recompute."""

from __future__ import annotations

import threading

_local = threading.local()


def is_recomputing() -> bool:
    """Whether this thread is inside the recompute of a branch. For hooks and branches that keep count.

    A branch that keeps a tensor from its forward for the recompute must put it in a list or dictionary that it does not
    replace. An attribute that it replaces is treated as recurrent state, and restored to its value before the forward;
    a `UserWarning` says so if the branch calls this function. Set ``revkernels_comes_back = True`` on the branch if its
    recompute must find what its forward left: none of its attributes is restored then.
    """
    _local.asked = times_asked() + 1
    return recomputes()


def recomputes() -> bool:
    """The same, when this package asks and not a branch or a hook."""
    return getattr(_local, "recomputing", False)


def times_asked() -> int:
    """How often this thread's branches and hooks have called `is_recomputing`."""
    return getattr(_local, "asked", 0)


def set_recomputing(flag: bool) -> None:
    """Set what `recomputes` returns in this thread."""
    _local.recomputing = flag


class within_a_branch:  # noqa: N801, as a function it would be a generator, and slow
    """Context in which a branch runs that may be recomputed."""

    __slots__ = ("outer",)

    def __enter__(self) -> None:
        self.outer, _local.within = getattr(_local, "within", False), True

    def __exit__(self, *_: object) -> None:
        _local.within = self.outer


def is_within_a_branch() -> bool:
    """Whether this thread runs a branch whose saved tensors are recomputed, in the forward or in the recompute."""
    return says_within() or recomputes()


def says_within() -> bool:
    """Whether this thread is inside `within_a_branch`."""
    return getattr(_local, "within", False)


def set_within(flag: bool) -> None:
    """Set what `says_within` returns in this thread."""
    _local.within = flag
