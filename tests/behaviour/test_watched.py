# SPDX-License-Identifier: Apache-2.0
"""What a branch reads besides its input, wherever it is: run again as it was, counted once, or refused by name."""

import copy
import functools

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import torch
from revkernels.nn import ReversibleBlock, ReversibleSequential, checkpoint

WIDE = torch.float64
NORM = nn.BatchNorm1d(6).double()
TENSOR = torch.ones(6, dtype=WIDE)


def norm_of_this_file(x):
    return NORM(x)


class Trainer:
    """No module."""

    def __init__(self, norm):
        self.net = nn.Sequential(norm)

    def step(self, x):
        return self.net(x)


def held():
    """A function that runs a batch norm, and the norm, by the way that it gets hold of it."""
    norm = nn.BatchNorm1d(6).double()
    trainer = Trainer(norm)
    return {
        "an argument": (lambda m, x: m(x), norm, (norm,)),
        "a dictionary": (lambda x, d={"norm": [norm]}: d["norm"][0](x), norm, ()),
        "a closure's dictionary": ((lambda d: lambda x: d["norm"](x))({"norm": norm}), norm, ()),
        "a closure's object": (lambda x: trainer.net(x), norm, ()),
        "a method of no module": (trainer.step, norm, ()),
        "a keyword": ((lambda *, m=norm: lambda x: m(x))(), norm, ()),
        "a partial": (functools.partial(lambda m, x: m(x), norm), norm, ()),
        "a global": (lambda x: NORM(x), NORM, ()),
        "a function's global": (lambda x: norm_of_this_file(x), NORM, ()),
    }


@pytest.mark.parametrize("way", held())
def test_a_checkpointed_functions_modules_are_found(way):
    """Their statistics are counted once, their mode is that of the forward, and a weight that changed is refused."""
    function, norm, given = held()[way]
    norm.reset_running_stats()
    norm.train()
    x = torch.randn(5, 6, dtype=WIDE, requires_grad=True)
    twin = copy.deepcopy(norm)
    y = checkpoint(function, *given, x)
    norm.eval()
    y.square().sum().backward()
    z = x.detach().clone().requires_grad_()
    twin(z).square().sum().backward()
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close((x.grad, norm.running_mean), (z.grad, twin.running_mean))
    norm.train()
    y = checkpoint(function, *given, x)
    with torch.no_grad():
        norm.weight.mul_(2)
    with pytest.raises(rk.ReconstructionError, match="weight was changed in place"):
        y.sum().backward()
    with torch.no_grad():
        norm.weight.fill_(1)


def test_containers_that_hold_themselves_or_are_long():
    """Looked into no further than that makes sense."""
    norm = nn.BatchNorm1d(6).double()
    ring = {"norm": norm}
    ring["ring"] = [ring]
    data = [object()] * 2**20
    x = torch.randn(5, 6, dtype=WIDE, requires_grad=True)
    checkpoint(lambda x: ring["norm"](x) + len(data), x).sum().backward()
    assert norm.num_batches_tracked == 1


def test_modules_among_the_arguments_of_a_branch():
    class Calls(nn.Module):
        def forward(self, x, norm):
            return norm(x).tanh()

    norm = nn.BatchNorm1d(3).double()
    net = ReversibleSequential(ReversibleBlock(Calls(), Calls()))
    net(torch.randn(5, 6, dtype=WIDE, requires_grad=True), norm=norm).sum().backward()
    assert norm.num_batches_tracked == 2  # two branches


class Attribute(nn.Module):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(3, dtype=WIDE)

    def forward(self, x):
        return (x * self.scale).tanh()


def test_other_tensors_that_change_are_refused():
    """Those of a closure, a global and an attribute, which torch's version check would find with stored activations."""
    scale = torch.ones(3, dtype=WIDE)
    attribute = Attribute()
    for branch, tensor, name in (
        (lambda x: (x * scale).tanh(), scale, "scale"),
        (lambda x: (x * TENSOR[:3]).tanh(), TENSOR, "TENSOR"),
        (attribute, attribute.scale, "scale"),
    ):
        for run in (
            lambda x, branch=branch: ReversibleSequential(ReversibleBlock(branch, branch))(x),
            lambda x, branch=branch: checkpoint(branch, x[:, :3]),
        ):
            x = torch.randn(5, 6, dtype=WIDE, requires_grad=True)
            y = run(x)
            tensor.mul_(2)
            with pytest.raises(rk.ReconstructionError, match=f"the tensor {name}, which is no parameter or buffer"):
                y.sum().backward()
            run(x).sum().backward()


def test_what_a_forward_counts_for_itself_is_let_be():
    """A tensor that no output depends on, written by every call, in two forwards before two backwards."""

    class Counts(Attribute):
        def __init__(self):
            super().__init__()
            self.calls = torch.zeros(1)

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    net = ReversibleSequential(ReversibleBlock(Counts(), Counts()))
    losses = [net(torch.randn(5, 6, dtype=WIDE, requires_grad=True)).sum() for _ in range(2)]
    for loss in losses:
        loss.backward()


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("chained", [True, False], ids=["a chain", "a checkpoint"])
def test_requires_grad_that_changes_is_the_forwards_in_the_recompute(wanted, chained):
    """As where adapters are switched, or a critic is frozen for the generator's loss, before the backward."""
    layer = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Tanh()).to(WIDE)
    stored = copy.deepcopy(layer)
    x = torch.randn(5, 6, dtype=WIDE)

    def step(layer, chain, run):
        layer.requires_grad_(wanted)
        a = x.clone().requires_grad_()
        y = ReversibleSequential(ReversibleBlock(layer, layer), activations=chain)(a) if chained else run(layer, a)
        layer.requires_grad_(not wanted)
        y.square().sum().backward()
        assert all(p.requires_grad is not wanted for p in layer.parameters())
        return [a.grad, *(p.grad for p in layer.parameters())]

    found = step(layer, "reconstruct", lambda layer, a: checkpoint(layer, a[:, :3]))
    for ours, theirs in zip(found, step(stored, "store", lambda layer, a: layer(a[:, :3])), strict=True):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", [True, False])
def test_requires_grad_of_a_side_input_that_changes_is_refused(wanted):
    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x * scale

    scale = torch.ones(3, dtype=WIDE, requires_grad=wanted)
    net = ReversibleSequential(ReversibleBlock(Scaled(), Scaled()))
    y = net(torch.randn(5, 6, dtype=WIDE, requires_grad=True), scale=scale)
    scale.requires_grad_(not wanted)
    with pytest.raises(rk.ReconstructionError, match="did not do the same twice"):
        y.sum().backward()


def test_an_argument_given_twice_is_one_again():
    """Attention asks whether query and key are one tensor, and takes another way if so."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8, requires_grad=True)
    checkpoint(attention, x, x, x)[0].square().sum().backward()
    found, x.grad = x.grad, None
    attention(x, x, x)[0].square().sum().backward()
    torch.testing.assert_close(found, x.grad)
