# SPDX-License-Identifier: Apache-2.0
"""Offload under a memory budget. Here the way to host memory is a copy on the same host, given as free of charge: what
is sent, when it comes back and what comes of it is the same; streams and events are a GPU's (`test_exact_gpu`)."""

import gc
import weakref

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import KINDS, WIDE, assert_same, step, torch
from behaviour.exact_chains import STORED, assert_same_bits, conv, pair_of
from revkernels.autograd.planning import offload, planner
from revkernels.nn import BasicBranch, MLPBranch


@pytest.fixture(autouse=True)
def a_way(monkeypatch):
    monkeypatch.setattr(planner, "way_of", lambda device: (0.0, 0.0))


@pytest.fixture
def moved(monkeypatch):
    """What was sent away, as weak references, and how often something was fetched."""
    seen = {"sent": [], "bytes": 0, "fetched": 0}
    init, fetch = offload.OffloadedTensor.__init__, offload.OffloadedTensor.fetch

    def noting(self, tensor):
        init(self, tensor)
        seen["sent"].append(weakref.ref(tensor.untyped_storage()))
        seen["bytes"] += tensor.nbytes

    def counting(self):
        seen["fetched"] += self.back is None
        fetch(self)

    monkeypatch.setattr(offload.OffloadedTensor, "__init__", noting)
    monkeypatch.setattr(offload.OffloadedTensor, "fetch", counting)
    return seen


#: Hardly anything may stay: what is worth keeping is sent away.
LITTLE = rk.MemoryBudget(0.3, offload=True)


def budget():
    return rk.MemoryBudget(LITTLE.amount, offload=True)


@pytest.mark.parametrize("name", KINDS)
def test_as_stored(name, backend, moved):
    kind = KINDS[name]
    net, plain = kind.twins(4, backend=backend, activations=budget())
    for number in range(4):
        x = kind.x()
        assert_same(step(net, x, seed=number), step(plain, x, seed=number))
    if "in host memory" in str(net.plan()):
        assert moved["fetched"] == len(moved["sent"]) > 0
        assert all(reference() is None for reference in moved["sent"])  # none was held on to


def test_all_of_it_goes_where_nothing_may_stay(compiled, moved):
    """Which the estimate of what is on its way leaves room for in a larger network only: so the budget is given."""
    net, stored = pair_of(conv, 6, backend=compiled)
    net.coupling = stored.coupling = rk.Exact(k=14)
    net.activations = rk.MemoryBudget(1 << 30, offload=True)
    x = torch.randn(2, 16, 5, 6, requires_grad=True)
    for number in range(4):
        assert_same_bits(step(net, x, seed=number), step(stored, x, seed=number))
    everything = {"everything", "everything but norms' outputs"}
    away = {f"{kept}, in host memory" for kept in everything}
    assert {kept.kept for kept in net.plan().steps} <= everything | away | {"nothing"}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("storage", STORED)
def test_forced(storage, again, compiled, moved, monkeypatch):
    """Every second half-step away, the others rebuilt: streams from before are sent and come back as well."""
    choose = planner.Planner._plan_for

    def alternate(self, order):
        made = choose(self, order)
        if made is not None:
            for choices in made.choices:
                for k in range(len(choices)):
                    option = planner.Choice.nothing().option
                    whole = option._replace(whole=True)
                    away = planner.Choice(whole, {}, True, again)
                    choices[k] = away if k % 2 else planner.Choice.nothing()
        return made

    monkeypatch.setattr(planner.Planner, "_plan_for", alternate)
    net, stored = pair_of(conv, 4, coupling=STORED[storage], backend=compiled)
    net.activations = budget()
    x = torch.randn(2, 16, 5, 6, requires_grad=True)
    for number in range(4):
        assert_same_bits(step(net, x, seed=number), step(stored, x, seed=number))
    assert moved["fetched"] == len(moved["sent"]) > 0
    gc.collect()
    assert all(reference() is None for reference in moved["sent"])
    net.zero_grad()
    y = net(x)
    y.square().sum().backward(retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]
    y.square().sum().backward()  # what was sent away is there still
    for parameter, gradient in zip(net.parameters(), first, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


def test_parameters_stay(compiled, moved):
    net, _ = pair_of(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()), 3, backend=compiled)
    offloaded = offload.OffloadGroup(frozenset(p.untyped_storage().data_ptr() for p in net.parameters()))
    weight = net[0].F[0].weight.detach()
    assert offloaded.send(weight) is weight and offloaded.send(weight.t()) is not None and not moved["sent"]
    other = torch.ones(3, dtype=WIDE)
    first, second = offloaded.send(other), offloaded.send(other.view(3))
    assert first is second and len(moved["sent"]) == 1  # one memory, one copy
    assert torch.equal(first.here(), other) and first.here().data_ptr() != other.data_ptr()


def test_every_stream_waits_for_the_copy(monkeypatch):
    """Nodes of a branch that used several CUDA streams ask on their own ones. No GPU is needed to see whom they ask."""
    waited = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            waited.append((self.name, event))

    class Back:
        def record_stream(self, stream):
            waited.append((stream.name, "recorded"))

    tensor = offload.OffloadedTensor(torch.ones(2))
    tensor.back, tensor.done = Back(), "copied"
    for name in ("first", "second"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, name=name: Stream(name))
        assert tensor.here() is tensor.back
    assert waited == [(name, what) for name in ("first", "second") for what in ("copied", "recorded")]


def test_options():
    assert repr(rk.MemoryBudget("1GiB", offload=True)) == "MemoryBudget('1GiB', offload=True)"
    with pytest.raises(TypeError, match="offload is a str"):
        rk.MemoryBudget("1GiB", offload="yes")


class Expanded(nn.Module):
    """Saves a tensor with less memory than elements."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) * x.mean(-1, keepdim=True).expand_as(x)


def test_expanded_tensors_stay(compiled, moved, monkeypatch):
    monkeypatch.setattr(planner.Planner, "_plan_for", everything_away(planner.Planner._plan_for))
    net, stored = pair_of(Expanded, 3, split_dim=-1, backend=compiled)
    net.activations = budget()
    x = torch.randn(5, 16, requires_grad=True)
    for number in range(3):
        assert_same_bits(step(net, x, seed=number), step(stored, x, seed=number))
    assert moved["sent"]


@pytest.mark.parametrize("branch", [BasicBranch, MLPBranch])
def test_outputs_of_norms_and_activations_are_not_sent(branch, compiled, moved, monkeypatch):
    """What they are made of is: once, and held on to by nobody. In a graph that is kept they are made twice."""
    wide = 16 if branch is MLPBranch else 8  # hidden, so that its activation's output is larger than all else

    def pair():
        return pair_of(lambda: branch(8, wide), 4, split_dim=-1 if branch is MLPBranch else 1, backend=compiled)

    x = torch.randn(*((3, 5, 16) if branch is MLPBranch else (3, 16, 5, 5)), requires_grad=True)
    choose, sent = planner.Planner._plan_for, {}
    for again in (False, True):
        monkeypatch.setattr(planner.Planner, "_plan_for", everything_away(choose, again))
        net, stored = pair()
        net.activations = budget()
        for number in range(3):
            del moved["sent"][:]
            moved["bytes"] = moved["fetched"] = 0
            assert_same_bits(step(net, x, seed=number), step(stored, x, seed=number))
        assert moved["fetched"] == len(moved["sent"]) > 0
        gc.collect()
        assert all(reference() is None for reference in moved["sent"])
        sent[again] = moved["bytes"]
        net.zero_grad()
        y = net(x)
        y.square().sum().backward(retain_graph=True)
        first = [p.grad.clone() for p in net.parameters()]
        y.square().sum().backward()
        for parameter, gradient in zip(net.parameters(), first, strict=True):
            assert torch.equal(parameter.grad, 2 * gradient)
    # Basic: four tensors of a stream's size instead of six. MLP: its norm's output and the wide one behind GELU less.
    assert sent[True] < 0.75 * sent[False]


def everything_away(choose, again=False):
    def forced(self, order):
        made = choose(self, order)
        for choices in made.choices if made is not None else ():
            whole = planner.Choice.nothing().option._replace(whole=True)
            choices[:] = [planner.Choice(whole, {}, True, again)] * len(choices)
        return made

    return forced
