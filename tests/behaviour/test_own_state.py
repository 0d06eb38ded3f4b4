# SPDX-License-Identifier: Apache-2.0
"""Buffers that a branch's forward writes, generators of its own, and weights that it is given: those of the forward."""

import copy

import pytest
from torch import nn
from torch.nn.utils import parametrizations

import revkernels as rk
from behaviour.common import WIDE, assert_all_close, check_step, loss_of, mlp, pairs_of, rows, torch, twins
from revkernels.autograd.state import snapshot
from revkernels.nn import ReversibleBlock, ReversibleSequential


class WritesBuffer(nn.Module):
    """A running average that its output depends on, in place or by a new tensor."""

    def __init__(self, in_place):
        super().__init__()
        self.inner, self.in_place = mlp(), in_place
        self.register_buffer("average", torch.ones(4, dtype=WIDE))

    def forward(self, x):
        new = 0.9 * self.average + 0.1 * x.detach().mean(0)
        if self.in_place:
            self.average.copy_(new)
        else:
            self.average = new
        return self.inner(x) * self.average


class Renorm(nn.BatchNorm1d):
    """A batch norm that normalises with its running mean while training, and then moves it."""

    def forward(self, x):
        f = x - self.running_mean
        with torch.no_grad():
            self.running_mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return f * self.weight


BRANCHES_WITH_STATE = {
    "written in place": lambda: WritesBuffer(True),
    "replaced": lambda: WritesBuffer(False),
    "a norm of one's own": lambda: nn.Sequential(nn.Linear(4, 4), Renorm(4), nn.Tanh()).to(WIDE),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4).to(WIDE)), nn.Tanh()
    ),
}


@pytest.mark.parametrize("kind", BRANCHES_WITH_STATE)
def test_branches_with_state_of_their_own(kind, options):
    """Row 34: buffers that the forward writes and its result depends on are rewound for the recompute."""
    check_step(*twins(pairs_of(BRANCHES_WITH_STATE[kind], 3), **options), rows(), steps=3)


def test_a_branch_with_a_generator_of_its_own(options):
    """Row 34: a torch.Generator that a module holds is rewound as well."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.generator = mlp(), torch.Generator()

        def forward(self, x):
            return self.inner(x) * torch.rand(4, generator=self.generator, dtype=WIDE)

    pairs = pairs_of(Own, 3)
    results = []
    for network in twins_without_copies(pairs, options):
        for index, branch in enumerate(b for pair in pairs for b in pair):
            branch.generator.manual_seed(index)
            branch.zero_grad()
        torch.manual_seed(0)
        x = rows()
        loss_of(network(x)).backward()
        results.append([x.grad, *(p.grad.clone() for p in network.parameters())])
        results[-1].extend(b.generator.get_state() for pair in pairs for b in pair)
    assert_all_close(*results)


def twins_without_copies(pairs, options):
    """Both networks on the same branches: a generator can not be copied."""
    net = ReversibleSequential([ReversibleBlock(F, G) for F, G in pairs], **options)
    return net, type(twins([])[1])(pairs)


class Subclass(nn.BatchNorm1d):
    """A batch norm with a forward of its own, as timm's."""

    def forward(self, x):
        return super().forward(x) * 1.0


class Functional(nn.Module):
    """Running statistics that torch's function writes, without counting it as a write."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("scale", torch.full((width,), 2.0))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.center, self.spread, training=self.training) * self.scale


class Moving(nn.Module):
    """A buffer that the output depends on, written in training alone."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("size", torch.ones(width))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.size.lerp_(x.abs().mean(0), 0.1)
        return x / self.size.clone()


STATEFUL = {
    "a batch norm's subclass": Subclass,
    "the function": Functional,
    "a moving average": Moving,
    "spectral norm": lambda width: parametrizations.spectral_norm(nn.Linear(width, width)),
    "old spectral norm": lambda width: nn.utils.spectral_norm(nn.Linear(width, width)),
}


class Given(nn.Module):
    """Its weight is computed elsewhere, as by a hypernetwork, and given to it before each forward."""

    weight = None

    def forward(self, h):
        return (h @ self.weight).tanh()


@pytest.mark.parametrize("dropped", ["set to None", "deleted", "replaced", "kept"])
def test_a_weight_with_a_graph_that_the_caller_drops(dropped, options):
    """Row 33: between forward and backward, so that the branch's record of it is all that is left."""
    nets = twins([(Given(), Given()) for _ in range(2)], **options)
    x, maker, found = rows(5, 8), nn.Linear(3, 16).to(WIDE), []
    for net in nets:
        parts, x.grad = [module for module in net.modules() if isinstance(module, Given)], None
        maker.zero_grad()
        for seed in range(2):
            for number, part in enumerate(parts):
                part.weight = maker(torch.full((3,), number + seed, dtype=WIDE)).view(4, 4)
            y = net(x)
            for part in parts if dropped != "kept" else ():
                del part.weight
                if dropped != "deleted":
                    part.weight = None if dropped == "set to None" else torch.ones(4, 4, dtype=WIDE)
            loss_of(y).backward()
            assert all((part.weight is None) is (dropped in ("set to None", "deleted")) for part in parts)
        found.append([x.grad, *(p.grad for p in maker.parameters())])
    assert_all_close(*found)


@pytest.mark.parametrize("first", ["train", "eval"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_buffers_are_written_once(kind, first):
    """In the first step of a module, and in the first in training behind one in evaluation: gradients and buffers."""
    torch.manual_seed(0)

    def branch():
        return nn.Sequential(STATEFUL[kind](3), nn.Linear(3, 3), nn.Tanh())

    net = ReversibleSequential(*[ReversibleBlock(branch(), branch()) for _ in range(2)], activations="store").double()
    twin = ReversibleSequential(*copy.deepcopy(net))
    x = torch.randn(5, 6, dtype=WIDE)
    for training in (first == "train", True, False, True):
        found = []
        for each in (net, twin):
            each.train(training).zero_grad()
            z = x.clone().requires_grad_()
            each(z).square().sum().backward()
            found.append([z.grad, *(p.grad for p in each.parameters()), *(b.clone() for b in each.buffers())])
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_values_are_compared_in_the_first_step_alone(monkeypatch):
    """That waits for a device: it belongs in no step but the first."""
    asked = []
    monkeypatch.setattr(snapshot, "differs", lambda before, now: asked.append(now) or not torch.equal(before, now))
    net = ReversibleSequential(ReversibleBlock(Functional(3), Subclass(3)))
    x = torch.randn(5, 6, requires_grad=True)
    net(x).sum().backward()
    assert asked
    asked.clear()
    for _ in range(2):
        net(x).sum().backward()
    assert not asked


def test_a_buffer_first_written_later_fails_once_and_says_so():
    """What it held is not known then; from the next step on it is rewound."""

    class Late(Moving):
        def __init__(self, width):
            super().__init__(width)
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) if self.calls > 2 else x / self.size.clone()

    net = ReversibleSequential(ReversibleBlock(Late(3), Late(3)))
    x = torch.randn(5, 6, requires_grad=True)
    for _ in range(2):
        net(x).sum().backward()
    with pytest.raises(rk.ReconstructionError, match=r"buffer size was written by the branch's own forward.*rewound"):
        net(x).sum().backward()
    net(x).sum().backward()


def test_the_inverse_reads_weights_that_it_was_given(backend):
    """Row 28: its gradient goes through a tensor or a tuple in an attribute, as in plain PyTorch."""

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=WIDE))
            self.pair, self.one = (self.weight * 2, self.weight.sin()), self.weight.exp()

        def forward(self, x):
            return (x * self.pair[0]).sin() + self.pair[1] * self.one

    net, y = ReversibleSequential(ReversibleBlock(Given(), Given()), backend=backend), rows(5, 8)
    found = [torch.autograd.grad(loss_of(net.inverse(y)), list(net.parameters()), retain_graph=True)]
    y1, y2 = y.chunk(2, 1)
    x2 = y2 - net[0].G(y1)
    found.append(torch.autograd.grad(loss_of(torch.cat((y1 - net[0].F(x2), x2), 1)), list(net.parameters())))
    assert_all_close(*found)
