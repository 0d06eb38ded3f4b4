# SPDX-License-Identifier: Apache-2.0
"""bench numpy: every case runs, does the same work in each contender, and goals are set where they were set for."""

import numpy as np
import pytest

from revkernels import native
from revkernels.bench import numpy as bench
from revkernels.bench.clocks import HostClock

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)


@pytest.fixture
def small_cache(monkeypatch):
    monkeypatch.setattr(bench, "last_level_cache", lambda: 1 << 10)


def test_every_case_runs(small_cache):
    rows = list(bench.SUITE.run(bench.Setup(megabytes=1, threads=2), HostClock(), rounds=2))
    assert len(rows) == 2 * len(bench.SUITE)
    for row in rows:
        assert row.median_s > 0 and row.baseline == "numpy"
        judged = row.variant == "cpu" and row.benchmark != "call"
        assert (row.goal is not None) == judged
        if judged:
            assert row.goal["at_most"] == (0.6 if row.case.endswith("temporaries") else 0.75)
        assert (row.gbps is None) == (row.benchmark == "call")
    float32 = next(row for row in rows if (row.benchmark, row.case) == ("reverse_step_", "float32"))
    assert float32.bytes_moved == 6 << 20  # four streams read, two written


def test_contenders_do_the_same_work(small_cache):
    """In place both leave the same bits; with temporaries NumPy's result is what the kernel leaves."""
    for one in bench.SUITE.benchmarks:
        for case in one.cases:
            trial = one.make(bench.Setup(megabytes=1), case)
            mine, theirs = ([a[:1000].copy() for a in trial.operands[0]] for _ in range(2))
            trial.contenders["cpu"](*mine)
            returned = trial.contenders["numpy"](*theirs)
            if "temporaries" in case:
                results = returned if isinstance(returned, tuple) else (returned,)
                theirs[: 2 * len(results) : 2] = results
            for left, right in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(left, right, err_msg=f"{one.name} {case}")


def test_no_goal_where_none_was_set(monkeypatch, small_cache):
    assert not bench.couple_(bench.Setup(megabytes=1, threads=1), "float32").goals
    monkeypatch.setattr(bench, "last_level_cache", lambda: 1 << 30)
    monkeypatch.setattr(bench, "rotation", lambda size, cache: 1)
    assert not bench.couple_(bench.Setup(megabytes=1, threads=2), "float32").goals
