# SPDX-License-Identifier: Apache-2.0
"""Many short chains in one graph: each block called alone, in a loop or an nn.Sequential of the user's own."""

import copy

import pytest
from torch import nn

from behaviour.common import Plain, assert_same, dropout_mlp, loss_of, mlp, pairs_of, rows, step, torch
from behaviour.test_costs import Counting
from revkernels.measure import peak_bytes
from revkernels.nn import ReversibleBlock


def stack(pairs, **options):
    return nn.Sequential(*(ReversibleBlock(F, G, **options) for F, G in pairs))


@pytest.mark.parametrize("make", [mlp, dropout_mlp])
def test_as_plain_pytorch(make, options):
    pairs = pairs_of(make, 4)
    plain = Plain(copy.deepcopy(pairs))
    x = rows()
    assert_same(step(stack(pairs, **options), x), step(plain, x))


def wide_branch():
    """Its saved tensors are many times its input."""
    return nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 8))


def peak_of(depth, backend):
    net = stack(pairs_of(wide_branch, depth), backend=backend)
    x = torch.randn(64, 16, requires_grad=True)
    net(x).sum().backward()  # parameter gradients exist from here on
    return peak_bytes(lambda: net(x).sum().backward(), "cpu")


def test_one_branch_s_tensors_at_a_time(backend):
    """A deeper stack costs the outputs of its blocks, and not a branch's saved tensors for each."""
    shallow, deep = peak_of(2, backend), peak_of(10, backend)
    output = 64 * 16 * 4
    saved_by_a_branch = 2 * 64 * 256 * 4
    assert deep - shallow < 8 * 1.5 * output < 8 * saved_by_a_branch / 2


class ReadsTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        (again,) = ctx.saved_tensors
        return (x + again) * dy


class Squared(nn.Module):
    def forward(self, x):
        return ReadsTwice.apply(x).tanh()  # else it explodes, and is not the same again


def test_no_branch_runs_more_often(backend):
    """Also where a saved tensor is read more than once."""
    for make in (mlp, Squared):
        branches = [Counting(make()) for _ in range(8)]
        net = stack(list(zip(branches[::2], branches[1::2], strict=True)), backend=backend)
        loss_of(net(rows())).backward()
        assert [branch.calls for branch in branches] == [[False, True]] * 8


def test_two_stacks_side_by_side(options):
    """Whose backwards interleave: dropped or not, what is asked for is right."""
    left, right = pairs_of(mlp, 3), pairs_of(dropout_mlp, 3)
    twins = [Plain(copy.deepcopy(pairs)) for pairs in (left, right)]

    class Both(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x):
            u, v = x, x * 2
            for p, q in zip(self.a, self.b, strict=True):
                u, v = p(u), q(v)
                u, v = u + 0.1 * v, v - 0.1 * u
            return u * v

    a, b = (stack(pairs, **options) for pairs in (left, right))
    c, d = (nn.ModuleList(Plain([(block.F, block.G)]) for block in twin.children()) for twin in twins)
    x = rows()
    got, expected = step(Both(a, b), x), step(Both(c, d), x)
    expected.parameters = {name.replace(".0.", ".", 1): grad for name, grad in expected.parameters.items()}
    assert_same(got, expected)
