# SPDX-License-Identifier: Apache-2.0
"""FusedSequential and what is said of it: layers in two places, hooks, slices, `explain()`, keywords."""

import copy

import pytest
from torch import nn

from behaviour.common import assert_raises, rows, torch
from revkernels.autograd.fused import fusion
from revkernels.models import revnet38
from revkernels.nn import (
    AttentionBranch,
    BasicBranch,
    FusedSequential,
    MLPBranch,
    NormAct,
    ReversibleBlock,
    ReversibleSequential,
)
from revkernels.nn.branches import SelfAttention


def test_a_layer_in_two_places(compiled):
    act, linear = nn.GELU(), nn.Linear(4, 4)
    plain = nn.Sequential(nn.LayerNorm(4), act, linear, act, linear)
    fused = FusedSequential.from_sequential(plain)
    assert list(fused.state_dict()) == list(plain.state_dict()) and len(fused) == 5
    x = rows(3, 4, dtype=torch.float32)
    torch.testing.assert_close(fused(x), plain(x))


def test_hooks_of_a_sequential_are_not_lost(compiled):
    plain = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    plain.register_forward_hook(lambda layer, inputs, y: y * 0)
    assert_raises(ValueError, ["hooks"], lambda: FusedSequential.from_sequential(plain))


@pytest.mark.parametrize(
    "layers", [BasicBranch(8, 8), MLPBranch(8, 16), NormAct(nn.LayerNorm(8), nn.ReLU()), AttentionBranch(8, 2)], ids=str
)
def test_slices(layers, compiled):
    part = layers[:2]
    assert type(part) is FusedSequential and list(part) == list(layers)[:2]
    assert layers[0] is next(iter(layers))
    rest = nn.Sequential(*layers)[1:]
    assert [name for name, _ in layers[1:].named_children()] == [name for name, _ in rest.named_children()]


class Inner(nn.Module):
    """A forward of its own: what is in it is called by that, as it is."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Sequential(nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8))
        self.fused = FusedSequential(nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x):
        return self.fused(self.plain(x))


class MyBN(nn.BatchNorm1d):
    """Without the word in its name."""


def branches():
    return [
        nn.Sequential(nn.Linear(8, 8), NormAct(nn.LayerNorm(8), nn.ReLU()), nn.Linear(8, 8)),
        Inner(),
        nn.Sequential(Inner(), nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))),
        nn.Sequential(MyBN(8), nn.ReLU(), nn.Linear(8, 8)),
    ]


@pytest.mark.parametrize("number", range(4))
def test_explain_says_what_happens(number, compiled, monkeypatch):
    """Norms that it calls fused are those that one kernel runs, counted; the others are named too."""
    branch = branches()[number]
    net = ReversibleSequential(ReversibleBlock(branch, nn.Identity()), split_dim=-1, activations="store")
    said, ran, fused = net.explain()[0], [], fusion.fused

    def counting(fusable, *args):
        h = fused(fusable, *args)
        ran.append(type(fusable.norm)) if h is not None else None
        return h

    monkeypatch.setattr(fusion, "fused", counting)
    net(torch.randn(4, 16))
    entry = not said.entry.startswith("nothing")
    assert len(said.fused) == len(ran) + entry
    norms = [layer for layer in branch.modules() if isinstance(layer, (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d))]
    assert len(said.fused) + len(said.unfused) == len(norms)


def test_explain_of_a_network():
    """All of its branches, those of a first unit that is a block among them."""
    assert len(revnet38().explain()) == 12 and len(revnet38(transitions="recompute").explain()) == 14


# ---- keywords


def attention_chain():
    torch.manual_seed(0)
    first = FusedSequential(nn.LayerNorm(8), nn.Linear(8, 8))
    return ReversibleSequential(ReversibleBlock(first, AttentionBranch(8, 2)), split_dim=-1)


def masked(net, x):
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    return net(x, attn_mask=mask)


def taught(module):
    """The same module with a forward that takes the keyword, as libraries patch one in."""
    plain = module.forward
    module.forward = lambda x, attn_mask=None: plain(x) + (0 if attn_mask is None else 1)


@pytest.mark.parametrize("how", ["another layer", "a patched forward", "another class"])
def test_a_branch_that_takes_a_keyword_later(how, compiled):
    net, x = attention_chain(), rows(2, 5, 16, dtype=torch.float32)
    masked(net, x)
    if how == "another layer":
        net[0].F[1] = SelfAttention(8, 2)
    elif how == "a patched forward":
        taught(net[0].F)
    else:

        class Taught(FusedSequential):
            def forward(self, x, attn_mask=None):
                return super().forward(x) + (0 if attn_mask is None else 1)

        net[0].F.__class__ = Taught
    fresh = net if how == "a patched forward" else copy.deepcopy(net)
    if how == "a patched forward":
        y1 = masked(net, (x[..., :8], x[..., 8:]))[0]
        torch.testing.assert_close(y1 - x[..., :8] - 1, nn.Sequential(*net[0].F)(x[..., 8:]))
    else:
        torch.testing.assert_close(masked(net, x), masked(fresh, x))
        assert (masked(net, x) - net(x)).abs().max() > 0.01


def test_a_ready_branch_with_a_forward_of_its_own(compiled):
    class Scaled(MLPBranch):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    torch.manual_seed(0)
    net = ReversibleSequential(ReversibleBlock(Scaled(8, 16), Scaled(8, 16)), split_dim=-1)
    x = rows(2, 5, 16, dtype=torch.float32)
    assert torch.equal(net(x, scale=0.0), x)
    assert not torch.equal(net(x), x)
    assert_raises(TypeError, ["no branch takes", "'other'"], lambda: net(x, other=1))


def test_lists_of_blocks():
    """Whatever holds modules is an iterable of blocks."""
    blocks = [ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)]
    for held in (nn.ModuleList(blocks), nn.Sequential(*blocks), tuple(blocks)):
        assert list(ReversibleSequential(held)) == blocks
    assert_raises(
        TypeError, ["blocks[0] is a ReversibleSequential"], lambda: ReversibleSequential(ReversibleSequential())
    )


def test_a_coupling_that_does_not_exist():
    net = ReversibleSequential(ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert_raises(ValueError, ["coupling is 'foo'"], lambda: setattr(net, "coupling", "foo"))
    assert net.coupling == "float"


ODD = {
    "a strided weight": lambda norm: ({"0.weight": torch.rand(4, 2)[:, 0], "0.bias": torch.rand(4, 2)[:, 1]}, norm),
    "one weight for all": lambda norm: ({"0.weight": torch.rand(1).expand(4)}, norm),
    "strided statistics": lambda norm: ({"0.running_mean": torch.zeros(4, 2)[:, 0]}, norm),
    "a momentum of one element": lambda norm: ({}, setattr(norm, "momentum", torch.tensor(0.3)) or norm),
    "a negative momentum": lambda norm: ({}, setattr(norm, "momentum", -0.1) or norm),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("training", [True, False])
def test_what_the_kernels_cannot_take_runs_as_modules(case, training, compiled):
    """Torch takes it, put in by `functional_call` or set on the module; so does a `NormAct`, with the same results."""
    x, found = torch.randn(6, 4), []
    for kind in (nn.Sequential, NormAct):
        torch.manual_seed(0)
        others, norm = ODD[case](nn.BatchNorm1d(4))
        layers = kind(norm, nn.ReLU()).train(training)
        h = torch.func.functional_call(layers, others, (x.clone().requires_grad_(),))
        found.append([h, *layers.buffers()])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_statistics_that_are_half_there_are_torchs_error(compiled):
    layer = NormAct(nn.BatchNorm1d(4)).eval()
    layer[0].running_var = None
    assert_raises(RuntimeError, ["running_var"], lambda: layer(torch.randn(6, 4)))
