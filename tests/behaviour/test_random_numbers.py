# SPDX-License-Identifier: Apache-2.0
"""Dropout and other random branches: the recompute sees the forward's masks, the caller never notices."""

import pytest
from torch import nn

from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_same,
    check_step,
    dropout_mlp,
    fresh,
    gathered,
    mlp,
    pairs_of,
    rows,
    step,
    torch,
    twins,
)


def check_dropout(kind, backend, activations, p=0.1):
    """Row 6, as a function: gradients under the same masks, and the generator where plain PyTorch leaves it."""
    net, plain = kind.with_dropout(p).twins(3, backend=backend, activations=activations)
    check_step(net, plain, kind.x(), steps=3)


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_dropout(p, kind, options):
    """Row 6: dropout in F and G."""
    check_dropout(kind, **options, p=p)


class Noise(nn.Module):
    """Noise that scales, so that its gradient depends on the draw; on some calls it draws nothing."""

    def __init__(self, draws=True):
        super().__init__()
        self.inner, self.draws = mlp(), draws

    def forward(self, x):
        f = self.inner(x)
        return f * torch.rand_like(f) if self.draws else f


def test_some_branches_draw_and_some_do_not(options):
    """Row 6: states are told apart half-step by half-step."""
    pairs = [(Noise(), Noise(False)), (Noise(False), Noise(False)), (Noise(False), Noise())]
    check_step(*twins(pairs, **options), rows(), steps=2)


def test_generator_state_is_the_caller_s_between_forward_and_backward(kind, options):
    """Row 6: draws between forward and backward are the caller's, and the backward neither repeats nor moves them."""
    results = []
    given = kind.x()
    for network in kind.with_dropout(0.5).twins(3, **options):
        torch.manual_seed(7)
        leaves, x = fresh(given)
        y = network(x)
        between = torch.rand(3)
        y.square().sum().backward()
        results.append([between, torch.rand(3), leaves[0].grad])
    assert_all_close(*results)


def rows_once():
    return torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8).requires_grad_()


def test_two_forwards_before_one_backward(kind, options):
    """Row 7: each forward has masks of its own, which its own part of the backward sees again."""
    check_two_forwards(kind, **options)


def check_two_forwards(kind, **options):
    """Row 7, as a function."""
    results = []
    first, second = kind.x(), kind.x()
    for network in kind.with_dropout(0.5).twins(3, **options):
        torch.manual_seed(7)
        (a,), xa = fresh(first)
        (b,), xb = fresh(second)
        outputs = [network(xa), network(xb)]
        (outputs[0] * outputs[1]).sum().backward()
        results.append(gathered(network, outputs, [a, b]))
    assert_same(*results)


@pytest.mark.parametrize("first", [0, 1])
def test_two_forwards_then_two_backwards(first, kind, options):
    """Row 7: in either order."""
    results = []
    given = kind.x()
    for network in kind.with_dropout(0.5).twins(3, **options):
        torch.manual_seed(7)
        (a,), xa = fresh(given)
        (b,), xb = fresh(given)
        outputs = [network(xa), network(xb)]
        for index in (first, 1 - first):
            outputs[index].square().sum().backward()
        results.append(gathered(network, outputs, [a, b]))
    assert_same(*results)


def test_a_network_applied_to_its_own_output(options):
    """Row 7: the same chain twice in one graph."""
    results = []
    for network in twins(pairs_of(lambda: dropout_mlp(p=0.5), 2), **options):
        torch.manual_seed(7)
        leaves, x = fresh(rows_once())
        y = network(network(x))
        y.square().sum().backward()
        results.append(gathered(network, [y], leaves))
    assert_same(*results)


def test_dropout_in_eval_mode(options):
    """Rows 6 and 16: no draw, no mask."""
    net, plain = twins(pairs_of(dropout_mlp, 3), **options)
    net.eval()
    plain.eval()
    state = torch.get_rng_state()
    check_step(net, plain, rows(requires_grad=True))
    torch.set_rng_state(state)
    before = step(net, rows_once(), seed=1).generator
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())
