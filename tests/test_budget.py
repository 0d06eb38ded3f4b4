# SPDX-License-Identifier: Apache-2.0
"""MemoryBudget: what it may be given, and what becomes of it."""

import copy
import math
import pickle
import subprocess
import sys

import pytest

import revkernels as rk
from revkernels.budget import words

BYTES = {
    0: 0,
    1: 1,
    10**12: 10**12,
    "0 B": 0,
    "17B": 17,
    "1kB": 1000,
    "1 KB": 1000,
    "1KiB": 1024,
    "2GiB": 2 * 2**30,
    "2 gib": 2 * 2**30,
    "500 MB": 500 * 10**6,
    "1.5MiB": 3 * 2**19,
    " .5 TiB ": 2**39,
    "1e3 B": 1000,
    "3TB": 3 * 10**12,
}
SHARES = {0.0: 0.0, 0.25: 0.25, 1.0: 1.0, math.inf: math.inf, "25%": 0.25, "0%": 0.0, "100 %": 1.0, "12.5%": 0.125}


@pytest.mark.parametrize("amount", BYTES)
def test_bytes(amount):
    budget = rk.MemoryBudget(amount)
    assert (budget.bytes, budget.share, budget.amount) == (BYTES[amount], None, amount)
    assert type(budget.bytes) is int
    assert not budget.stores and budget.reconstructs == (BYTES[amount] == 0)
    assert budget.limit(100, 300) == (BYTES[amount] or 100)


@pytest.mark.parametrize("amount", SHARES)
def test_shares(amount):
    budget = rk.MemoryBudget(amount)
    share = SHARES[amount]
    assert (budget.bytes, budget.share) == (None, share)
    assert budget.stores == (share == math.inf) and budget.reconstructs == (share == 0)
    assert budget.limit(100, 300) == (math.inf if share == math.inf else 100 + 200 * share)


BAD = {
    "a bool": (True, TypeError, "bool"),
    "nothing": (None, TypeError, "NoneType"),
    "bytes": (b"1GB", TypeError, "bytes"),
    "a list": ([1], TypeError, "list"),
    "negative bytes": (-1, ValueError, "-1"),
    "a negative share": (-0.25, ValueError, "-0.25"),
    "a share above 1": (1.5, ValueError, "1.5"),
    "minus infinity": (-math.inf, ValueError, "-inf"),
    "not a number": (math.nan, ValueError, "nan"),
    "an empty string": ("", ValueError, "''"),
    "no unit": ("17", ValueError, "unit"),
    "no number": ("GiB", ValueError, "GiB"),
    "another unit": ("2 GiBit", ValueError, "GiBit"),
    "parsecs": ("2 parsecs", ValueError, "parsecs"),
    "a negative string": ("-2GB", ValueError, "-2GB"),
    "above all": ("110%", ValueError, "1.1"),
    "a percentage of nothing": ("%", ValueError, "%"),
    "two": ("1GB 2GB", ValueError, "1GB 2GB"),
    "nan as a string": ("nan%", ValueError, "nan%"),
    "more than a float holds": ("1e400 GB", ValueError, "1e400 GB"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_amounts(case):
    amount, error, part = BAD[case]
    with pytest.raises(error, match="amount is ") as caught:
        rk.MemoryBudget(amount)
    assert part in str(caught.value)


@pytest.mark.parametrize("amount", [5, 0.25, "2GiB", math.inf])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda budget: pickle.loads(pickle.dumps(budget))])
def test_copies_measure_for_themselves(amount, copied):
    budget = rk.MemoryBudget(amount)
    budget.planner = object()
    again = copied(budget)
    assert again is not budget and again.planner is None
    assert (again.amount, again.bytes, again.share) == (budget.amount, budget.bytes, budget.share)
    assert repr(budget) == repr(again) == f"MemoryBudget({amount!r})"


def test_no_torch():
    """A budget may be named where there is no torch."""
    code = "import sys, revkernels as rk; rk.MemoryBudget('10%'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_words():
    shown = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536 * 2**10: "1.5 MiB", 3 * 2**30: "3.0 GiB"}
    shown |= {5000 * 2**30: "5000.0 GiB", -2048: "-2.0 KiB", math.inf: "inf GiB"}
    assert {count: words(count) for count in shown} == shown
