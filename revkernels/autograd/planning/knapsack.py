# SPDX-License-Identifier: Apache-2.0
"""What to keep under a bound on memory: the choice that saves most time, by dynamic programming.

Half-steps run forward one after another, and backward in reverse. What half-step k keeps is alive from its forward to
its backward: while the backward is at half-step p, that is what 0 .. p - 1 have kept, and what p works with:

    used(p) = kept(0) + ... + kept(p - 1)      used(p) + working(p) <= limit for every p, and used(n) at the turn

This is a knapsack with nested bounds. Dynamic programming visits the half-steps from first to last and stores, for
every amount used, the most time saved. Bytes are counted in units, and each half-step's are rounded up: the plan found
is the best of all where the unit is a byte, and otherwise at least as good as the best that leaves a unit or two for
each half-step unused. The unit does not depend on the limit, so that a larger limit never saves less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

UNITS = 2048  # into which the total to keep is divided


class Option(NamedTuple):
    """One way to treat a half-step.

    Attributes:
        kept: bytes that it keeps until its backward.
        saved: seconds of the recompute that it saves.
        whole: it keeps all that its backward needs, and is not recomputed.
        before: of a ``whole`` one, bytes of the stream it adds to, before the addition: kept too, unless the
            previous half-step ``covers`` it.
        covers: what it keeps includes the stream that the next half-step adds to.
    """

    kept: int
    saved: float
    whole: bool = False
    before: int = 0
    covers: bool = False


class Stop(NamedTuple):
    """A half-step: its options (the first keeps nothing), and the bytes that its backward works with."""

    options: Sequence[Option]
    working: int


def allot(stops: Sequence[Stop], turn: int, limit: float) -> list[int] | None:
    """Return the number of the option for every half-step, or None if the limit cannot be met at all.

    Args:
        stops: the half-steps in the order of the forward, over all chains.
        turn: bytes held in addition when the forward is over.
        limit: bytes, never exceeded by what is kept plus what is worked with.
    """
    needed = max([turn, *(stop.working for stop in stops)])
    if needed > limit:
        return None
    most = sum(max(option.kept + option.before for option in stop.options) for stop in stops)
    unit = max(1, -(-most // UNITS))
    size = -(-most // unit) + len(stops)
    nothing = -np.inf
    # best[covers][used]: the most time saved, if the last half-step covers the next one's stream or not
    best = np.full((2, size + 1), nothing)
    best[0, 0] = 0.0
    came: list[np.ndarray] = []
    for stop in stops:
        _cut(best, stop.working, limit, unit)
        following, chosen = np.full_like(best, nothing), np.zeros((2, size + 1, 3), dtype=np.int64)
        for number, option in enumerate(stop.options):
            for last in (0, 1):
                kept = option.kept + (option.before if option.whole and not last else 0)
                step = -(-kept // unit)
                if step > size:
                    continue
                now = int(option.covers)
                candidates = best[last, : size + 1 - step] + option.saved
                better = candidates > following[now, step:]
                following[now, step:][better] = candidates[better]
                chosen[now, step:][better] = (number, last, step)
        best = following
        came.append(chosen)
    _cut(best, turn, limit, unit)
    covers, used = np.unravel_index(int(np.argmax(best)), best.shape)
    numbers = []
    for chosen in reversed(came):
        number, last, step = chosen[covers, used]
        numbers.append(int(number))
        covers, used = last, used - step
    return numbers[::-1]


def _cut(best: np.ndarray, working: int, limit: float, unit: int) -> None:
    """Exclude what leaves no room for ``working``."""
    room = (limit - working) // unit
    if room < best.shape[1] - 1:
        best[:, int(room) + 1 :] = -np.inf
