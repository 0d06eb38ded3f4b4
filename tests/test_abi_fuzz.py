# SPDX-License-Identifier: Apache-2.0
"""Random calls of every entry of the C interface: right ones, wrong ones, and what lies between.

`abi.model` says beforehand whether a call must be refused. If so, it comes back with a status and a sentence and no
byte of memory has changed; if not, the memory is what `revkernels.reference` says. Calls are made in another process: a
crash is a failure like any other, which Hypothesis makes as small as it can. Calls that lie about the memory behind a
pointer are not made, for no library can see that. `test_sanitizers.py` has the same with sanitizers.
"""

import random

import pytest
from abi.cases import ENTRIES
from abi.fuzzer import Fuzzer
from native_oracle import ISAS
from programs import need_extension

from revkernels import native


@pytest.fixture
def fuzzer():
    need_extension()
    if native.missing("cuda") is None:
        pytest.skip("the model is of a machine without CUDA")
    made = Fuzzer(native.library(), isas=ISAS)
    yield made
    made.close()


def check_both(fuzzer, at_least):
    """Every entry has had calls that are right, and ones that are not."""
    for entry in ENTRIES:
        for outcome in ("right", "refused"):
            assert fuzzer.seen[entry, outcome] >= at_least, fuzzer.seen


def test_random_calls(fuzzer):
    """The same ones every time, as far as ten seconds take us."""
    fuzzer.run(10, first=0)
    check_both(fuzzer, 1)


@pytest.mark.slow
def test_random_calls_for_long(fuzzer):
    """Others every time; a failure says with which seed its batch began."""
    fuzzer.run(200, first=random.SystemRandom().randrange(10**6, 10**9))
    check_both(fuzzer, 100)
