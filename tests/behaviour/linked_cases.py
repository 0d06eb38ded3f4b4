# SPDX-License-Identifier: Apache-2.0
"""Modules that a network calls one by one, here as linked calls and in plain torch."""

import copy

import pytest
from torch import nn

from behaviour.common import WIDE, mlp, torch
from revkernels.autograd.driver_forward import Reversal
from revkernels.nn import linked
from revkernels.nn.chain import HalfStep


class Layer(nn.Module):
    """Two half-steps, on one tensor or on a pair; ``plain`` is the same in plain torch."""

    def __init__(self, make=mlp, backend="eager"):
        super().__init__()
        self.F, self.G = make(), make()
        self.backend, self.plain = backend, False

    def forward(self, x):
        if not self.plain:
            half_steps = [HalfStep(self.F, 0, (1,)), HalfStep(self.G, 1, (0,))]
            return linked.run(half_steps, x, 2, "FG".__getitem__, backend=self.backend)
        x1, x2 = x if isinstance(x, tuple) else x.chunk(2, 1)
        x1 = x1 + self.F(x2)
        x2 = x2 + self.G(x1)
        return (x1, x2) if isinstance(x, tuple) else torch.cat((x1, x2), 1)


class Shift(nn.Module):
    """Under a mask: the first half of the features is shifted by a function of the others."""

    def __init__(self, backend="eager", read=5, shifted=3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(read, 6), nn.Tanh(), nn.Linear(6, shifted)).to(WIDE)
        self.backend, self.plain, self.shifted = backend, False, shifted

    def branch(self, x):
        return torch.cat((self.net(x[:, self.shifted :]), torch.zeros_like(x[:, self.shifted :])), 1)

    def forward(self, x):
        if self.plain:
            return torch.cat((x[:, : self.shifted] + self.net(x[:, self.shifted :]), x[:, self.shifted :]), 1)
        return linked.run([HalfStep(self.branch, 0, (0,))], (x,), 1, "S".__getitem__, backend=self.backend)[0]


class Permute(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.register_buffer("order", torch.randperm(size))
        self.plain = False

    def forward(self, x):
        if self.plain:
            return x[:, self.order]
        return linked.rearrange(x, lambda x: x[:, self.order], lambda y: y[:, self.order.argsort()])


class Stack(nn.Module):
    """Layers in a loop, and what else happens between them."""

    def __init__(self, layers, between=None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.between = between or (lambda index, x: x)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = self.between(index, layer(x))
        return x


def twins(layers, between=None):
    net, plain = Stack(layers, between), Stack(copy.deepcopy(list(layers)), between)
    for layer in plain.layers:
        layer.plain = True
    return net, plain


def flow(depth, backend="eager"):
    return [module for _ in range(depth) for module in (Shift(backend), Permute(8))]


def chains(network, x):
    """How many reversals a forward takes."""
    made, original = [], Reversal.__init__

    def noted(self, *args, **kwargs):
        made.append(self)
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reversal, "__init__", noted)
        copy.deepcopy(network)(x)  # of which running statistics are not counted
    return len(made)
