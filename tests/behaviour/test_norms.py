# SPDX-License-Identifier: Apache-2.0
"""Batch norm in the branches: gradients, and running statistics that are updated once a step."""

import pytest
from torch import nn

from behaviour.common import KINDS, WIDE, check_step, conv, images, loss_of, pairs_of, rows, torch, twins
from revkernels.autograd import norm_act
from revkernels.nn import ReversibleBlock, ReversibleSequential


def norm_branch(norm):
    # no bias before a norm: its gradient is zero, and rounding noise has no relative error
    return lambda: nn.Sequential(norm(), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False), norm()).to(WIDE)


def check_statistics(kind, backend, activations):
    """Row 4, as a function: three steps, and buffers as in plain PyTorch after each."""
    net, plain = kind.twins(3, backend=backend, activations=activations)
    for _ in range(3):
        check_step(net, plain, kind.x())
    counts = [b for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counts) >= 6
    assert all(count == 3 for count in counts)


def test_running_statistics(kind, options):
    """Row 4: running_mean, running_var and num_batches_tracked, after every of three steps."""
    check_statistics(kind, **options)


def test_running_statistics_of_images(options):
    """Row 4: two norms a branch, on images."""
    check_step(*twins(pairs_of(norm_branch(lambda: nn.BatchNorm2d(4)), 3), **options), images(), steps=3)


NORMS = {
    "momentum None": lambda: nn.BatchNorm2d(4, momentum=None),
    "momentum 0.01, eps 1e-3": lambda: nn.BatchNorm2d(4, momentum=0.01, eps=1e-3),
    "no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "instance norm, running": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group norm": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("name", NORMS)
def test_kinds_of_norm(name, options):
    """Row 5: every option of torch's norms, over two steps."""
    check_step(*twins(pairs_of(norm_branch(NORMS[name]), 2), **options), images(), steps=2)


def test_frozen_norms_in_training(kind, options):
    """Row 5: norms in eval mode inside a training step leave their statistics alone and use them."""
    net, plain = kind.twins(2, **options)
    check_step(net, plain, kind.x())
    for network in (net, plain):
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    buffers = [b.clone() for b in net.buffers()]
    check_step(net, plain, kind.x(), steps=2)
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))


def test_one_frozen_branch_among_training_ones(kind, options):
    """Row 5: eval mode in the middle only."""
    net, plain = kind.twins(3, **options)
    for network in (net, plain):
        list(network.children())[1].F.eval()
    check_step(net, plain, kind.x(), steps=2)


def test_a_norm_shared_by_all_branches(options):
    """Rows 4 and 13: one norm, updated once for each branch that uses it."""
    norm = nn.BatchNorm1d(4).to(WIDE)
    pairs = pairs_of(lambda: nn.Sequential(norm, nn.Linear(4, 4).to(WIDE)), 3)
    net, plain = twins(pairs, **options)
    check_step(net, plain, rows(6, 8), steps=2)
    assert norm.num_batches_tracked == 12


def test_statistics_are_the_caller_s_own_buffers(kind, options):
    """Row 4: the buffers are the same objects after a step; a reference taken before sees the update."""
    net, _ = kind.twins(2, **options)
    held = [(b, b.clone()) for b in net.buffers()]
    net(kind.x()).sum().backward()
    assert all(now is then for now, (then, _) in zip(net.buffers(), held, strict=True))
    assert all(not torch.equal(now, before) for now, before in held)


def test_statistics_of_evaluation_are_those_of_the_forward(compiled):
    """Row 5: a forward in training before the backward of one in evaluation writes the buffers, not what the backward
    of the fused norm reads. (Plain torch's own batch norm does not notice either.)"""
    found = []
    for between in (False, True):
        torch.manual_seed(0)
        net = ReversibleSequential(ReversibleBlock(conv(), conv()), activations="store").eval()
        y = net(rows(2, 8, 5, 6))
        if between:
            net.train()(3 * rows(2, 8, 5, 6))
        y.square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("activations", ["reconstruct", "store"])
@pytest.mark.parametrize("name", ["basic", "mlp"])
def test_parameters_beside_the_saved_tensors(name, activations, compiled, monkeypatch):
    """As on torch 2.6, where a leaf that a Python node saves under hooks loses its own: theirs fire, once a step,
    and a parameter that was written to is refused."""
    monkeypatch.setattr(norm_act, "_SAVES_LEAVES", False)
    net, plain = KINDS[name].twins(3, activations=activations)
    x, fired = KINDS[name].x(), []
    names = sorted(key for key, _ in net.named_parameters())
    for key, parameter in net.named_parameters():
        parameter.register_hook(lambda gradient, key=key: fired.append(key))
    for _ in range(2):
        check_step(net, plain, x)
        assert sorted(fired) == names
        fired.clear()
    y = net(x)
    with torch.no_grad():
        norm = next(m for m in net[1].F.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)))
        norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|was changed in place"):
        loss_of(y).backward()
