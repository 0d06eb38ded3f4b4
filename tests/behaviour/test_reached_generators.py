# SPDX-License-Identifier: Apache-2.0
"""Row 6 for generators that a branch holds, closes over or is given, for branches that seed or fork torch's own, and
for Python's and NumPy's."""

import copy
import dataclasses
import functools
import random
import weakref

import numpy
import pytest
from torch import nn
from torch.nn.utils import parametrizations

from behaviour.common import WIDE, rows, torch
from revkernels import ReconstructionError
from revkernels.autograd.state.other_generators import PYTHONS
from revkernels.autograd.state.snapshot import Snapshot
from revkernels.nn import ReversibleBlock, ReversibleSequential, checkpoint
from revkernels.nn.chain import HalfStep, run


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


@dataclasses.dataclass
class Unhashable:
    linear: nn.Linear

    def __call__(self, h):
        return self.linear(h).tanh()


def test_a_branch_without_a_hash():
    test_a_branch_that_seeds(False)
    ReversibleSequential(ReversibleBlock(Unhashable(nn.Linear(4, 4).to(WIDE)), nn.Tanh()))(rows()).sum().backward()


somebody_s, nobody_s = random.Random(), random.SystemRandom()
shuffled = numpy.random.permutation


def drawn_elsewhere():
    return random.gauss(1, 0.5)


def imports():
    import numpy as np

    return np.random.rand()


OTHERS = {
    "Python": lambda own: random.random(),
    "Python, in a function": lambda own: drawn_elsewhere(),
    "NumPy, next to one without a state": lambda own: numpy.random.rand() + 0 * nobody_s.random(),
    "NumPy, imported by name": lambda own: shuffled(5)[0],
    "NumPy, imported by a function": lambda own: imports(),
    "a Random": lambda own: own[0].random(),
    "a Generator": lambda own: own[1].random(),
    "a RandomState": lambda own: own[2].rand(),
    "a RandomState of another kind": lambda own: own[4].rand(),
}


class DrawsElsewhere(nn.Module):
    """Stochastic depth as it is often written, and a scale."""

    def __init__(self, own):
        super().__init__()
        self.weight, self.own = nn.Parameter(torch.eye(4, dtype=WIDE)), own

    def forward(self, h):
        return (h @ self.weight).tanh() * self.draw(self.own) if self.draw(self.own) < 0.8 else h * 0


def drawing(way, held):
    """One whose class has the function that draws, or which holds it."""
    own = random.Random(0), numpy.random.default_rng(0), numpy.random.RandomState(0), nobody_s
    own += (numpy.random.RandomState(numpy.random.PCG64(0)),)
    branch = type("Drawing", (DrawsElsewhere,), {} if held else {"draw": staticmethod(OTHERS[way])})(own)
    if held:
        branch.draw = OTHERS[way]
    return branch


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("way", OTHERS)
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_generators_of_python_and_numpy(way, held, checkpointed):
    """Run after run, also with draws of the caller in between, and they are left where plain torch leaves them."""
    x, found = rows(), []
    for rebuilt in (False, True):
        random.seed(0)
        numpy.random.seed(0)
        branches = [drawing(way, held) for _ in range(6)]
        blocks = [ReversibleBlock(F, G) for F, G in zip(branches[::2], branches[1::2], strict=True)]
        net = ReversibleSequential(blocks, activations="reconstruct" if rebuilt and not checkpointed else "store")
        x.grad = None
        for _ in range(5):  # longer than what a branch returns is compared
            y = checkpoint(net, x) if rebuilt and checkpointed else net(x)
            between = OTHERS[way](branches[0].own)
            y.sin().sum().backward()
        last = torch.tensor([between, OTHERS[way](branches[0].own)])
        found.append([x.grad, *(branch.weight.grad for branch in branches), last])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


class HasOne(nn.Module):
    def forward(self, h):
        drawn = torch.rand((), generator=self.own) if isinstance(self.own, torch.Generator) else self.own.random()
        return (h * float(drawn)).sin()


@pytest.mark.parametrize("kind", ["torch", "Python", "NumPy"])
def test_a_generator_that_is_replaced_before_the_backward(kind):
    """The recompute draws from the forward's, and the new one is left as it is."""
    make = {
        "torch": lambda seed: torch.Generator().manual_seed(seed),
        "Python": random.Random,
        "NumPy": numpy.random.default_rng,
    }[kind]
    x, found = rows(), []
    for activations in ("store", "reconstruct"):
        net = ReversibleSequential(ReversibleBlock(HasOne(), HasOne()), activations=activations)
        branches = [net[0].F, net[0].G]
        for seed, branch in enumerate(branches):
            branch.own = make(seed)
        x.grad = None
        for seed in range(5):  # longer than what a branch returns is compared
            loss = net(x).sin().sum()
            for branch in branches:
                branch.own = make(7 + seed)
            loss.backward()
        found.append([x.grad, *(branch(torch.ones(4)).detach() for branch in branches)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


class DrawsBefore(nn.Module):
    """And in a function that it makes, if it is to."""

    def __init__(self, later):
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(numpy.random.rand(4, 4)) * random.random())
        self.scale = (lambda: random.random()) if later else (lambda: 0.5)

    def forward(self, h):
        return (h @ self.weight).tanh() * self.scale()


def test_who_draws_before_the_forward_alone_pays_nothing():
    assert Snapshot(DrawsBefore(False)).generators == []
    assert Snapshot(DrawsBefore(True)).generators == [PYTHONS]


class Drawer:
    def depth(self):
        return random.random()

    def __call__(self, h):
        return h.sin() * self.depth()


CALLABLES = {
    "function": lambda: lambda h: h.sin() * random.random() * somebody_s.random(),
    "object": Drawer,
    "method": lambda: Drawer().__call__,
    "partial": lambda: functools.partial(Drawer.__call__, Drawer()),
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_generators_that_a_function_names(kind):
    """The branch is no module, and made anew in every call."""
    x, found = rows(), []
    for activations in ("store", "reconstruct"):
        random.seed(0)
        somebody_s.seed(0)
        x.grad = None
        for _ in range(5):  # longer than what a branch returns is compared
            steps = [HalfStep(CALLABLES[kind](), k, (1 - k,)) for k in (0, 1)]
            run(steps * 3, x, activations=activations).sin().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


class Settings(dict):
    """With attributes, as it is often written: one that is missing raises no AttributeError."""

    __getattr__ = dict.__getitem__


settings, gone = Settings(by=0.5), weakref.proxy(Drawer())


def names_both(h):
    return h * settings.by if h is not gone else h


class NamesBoth(nn.Module):
    def forward(self, h):
        return h * settings.by if h is not gone else h


@pytest.mark.parametrize("branch", [names_both, NamesBoth()], ids=["function", "module"])
def test_globals_that_know_no_attribute(branch):
    """Looking for generators asks them for none."""
    ReversibleSequential(ReversibleBlock(branch, nn.Tanh()))(rows()).sum().backward()


class SecondTimeWithout(nn.Module):
    """Not the same twice, which shows in what it draws."""

    calls = 0

    def forward(self, h):
        self.calls += 1
        return nn.functional.dropout(h, 0.5).sin() if self.calls % 2 else h.sin()


def test_another_number_of_draws_is_not_laid_at_another_thread_s_door():
    y = ReversibleSequential(ReversibleBlock(SecondTimeWithout(), nn.Tanh()))(rows())
    with pytest.raises(ReconstructionError, match="did not do the same twice"):
        y.sum().backward()
