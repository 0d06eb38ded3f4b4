# SPDX-License-Identifier: Apache-2.0
"""The largest batch that fits into given memory, found by measuring."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["largest_batch"]

_TRIES = 6  # each is a training step; a peak that is linear in the batch needs three


def largest_batch(peak: Callable[[int], int], limit: int, first: int, first_peak: int, most: int) -> int:
    """Return the largest batch found whose measured peak is at most ``limit``; 0 if none was found.

    Peaks are assumed to be linear in the batch, through the last two measured; every guess is measured, and only a
    batch measured within the limit is returned.

    Args:
        peak: measures a batch's bytes.
        limit: bytes.
        first, first_peak: a batch that has been measured, and its bytes.
        most: no larger batch is tried.
    """
    known = {first: first_peak}
    guess = first * limit // max(1, first_peak)  # ignores the constant part, so the guess is too small above first
    for _ in range(_TRIES):
        good = max((b for b, bytes_ in known.items() if bytes_ <= limit), default=0)
        bad = min((b for b, bytes_ in known.items() if bytes_ > limit), default=most + 1)
        guess = min(max(guess, good + 1), bad - 1)
        if guess in known or guess < 1 or guess <= good:
            break
        known[guess] = peak(guess)
        (b1, p1), (b2, p2) = list(known.items())[-2:]
        slope = (p2 - p1) / (b2 - b1)
        guess = int(b2 + (limit - p2) / slope) if slope > 0 else most
    return max((b for b, bytes_ in known.items() if bytes_ <= limit), default=0)
