# SPDX-License-Identifier: Apache-2.0
"""Branches of many kinds: whatever torch can differentiate is a residual function."""

import pytest
from torch import nn

from behaviour.common import WIDE, check_step, mlp, pairs_of, rows, torch, twins


class Square(torch.autograd.Function):
    """Keeps its input on the context, past the saved tensors: allowed, and then it is really kept."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.kept = x
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return (x + ctx.kept) * dy


class Exponential(torch.autograd.Function):
    """Saves its output."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        return ctx.saved_tensors[0] * dy


class Through(nn.Module):
    """A function of what a small network makes of x."""

    def __init__(self, function):
        super().__init__()
        self.inner, self.function = mlp(), function

    def forward(self, x):
        return self.function(self.inner(x), x)


class Cached(nn.Module):
    """Makes a constant at its first call and keeps it as a plain attribute."""

    def __init__(self):
        super().__init__()
        self.inner, self.cache = mlp(), None

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.linspace(1, 2, 4, dtype=WIDE)
        return self.inner(x) * self.cache


class PartlyWithoutGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        with torch.no_grad():
            gate = torch.sigmoid(self.inner(x))
        return gate * self.inner(x)


ON_ROWS = {
    "custom function that saves its input": lambda: Through(lambda f, x: Square.apply(f * x)),
    "custom function that saves its output": lambda: Through(lambda f, x: Exponential.apply(-f.square())),
    "constant cached at the first call": Cached,
    "part of it under no_grad": PartlyWithoutGradients,
    "sorted": lambda: Through(lambda f, x: f.sort(1).values * x.argsort(1)),
    "indexed": lambda: Through(lambda f, x: f[torch.arange(5).flip(0)][:, [1, 0, 3, 2]]),
    "detached in part": lambda: Through(lambda f, x: f * x.detach() + f.detach() * x),
    "branching on the data": lambda: Through(lambda f, x: f * x if x.sum() > 0 else f - x),
    "layer norm and GELU": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).to(WIDE),
    "old spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Tanh()).to(WIDE),
    "a function without parameters": nn.Tanh,
    "the identity": nn.Identity,
}


@pytest.mark.parametrize("kind", ON_ROWS)
def test_on_rows(kind, options):
    """Rows 1 and 34: on a batch of vectors."""
    check_step(*twins(pairs_of(ON_ROWS[kind], 3), **options), rows(), steps=2)


def test_spectral_norm_on_every_layer(kind, options):
    """Row 34: each forward in training writes the vectors that its weights are divided by the norm with."""
    check_spectral_norm(kind, **options)


def check_spectral_norm(kind, **options):
    """Row 34, as a function."""

    def constrain(branch):
        for layer in list(branch.modules()):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.utils.parametrizations.spectral_norm(layer)
        return branch

    check_step(*kind.within(constrain).twins(3, **options), kind.x(), steps=3)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.to(WIDE)

    def forward(self, x):
        h = self.norm(x)
        return self.attention(h, h, h, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(4, 4, batch_first=True).to(WIDE)

    def forward(self, x):
        return self.cell(x)[0]


@pytest.mark.parametrize("make", [Attention, Recurrent])
def test_on_tokens(make, options):
    """Rows 1 and 6: attention with dropout, a recurrent cell, split along the channels of tokens."""
    check_step(*twins(pairs_of(make, 2), split_dim=2, **options), rows(3, 5, 8), steps=2)


class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4).to(WIDE)

    def forward(self, x, index):
        return self.table(index) * x


def test_embedding(options):
    """Rows 13 and 19: a table looked up by an argument of integers."""
    check_step(*twins(pairs_of(Looking, 2), **options), rows(), index=torch.tensor([1, 2, 3, 4, 1]))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims, options):
    """Rows 1 and 18: one, two and three dimensions, channels-last where there is such a thing."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    net, plain = twins(pairs_of(lambda: nn.Sequential(nn.Tanh(), conv(4, 4, 3, padding=1)).to(WIDE), 2), **options)
    x = rows(2, 8, *(3, 4, 5)[:dims])
    check_step(net, plain, x)
    if dims > 1:
        last = torch.channels_last if dims == 2 else torch.channels_last_3d
        check_step(net, plain, x.detach().to(memory_format=last).requires_grad_())
