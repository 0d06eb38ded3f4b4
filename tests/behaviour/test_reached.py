# SPDX-License-Identifier: Apache-2.0
"""Rows 4, 6, 33 and 34 for what a branch reaches without having registered it: modules in lists and dictionaries,
behind lambdas, as globals; generators likewise, and given as arguments."""

import copy
import dataclasses
import functools
import itertools
import threading
import weakref

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from behaviour.common import WIDE, assert_raises, rows, torch
from revkernels.autograd import behind
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


# ---- generators


class Draws(nn.Module):
    """Drops a half, with a generator that it is given or finds."""

    def __init__(self, linear, generator=None, how="argument"):
        super().__init__()
        self.linear, self.how = linear, how
        if how == "list":
            self.generators = [generator]
        if how == "closure":
            self.draw = lambda h: torch.rand(h.shape, dtype=h.dtype, generator=generator)

    def forward(self, h, generator=None):
        if self.how == "closure":
            return self.linear(h).tanh() * self.draw(h)
        generator = self.generators[0] if self.how == "list" else generator
        return self.linear(h).tanh() * torch.rand(h.shape, dtype=h.dtype, generator=generator)


@pytest.mark.parametrize("how", ["argument", "nested", "list", "closure"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_generators(how, checkpointed):
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 4).to(WIDE), rows()
    found = []
    for rebuilt in (False, True):
        ours, own = copy.deepcopy(linear), torch.Generator().manual_seed(3)
        branches = [Draws(ours, own, how) for _ in range(6)]
        if how == "nested":
            for branch in branches:
                forward = branch.forward
                branch.forward = lambda h, generator=None, forward=forward: forward(h, generator["it"][0])
        kwargs = {"argument": {"generator": own}, "nested": {"generator": {"it": [own]}}}.get(how, {})
        blocks = [ReversibleBlock(F, G) for F, G in zip(branches[::2], branches[1::2], strict=True)]
        x.grad = None
        net = ReversibleSequential(blocks, activations="reconstruct" if rebuilt and not checkpointed else "store")
        y = checkpoint(net, x, **kwargs) if rebuilt and checkpointed else net(x, **kwargs)
        y.sin().sum().backward()
        found.append([x.grad, ours.weight.grad, torch.rand(3, generator=own)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


class Seeded(nn.Module):
    def forward(self, h):
        torch.manual_seed(7)
        return nn.functional.dropout(h, 0.5).sin()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_branch_that_seeds(checkpointed):
    """It leaves the generator, run after run, as it found it; the backward still must not move it."""
    net = ReversibleSequential([ReversibleBlock(Seeded(), Seeded()) for _ in range(2)])
    for _ in range(3):
        x = rows()
        y = checkpoint(Seeded(), x) if checkpointed else net(x)
        torch.rand(3)
        before = torch.get_rng_state()
        y.sum().backward()
        assert torch.equal(torch.get_rng_state(), before)


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


def test_a_parameter_that_the_forward_writes():
    branch = nn.Embedding(10, 4, max_norm=0.1)

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = branch

        def forward(self, h):
            return h.tanh() + self.table(torch.arange(5))

    y = ReversibleSequential(ReversibleBlock(Adds(), nn.Tanh()))(rows(dtype=torch.float32)).sum()
    assert_raises(ReconstructionError, ["table.weight", "own forward", "not rewound"], y.backward)


class Forks(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h):
        with torch.random.fork_rng(devices=[]):
            return nn.functional.dropout(self.linear(h), 0.5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_fork_of_the_generator(checkpointed):
    """It leaves the generator as it found it, although it draws."""
    torch.manual_seed(0)
    branches, found = [Forks().to(WIDE), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(WIDE)] * 2, []
    for rebuilt in (False, True):
        torch.manual_seed(1)
        blocks = [ReversibleBlock(F, G) for F, G in zip(branches[::2], branches[1::2], strict=True)]
        net = ReversibleSequential(blocks, activations="reconstruct" if rebuilt and not checkpointed else "store")
        x = torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8).requires_grad_()
        y = checkpoint(net, x) if rebuilt and checkpointed else net(x)
        nn.functional.dropout(y, 0.1).sin().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


class Noisy(nn.Module):
    """With a generator of its own; a parametrised copy is of a class that torch makes."""

    def __init__(self):
        super().__init__()
        self.weight, self.own = nn.Parameter(torch.eye(4, dtype=WIDE)), torch.Generator().manual_seed(4)

    def forward(self, h, noise=None):
        drawn = torch.rand(h.shape, generator=self.own, dtype=h.dtype) < 0.5
        return (h @ self.weight).tanh() * drawn * (1 if noise is None else noise(h))


@pytest.mark.parametrize("given", ["nothing", "module", "function"])
@pytest.mark.parametrize("parametrised", [False, True])
def test_generators_of_classes_that_torch_makes_and_of_arguments(given, parametrised):
    found = []
    for activations in ("store", "reconstruct"):
        torch.manual_seed(0)
        branches = [parametrizations.weight_norm(Noisy()) if parametrised else Noisy() for _ in range(4)]
        blocks = [ReversibleBlock(F, G) for F, G in zip(branches[::2], branches[1::2], strict=True)]
        own = torch.Generator().manual_seed(9)

        class Source(nn.Module):
            def __init__(self, generator):
                super().__init__()
                self.draw = lambda h: torch.rand(h.shape, generator=generator, dtype=h.dtype)

            def forward(self, h):
                return self.draw(h)

        source = Source(own)
        noise = {"nothing": {}, "module": {"noise": source}, "function": {"noise": source.draw}}[given]
        x = torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8).requires_grad_()
        ReversibleSequential(blocks, activations=activations)(x, **noise).sin().sum().backward()
        found.append([x.grad, torch.rand(3, generator=own)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


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
    looked = behind.beside([net[0].G])
    assert looked._left > 0  # nothing was found in it, which is remembered


@dataclasses.dataclass
class Unhashable:
    linear: nn.Linear

    def __call__(self, h):
        return self.linear(h).tanh()


def test_a_branch_without_a_hash():
    test_a_branch_that_seeds(False)
    ReversibleSequential(ReversibleBlock(Unhashable(nn.Linear(4, 4).to(WIDE)), nn.Tanh()))(rows()).sum().backward()
