# SPDX-License-Identifier: Apache-2.0
"""Classes declared `stateless`: the results of plain torch, no search, and what is wrong with a declaration."""

import random

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import WIDE, assert_all_close, assert_raises, check_step, loss_of, rows, torch, twins
from revkernels.autograd.state.parts import Parts
from revkernels.nn import ReversibleBlock, ReversibleSequential, stateless


class Own(nn.Module):
    """A norm, dropout, a buffer that is written, and numbers."""

    def __init__(self, p=0.2):
        super().__init__()
        self.norm, self.layer, self.p, self.scale = nn.BatchNorm1d(4), nn.Linear(4, 4), p, 0.5
        self.register_buffer("seen", torch.zeros(()))
        self.to(WIDE)

    def forward(self, x):
        self.seen.add_(len(x))
        h = torch.relu(self.norm(x)) + torch.tanh(self.seen) * x
        return self.scale * nn.functional.dropout(self.layer(h), self.p, self.training)


@stateless
class Declared(Own):
    pass


class Derived(Declared):
    pass


def pairs(depth=3):
    torch.manual_seed(0)
    return [(Declared(), Declared()) for _ in range(depth)]


@pytest.mark.parametrize("training", [True, False])
def test_steps_as_plain_torch(training, options):
    net, plain = twins(pairs(), **options)
    net.train(training)
    plain.train(training)
    check_step(net, plain, rows(), steps=3)


def test_it_is_not_searched():
    """Nor for what it holds, where its class promises that; a derived class has promised nothing."""
    assert Parts(Declared()).own is None
    assert Parts(Derived()).own is not None
    for held in ([1], {}, torch.ones(1), len):
        branch = Declared()
        branch.held = held
        assert Parts(branch).own is not None, held


def warm(backend):
    """A chain that has run once: which buffers its branches write is known."""
    net = ReversibleSequential([ReversibleBlock(*pair) for pair in pairs(1)], backend=backend)
    net(rows()).sum().backward()
    net.zero_grad()
    return net


def test_parameters_are_watched(backend):
    net = warm(backend)
    y = net(rows())
    with torch.no_grad():
        net[0].F.layer.weight.mul_(2)
    assert_raises(rk.ReconstructionError, ["weight", "changed in place"], y.sum().backward)


def test_numbers_come_back(backend):
    """Those of the forward are there in the recompute."""
    found = []
    for changed in (False, True):
        net, x = warm(backend), torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8).requires_grad_()
        torch.manual_seed(1)
        loss = loss_of(net(x))
        if changed:
            net[0].F.scale = 3.0
        loss.backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert_all_close(*found)


@stateless
class Draws(nn.Module):
    """A wrong declaration: it draws from Python's generator."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=WIDE))

    def forward(self, x):
        return x * self.weight * random.uniform(1, 2)


def test_a_wrong_declaration_is_found_at_first(backend):
    net = ReversibleSequential(ReversibleBlock(Draws(), nn.Tanh()), backend=backend)
    y = net(rows())
    assert_raises(rk.ReconstructionError, ["did not do the same twice"], y.sum().backward)


UNFIT = {
    "a module": nn.Tanh(),
    "a number": 3,
    "a function": torch.relu,
    "another class": int,
    "no forward": type("Empty", (nn.Module,), {}),
}


@pytest.mark.parametrize("given", UNFIT)
def test_what_cannot_be_declared(given):
    assert_raises(TypeError, ["stateless"], lambda: stateless(UNFIT[given]))
