# SPDX-License-Identifier: Apache-2.0
"""`allot` against trying out all plans there are."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")  # revkernels.autograd imports it

from revkernels.autograd.planning.knapsack import UNITS, Option, Stop, allot

NOTHING = Option(0, 0.0)


def options(largest):
    saved, sizes = st.integers(-3, 60).map(float), st.integers(0, largest)
    some = st.builds(Option, sizes, saved, st.just(False), st.just(0), st.just(False))
    return st.one_of(some, st.builds(Option, sizes, saved, st.just(True), sizes, st.booleans()))


def stops(largest, count=6):
    menus = st.lists(options(largest), max_size=3).map(lambda found: [NOTHING, *found])
    return st.lists(st.builds(Stop, menus, st.integers(0, 2 * largest)), min_size=1, max_size=count)


def outcome(stops, turn, numbers):
    """The peak of a plan and what it saves, told straight from the definition."""
    chosen = [stop.options[number] for stop, number in zip(stops, numbers, strict=True)]
    kept = []
    for k, option in enumerate(chosen):
        has_it = k > 0 and chosen[k - 1].covers
        kept.append(option.kept + (option.before if option.whole and not has_it else 0))
    peak = max(sum(kept[:p]) + stop.working for p, stop in enumerate(stops))
    return max(peak, sum(kept) + turn), sum(option.saved for option in chosen)


def best(stops, turn, limit):
    plans = itertools.product(*(range(len(stop.options)) for stop in stops))
    possible = [saved for peak, saved in (outcome(stops, turn, plan) for plan in plans) if peak <= limit]
    return max(possible, default=None)


@settings(max_examples=300, deadline=None)
@given(stops(20), st.integers(0, 60), st.integers(0, 200))
def test_the_best_of_all(stops, turn, limit):
    """Where all that there is fits into the units, nothing is rounded: no plan saves more."""
    numbers, expected = allot(stops, turn, limit), best(stops, turn, limit)
    if expected is None:
        assert numbers is None
        return
    peak, saved = outcome(stops, turn, numbers)
    assert peak <= limit and saved == expected


@settings(max_examples=300, deadline=None)
@given(stops(10**9), st.integers(0, 10**9), st.integers(0, 4 * 10**9))
def test_rounded(stops, turn, limit):
    """Bytes are rounded up to units: never above the limit, as good as what leaves a unit a half-step unused."""
    numbers = allot(stops, turn, limit)
    assert (numbers is None) == (best(stops, turn, limit) is None)
    if numbers is None:
        return
    peak, saved = outcome(stops, turn, numbers)
    assert peak <= limit
    most = sum(max(option.kept + option.before for option in stop.options) for stop in stops)
    unit = -(-most // UNITS)
    below = best(stops, turn, limit - (2 * len(stops) + 1) * unit)
    assert below is None or saved >= below


@settings(max_examples=100, deadline=None)
@given(stops(10**6, 12), st.integers(0, 10**6), st.lists(st.integers(0, 10**7), min_size=2, max_size=6))
def test_more_memory_never_saves_less(stops, turn, limits):
    found = [allot(stops, turn, limit) for limit in (*sorted(limits), math.inf)]
    saved = [-math.inf if numbers is None else outcome(stops, turn, numbers)[1] for numbers in found]
    assert saved == sorted(saved)


@settings(max_examples=100, deadline=None)
@given(stops(10**6, 5), st.integers(0, 10**6))
def test_without_a_limit(stops, turn):
    """Every half-step has the option that saves most."""
    numbers = allot(stops, turn, math.inf)
    _, saved = outcome(stops, turn, numbers)
    assert saved == sum(max(option.saved for option in stop.options) for stop in stops)


def test_the_least_that_does():
    """None below the largest of what is worked with, and at the turn; then nothing is kept."""
    chain = [Stop([NOTHING, Option(10, 1.0)], 30), Stop([NOTHING, Option(10, 1.0)], 40)]
    for turn in (0, 39, 50):
        least = max(40, turn)
        assert allot(chain, turn, least - 1) is None
        assert allot(chain, turn, least) == [0, int(turn < 30)]
    assert allot(chain, 0, 50) == [1, 1]


def test_what_is_kept_is_gone_when_its_backward_is_over():
    """The first half-step works with much: what comes later is kept nonetheless."""
    chain = [Stop([NOTHING, Option(10, 1.0)], 100), Stop([NOTHING, Option(60, 1.0)], 20)]
    assert allot(chain, 0, 100) == [1, 1]
    assert allot(chain[::-1], 0, 100) == [0, 1]


def test_a_neighbour_may_have_the_stream_already():
    whole = Option(10, 1.0, True, 7, covers=True)
    chain = [Stop([NOTHING, whole], 0)] * 3
    assert allot(chain, 0, 37) == [1, 1, 1]
    assert sum(allot(chain, 0, 36)) == 2
    assert sum(allot(chain, 0, 26)) == 1  # two apart would need 34, two together 27
    bare = whole._replace(covers=False)
    chain = [Stop([NOTHING, bare], 0)] * 3
    assert allot(chain, 0, 51) == [1, 1, 1] and sum(allot(chain, 0, 50)) == 2


@pytest.mark.parametrize("length", [1, 128, 600])
def test_long_chains(length):
    """As many as a deep network has; a third of the memory keeps about a third."""
    random = np.random.default_rng(length)
    chain = [Stop([NOTHING, Option(int(size), 1.0)], 10**6) for size in random.integers(10**6, 2 * 10**6, length)]
    everything = sum(stop.options[1].kept for stop in chain) + 10**6
    numbers = allot(chain, 0, everything // 3 + 10**6)
    assert length == 1 or length / 3 - 2 < sum(numbers) < length / 2
    assert outcome(chain, 0, numbers)[0] <= everything // 3 + 10**6
