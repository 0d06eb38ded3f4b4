# SPDX-License-Identifier: Apache-2.0
"""reformer-pytorch beside the shim, where it is installed: the same results, and what is wrong in it."""

import copy

import pytest
from behaviour.common import WIDE, assert_same, loss_of, mlp, relative_error, step, torch
from torch import nn

from compat.common import couple, installed, plain, spelled
from compat.test_reformer import (
    LENGTH,
    SIGNATURES,
    Norm,
    Scaled,
    in_plain_torch,
    pairs,
    sequence,
    tokens,
    tokens_once,
)
from revkernels.compat.reformer import ReversibleSequence

pytestmark = pytest.mark.slow


def original():
    installed("reformer_pytorch")
    from reformer_pytorch import reversible

    return reversible


def test_signatures_are_the_peers():
    for name, expected in SIGNATURES.items():
        assert spelled(getattr(original(), name)) == expected


@pytest.mark.parametrize(
    "options", [{}, {"reverse_thres": LENGTH}, {"layer_dropout": 0.5}], ids=["plain", "stored", "layer dropout"]
)
@pytest.mark.parametrize("make", [mlp, Norm, Scaled], ids=["mlp", "norm", "dropout"])
def test_steps_as_the_peer(make, options, backend):
    """From its state_dict, with its masks, leaving out the same blocks; running statistics aside."""
    theirs = original().ReversibleSequence(nn.ModuleList(map(nn.ModuleList, pairs(make))), **options)
    ours, _ = sequence(make, **options)
    ours.load_state_dict(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for seed in range(4):
        outcomes = [step(network, tokens_once(), seed=seed) for network in (ours, theirs)]
        for outcome in outcomes:
            outcome.buffers = {}
        assert_same(*outcomes)


@pytest.mark.parametrize("n_hashes", [1, 4])
def test_a_whole_reformer(n_hashes, monkeypatch, backend):
    """LSH attention comes back to its forward's buckets: the shim in the original's own model, against the original."""
    original()
    from reformer_pytorch import Reformer, reformer_pytorch

    def make():
        torch.manual_seed(0)
        return Reformer(
            dim=8, depth=3, heads=2, bucket_size=4, n_hashes=n_hashes, ff_chunks=1, lsh_dropout=0.1, ff_dropout=0.1
        ).to(WIDE)

    theirs = make()
    monkeypatch.setattr(reformer_pytorch, "ReversibleSequence", ReversibleSequence)
    ours = make()
    assert isinstance(ours.layers, ReversibleSequence)
    ours.load_state_dict(theirs.state_dict())
    x = tokens(2, 16)
    for seed in range(2):
        got, expected = (step(network, x, seed=seed) for network in (ours, theirs))
        got.buffers = expected.buffers = {}
        assert_same(got, expected)
    twin = copy.deepcopy(ours.eval())
    twin.layers = plain(ours.layers, in_plain_torch)
    assert_same(step(ours, x), step(twin, x))


# What docs/migration.md says of reformer-pytorch: the day that one of these fails, its row goes.


def peers(make, depth=2, **options):
    return original().ReversibleSequence(nn.ModuleList(map(nn.ModuleList, pairs(make, depth))), **options)


def through_nets(net, x):
    for block in net.blocks:
        x = couple((block.f.net, block.g.net), x, 2)
    return x


def test_the_peer_lists_every_weight_twice():
    assert len(peers(mlp).state_dict()) == 2 * len(list(peers(mlp).parameters()))


def test_the_peer_loses_the_first_of_two_forwards():
    net = peers(lambda: Scaled(0.5))
    results = []
    for network in (net, plain(net, through_nets)):
        torch.manual_seed(1)
        x = tokens_once()
        y = network(x)
        network(x)
        results.append(torch.autograd.grad(y.sum(), x)[0])
    assert relative_error(*results) > 0.1


def test_the_peer_routes_computed_arguments_to_f_alone():
    net, scale = peers(lambda: Scaled(0.0)), torch.rand(4, dtype=WIDE, requires_grad=True)
    net(tokens(), scale=scale.tanh()).sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        net(tokens(), arg_route=(False, True), scale=scale.tanh()).sum().backward()


def test_the_peer_has_no_backward_in_eval_mode():
    net = peers(mlp).eval()
    with pytest.raises(TypeError):
        loss_of(net(tokens())).backward()


def test_the_peer_has_no_gradient_for_short_sequences_under_layer_dropout():
    net = peers(mlp, layer_dropout=0.1, reverse_thres=LENGTH)
    assert not net(tokens()).requires_grad


def test_the_peers_autograd_grad_writes_to_grad_and_returns_nothing():
    net, x = peers(mlp), tokens()
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(loss_of(net(x)), list(net.parameters()))
    torch.autograd.grad(loss_of(net(x)), x)
    assert next(net.parameters()).grad is not None
