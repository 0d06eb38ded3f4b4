# SPDX-License-Identifier: Apache-2.0
"""The planner by itself: what a plan counts, and which calls belong to a step."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
import revkernels as rk  # noqa: E402
from revkernels.autograd.planning.costs import CallCost, Choice, StepCost  # noqa: E402
from revkernels.autograd.planning.planner import Made, Planner, _kept_by, _workings  # noqa: E402

NOTHING = Choice.nothing()


def step(covers=False, live=None):
    return StepCost("branch", (), 5.0, 9.0, 700, 100, 100, 30, live, None, covers)


def test_streams_that_are_kept_besides():
    """Behind a half-step that is rebuilt, unless a neighbour covers them."""
    bare, covering = (step(covers).choices()[-1] for covers in (False, True))
    assert list(_kept_by([bare, bare, NOTHING, bare, bare])) == [800, 800, 0, 900, 900]
    assert list(_kept_by([covering, NOTHING, covering, covering])) == [800, 0, 900, 800]


def test_what_goes_to_host_memory():
    """900 bytes of a half-step, or 500 where outputs are made again in a second; 5 seconds of forward and 9 of backward
    hide the way."""
    cost = replace(step(), made_again=400, making=1.0)

    def away(there, back):
        menu = cost.choices((there / 100, back / 100))
        return {c.makes_again: c.option.saved for c in menu if c.away and c.option.kept == 0 and c.option.whole}

    assert away(0.5, 1.0) == {False: 5.0, True: 4.0}
    assert away(1.0, 1.0) == {False: 5.0 - 4.0, True: 4.0}  # 9 seconds there, 4 too many; or 5
    assert away(1.0, 2.0) == {True: 4.0 - 1.0}  # 18 back, or 10
    assert away(2.0, 2.0) == {}
    assert not any(choice.away for choice in cost.choices())


def test_earlier_calls_are_there_meanwhile():
    """What a call was seen to take is added to the input and output of those before it, and to what lies between."""
    call = CallCost(200, [step(live=5000)] * 2, 20.0)
    (first, second), turn = _workings([call, call])
    assert second == [working + 400 for working in first] and turn == 800
    between = CallCost(200, [step(live=5000)] * 2, 20.0, entry=1000)
    assert _workings([call, between])[0][1] == [working + 1000 for working in first]


def enter(planner, kind):
    x = torch.zeros(2, 4)
    return planner.enter(kind, ["branch"] * 2, [x, x], [torch.tanh] * 2, 64)


def learn(planner, *kinds):
    """A step of these calls."""
    calls = [enter(planner, kind) for kind in kinds]
    for kind in kinds:
        planner._costs.setdefault(kind, (CallCost(200, [step(True)] * 2, 20.0), tuple(kinds)))
    for call in calls:
        call.meter = None
        planner.ended(call)


def test_a_call_leaves_room_for_those_that_may_follow():
    everything = Made(rk.MemoryBudget(0), [CallCost(200, [step(True)] * 2, 1.0)], 1.0).storing
    for order in (["A"], ["A", "B"]), (["A", "B"], ["A"]):
        planner = Planner(rk.MemoryBudget(everything))
        for kinds in order:
            learn(planner, *kinds)
        alone, both = planner._plans["A",], planner._plans["A", "B"]
        assert both.kept[0] < alone.kept[0]
        assert planner._plan_for(("A",)) is both


def test_pending_calls_belong_to_the_next_step():
    """As in a pipeline; thrown away, or with their backward behind them, they do not."""
    planner = Planner(rk.MemoryBudget(0.5))
    first, second = enter(planner, "A"), enter(planner, "B")
    assert second.order == ("A", "B")
    first.meter = None
    planner.ended(first)
    third = enter(planner, "C")
    assert third.order == ("B", "C")
    del second
    assert enter(planner, "D").order == ("C", "D")
    del third
    assert enter(planner, "E").order == ("E",)
