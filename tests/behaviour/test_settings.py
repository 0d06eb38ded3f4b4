# SPDX-License-Identifier: Apache-2.0
"""Row 33: numbers and flags in attributes that the caller changes between forwards: each recompute finds its own."""

import enum
import gc
import weakref

import numpy
import pytest
import torch
from torch import nn

from behaviour.common import WIDE, assert_all_close, loss_of, rows, twins
from revkernels.nn import ReversibleBlock, ReversibleSequential


class OfDomains(nn.Module):
    """Domain-specific batch normalization: the caller says before each forward which one it is."""

    def __init__(self):
        super().__init__()
        self.norms, self.linear = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)]), nn.Linear(4, 4)
        for norm in self.norms:
            nn.init.normal_(norm.weight)
        self.domain, self.bounded, self.calls = 0, True, 0

    def forward(self, h):
        self.calls += 1
        h = self.linear(self.norms[self.domain](h))
        return h.tanh() if self.bounded else h


class Domain(enum.Enum):
    FIRST, SECOND = 0, 1

    def __index__(self):
        return self.value


@pytest.mark.parametrize("domains", [(0, 1), numpy.arange(2), tuple(Domain)], ids=["int", "numpy", "enum"])
def test_numbers_and_flags_that_the_caller_changes(domains, options):
    """Row 33: two forwards, each with its own, before one backward; and the caller finds what it set."""
    nets = twins([(OfDomains().to(WIDE), OfDomains().to(WIDE)) for _ in range(2)], **options)
    x, found = rows(12, 8), []
    for net in nets:
        parts, x.grad = [module for module in net.modules() if isinstance(module, OfDomains)], None
        for _ in range(5):  # longer than what a branch returns is compared
            loss = 0.0
            for number, domain in enumerate(domains):
                for part in parts:
                    part.domain, part.bounded = domain, number == 0
                loss = loss + loss_of(net(x[number::2]))
            loss.backward()
        assert all(part.domain == domain and not part.bounded for part in parts)
        found.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    assert_all_close(*found)


class Adapted(nn.Module):
    """Adapters beside a layer, as peft has them: names of the active ones in a list, their scales in a dictionary."""

    def __init__(self):
        super().__init__()
        self.linear, self.adapters = nn.Linear(4, 4), nn.ModuleDict({name: nn.Linear(4, 4) for name in "ab"})
        self.active, self.scales, self.bounds = ["a"], {"a": 1.0, "b": 2.0, "calls": 0}, (-1, 1)
        self.steps = {"of": {"warm": 1}, "why": [None]}

    def forward(self, h):
        self.scales["calls"] += 1
        out = self.linear(h)
        for name in self.active:
            out = out + self.adapters[name](h) * self.scales[name] * self.steps["of"].get("warm", 3)
        return out.clamp(*self.bounds)


def test_settings_in_lists_and_dictionaries(options):
    """Row 33: replaced, changed, added and removed; the caller finds what it set."""
    nets = twins([(Adapted().to(WIDE), Adapted().to(WIDE)) for _ in range(2)], **options)
    x, found = rows(12, 8), []
    for net in nets:
        parts, x.grad = [module for module in net.modules() if isinstance(module, Adapted)], None
        for _ in range(5):  # longer than what a branch returns is compared
            loss = 0.0
            for step in range(3):
                for part in parts:
                    part.active, part.bounds = (["b"], ["a"], ["a", "b"])[step], (-1 - step, 1)
                    part.scales["b"] = 2.0 + step
                    part.steps["of"] = {"warm": step} if step else {}
                loss = loss + loss_of(net(x))
            for part in parts:
                part.active.pop()
                del part.scales["b"], part.steps["of"]["warm"]
            loss.backward()
            for part in parts:
                assert (part.active, part.bounds, part.steps) == (["a"], (-3, 1), {"of": {}, "why": [None]})
                assert [*part.scales] == ["a", "calls"]
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert_all_close(*found)


class Weighs(nn.Module):
    a = b = 0

    def forward(self, h):
        return (h * self.a).sin() * self.b


def test_numbers_that_are_set_anew_in_another_order(options):
    """Row 33: the same values, each in the other's place."""
    nets = twins([(Weighs(), nn.Identity()) for _ in range(2)], **options)
    x, found = rows(12, 8), []
    for net in nets:
        parts, x.grad = [module for module in net.modules() if isinstance(module, Weighs)], None
        for _ in range(5):  # longer than what a branch returns is compared
            loss = 0.0
            for names in ("ab", "ba"):
                for part in parts:
                    vars(part).pop("a", None), vars(part).pop("b", None)
                    for name, value in zip(names, (1, 2), strict=True):
                        setattr(part, name, value)
                loss = loss + loss_of(net(x))
            loss.backward()
        found.append([x.grad])
    assert_all_close(*found)


class Slope(nn.LeakyReLU):
    """With torch's forward, in a class of its own."""


class Adds(nn.Module):
    """It begins with nothing, and counts."""

    def __init__(self):
        super().__init__()
        self.last, self.calls = None, 0

    def forward(self, h):
        last, self.calls = self.last, self.calls + 1
        self.last = h.detach()
        return h.tanh() * self.calls if last is None else (h + last).tanh() * self.calls


class Holds(nn.Module):
    """It runs a module that it has not registered."""

    def __init__(self, held):
        super().__init__()
        self.linear, self.held = nn.Linear(4, 4), [held]

    def forward(self, h):
        return self.held[0](self.linear(h)).sin()


@pytest.mark.parametrize("kind", [Slope, Adds])
@pytest.mark.parametrize("held", [False, True])
def test_numbers_and_states_of_modules_that_are_held(kind, held, options):
    """Row 33: also where the forward is torch's."""
    nets = twins([(Holds(kind()).to(WIDE), Holds(kind()).to(WIDE)) for _ in range(2)], **options)
    x, found = rows(12, 8), []
    for net in nets:
        x.grad = None
        parts = [module for module in net.modules() if isinstance(module, Holds)]
        if not held:
            for part in parts:
                part.registered = part.held[0]
        for _ in range(5):  # longer than what a branch returns is compared
            loss = 0.0
            for part in parts:
                vars(part.held[0]).update(last=None, calls=0)
            for slope in (0.2, 0.3):
                for part in parts:
                    part.held[0].negative_slope = slope
                loss = loss + loss_of(net(x))
            loss.backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert_all_close(*found)


class Keyed(nn.Module):
    """A dictionary by its own methods, and one by its parameters."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.shares = {self.first: 0.5, self.second: 2.0}
        self.rates = {self.linear.weight: 1.0, self.linear.bias: 2.0}

    def first(self, h):
        return self.linear(h).sin()

    def second(self, h):
        return self.linear(h).cos()

    def forward(self, h):
        return sum(share * part(h) for part, share in self.shares.items()) * self.rates[self.linear.weight]


def test_dictionaries_by_parameters(options):
    """Row 33: two forwards, with other parameters for keys of the same dictionary."""
    nets = twins([(Keyed().to(WIDE), Keyed().to(WIDE)) for _ in range(2)], **options)
    x, found = rows(12, 8), []
    for net in nets:
        parts, x.grad, loss = [module for module in net.modules() if isinstance(module, Keyed)], None, 0.0
        for rate in (1.0, 2.0):
            for part in parts:
                weight = part.linear.weight = nn.Parameter(part.linear.weight.detach() / rate)
                part.rates.clear()
                part.rates.update({weight: rate, part.linear.bias: 3.0})
            loss = loss + loss_of(net(x))
        loss.backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert_all_close(*found)


def test_dictionaries_by_what_holds_the_module():
    """Row 33: a module that has run is freed like any other, also if one comes to hold it later."""
    net = ReversibleSequential(ReversibleBlock(Keyed(), Weighs()))
    net[0].G.shares = {"a": 0.5}
    net(rows(12, 8).float()).sum().backward()
    net[0].G.shares["b"] = net[0].G.forward
    modules = [weakref.ref(module) for module in net.modules()]
    del net
    gc.collect()
    assert not any(module() for module in modules)


class Mixed(nn.Module):
    """Numbers next to functions, tensors and layers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.options = {"act": torch.sin, "bias": torch.ones(4, dtype=WIDE), "scale": 1.0, "inner": {"act": torch.cos}}
        self.stages = [self.linear, 1.0]

    def forward(self, h):
        h = self.stages[0](self.options["act"](h) * self.stages[1] + self.options["bias"]) * self.options["scale"]
        return self.options["inner"]["act"](h) * self.options["inner"]["by"]


def test_settings_next_to_other_objects(options):
    """Row 33: two forwards, each with its own numbers, in dictionaries and lists of more than these."""
    nets = twins([(Mixed().to(WIDE), Mixed().to(WIDE)) for _ in range(2)], **options)
    x, found = rows(12, 8), []
    for net in nets:
        parts, x.grad = [module for module in net.modules() if isinstance(module, Mixed)], None
        for _ in range(5):  # longer than what a branch returns is compared
            loss = 0.0
            for number in (1.0, 2.0):
                for part in parts:
                    part.options["scale"] = part.stages[1] = part.options["inner"]["by"] = number
                loss = loss + loss_of(net(x))
            loss.backward()
        assert all((part.options["scale"], part.stages[1], part.options["inner"]["by"]) == (2.0,) * 3 for part in parts)
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert_all_close(*found)
