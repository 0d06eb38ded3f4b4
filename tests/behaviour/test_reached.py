# SPDX-License-Identifier: Apache-2.0
"""Rows 4, 33 and 34 for what a branch reaches without having registered it: modules in lists and dictionaries, behind
lambdas, as globals."""

import functools
import itertools
import threading
import weakref

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from behaviour.common import WIDE, assert_raises, rows, torch
from revkernels import Exact
from revkernels.autograd.state import reachable
from revkernels.errors import ReconstructionError
from revkernels.nn import ReversibleBlock, ReversibleSequential, checkpoint


class Listed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.held = [inner]

    def inner(self):
        return self.held[0]

    def forward(self, h):
        return self.inner()(h).tanh()


class InDictionary(Listed):
    def __init__(self, inner):
        super().__init__(inner)
        self.held = {"a": (inner,)}

    def inner(self):
        return self.held["a"][0]


class Unregistered(Listed):
    def __init__(self, inner):
        super().__init__(None)
        object.__setattr__(self, "hidden", inner)

    def inner(self):
        return self.hidden


class BehindPartial(Listed):
    def __init__(self, inner):
        super().__init__(None)
        self.call = functools.partial(lambda module, h: module(h), inner)

    def inner(self):
        return self.call


class OwnForward(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.forward = lambda h: inner(h).tanh()


class InAnother(nn.Module):
    """Held by something that is held."""

    def __init__(self, inner):
        super().__init__()
        self.held = [Listed(inner)]

    def forward(self, h):
        return self.held[0](h)


GLOBAL = nn.BatchNorm1d(4).to(WIDE)


class NamesAGlobal(nn.Module):
    def __init__(self, inner):
        super().__init__()
        GLOBAL.load_state_dict(inner.state_dict())

    def forward(self, h):
        return GLOBAL(h).tanh()


HOLDERS = [Listed, InDictionary, Unregistered, BehindPartial, OwnForward, InAnother]


def net_of(holder, inner, activations="reconstruct", **options):
    return ReversibleSequential(ReversibleBlock(holder(inner), nn.Tanh()), activations=activations, **options)


@pytest.mark.parametrize("holder", [*HOLDERS, NamesAGlobal])
def test_statistics_move_once(holder):
    found = []
    for activations in ("store", "reconstruct"):
        inner = nn.BatchNorm1d(4).to(WIDE)
        x = torch.linspace(-1, 2, 40, dtype=WIDE).reshape(5, 8).requires_grad_()
        net_of(holder, inner, activations)(x).sin().sum().backward()
        inner = GLOBAL if holder is NamesAGlobal else inner
        found.append((inner.num_batches_tracked.item(), inner.running_mean.clone(), x.grad))
    (count, mean, grad), (again, now, theirs) = found
    assert count == again == 1 and torch.equal(mean, now)
    torch.testing.assert_close(theirs, grad)


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_change_is_told(holder):
    linear = nn.Linear(4, 4).to(WIDE)
    y = net_of(holder, linear)(rows()).sin().sum()
    with torch.no_grad():
        linear.weight.mul_(2)
    assert_raises(ReconstructionError, ["weight", "changed in place"], y.backward)


@pytest.mark.parametrize("holder", HOLDERS)
def test_modes_and_power_iterations_are_those_of_the_forward(holder):
    found = []
    for activations in ("store", "reconstruct"):
        torch.manual_seed(3)
        inner = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Dropout(0.5)).to(WIDE)
        x = rows()
        y = net_of(holder, inner, activations)(x).sin().sum()
        inner.eval()
        y.backward()
        assert not inner.training
        found.append([x.grad, *(p.grad for p in inner.parameters()), *inner.buffers()])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_tensor_in_a_list():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scales = [scale]

        def forward(self, h):
            return (h * self.scales[0]).tanh()

    scale = torch.ones(4, dtype=WIDE)
    y = net_of(Scaled, scale)(rows()).sum()
    scale.mul_(2)
    assert_raises(ReconstructionError, ["scales", "changed in place"], y.backward)


def test_what_contains_the_branch_is_not_part_of_it():
    """A module may know the model that it is in, whose other parameters are nobody's here."""

    class Knows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.up = nn.Linear(4, 4), []

        def forward(self, h):
            return self.linear(h).tanh()

    model = nn.Module()
    model.head = nn.Linear(8, 1).to(WIDE)
    knows = Knows().to(WIDE)
    model.net = ReversibleSequential(ReversibleBlock(knows, nn.Tanh()))
    knows.up.append(model)
    y = model.net(rows()).sum()
    with torch.no_grad():
        model.head.weight.mul_(2)
    y.backward()
    assert knows.linear.weight.grad is not None


def test_through_checkpoint():
    inner = nn.BatchNorm1d(8).to(WIDE)
    checkpoint(Listed(inner), rows()).sum().backward()
    assert inner.num_batches_tracked == 1


def test_script_modules():
    """Buffers of theirs cannot be put back; without, they are as any."""
    x = rows(dtype=torch.float32)
    traced = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(5, 4))
    net = ReversibleSequential(ReversibleBlock(traced, nn.Tanh()))
    assert_raises(ReconstructionError, ["TracedModule", "buffers", "activations='store'"], lambda: net(x))
    net.activations = "store"
    net(x).sum().backward()
    branch = nn.Sequential(torch.jit.trace(nn.Linear(4, 4), torch.randn(5, 4)), torch.jit.script(nn.SiLU()))
    branch.metrics = {"unused": torch.jit.script(nn.BatchNorm1d(4))}
    found = []
    for activations in ("store", "reconstruct"):
        x.grad = None
        net = ReversibleSequential(ReversibleBlock(branch, nn.Tanh()), activations=activations)
        net(x).sin().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.sigmoid(x @ self.weight) * x


class CallsScripted(Gated):
    """The scripted function is found by the code alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.__dict__["function"] = torch.jit.script(gate)

    def forward(self, x):
        return self.__dict__["function"](x, self.weight)


def gate(x, weight):
    return torch.sigmoid(x @ weight) * x


# Each once in a process, for torch.jit keeps what it has made of a class or a function.
@pytest.mark.parametrize(
    ("make", "coupling"),
    [(lambda: torch.jit.script(Gated()), "float"), (CallsScripted, Exact(k=12))],
    ids=["module", "function"],
)
def test_the_first_call_of_what_is_scripted(make, coupling):
    """torch.jit runs it otherwise than later ones, and saves tensors of the same shapes in another order: refused, and
    right behind a call whose result is dropped."""
    net = ReversibleSequential(ReversibleBlock(make(), nn.Tanh()), coupling=coupling)
    plain = Gated()
    plain.load_state_dict(net[0].F.state_dict())
    x = rows(4, 8, dtype=torch.float32)
    assert_raises(ReconstructionError, ["torch.jit", "before its first step"], lambda: net(x).sin().sum().backward())
    x.grad = None
    net(x).sin().sum().backward()
    expected = ReversibleSequential(ReversibleBlock(plain, nn.Tanh()), coupling=coupling, activations="store")
    (gradient,) = torch.autograd.grad(expected(x).sin().sum(), x)
    torch.testing.assert_close(x.grad, gradient)


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4), []
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, h):
        self.steps += 1
        return self.linear(h).tanh()


def test_modules_that_are_known_and_not_run():
    """Each branch knows the next, and all know the head, whose buffers are written elsewhere."""
    branches, head = [Steps().to(WIDE) for _ in range(4)], Steps().to(WIDE)
    for branch, other in itertools.pairwise(branches):
        branch.other = [other, head]
    net = ReversibleSequential([ReversibleBlock(F, G) for F, G in zip(branches[::2], branches[1::2], strict=True)])
    for step in range(1, 4):
        y1, y2 = net(rows()).chunk(2, 1)
        (head(y1) + y2).sum().backward()
        assert [branch.steps.item() for branch in branches] == [step] * 4 and head.steps == step


total = torch.zeros((), dtype=WIDE)


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.total = nn.Linear(4, 4)

    def forward(self, h):
        return self.total(h).tanh()


def test_an_attribute_of_a_globals_name():
    y = ReversibleSequential(ReversibleBlock(Names().to(WIDE), nn.Tanh()))(rows()).sum()
    total.add_(y.detach())
    y.backward()


class Loads(list):
    def __iter__(self):
        raise OSError


class Anything:
    def __init__(self):
        self.d = {}

    def __getattr__(self, name):
        return self.d[name]

    def __call__(self, h):
        return h


def test_odd_things_are_left_alone():
    """Proxies, callables that answer any name, lists that load when they are looked at, and much data."""
    net = ReversibleSequential(ReversibleBlock(nn.Linear(4, 4), Names())).to(WIDE)
    gone = nn.Linear(1, 1)
    net[0].G.held = [weakref.proxy(net), weakref.proxy(gone), Anything(), Loads([1]), threading.Lock()]
    net[0].G.loads, net[0].G.any = Loads([1]), Anything()
    del gone
    net(rows()).sum().backward()
    deep = [[[0.5] * 1000] * 1000] * 1000
    net[0].G.data = deep
    net(rows()).sum().backward()
    assert abs(reachable.beside([net[0].G])._left) < reachable._MANY  # of a thousand million items
    net[0].G.held[:], net[0].G.data = [None] * 4, [nn.BatchNorm1d(1) for _ in range(300)]
    assert len(reachable.beside([net[0].G]).modules) == 300
    net[0].G.held[2] = own = torch.Generator()  # in place of what was looked at before
    assert reachable.beside([net[0].G]).generators == [own]
