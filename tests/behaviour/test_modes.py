# SPDX-License-Identifier: Apache-2.0
"""Evaluation, the inverse, and what people do to modules as objects."""

import copy
import io
import pickle

import pytest
from torch import nn

from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_close,
    assert_same,
    check_step,
    conv,
    fresh,
    gathered,
    images,
    loss_of,
    mlp,
    norm_mlp,
    pairs_of,
    rows,
    step,
    torch,
    twins,
)
from revkernels.nn import ReversibleBlock, ReversibleSequential


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradients(context, training, options):
    """Row 16: the plain values, buffers and generator; the caller's input untouched."""
    net, plain = twins(pairs_of(norm_mlp, 3), **options)
    results = []
    for network in (net, plain):
        network.train(training)
        torch.manual_seed(0)
        leaves, x = fresh(rows(6, 8))
        before = x.detach().clone()
        with context():
            y = network(x)
        assert y.requires_grad is (context is torch.enable_grad)
        assert y.is_inference() is (context is torch.inference_mode)
        assert torch.equal(x, before)
        results.append(gathered(network, [y.clone()], leaves))
    assert_same(*results)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_training_steps(context, options):
    """Row 16: evaluating in between changes nothing, and trains on afterwards."""
    net, plain = twins(pairs_of(norm_mlp, 2), **options)
    check_step(net, plain, rows(6, 8))
    for network in (net, plain):
        network.eval()
        with context():
            network(rows(6, 8))
        network.train()
    check_step(net, plain, rows(6, 8))


def test_evaluation_between_forward_and_backward(options):
    """Row 16: a no_grad call between a forward and its backward, without switching modes."""
    net, plain = twins(pairs_of(mlp, 3), **options)
    results = []
    for network in (net, plain):
        torch.manual_seed(0)
        leaves, x = fresh(rows())
        loss = loss_of(network(x))
        with torch.no_grad():
            network(x)
        loss.backward()
        results.append(gathered(network, [], leaves))
    assert_same(*results)


def test_gradients_in_eval_mode(options):
    """Row 16: eval mode with gradients: norms use their running statistics, and pass gradients on."""
    net, plain = twins(pairs_of(conv, 3), **options)
    check_step(net, plain, images())
    net.eval()
    plain.eval()
    check_step(net, plain, images(), steps=2)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_inverse(context, training, options):
    """Row 28: net.inverse(net(x)) is x, and the inverse leaves running statistics alone."""
    net, plain = twins(pairs_of(norm_mlp, 3), **options)
    net.train(training)
    x = rows(6, 8)
    pair = rows(6, 4), rows(6, 4)
    with context():
        y, pair_out = net(x), net(pair)
        buffers = [b.clone() for b in net.buffers()]
        back, pair_back = net.inverse(y), net.inverse(pair_out)
    assert type(pair_back) is tuple
    assert_all_close([back, *pair_back], [x, *pair])
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
    if not training:
        assert_close(y, plain.eval()(x))


def test_inverse_is_differentiable(options):
    """Row 28: gradients through the inverse are those of x2 = y2 - G(y1); x1 = y1 - F(x2) in plain PyTorch."""

    class PlainInverse(nn.Module):
        def __init__(self, plain):
            super().__init__()
            self.blocks = plain

        def forward(self, y):
            y1, y2 = y.chunk(2, 1)
            for block in reversed(list(self.blocks.children())):
                y2 = y2 - block.G(y1)
                y1 = y1 - block.F(y2)
            return torch.cat((y1, y2), 1)

    net, plain = twins(pairs_of(mlp, 3), **options)
    y = rows()
    results = []
    for network, inverse in ((net, net.inverse), (plain, PlainInverse(plain))):
        leaves, copied = fresh(y)
        loss_of(inverse(copied)).backward()
        results.append([leaves[0].grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_inverse_of_a_block(options):
    """Rows 28 and 36: a block alone is inverted as well."""
    block = ReversibleBlock(conv(), conv(), **options).eval()
    x = images()
    assert_close(block.inverse(block(x)), x)


def test_functional_call(options):
    """Row 26: other parameters and buffers for one call; the backward, outside it, differentiates those."""
    net, plain = twins(pairs_of(norm_mlp, 2), **options)
    results = []
    for network in (net, plain):
        torch.manual_seed(0)
        own = {name: p.detach().clone() for name, p in network.named_parameters()}
        others = {name: torch.randn_like(p).requires_grad_() for name, p in network.named_parameters()}
        buffers = {name: b.clone() for name, b in network.named_buffers()}
        x = rows(6, 8)
        y = torch.func.functional_call(network, {**others, **buffers}, (x,))
        loss_of(y).backward()
        assert all(torch.equal(p, own[name]) and p.grad is None for name, p in network.named_parameters())
        results.append([x.grad, *(p.grad for p in others.values()), *buffers.values(), *network.buffers()])
    assert_all_close(*results)


def test_state_dict(options):
    """Row 26: plain PyTorch's keys, no key twice, and a round trip through a file."""
    net, plain = twins(pairs_of(norm_mlp, 3), **options)
    state = net.state_dict()
    assert list(state) == list(plain.state_dict())
    addresses = [t.data_ptr() for t in state.values()]
    assert len(set(addresses)) == len(addresses)
    other, _ = twins(pairs_of(norm_mlp, 3), **options)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    check_step(other, plain, rows(6, 8))


def test_parameters_are_listed_once_and_are_the_caller_s(options):
    """Row 26: branches are kept by reference."""
    F, G = mlp(), mlp()
    net = ReversibleSequential(ReversibleBlock(F, G), ReversibleBlock(F, G), **options)
    assert [id(p) for p in net.parameters()] == [id(p) for branch in (F, G) for p in branch.parameters()]
    step(net, rows())
    assert all(p.grad is not None for branch in (F, G) for p in branch.parameters())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies(how, options):
    """Row 26: a copy made after training steps trains on by itself, and the original is left alone."""
    net, plain = twins(pairs_of(norm_mlp, 2), **options)
    check_step(net, plain, rows(6, 8), steps=2)
    other = how(net)
    kept = copy.deepcopy(plain)
    check_step(other, plain, rows(6, 8), steps=2)
    assert type(other) is ReversibleSequential and other.backend == net.backend
    check_step(net, kept, rows(6, 8))


def test_to_dtype_and_back(options):
    """Row 26: to(dtype) converts in place; a step before it does not matter after it."""
    net, plain = twins(pairs_of(norm_mlp, 2), **options)
    check_step(net, plain, rows(6, 8))
    net.to(torch.float32)
    plain.to(torch.float32)
    check_step(net, plain, rows(6, 8, dtype=torch.float32), tolerance=1e-4)
    net.to(WIDE)
    plain.to(WIDE).load_state_dict(net.state_dict())  # running statistics have differed by a rounding in float32
    check_step(net, plain, rows(6, 8))


def test_to_memory_format(options):
    """Row 26: to(memory_format=channels_last)."""
    net, plain = twins(pairs_of(conv, 2), **options)
    check_step(net, plain, images())
    net.to(memory_format=torch.channels_last)
    plain.to(memory_format=torch.channels_last)
    x = images().detach().to(memory_format=torch.channels_last).requires_grad_()
    check_step(net, plain, x, steps=2)
    assert net(x).is_contiguous(memory_format=torch.channels_last)


def test_reset_of_parameters_between_steps(options):
    """Row 26: parameters replaced by new ones between steps are the ones used."""
    net, plain = twins(pairs_of(mlp, 2), **options)
    check_step(net, plain, rows())
    weight = torch.randn(6, 4, dtype=WIDE)
    for network in (net, plain):
        next(network.children()).F[0].weight = nn.Parameter(weight.clone())
    check_step(net, plain, rows())


def test_parametrized_weights(options):
    """Row 26: torch.nn.utils.parametrizations.weight_norm on a branch's layer."""
    net, plain = twins(pairs_of(mlp, 2), **options)
    for network in (net, plain):
        for block in network.children():
            nn.utils.parametrizations.weight_norm(block.F[0])
    check_step(net, plain, rows(), steps=2)
