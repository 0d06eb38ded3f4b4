# SPDX-License-Identifier: Apache-2.0
"""Norms and activations fused with each other and with the coupling: the same results, by fewer kernels."""

import copy
from collections import Counter

import numpy as np
import pytest
from torch import nn
from torch.nn.utils import parametrizations

import revkernels as rk
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_raises,
    check_step,
    images,
    pairs_of,
    relative_error,
    rows,
    step,
    torch,
    twins,
)
from revkernels import native
from revkernels.autograd.fused import fusion
from revkernels.measure import peak_bytes
from revkernels.models import RevNet, revnet38
from revkernels.models.layers import BasicBranch
from revkernels.models.plan import Plan
from revkernels.nn import FusedSequential, NormAct, ReversibleBlock, ReversibleSequential

KERNELS = ("norm_act", "couple_norm_act", "uncouple_norm_act", "norm_act_backward", "couple", "uncouple", "accumulate")


@pytest.fixture
def calls(compiled, monkeypatch):
    """Counts the calls of every compiled kernel."""
    counter = Counter()

    def counted(name, kernel):
        def call(*args, **kwargs):
            counter[name] += 1
            return kernel(*args, **kwargs)

        return call

    for name in KERNELS:
        monkeypatch.setattr(native, name, counted(name, getattr(native, name)))
    return counter


def pre_activation(norm, activation):
    """norm - activation - conv - norm - activation - conv, as anybody would write it."""
    return nn.Sequential(
        norm(), activation(), nn.Conv2d(4, 4, 3, padding=1, bias=False), norm(), activation(), nn.Conv2d(4, 4, 1)
    ).to(WIDE)


def basic():
    return BasicBranch(4, 4).to(WIDE)


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, momentum None": lambda: nn.BatchNorm2d(4, momentum=None),
    "batch, no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "batch, no running": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "group, no affine": lambda: nn.GroupNorm(4, 4, affine=False),
    "group, NumPy's numbers": lambda: nn.GroupNorm(np.int64(2), 4, eps=np.float32(1e-3)),
}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}
ROW_NORMS = {
    "layer": lambda: nn.LayerNorm(4),
    "layer, no affine": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "layer, no bias": lambda: nn.LayerNorm(4, bias=False),
    "rms": lambda: nn.RMSNorm(4),
    "rms, eps": lambda: nn.RMSNorm(4, eps=1e-3),
    "layer, torch's number": lambda: nn.LayerNorm(4, eps=torch.tensor(1e-3)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_images(norm, activation, activations, calls):
    """Every norm and activation of images, two steps, against torch's own layers."""
    pairs = pairs_of(lambda: pre_activation(NORMS[norm], ACTIVATIONS[activation]), 2)
    check_step(*twins(pairs, activations=activations, backend="cpu"), images(), steps=2)
    assert calls["norm_act_backward"] == 16
    assert calls["couple_norm_act"] == 6


@pytest.mark.parametrize("norm", ROW_NORMS)
def test_tokens(norm, activations, calls):
    """Norms over rows, in front of a linear layer."""
    pairs = pairs_of(lambda: nn.Sequential(ROW_NORMS[norm](), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)).to(WIDE), 2)
    check_step(*twins(pairs, split_dim=-1, activations=activations, backend="cpu"), rows(3, 5, 8), steps=2)
    assert calls["norm_act_backward"] == 8


def test_kernel_calls_of_a_step(calls):
    """No kernel is dead code: what 4 half-steps of two norms each come to, couplings and accumulations included."""
    net, _ = twins(pairs_of(basic, 2), backend="cpu")
    net(images()).sum().backward()
    assert calls == {
        "norm_act": 5
        + 5,  # the first entry and 4 inner norms; again, but for the first entry, and the last one instead
        "couple_norm_act": 3,
        "couple": 1,  # nothing follows the last
        "uncouple_norm_act": 3,  # nothing is subtracted from what the first half-step added to
        "norm_act_backward": 8,  # four of them accumulate into a stream's gradient
    }


def test_user_branches_that_begin_otherwise_count_their_own_kernels(calls):
    """A branch that begins with a convolution keeps the coupling's nodes, which accumulate by themselves."""
    net, plain = twins(
        pairs_of(lambda: nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)).to(WIDE), 2), backend="cpu"
    )
    check_step(net, plain, images())
    assert calls == {"norm_act": 8, "couple": 4, "uncouple": 3, "norm_act_backward": 4, "accumulate": 4}


def test_batch_statistics_are_computed_once(compiled, monkeypatch):
    """The recompute is given the forward's statistics, always."""
    given = []
    for name, position in (("norm_act", 5), ("uncouple_norm_act", 7), ("couple_norm_act", 7)):
        kernel = getattr(native, name)

        def watched(*args, _kernel=kernel, _position=position):
            given.append(args[_position])
            return _kernel(*args)

        monkeypatch.setattr(native, name, watched)
    net, _ = twins(pairs_of(basic, 2), backend="cpu")
    y = net(images())
    assert given == [False] * 8
    given.clear()
    y.sum().backward()
    assert given == [True] * 8


def test_row_statistics_are_not_kept(compiled):
    """A float for every position would grow with depth: they are computed anew."""

    def peak(depth):
        pairs = pairs_of(lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), depth)
        net, _ = twins(pairs, split_dim=-1, backend="cpu")
        x = torch.randn(2000, 8)
        net(x).sum().backward()
        return peak_bytes(lambda: net(x).sum().backward())

    assert peak(16) - peak(4) < 2000 * 4  # one set of means of one half-step


def hooked(norm):
    norm.register_forward_hook(lambda module, args, output: None)
    return norm


def own_forward(norm):
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x) * 1
    return norm


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


LEFT_ALONE = {
    "hooks": (lambda: hooked(nn.BatchNorm2d(4)), "BatchNorm2d has hooks"),
    "a parametrisation": (lambda: parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None), "ParametrizedBatchNorm2d"),
    "a forward of its own": (lambda: own_forward(nn.BatchNorm2d(4)), "has a forward of its own"),
    "a subclass": (lambda: Doubled(4), "Doubled is not a norm"),
    "another norm": (lambda: nn.InstanceNorm2d(4, affine=True), "InstanceNorm2d is not a norm"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_left_alone(case, calls):
    """A norm that somebody else has a hand in runs as a module, and `explain` says why."""
    make, reason = LEFT_ALONE[case]
    branch = nn.Sequential(make(), nn.ReLU(), nn.Conv2d(4, 4, 1)).to(WIDE)
    net = ReversibleSequential(ReversibleBlock(branch, copy.copy(branch)), backend="cpu")
    stored = ReversibleSequential(ReversibleBlock(branch, copy.copy(branch)), activations="store", backend="eager")
    x = images()
    got = step(net, x)
    expected = step(stored, x)
    assert_all_close(got.outputs + got.inputs, expected.outputs + expected.inputs)
    assert calls["norm_act"] == calls["couple_norm_act"] == 0
    told = net.explain()
    assert reason in str(told)
    assert told[0].fused == ()


def test_hooks_of_branches_and_norms_fire(compiled):
    """Branch hooks see the stream, in forward and recompute; a global hook sees every layer."""
    seen = []
    branch = basic()
    branch.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    net = ReversibleSequential(ReversibleBlock(branch, basic()), backend="cpu")
    net(images()).sum().backward()
    assert seen == [(2, 4, 5, 6)] * 2
    layers = Counter()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: layers.update([type(module)]))
    try:
        net(images()).sum().backward()
    finally:
        handle.remove()
    assert layers[nn.BatchNorm2d] == 8


def test_a_sequential_with_hooks_is_called_as_a_module(compiled):
    """A user's Sequential is taken apart only if nobody would notice."""
    seen = []
    branch = pre_activation(lambda: nn.BatchNorm2d(4), nn.ReLU)
    branch.register_forward_pre_hook(lambda module, args: seen.append(1))
    net = ReversibleSequential(ReversibleBlock(branch, basic()), backend="cpu")
    net(images()).sum().backward()
    assert len(seen) == 2
    assert "has hooks" in net.explain()[0].entry


def test_explain():
    """Every branch, what joins the coupling, what is fused, and what is not."""
    net = ReversibleSequential(
        ReversibleBlock(BasicBranch(4, 4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU())),
        ReversibleBlock(lambda x: x, nn.TransformerEncoderLayer(4, 2)),
    )
    first, second, third, fourth = net.explain()
    assert first.branch == "block 0, F (BasicBranch)"
    assert first.entry == "BatchNorm2d + relu"
    assert first.fused == ("0: BatchNorm2d + relu", "3: BatchNorm2d + relu")
    assert second.entry == "nothing: Conv2d is not a norm that the kernels support"
    assert second.fused == ("1: GroupNorm + silu",)
    assert "plain callable" in third.entry
    assert "not an nn.Sequential" in fourth.entry
    assert len(fourth.unfused) == 2
    net.backend = "eager"
    assert all("every layer as it is" in branch.entry for branch in net.explain())
    assert len(revnet38().explain()) == 12
    assert "stage 2, block 1, G" in str(revnet38().explain())


def test_eager_runs_layers_as_they_are(calls, available):
    """backend="eager" is the unfused baseline: no kernel of ours, in chains, stems and heads alike."""
    plan = Plan("basic", (2, 2), (8, 8), stem_width=8)
    torch.manual_seed(0)
    net = RevNet(plan, backend="eager")
    fused = RevNet(plan, backend="cpu")
    fused.load_state_dict(net.state_dict())
    x = torch.randn(4, 3, 8, 8)
    net(x).sum().backward()
    assert calls == {}
    fused(x).sum().backward()
    assert calls["norm_act"] > 0
    for ours, theirs in zip(fused.parameters(), net.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-3
    for (name, ours), theirs in zip(fused.named_buffers(), net.buffers(), strict=True):
        assert relative_error(ours, theirs) < 1e-5, name


def test_norm_act_alone(calls):
    """`NormAct` is ``Sequential(norm, activation)``: values, gradients, statistics, names, modes."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(8), nn.SiLU()).to(WIDE)
    fused = NormAct(copy.deepcopy(plain[0]), nn.SiLU())
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for training in (True, False):
        plain.train(training)
        fused.train(training)
        x = images()
        got, expected = step(fused, x), step(plain, x)
        assert_all_close(got.outputs + got.inputs, expected.outputs + expected.inputs)
        for name, gradient in expected.parameters.items():
            assert relative_error(got.parameters[name], gradient) < 1e-10
        for name, buffer in expected.buffers.items():
            assert relative_error(got.buffers[name], buffer) < 1e-10
    assert calls["norm_act"] == calls["norm_act_backward"] == 2
    assert calls["couple"] == 0


def test_norm_act_refuses():
    """What is no norm or activation that it knows, by name."""
    assert_raises(TypeError, ["norm", "Conv2d"], lambda: NormAct(nn.Conv2d(4, 4, 1)))
    assert_raises(TypeError, ["activation", "Tanh", "GELU"], lambda: NormAct(nn.BatchNorm2d(4), nn.Tanh()))
    assert_raises(TypeError, ["norm", "int"], lambda: NormAct(4))
    assert_raises(rk.BackendError, ["backend", "warp"], lambda: NormAct(nn.BatchNorm2d(4), backend="warp"))


def test_norm_act_errors_are_torch_s(compiled):
    """One value a channel, and a wrong number of channels: the layers themselves complain."""
    layer = NormAct(nn.BatchNorm1d(4), nn.ReLU())
    assert_raises(ValueError, ["more than 1 value per channel"], lambda: layer(torch.randn(1, 4)))
    assert_raises(RuntimeError, ["running_mean"], lambda: layer(torch.randn(6, 5)))


def test_norm_act_twice_differentiable(compiled):
    """Its backward can be differentiated: every norm and activation, in float64."""
    for norm in (nn.BatchNorm1d(4), nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4)):
        for activation in (nn.GELU(), nn.SiLU(), None):
            layer = NormAct(norm.to(WIDE), activation)
            torch.manual_seed(1)
            assert torch.autograd.gradgradcheck(layer, rows(5, 4))


def test_from_sequential():
    """The same layers, under the same names; what is no plain Sequential is refused."""
    plain = pre_activation(lambda: nn.BatchNorm2d(4), nn.ReLU).eval()
    fused = FusedSequential.from_sequential(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(a is b for a, b in zip(fused, plain, strict=True))
    assert not fused.training
    assert_raises(TypeError, ["sequential", "Linear"], lambda: FusedSequential.from_sequential(nn.Linear(2, 2)))


def test_autocast_writes_the_narrow_type_at_once(compiled, monkeypatch):
    """In front of a convolution h is bfloat16, as autocast would cast it; elsewhere what the layers would give."""
    seen = []

    def noting(*args):
        h = norm_act(*args)
        seen.append(h.dtype)
        return h

    norm_act = fusion.norm_act
    monkeypatch.setattr(fusion, "norm_act", noting)
    layer = FusedSequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    plain = nn.Sequential(*copy.deepcopy(layer))
    x = torch.randn(4, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = layer(x), plain(x)
    assert seen == [torch.bfloat16, torch.bfloat16]  # the convolution gives it to the second
    assert got.dtype == expected.dtype
    assert relative_error(got, expected) < 2**-7


def test_compiled_branches_see_plain_layers(calls):
    """torch.compile fuses by itself: the branch is one graph, and none of our kernels is in it."""
    torch._dynamo.reset()
    branch = BasicBranch(4, 4)
    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5)
    with rk.use_backend("eager"):
        expected = copy.deepcopy(branch)(x)
    assert relative_error(compiled(x), expected) < 1e-5
    assert calls == {}


def test_checkpoint_inside_a_branch(activations, compiled):
    """A checkpointed part runs its norms a third time, without the chain's statistics."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = FusedSequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()).to(WIDE)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    check_step(*twins(pairs_of(Checkpointed, 2), split_dim=-1, activations=activations, backend="cpu"), rows(5, 8))


def test_a_chain_inside_a_branch_keeps_its_own_statistics(compiled):
    """The inner chain's batch norms are run again with the outer recompute, and counted once."""

    def nest():
        return nn.Sequential(
            nn.BatchNorm2d(4).to(WIDE), nn.ReLU(), _Halved(ReversibleSequential(ReversibleBlock(_half(), _half())))
        )

    net, plain = twins(pairs_of(nest, 2), backend="cpu")
    check_step(net, plain, images(), steps=2)


def _half():
    return nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)).to(WIDE)


class _Halved(nn.Module):
    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def forward(self, x):
        return self.chain(x)
