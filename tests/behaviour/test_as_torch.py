# SPDX-License-Identifier: Apache-2.0
"""Where layers run fused, they do what torch's do: in every setting of theirs, and under whatever is around them."""

import copy
import functools
import re

import pytest
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import revkernels as rk
from behaviour.common import WIDE, assert_raises, rows, torch
from revkernels.autograd import accumulate
from revkernels.errors import ReconstructionError
from revkernels.models import revnet38
from revkernels.nn import (
    AttentionBranch,
    FusedSequential,
    NormAct,
    ReversibleBlock,
    ReversibleSequential,
    checkpoint,
    selective_checkpoint,
)

HALVES = [torch.bfloat16, torch.float16]


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01, 1e-3])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, WIDE], ids=str)
@pytest.mark.parametrize("weighted", ["own", "float32", None])
def test_the_default_eps_of_an_rms_norm(dtype, scale, weighted, compiled):
    """Of the arithmetic's type in some versions of torch and of the input's in others: small inputs tell."""
    norm = nn.RMSNorm(64, elementwise_affine=weighted is not None)
    norm = norm.to(dtype) if weighted == "own" else norm
    x = (torch.randn(32, 64) * scale).to(dtype).requires_grad_()
    expected, dh = norm(x), torch.randn(32, 64)
    (dx,) = torch.autograd.grad(expected, x, dh.to(expected.dtype))
    got = FusedSequential(norm)(x)
    bound = 8 * torch.finfo(dtype).eps
    assert relative(got, expected) < bound
    assert relative(torch.autograd.grad(got, x, dh.to(got.dtype))[0], dx) < 4 * bound


@pytest.mark.parametrize(
    ("norm", "error"),
    [
        (lambda: nn.BatchNorm2d(4, eps=-1e-3), "eps must be positive"),
        (lambda: nn.GroupNorm(2.0, 4), "num_groups.*must be int, not float"),
        (lambda: nn.GroupNorm(2, 4, eps="1"), "eps.*must be float, not str"),
        (lambda: nn.GroupNorm(2, 4, eps=float("nan")), "computed with"),
    ],
)
def test_numbers_that_no_kernel_takes_are_left_to_torch(norm, error, compiled):
    branch = nn.Sequential(norm(), nn.ReLU())
    plain, x = copy.deepcopy(branch), torch.randn(2, 8, 3, 3)
    net = ReversibleSequential(ReversibleBlock(branch, nn.Conv2d(4, 4, 1)))
    try:
        expected = plain(x[:, 4:])
    except (TypeError, ValueError) as refusal:
        assert re.search(error, str(refusal))
        with pytest.raises(type(refusal), match=error):
            net(x)
        assert all(a.equal(b) for a, b in zip(branch.buffers(), plain.buffers(), strict=True))
    else:  # a NaN; and older versions of torch compute with a negative eps
        assert net(x).isnan().any() == expected.isnan().any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("buffers", [True, False])
def test_tracking_switched_off(training, buffers, compiled):
    """As for adaptation, or for adversarial batches: the running statistics are left alone."""
    norm = nn.BatchNorm1d(8)
    if not buffers:
        norm.running_mean = norm.running_var = None
    for track in (False, True):
        norm.track_running_stats = track
        norm.train(training)
        for make in (NormAct, lambda layer: nn.Sequential(NormAct(layer))):
            ours, theirs = copy.deepcopy(norm), copy.deepcopy(norm)
            x = torch.randn(16, 8) + 2
            torch.testing.assert_close(make(ours)(x), theirs(x))
            for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activations", ["store", "reconstruct"])
def test_tracking_switched_off_in_a_chain(activations, backend):
    norm = nn.BatchNorm1d(4).to(WIDE)
    norm.track_running_stats = False
    branch = nn.Sequential(norm, nn.ReLU(), nn.Linear(4, 4)).to(WIDE)
    net = ReversibleSequential(ReversibleBlock(branch, nn.Tanh()), activations=activations, backend=backend)
    net(rows()).sum().backward()
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()


# ---- keywords


class Takes(nn.Module):
    def forward(self, x, **kwargs):
        return x * kwargs.get("scale", 1.0)


class Adapter(nn.Module):
    """Hands on what it is given to a layer that takes none."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.low = layer, nn.Linear(8, 8)

    def forward(self, x, *args, **kwargs):
        return self.layer(x, *args, **kwargs) + self.low(x)


def test_keywords(compiled):
    attention, z = AttentionBranch(8, 2), torch.randn(3, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = attention(z, attn_mask=mask)
    assert not torch.equal(expected, attention(z))
    assert_raises(TypeError, ["keyword", "'mask'"], lambda: attention(z, mask=mask))
    assert_raises(TypeError, ["keyword", "'a'"], lambda: NormAct(nn.LayerNorm(8))(z, a=1))
    nested = FusedSequential(FusedSequential(attention), nn.Identity())
    assert torch.equal(nested(z, attn_mask=mask), expected)
    any_keyword = FusedSequential(nn.LayerNorm(8), Takes())
    torch.testing.assert_close(any_keyword(z, scale=2.0), 2 * nn.LayerNorm(8)(z))
    adapted = FusedSequential(nn.LayerNorm(8), Adapter(nn.Linear(8, 8)), attention)
    torch.testing.assert_close(adapted(z, attn_mask=mask), attention(adapted[1](nn.LayerNorm(8)(z)), attn_mask=mask))
    net = ReversibleSequential(ReversibleBlock(nested, attention), split_dim=-1)
    x = torch.randn(3, 5, 16)
    assert_raises(TypeError, ["keyword", "'mask'"], lambda: net(x, mask=mask))
    plain = ReversibleSequential(ReversibleBlock(attention, attention), split_dim=-1)
    torch.testing.assert_close(net(x, attn_mask=mask), plain(x, attn_mask=mask))


# ---- subclasses, and whoever else has a hand in it


class Twice(nn.Sequential):
    def __call__(self, h):
        return super().__call__(h) * 2


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed(list(super().__iter__()))


@pytest.mark.parametrize("kind", [Twice, Backwards])
def test_sequentials_that_do_something_else(kind, compiled):
    branch = kind(nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid())
    x1, x2 = torch.randn(2, 3, 8)
    y1, _ = ReversibleSequential(ReversibleBlock(branch, nn.Tanh()))((x1, x2))
    torch.testing.assert_close(y1, x1 + branch(x2))


class Wide(nn.Linear):
    """Kept in float32 on purpose."""

    seen = None

    def forward(self, h):
        Wide.seen = h.dtype
        with torch.autocast("cpu", enabled=False):
            return super().forward(h)


def test_autocast_leaves_a_layer_with_a_forward_of_its_own_alone(compiled):
    branch = nn.Sequential(nn.LayerNorm(8), Wide(8, 8))
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = branch(x[:, 8:])
        y = ReversibleSequential(ReversibleBlock(branch, nn.Tanh()))(x.requires_grad_())
        assert Wide.seen is torch.float32
        y.sum().backward()
        torch.testing.assert_close(y[:, :8] - x[:, :8], expected, atol=1e-6, rtol=1e-6)


def layers():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4), nn.BatchNorm1d(4)).to(WIDE)


@pytest.mark.parametrize("where", ["norm", "activation", "first", "branch", "everywhere"])
@pytest.mark.parametrize("when", ["removed", "added"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_hooks_that_come_and_go(where, when, checkpointed, compiled):
    """Registered or removed between forward and backward, as to look at features: the recompute runs as the forward."""
    branch = nn.Sequential(nn.LayerNorm(4), *layers()).to(WIDE) if where == "first" else layers()
    net, seen = ReversibleSequential(ReversibleBlock(branch, layers())), []

    def register():
        if where == "everywhere":
            return nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        place = {"norm": branch[1], "activation": branch[2], "first": branch[0], "branch": branch}[where]
        return place.register_forward_hook(lambda *_: seen.append(1))

    def run(x):
        return checkpoint(nn.Sequential(branch, layers()), x) if checkpointed else net(x)

    torch.manual_seed(0)
    x = rows(5, 4) if checkpointed else rows()
    state, plain = copy.deepcopy(net.state_dict()), x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    run(plain).sin().sum().backward()
    net.load_state_dict(state)
    torch.manual_seed(1)
    handle = register() if when == "removed" else None
    try:
        y = run(x).sin().sum()
        assert bool(seen) == (when == "removed")
        if handle is None:
            handle = register()
        else:
            handle.remove()
        y.backward()
    finally:
        handle.remove()
    torch.testing.assert_close(x.grad, plain.grad)


# ---- transforms and modes


def test_torch_func_over_parameters(compiled):
    layer, x = FusedSequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)), torch.randn(5, 8)
    parameters = dict(layer.named_parameters())
    got = torch.func.grad(lambda p: functional_call(layer, p, (x,)).sum())(parameters)
    for name, expected in zip(got, torch.autograd.grad(layer(x).sum(), list(parameters.values())), strict=True):
        torch.testing.assert_close(got[name], expected)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_recorded_graph_has_no_holes(pre_dispatch, compiled):
    layer = FusedSequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8))
    net = ReversibleSequential(ReversibleBlock(copy.deepcopy(layer), layer), split_dim=-1)
    again, selective = (functools.partial(run, layer) for run in (checkpoint, selective_checkpoint))
    for function, x in ((layer, (5, 8)), (again, (5, 8)), (selective, (5, 8)), (net, (5, 16))):
        x = torch.randn(x)
        graph = make_fx(function, pre_dispatch=pre_dispatch)(x)
        torch.testing.assert_close(graph(x), function(x))


class KeepsAll(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.kept.append(result)
        return result


def test_a_mode_that_keeps_everything_teaches_nothing_wrong(compiled, monkeypatch):
    """Under it, in a process's first step, no gradient is free; afterwards those that a hook holds are not either."""
    monkeypatch.setattr(accumulate, "_free", {})
    net = ReversibleSequential([ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]).to(WIDE)
    with KeepsAll():
        net(rows()).sum().backward()
    held = []

    def note(module, inputs, output):
        output.register_hook(lambda gradient: held.append((gradient, gradient.clone())))

    for linear in net.modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_hook(note)
    net(rows()).sin().sum().backward()
    assert held and all(torch.equal(gradient, value) for gradient, value in held)


def test_selective_checkpoint_of_torch_in_the_first_step(compiled, monkeypatch):
    monkeypatch.setattr(accumulate, "_free", {})

    def policy(context, operator, *args, **kwargs):
        keep = operator is torch.ops.aten.mul.Tensor
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    net, linear, x = (
        ReversibleSequential(ReversibleBlock(nn.Tanh(), nn.Tanh())).to(WIDE),
        nn.Linear(8, 8).to(WIDE),
        rows(),
    )

    def function(t):
        return linear(net(linear(t) * 2) * 3).sin()

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    torch_checkpoint(function, x, use_reentrant=False, context_fn=contexts).sum().backward()
    got, x.grad = x.grad, None
    function(x).sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_fake_tensors(compiled):
    """As of an estimate of memory."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        net = ReversibleSequential(ReversibleBlock(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.5))))
        x = torch.randn(5, 8, requires_grad=True)
        net(x).sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ["reconstruct", "store", rk.MemoryBudget("50%")], ids=str)
def test_on_meta(activations, dtype):
    """Where there are shapes alone, and no autocast: steps, and a whole network."""
    with torch.device("meta"):
        net = ReversibleSequential(
            [ReversibleBlock(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.ReLU())) for _ in range(3)],
            activations=activations,
        )
        models = net.to(dtype), revnet38(activations=activations).to(dtype)
        inputs = torch.ones(5, 8, dtype=dtype), torch.ones(2, 3, 8, 8, dtype=dtype)
    for model, x in zip(models, inputs, strict=True):
        for _ in range(2):
            model(x).sum().backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())


# ---- tensors of other kinds


def test_negated_views(backend):
    """Gradients, outputs and inputs that are the imaginary part of a conjugate."""

    class Imaginary(nn.Module):
        def forward(self, h):
            return torch.complex(h, h.tanh()).conj().imag

    def transformed(net, x):
        y1, y2 = net(x).chunk(2, 1)
        return (torch.fft.fft(torch.complex(y1, y2).conj()).abs() ** 2).sum()

    found = []
    torch.manual_seed(2)
    norm = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)).to(WIDE)
    for activations in ("store", "reconstruct"):
        net = ReversibleSequential(
            [ReversibleBlock(Imaginary(), copy.deepcopy(norm)) for _ in range(2)],
            activations=activations,
            backend=backend,
        )
        x = torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8).requires_grad_()
        transformed(net, x).backward()
        found.append(x.grad)
        y = net(x.detach())
        torch.testing.assert_close(net.inverse(y), x.detach())
    torch.testing.assert_close(found[0], found[1])
    z = torch.complex(rows(5, 8).detach(), rows(5, 8).detach()).conj().imag
    torch.testing.assert_close(FusedSequential(nn.LayerNorm(8).to(WIDE))(z), nn.LayerNorm(8).to(WIDE)(z.resolve_neg()))


def test_a_checkpointed_function_that_writes_to_its_input():
    h = rows(2, 4) * 1
    function = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)).to(WIDE)
    assert_raises(ReconstructionError, ["input of its own in place", "inplace=False"], lambda: checkpoint(function, h))


def test_a_lazy_norm_that_is_run_in_evaluation_first():
    branch = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(), nn.Tanh())
    net = ReversibleSequential(ReversibleBlock(branch, nn.Tanh())).eval()
    x = rows(dtype=torch.float32)
    net(x).sum().backward()
    assert x.grad is not None
