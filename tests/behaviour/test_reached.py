# SPDX-License-Identifier: Apache-2.0
"""Rows 4, 6, 33 and 34 for what a branch reaches without having registered it: modules in lists and dictionaries,
behind lambdas, as globals; generators likewise, and given as arguments."""

import copy
import functools

import pytest
from torch import nn
from torch.nn.utils import parametrizations

from behaviour.common import WIDE, assert_raises, rows, torch
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


def test_script_modules_are_refused():
    """Their buffers and modes cannot be put back."""
    traced = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4))
    net = ReversibleSequential(ReversibleBlock(traced, nn.Tanh()))
    x = rows(dtype=torch.float32)
    assert_raises(ReconstructionError, ["TracedModule", "activations='store'"], lambda: net(x))
    net.activations = "store"
    net(x).sum().backward()


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
