# SPDX-License-Identifier: Apache-2.0
"""A chain's witness: shown the input streams before the forward, and by every backward what it rebuilt of them."""

import pytest

torch = pytest.importorskip("torch")
from one_thread import one_thread_here  # noqa: E402, F401
from torch import nn  # noqa: E402

from revkernels.models import BasicBranch  # noqa: E402
from revkernels.nn import ReversibleBlock, ReversibleSequential  # noqa: E402


def branch():
    return nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.Tanh())


def chain(streams=2, blocks=3, **options):
    made = [ReversibleBlock(*(branch() for _ in range(streams))) for _ in range(blocks)]
    return ReversibleSequential(made, **options).double()


class Witness:
    """Keeps what it is shown."""

    def __init__(self, looks=True):
        self.looks, self.given, self.rebuilt = looks, [], []

    def __call__(self, streams):
        self.given.append([s.detach().clone() for s in streams])
        return (lambda streams: self.rebuilt.append([s.clone() for s in streams])) if self.looks else None


def gradients(net, x):
    net.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    net(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("streams", [2, 3])
def test_it_sees_the_input_and_what_is_rebuilt_of_it(backend, streams):
    net = chain(streams, backend=backend)
    x = torch.randn(5, 8 * streams, dtype=torch.float64)
    net.witness = witness = Witness()
    net(x).square().sum().backward()
    assert len(witness.given) == len(witness.rebuilt) == 1
    for given, rebuilt, true in zip(witness.given[0], witness.rebuilt[0], x.chunk(streams, 1), strict=True):
        assert torch.equal(given, true)
        assert rebuilt.shape == true.shape
        torch.testing.assert_close(rebuilt, true, rtol=0, atol=1e-14)


def test_images_in_channels_last():
    net = ReversibleSequential(*(ReversibleBlock(BasicBranch(4, 4), BasicBranch(4, 4)) for _ in range(2))).double()
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    net.witness = witness = Witness()
    net(x).square().sum().backward()
    for rebuilt, true in zip(witness.rebuilt[0], x.chunk(2, 1), strict=True):
        torch.testing.assert_close(rebuilt, true, rtol=0, atol=1e-13)


def test_it_changes_no_bit():
    net, x = chain(), torch.randn(5, 16, dtype=torch.float64)
    expected = gradients(net, x)
    net.witness = Witness()
    for got, wanted in zip(gradients(net, x), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_single_block_has_one_too():
    block = ReversibleBlock(branch(), branch()).double()
    block.witness = witness = Witness()
    x = torch.randn(5, 16, dtype=torch.float64)
    block(x).square().sum().backward()
    torch.testing.assert_close(torch.cat(witness.rebuilt[0], 1), x, rtol=0, atol=1e-14)


def test_once_for_each_backward():
    net, x = chain(), torch.randn(5, 16, dtype=torch.float64)
    net.witness = witness = Witness()
    loss = net(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(witness.given) == 1
    assert len(witness.rebuilt) == 2
    for first, second in zip(*witness.rebuilt, strict=True):
        assert torch.equal(first, second)


def test_under_create_graph():
    net, x = chain(), torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    net.witness = witness = Witness()
    (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    torch.testing.assert_close(torch.cat(witness.rebuilt[0], 1), x.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("way", ["stored", "no_grad", "declines", "none"])
def test_where_nothing_is_rebuilt_or_wanted_nothing_is_shown(way):
    net = chain(activations="store" if way == "stored" else "reconstruct")
    net.witness = witness = None if way == "none" else Witness(looks=way != "declines")
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.set_grad_enabled(way != "no_grad"):
        y = net(x)
    if way != "no_grad":
        y.square().sum().backward()
    if witness is not None:
        assert len(witness.given) == (way == "declines")
        assert witness.rebuilt == []


def test_what_it_raises_comes_out_of_the_backward_and_the_next_step_is_well():
    net, x = chain(), torch.randn(5, 16, dtype=torch.float64)
    expected = gradients(net, x)

    def refuse(streams):
        raise ArithmeticError("too far")

    net.witness = lambda streams: refuse
    with pytest.raises(ArithmeticError, match="too far"):
        net(x).square().sum().backward()
    net.witness = None
    for got, wanted in zip(gradients(net, x), expected, strict=True):
        assert torch.equal(got, wanted)
