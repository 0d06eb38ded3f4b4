# SPDX-License-Identifier: Apache-2.0
"""Any depth, any way of handing the input over."""

import pytest
from torch import nn

from behaviour.common import WIDE, assert_all_close, check_step, fresh, mlp, pairs_of, rows, step, torch, twins
from revkernels.nn import ReversibleBlock, ReversibleSequential


@pytest.mark.parametrize("depth", range(1, 7))
def test_depth(depth, kind, options):
    """Row 1: depth 1 to 6, odd and even."""
    check_step(*kind.twins(depth, **options), kind.x(), steps=2)


def test_no_block_is_the_identity(options):
    """Row 1: zero blocks."""
    check_step(*twins([], **options), rows())
    check_step(*twins([], **options), (rows(5, 4), rows(5, 4)))
    x = rows()
    assert torch.equal(ReversibleSequential(**options).inverse(x), x)


def test_one_block_alone(kind, options):
    """Rows 1 and 36: a block called without a chain works like a chain of one, on a tensor and on a pair."""
    pairs = kind.pairs(1)
    net, plain = twins(pairs, **options)
    block = ReversibleBlock(*pairs[0], **options)
    for x in (kind.x(), kind.pair()):
        got, expected = step(block, x), step(plain, x)
        assert_all_close(got.outputs, expected.outputs)
        assert_all_close(got.inputs, expected.inputs)
        assert_all_close(list(got.parameters.values()), list(expected.parameters.values()))
        chained = step(net, x)
        assert_all_close(got.outputs, chained.outputs, tolerance=1e-300)
    x = kind.x(requires_grad=False)
    assert_all_close([block.inverse(block(x))], [x], 1e-12)


@pytest.mark.parametrize("activations", ["reconstruct", "store"])
def test_hooks_of_a_block_called_alone_fire_once(activations):
    block = ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3), activations=activations).double()
    x = torch.randn(5, 6, dtype=WIDE, requires_grad=True)
    block(x).square().sum().backward()
    plain, x.grad, seen = x.grad, None, []
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    block.register_forward_hook(lambda *_: seen.append("after"))
    block.register_full_backward_hook(lambda _, given, __: (seen.append("backward"), (given[0] * 2, *given[1:]))[1])
    block(x).square().sum().backward()
    assert seen == ["before", "after", "backward"]
    torch.testing.assert_close(x.grad, 2 * plain)
    twice = block.register_forward_pre_hook(lambda _, given: (given[0] * 2, *given[1:]))
    with torch.no_grad():
        doubled = block(x)
        twice.remove()
        torch.testing.assert_close(doubled, block(2 * x))


def test_pair_in_pair_out(kind, options):
    """Row 36: (x1, x2) in, a tuple of two out, both differentiable on their own."""
    net, plain = kind.twins(3, **options)
    x = kind.pair()
    check_step(net, plain, x)
    for which in (0, 1):
        grads = []
        for network in (net, plain):
            leaves, pair = fresh(x)
            y = network(pair)
            assert type(y) is tuple and len(y) == 2
            y[which].square().sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        assert_all_close(*grads)


def test_pair_of_one_tensor_twice(options):
    """Row 36: both streams start as the same tensor; its gradient is the sum."""
    net, plain = twins(pairs_of(mlp, 2), **options)
    grads = []
    for network in (net, plain):
        torch.manual_seed(0)
        x = rows(5, 4)
        y1, y2 = network((x, x))
        (y1.square().sum() + y2.sum()).backward()
        grads.append([x.grad])
    assert_all_close(*grads)


def check_pair_is_not_copied(**options):
    """Row 36, as a function: the branches read the caller's memory, and the pair that comes out is what they made."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x.data_ptr())
            return x * 2

    net, _ = twins([(Spy(), Spy()), (Spy(), Spy())], **options)
    x1, x2 = rows(5, 4), rows(5, 4)
    y1, _ = net((x1, x2))
    assert seen[0] == x2.data_ptr()
    assert seen[3] == y1.data_ptr()
    seen.clear()
    y1, _ = net[0]((x1, x2))
    assert seen == [x2.data_ptr(), y1.data_ptr()]


def test_a_pair_is_not_copied(options):
    """Row 36: by the addresses that the branches see, in a chain and in a block alone."""
    check_pair_is_not_copied(**options)


def test_a_list_of_two_is_a_pair(options):
    """Row 36: [x1, x2] is taken as well."""
    net, _ = twins(pairs_of(mlp, 2), **options)
    x = rows(5, 4), rows(5, 4)
    assert_all_close(list(net(list(x))), list(net(x)), tolerance=1e-300)


@pytest.mark.parametrize("split_dim", [0, 2, -1])
def test_split_dim(split_dim, options):
    """Row 36: halves along any dimension."""
    width = 8 if split_dim == 0 else 4
    check_step(*twins(pairs_of(lambda: mlp(width), 3), split_dim=split_dim, **options), rows(6, 2, 8))


def check_input_is_not_written_to(kind, **options):
    """Rows 17 and 36, as a function: the caller's input is as it was after forward and backward."""
    net, _ = kind.twins(4, **options)
    for x in (kind.x(), kind.pair()):
        leaves, handed = fresh(x)
        before, versions = [leaf.detach().clone() for leaf in leaves], [leaf._version for leaf in leaves]
        y = net(handed)
        sum(t.square().sum() for t in (y if isinstance(y, tuple) else (y,))).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))
        assert versions == [leaf._version for leaf in leaves]


def test_input_is_not_written_to(kind, options):
    """Rows 17 and 36: neither a single tensor nor a pair."""
    check_input_is_not_written_to(kind, **options)
