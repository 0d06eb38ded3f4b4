# SPDX-License-Identifier: Apache-2.0
"""The tests' own machinery: what goes wrong in a process is told, and goes no further than its case."""

import os
import time
from pathlib import Path

import pytest
from behaviour.common import torch

from distributed.cases import Cases

dist = torch.distributed
cases = Cases()


@cases.add
def sum_of_ranks():
    total = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(total)
    assert total == 3, total


def fail_here():
    raise ArithmeticError("on purpose")


@cases.add
def one_fails():
    if dist.get_rank() == 1:
        fail_here()
    sum_of_ranks()


@cases.add
def one_fails_late():
    sum_of_ranks()
    if dist.get_rank() == 0:
        fail_here()


def sleep_here():
    time.sleep(1e6)


@cases.add
def one_hangs():
    if dist.get_rank() == 1:
        sleep_here()
    sum_of_ranks()


@cases.add
def one_dies():
    """Once the other one is past the making of the group, where a death would be told as well, but from there."""
    arrived = Path("arrived")
    if dist.get_rank() == 1:
        while not arrived.exists():
            time.sleep(0.01)
        arrived.unlink()
        os._exit(3)
    arrived.touch()
    sum_of_ranks()


@pytest.fixture
def told(processes):
    return lambda case, patience=60: processes.run(__name__, case, patience)


@pytest.mark.parametrize(("case", "failing"), [("one_fails", 1), ("one_fails_late", 0)])
def test_a_failure_is_told(told, case, failing):
    """With the traceback of the rank that failed; the other one, which waits for it, is set free."""
    text = told(case).removeprefix("rank 0: ").split("\nrank 1: ")[failing]
    assert "in fail_here" in text and "ArithmeticError: on purpose" in text
    assert told("sum_of_ranks") is None


def test_a_hang_ends(told):
    """With a traceback of where every process was."""
    text = told("one_hangs", patience=4)
    assert "in sleep_here" in text and "in sum_of_ranks" in text
    assert told("sum_of_ranks") is None


def test_a_death_is_told(told):
    text = told("one_dies")
    assert "rank 1: ended within one_dies" in text and "in sum_of_ranks" in text
    assert told("sum_of_ranks") is None
