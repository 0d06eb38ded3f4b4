# SPDX-License-Identifier: Apache-2.0
"""What a branch leaves on itself for its next call, as a recurrent cell does: the recompute finds what the
forward found, and leaves what the forward left."""

import copy
import warnings

import pytest
from torch import nn

from behaviour.common import WIDE, assert_all_close, loss_of, pairs_of, rows, torch, twins
from revkernels.nn import ReversibleBlock, ReversibleSequential, checkpoint, is_recomputing


class Recurrent(nn.Module):
    """Reads what its last call has left."""

    def __init__(self):
        super().__init__()
        self.linear, self.state = nn.Linear(4, 4), torch.zeros(4, dtype=WIDE)

    def forward(self, h):
        out = (self.linear(h) + self.state).tanh()
        self.state = out.detach().mean(0)
        return out


class Remembers(nn.Module):
    """An LSTM that goes on from where its last call has ended: ``keeps`` makes of (h, c) what hangs on it."""

    def __init__(self, keeps, first):
        super().__init__()
        self.layer, self.keeps, self.state = nn.LSTM(4, 4), keeps, first

    def forward(self, h):
        out, (hidden, cell) = self.layer(h, self.read())
        self.state = self.keeps(hidden.detach(), cell.detach())
        return out

    def read(self):
        found = self.state["of"][0] if type(self.state) is dict else self.state
        return tuple(found) if found else None


KEPT = {
    "tuple": (lambda *state: state, None),
    "list": (lambda *state: list(state), []),
    "dictionary": (lambda *state: {"of": [state, None]}, {"of": [None]}),
}


@pytest.mark.parametrize("kept", KEPT)
def test_a_recurrent_state_of_several_tensors(kept, options):
    """Row 34: the recompute goes on from where the forward did, and leaves what the forward left."""
    nets, results = twins(pairs_of(lambda: Remembers(*KEPT[kept]).to(WIDE), 2), split_dim=-1, **options), []
    inputs = [rows(3, 2, 8) for _ in range(3)]
    for net in nets:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        for leaf in leaves:
            loss_of(net(leaf)).backward()
        branches = [branch for block in net.children() for branch in (block.F, block.G)]
        states = [t for branch in branches for t in branch.read()]
        results.append([*(leaf.grad for leaf in leaves), *(p.grad for p in net.parameters()), *states])
    assert_all_close(*results)


class Leaks(nn.Module):
    """A membrane that leaks, of a spiking network: a state with a gradient that goes through it from step to step.
    ``first`` is what stands there before the first one."""

    def __init__(self, where, first, detached):
        super().__init__()
        self.linear, self.where, self.detached, self.first = nn.Linear(4, 4), where, detached, first
        self.held = {}
        self.reset()

    def reset(self):
        if self.where == "dictionary":
            self.held["v"] = self.first
        elif self.where == "buffer":
            self.register_buffer("v", torch.zeros(1, dtype=WIDE), persistent=False)
        else:
            self.v = self.first

    def forward(self, h):
        found = self.held["v"] if self.where == "dictionary" else self.v
        v = found[0] if type(found) is tuple else found
        decay = self.linear.bias.sigmoid()  # what is multiplied by the state is saved if that has a gradient
        v = self.linear(h) if v is None else decay * v + self.linear(h)
        kept = v.detach() if self.detached else v
        if self.where == "dictionary":
            self.held["v"] = kept
        else:
            self.v = (kept, None) if self.where == "tuple" else kept
        return (4 * v).sigmoid()


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("first", [None, 0.0], ids=str)
@pytest.mark.parametrize("where", ["attribute", "dictionary", "tuple", "buffer"])
def test_a_state_through_time(where, first, detached, options):
    """Row 34: several calls and one backward behind them all, twice, with the state begun anew."""
    nets, results = twins(pairs_of(lambda: Leaks(where, first, detached).to(WIDE), 2), **options), []
    x = rows()
    for net in nets:
        for _ in range(2):
            branches = [branch for block in net.children() for branch in (block.F, block.G)]
            for branch in branches:
                branch.reset()
            net.zero_grad()
            sum(net(x * step).sin().sum() for step in range(1, 4)).backward()
        states = [branch.held["v"] if where == "dictionary" else branch.v for branch in branches]
        results.append([*(p.grad for p in net.parameters()), *(s[0] if type(s) is tuple else s for s in states)])
    assert_all_close(*results)


class Leaky(nn.Module):
    """The same, with its code elsewhere than in its own forward."""

    def __init__(self):
        super().__init__()
        self.linear, self.v = nn.Linear(4, 4), 0.0

    def forward(self, h):
        return step(self, h)


def step(self, h):
    self.v = 0.5 * self.v + self.linear(h)
    return (4 * self.v).sigmoid()


class Decorated(Leaky):
    forward = (lambda function: lambda *given: function(*given))(step)


class MadeInForward(Leaky):
    def __init__(self):
        super().__init__()
        del self.v

    def forward(self, h):
        if not hasattr(self, "v"):
            self.v = torch.zeros_like(h)
        self.v = 0.5 * self.v + self.linear(h)
        return (4 * self.v).sigmoid()


class OnTheInstance(Leaky):
    def __init__(self):
        super().__init__()
        self.forward = step.__get__(self)

    def __deepcopy__(self, memo):
        new = type(self)().to(WIDE)
        new.load_state_dict(self.state_dict())
        return new


class InALambda(Leaky):
    def forward(self, h):
        decayed = lambda: 0.5 * self.v  # noqa: E731
        self.v = decayed() + self.linear(h)
        return (4 * self.v).sigmoid()


class InANewList(Leaky):
    def forward(self, h):
        self.v = [0.5 * (self.v[0] if self.v else 0) + self.linear(h)]
        return (4 * self.v[0]).sigmoid()


class InANewDictionary(Leaky):
    def forward(self, h):
        self.v = {"v": 0.5 * (self.v["v"] if self.v else 0) + self.linear(h)}
        return (4 * self.v["v"]).sigmoid()


@pytest.mark.parametrize(
    "kind", [Leaky, Decorated, MadeInForward, OnTheInstance, InALambda, InANewList, InANewDictionary]
)
def test_a_state_through_time_wherever_it_is_read(kind, options):
    """Row 34: what tells a state from an output that is kept is the code, wherever that is."""
    nets, results = twins(pairs_of(lambda: kind().to(WIDE), 2), **options), []
    x = rows()
    for net in nets:
        sum(net(x * step).sin().sum() for step in range(1, 4)).backward()
        results.append([p.grad for p in net.parameters()])
    assert_all_close(*results)


class MadeOnce(nn.Module):
    """A weight with a gradient that is made in the first call, and is no state."""

    made = False

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h):
        if not self.made:
            self.turned, self.made = self.linear.weight.t(), True
        return (h @ self.turned).sin()


def test_what_is_made_once_is_no_state(options):
    nets, results = twins(pairs_of(lambda: MadeOnce().to(WIDE), 2), **options), []
    x = rows()
    for net in nets:
        loss_of(net(x)).backward()
        results.append([p.grad for p in net.parameters() if p.grad is not None])
    assert_all_close(*results)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_recurrent_state(shared, checkpointed, backend):
    """Of several calls, with one backward behind each or behind them all."""
    torch.manual_seed(0)
    one = Recurrent().to(WIDE)
    for each in (False, True):
        found = []
        for activations in ("store", "reconstruct"):
            branches = [copy.deepcopy(one) for _ in range(1 if shared else 4)] * (4 if shared else 1)
            blocks = [ReversibleBlock(F, G) for F, G in zip(branches[::2], branches[1::2], strict=True)]
            rebuilds = activations == "reconstruct"
            kind = "store" if checkpointed else activations
            net = ReversibleSequential(blocks, activations=kind, backend=backend)
            inputs = [torch.randn(5, 8, dtype=WIDE, generator=torch.Generator().manual_seed(k)) for k in range(3)]
            total = 0
            for x in inputs:
                x.requires_grad_()
                y = (checkpoint(net, x) if checkpointed and rebuilds else net(x)).sin().sum()
                if each:
                    y.backward()
                else:
                    total = total + y
            if not each:
                total.backward()
            found.append([*(x.grad for x in inputs), *(b.linear.weight.grad for b in branches)])
            found[-1] += [b.state for b in branches]
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)


class InContainer(nn.Module):
    """A recurrent state in a list or dictionary that stays, beside what is no tensor."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind
        self.held = {"list": [None, 3], "dictionary": {0: None, "steps": 3}, "nested": {"of": [None]}}[kind]

    def forward(self, h):
        held = self.held["of"] if self.kind == "nested" else self.held
        out = (self.linear(h) + (0 if held[0] is None else held[0])).tanh()
        held[0] = out.detach().mean(0)
        return out


@pytest.mark.parametrize("each", [True, False], ids=["a backward each", "one backward"])
@pytest.mark.parametrize("kind", ["list", "dictionary", "nested"])
def test_a_recurrent_state_in_a_container_that_stays(kind, each, backend):
    nets, found = twins([(InContainer(kind).to(WIDE), InContainer(kind).to(WIDE)) for _ in range(2)]), []
    given = [rows(5, 8).detach() for _ in range(3)]
    for net in nets:
        inputs, total = [x.clone().requires_grad_() for x in given], 0
        for x in inputs:
            y = loss_of(net(x))
            if each:
                y.backward()
            else:
                total = total + y
        if not each:
            total.backward()
        branches = [branch for block in net.children() for branch in (block.F, block.G)]
        states = [b.held["of"][0] if kind == "nested" else b.held[0] for b in branches]
        found.append([*(p.grad for p in net.parameters()), *(x.grad for x in inputs), *states])
    assert_all_close(*found)


def test_who_asks_and_replaces_nothing_is_told_nothing():
    """Nor is a recurrent state that does not ask, nor what a hook collects in the second run."""
    branches, seen = [Recurrent().to(WIDE), nn.Linear(4, 4).to(WIDE)], []
    branches[1].register_forward_hook(lambda module, *_: seen.append(is_recomputing()))
    net = ReversibleSequential(ReversibleBlock(*branches))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            net(torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8)).sum().backward()
    assert seen == [False, True] * 2


class Grows(nn.Module):
    """A table of positions as long as the longest input so far, whose length is a number next to it."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind, self.length = nn.Linear(4, 4), kind, 0
        self.register_buffer("table", torch.zeros(0, 1, dtype=WIDE), persistent=False) if kind == "buffer" else None
        if kind == "attribute":
            self.table = None

    def forward(self, h):
        if len(h) > self.length:
            self.length, table = len(h), torch.arange(len(h), dtype=WIDE)[:, None].cos()
            if self.kind == "buffer":
                self.register_buffer("table", table, persistent=False)
            else:
                self.table = table
        return self.linear(h).sin() * self.table[: len(h)]


class SetByTheFirst(nn.Module):
    """Scales by what the first batch had, as an ActNorm does; a flag says that it has been there."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.ready = nn.Linear(4, 4), False
        scale = torch.ones(4, dtype=WIDE)
        self.register_buffer("scale", scale) if kind == "buffer" else setattr(self, "scale", scale)

    def forward(self, h):
        if not self.ready:
            self.scale.copy_(1 / h.detach().std(0))
            self.ready = True
        return (self.linear(h) * self.scale).sin()


class EveryThird(nn.Module):
    """Looks at its input in every third call, and counts in all of them."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.calls, seen = nn.Linear(4, 4), 0, torch.zeros(4, dtype=WIDE)
        self.register_buffer("seen", seen) if kind == "buffer" else setattr(self, "seen", seen)

    def forward(self, h):
        if self.calls % 3 == 0:
            self.seen = h.detach().mean(0)
        self.calls += 1
        return (self.linear(h) - self.seen).sin()


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
@pytest.mark.parametrize("make", [Grows, SetByTheFirst, EveryThird])
def test_numbers_and_flags_next_to_a_state(make, kind, options):
    """Row 34: how long a table is, and whether it was set, come back with it."""
    net, plain = twins([(make(kind).to(WIDE), nn.Linear(4, 4).to(WIDE)) for _ in range(2)], **options)
    for length in (4, 7, 5, 9):
        x, longer = rows(length, 8), rows(length + 3, 8)
        for network in (net, plain):
            (loss_of(network(x)) + loss_of(network(longer))).backward()
        assert_all_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])
    ours, theirs = net[0].F, getattr(plain, "0").F
    for name in ("length", "ready", "calls"):
        assert vars(ours).get(name) == vars(theirs).get(name)
