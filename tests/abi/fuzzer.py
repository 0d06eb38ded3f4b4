# SPDX-License-Identifier: Apache-2.0
"""Calls on one library, judged: by hand, or at random for as long as one likes."""

import collections
import itertools
import time

import numpy as np
from hypothesis import HealthCheck, given, seed, settings

from abi import oracle, structs
from abi.calls import ARENA
from abi.cases import cases
from abi.model import RefusedError, UnknownError
from abi.verdict import facts
from abi.worker import Worker


class Fuzzer:
    """Makes calls in another process and judges them.

    Attributes:
        seen: how many calls of each entry were right, and how many refused.
    """

    def __init__(self, library, env=None, isas=(None,)):
        self._worker, self._isas, self._said = Worker(library, env), itertools.cycle(isas), None
        self._isa = next(self._isas)
        self.seen = collections.Counter()

    def close(self):
        self._worker.close()

    def run(self, seconds, first):
        """Judge random calls for that long. ``first`` is the seed of the first batch, the rest follow."""
        end = time.monotonic() + seconds
        for number in itertools.count(first):
            if time.monotonic() > end:
                return
            self._isa = next(self._isas)
            self._batch(number)

    def _batch(self, number):
        @seed(number)
        @settings(max_examples=250, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(cases())
        def judge(case):
            try:
                self.judge(case)
            except AssertionError as error:
                raise type(error)(f"{error}\nof batch {number}, loops: {self._isa or 'as they are'}") from None

        judge()

    def judge(self, case):
        """Make a call unless it is about memory that is not there; say what is wrong with its outcome, if anything."""
        entry = case.call["entry"]
        try:
            self._judge_right(case, facts(case.call))
            self.seen[entry, "right"] += 1
        except RefusedError as refusal:
            self._judge_refused(case, str(refusal))
            self.seen[entry, "refused"] += 1
        except UnknownError:
            self.seen["not made"] += 1

    def _call(self, case, arrays):
        """(result, last error, last error before, the arena before and after); those arrays may be touched."""
        before, previous, self._said = case.content(), self._said, None  # unknown, should this end in a crash
        result, self._said, after = self._worker.call(before, case.call, _ranges(arrays), self._isa)
        return result, self._said, previous, before, after

    def _judge_right(self, case, about):
        status, said, previous, before, after = self._call(case, about.arrays)
        assert status == 0, f"refused with status {status}: {said}"
        assert said == previous or previous is None, "a call that succeeds leaves the last failure as it was"
        oracle.check(case.call["entry"], about, before, after)

    def _judge_refused(self, case, reason):
        status, said, _, before, after = self._call(case, [])
        counts_bytes = case.call["entry"] == "revk_norm_workspace"
        refused = (-1,) if counts_bytes else (structs.INVALID_ARGUMENT, structs.UNSUPPORTED)
        assert status in refused, f"status {status}, but: {reason}"
        assert said.strip(), "refused without a word"
        assert after == before, f"refused with {said!r}, but something is written"


def _ranges(arrays):
    """(begin, end) of the bytes that belong to some array."""
    mask = np.zeros(ARENA + 2, bool)
    for array in arrays:
        mask[1:-1] |= array.mask()
    edges = np.flatnonzero(mask[1:] != mask[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
