# SPDX-License-Identifier: Apache-2.0
"""Residual functions of transformers and ConvNeXts: their formulas, their names, their use in a reversible chain."""

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as tf  # noqa: E402

from revkernels.measure import angle  # noqa: E402
from revkernels.nn import PerBlock, ReversibleBlock, ReversibleSequential  # noqa: E402
from revkernels.nn.branches import (  # noqa: E402
    AttentionBranch,
    ConvNeXtBranch,
    DropPath,
    LayerNorm2d,
    LayerScale,
    MLPBranch,
    SelfAttention,
)

WIDE = torch.float64
INF = float("inf")


def close(got, expected, tolerance=1e-12):
    """Far above what sums of some dozens of float64 round to, far below any mistake."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert (got - expected).norm() <= tolerance * (1 + expected.norm())


def spread(module):
    """Parameters that show a mistake: norms start as the identity, a layer scale as next to nothing."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / max(p[0].numel(), 1) ** 0.5)
    return module.to(WIDE)


def plain(branch):
    """The same layers, copied, in a Sequential of PyTorch's."""
    return nn.Sequential(*copy.deepcopy(list(branch.children())))


def reference(pairs, x1, x2, **of_attention):
    """y1 = x1 + F(x2); y2 = x2 + G(y1) with torch alone, layer by layer."""

    def branch(layers, x):
        for layer in layers:
            x = layer(x, **of_attention) if isinstance(layer, SelfAttention) else layer(x)
        return x

    for F, G in pairs:
        x1 = x1 + branch(F, x2)
        x2 = x2 + branch(G, x1)
    return x1, x2


def gradients(run, modules, streams, seed=3):
    """What one step leaves: outputs, gradients of the streams and of the parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in streams]
    for module in modules:
        module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    outputs = run(*leaves)
    sum((y * torch.linspace(-1, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs).backward()
    return [*outputs, *(x.grad for x in leaves), *(p.grad for m in modules for p in m.parameters())]


BRANCHES = {
    "mlp": (lambda p=0.0, d=0.0: MLPBranch(12, 20, p, drop_path=d), (3, 5, 12)),
    "mlp of rows": (lambda p=0.0, d=0.0: MLPBranch(12, 20, p, drop_path=d), (7, 12)),
    "attention": (lambda p=0.0, d=0.0: AttentionBranch(12, 3, p, drop_path=d), (3, 5, 12)),
    "causal attention": (lambda p=0.0, d=0.0: AttentionBranch(12, 3, p, True, drop_path=d), (3, 5, 12)),
    "attention of one sequence": (lambda p=0.0, d=0.0: AttentionBranch(12, 3, p, drop_path=d), (5, 12)),
    "convnext": (lambda p=0.0, d=0.0: ConvNeXtBranch(6, kernel=3, drop_path=d), (3, 6, 5, 7)),
    "convnext, no layer scale": (
        lambda p=0.0, d=0.0: ConvNeXtBranch(6, 2, 5, layer_scale=None, drop_path=d),
        (3, 6, 5, 7),
    ),
}
every_branch = pytest.mark.parametrize("name", BRANCHES)


# ---- each branch alone


SEQUENTIAL = {
    "mlp": (
        lambda: MLPBranch(12, 20),
        lambda: nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)),
        (3, 5, 12),
    ),
    "mlp with dropout": (
        lambda: MLPBranch(12, 20, 0.1, drop_path=0.1),
        lambda: nn.Sequential(
            nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Dropout(0.1), nn.Linear(20, 12), nn.Dropout(0.1)
        ),
        (3, 5, 12),
    ),
    "attention": (
        lambda: AttentionBranch(12, 3),
        lambda: nn.Sequential(nn.LayerNorm(12), SelfAttention(12, 3)),
        (3, 5, 12),
    ),
    "convnext": (
        lambda: ConvNeXtBranch(6),
        lambda: nn.Sequential(
            nn.Conv2d(6, 6, 7, padding=3, groups=6),
            LayerNorm2d(6, eps=1e-6),
            nn.Conv2d(6, 24, 1),
            nn.GELU(),
            nn.Conv2d(24, 6, 1),
            LayerScale(6),
        ),
        (2, 6, 9, 8),
    ),
}


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_state_dict_is_that_of_a_plain_sequential(name):
    make, make_plain, shape = SEQUENTIAL[name]
    branch, other = spread(make()).eval(), spread(make_plain()).eval()
    x = torch.randn(shape, dtype=WIDE)
    assert list(branch.state_dict()) == list(other.state_dict())
    assert (branch(x) - other(x)).norm() > 0.1
    branch.load_state_dict(other.state_dict())
    close(branch(x), other(x))
    spread(branch)
    other.load_state_dict(branch.state_dict())
    close(branch(x), other(x))


@every_branch
def test_shape_stays_and_fused_is_unfused(name):
    make, shape = BRANCHES[name]
    branch = spread(make())
    x = torch.randn(shape, dtype=WIDE)
    y = branch(x)
    assert y.shape == x.shape
    close(y, plain(branch)(x))
    narrow = branch.float()(x.float())
    assert narrow.dtype == torch.float32
    assert (narrow - y).norm() < 1e-5 * y.norm()  # some hundred roundings of 6e-8


@every_branch
def test_empty_batch(name):
    make, shape = BRANCHES[name]
    x = torch.randn(0, *shape[1:]).requires_grad_()
    if len(shape) == 2 and "attention" in name:
        pytest.skip("its first dimension is the sequence")
    make()(x).sum().backward()
    assert x.grad.shape == x.shape


def attention_by_formula(layer, x, mask=0.0):
    """Head by head, in loops: softmax(q k^T / sqrt(d) + mask) v."""
    dim, heads = layer.proj.in_features, layer.heads
    d = dim // heads
    y = torch.zeros_like(x)
    mask = torch.as_tensor(mask, dtype=x.dtype).expand(x.shape[0], heads, x.shape[1], x.shape[1])
    for n in range(x.shape[0]):
        for head in range(heads):
            rows = [slice(part * dim + head * d, part * dim + (head + 1) * d) for part in range(3)]
            q, k, v = (x[n] @ layer.qkv.weight[r].T + layer.qkv.bias[r] for r in rows)
            weights = torch.exp(q @ k.T / d**0.5 + mask[n, head])
            y[n, :, head * d : (head + 1) * d] = (weights / weights.sum(1, keepdim=True)) @ v
    return y @ layer.proj.weight.T + layer.proj.bias


FUTURE = torch.full((5, 5), -INF).triu(1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float32", "float64"])
def test_attention_is_its_formula(mask, causal):
    layer = spread(SelfAttention(12, 3, causal=causal))
    x = torch.randn(2, 5, 12, dtype=WIDE)
    allowed = (torch.rand(2, 3, 5, 5) < 0.6) | torch.eye(5, dtype=torch.bool)  # nobody attends to nothing
    added = {
        "none": torch.zeros(1),
        "bool": torch.where(allowed, 0.0, -INF),
        "float32": torch.randn(2, 1, 5, 5),
        "float64": torch.randn(5, 5, dtype=WIDE),
    }[mask]
    given = {"none": None, "bool": allowed}.get(mask, added)
    expected = attention_by_formula(layer, x, added.to(WIDE) + (FUTURE if causal else 0.0))
    close(layer(x) if given is None else layer(x, attn_mask=given), expected)


def test_causal_attention_does_not_see_what_comes_after():
    layer = SelfAttention(12, 3, causal=True)
    x = torch.randn(2, 6, 12, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x)[:, 3].sum(), x)
    assert torch.equal(dx[:, 4:], torch.zeros_like(dx[:, 4:]))
    assert (dx[:, :4].norm(dim=-1) > 0).all()


def test_attention_dropout_is_of_weights_and_output():
    layer = SelfAttention(8, 2, dropout=0.5)
    x = torch.randn(64, 4, 8)
    dropped = (layer(x) == 0).double().mean().item()
    assert abs(dropped - 0.5) < 0.06  # of 2,048 elements: five standard deviations
    assert torch.equal(layer.eval()(x), layer(x))
    outputs = layer.train()(x)
    kept = outputs != 0
    assert not torch.allclose(outputs[kept], 2 * layer.eval()(x)[kept])  # the weights were dropped too


def test_drop_path_leaves_out_whole_samples():
    layer = DropPath(0.25)
    x = torch.rand(4000, 3, 2) + 0.5
    y = layer(x)
    kept = (y != 0).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1))
    assert abs(kept.all(1).double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    torch.testing.assert_close(y[kept.all(1)], x[kept.all(1)] / 0.75)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (3, 6), (2, 6, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layer_norm_2d_is_a_layer_norm_of_channels(shape, memory_format):
    norm, other = spread(LayerNorm2d(6, eps=1e-3)), nn.LayerNorm(6, eps=1e-3).to(WIDE)
    other.load_state_dict(norm.state_dict())
    x = torch.randn(shape, dtype=WIDE) + 3
    if len(shape) == 4:
        x = x.contiguous(memory_format=memory_format)
    close(norm(x), other(x.movedim(1, -1)).movedim(-1, 1))


def test_layer_scale_is_one_factor_a_channel():
    scale = spread(LayerScale(6))
    x = torch.randn(2, 6, 3, 4, dtype=WIDE)
    assert torch.equal(scale(x), x * scale.gamma[None, :, None, None])
    assert torch.equal(scale(x[:, :, 0, 0]), x[:, :, 0, 0] * scale.gamma)
    assert torch.equal(LayerScale(3).gamma, torch.full((3,), 1e-6))


# ---- in a chain


@pytest.mark.parametrize(("dropout", "drop_path"), [(0.0, 0.0), (0.2, 0.3)])
@pytest.mark.parametrize("activations", ["reconstruct", "store"])
@every_branch
def test_gradients_are_those_of_plain_torch(name, activations, dropout, drop_path):
    make, shape = BRANCHES[name]
    pairs = [(spread(make(dropout, drop_path)), spread(make(dropout, drop_path))) for _ in range(4)]
    copies = [(plain(F), plain(G)) for F, G in pairs]
    net = ReversibleSequential([ReversibleBlock(F, G) for F, G in pairs], activations=activations)
    streams = [torch.randn(shape, dtype=WIDE) for _ in range(2)]
    got = gradients(lambda *x: net(x), [net], streams)
    expected = gradients(lambda *x: reference(copies, *x), [m for pair in copies for m in pair], streams)
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-10)  # 4 blocks rebuilt, each from a difference that rounds to 1e-16


def transformer(depth, activations="reconstruct", backend=None, **options):
    return ReversibleSequential(
        [ReversibleBlock(AttentionBranch(12, 3, **options), MLPBranch(12, 20)) for _ in range(depth)],
        activations=activations,
        backend=backend,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activations", ["reconstruct", "store"])
def test_mask_reaches_the_attention_alone(activations, causal):
    net = spread(transformer(3, activations, causal=causal))
    copies = [(plain(block.F), plain(block.G)) for block in net]
    streams = [torch.randn(2, 5, 12, dtype=WIDE) for _ in range(2)]
    mask = (torch.rand(2, 1, 5, 5) < 0.5) | torch.eye(5, dtype=torch.bool)
    got = gradients(lambda *x: net(x, attn_mask=mask), [net], streams)
    modules = [m for pair in copies for m in pair]
    expected = gradients(lambda *x: reference(copies, *x, attn_mask=mask), modules, streams)
    unmasked = gradients(lambda *x: net(x), [net], streams)
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-10)
    assert (got[0] - unmasked[0]).norm() > 1e-3


def test_mask_that_is_learnt_gets_its_gradient():
    streams = [torch.randn(2, 5, 12, dtype=WIDE) for _ in range(2)]
    grads = []
    net = spread(transformer(3))
    bias = torch.randn(3, 5, 5, dtype=WIDE)
    for activations in ("reconstruct", "store"):
        net.activations = activations
        mask = bias.clone().requires_grad_()
        gradients(lambda *x, mask=mask: net(x, attn_mask=mask), [net], streams)
        grads.append(mask.grad)
    close(*grads, 1e-10)
    assert grads[0].norm() > 0


def test_mask_of_each_block():
    net = spread(transformer(2)).eval()
    x = tuple(torch.randn(2, 5, 12, dtype=WIDE) for _ in range(2))
    masks = [torch.rand(5, 5) < 0.5, FUTURE == 0]
    masks[0].fill_diagonal_(True)
    for_one = net[:1](x, attn_mask=masks[0])
    for a, b in zip(net(x, attn_mask=PerBlock(masks)), net[1:](for_one, attn_mask=masks[1]), strict=True):
        close(a, b)


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="'mask'"):
        transformer(2)(torch.randn(2, 24, 12), mask=torch.ones(24, 24))


@pytest.mark.parametrize("name", ["mlp", "attention", "convnext"])
def test_eager_and_fused_agree(name):
    make, shape = BRANCHES[name]
    pairs = [(make(0.1, 0.1), make(0.1, 0.1)) for _ in range(3)]
    streams = [torch.randn(shape) for _ in range(2)]
    results = []
    for backend in ("eager", None):
        net = ReversibleSequential([ReversibleBlock(F, G) for F, G in pairs], backend=backend)
        results.append(gradients(lambda *x, net=net: net(x), [net], streams))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-5 * (1 + b.norm())  # float32, some hundred roundings


@pytest.mark.parametrize("name", ["mlp", "attention", "convnext"])
def test_autocast(name):
    """Branches in bfloat16, streams in float32, and what is rebuilt has the gradients of what is stored."""
    make, shape = BRANCHES[name]
    pairs = [(make(0.1, 0.1), make(0.1, 0.1)) for _ in range(4)]
    streams = [torch.randn(shape) for _ in range(2)]
    results = []
    for activations in ("reconstruct", "store"):
        net = ReversibleSequential([ReversibleBlock(F, G) for F, G in pairs], activations=activations)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(lambda *x, net=net: net(x), [net], streams))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == torch.float32
    # A stream that is off by 1e-7 can round to the neighbouring bfloat16 in a branch, 0.4 % away, here and there.
    assert angle(*results) < 0.5


# ---- what does not fit


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MLPBranch(0, 4), ValueError, "dim is 0"),
        (lambda: MLPBranch(4, 2.0), TypeError, "hidden is 2.0, a float"),
        (lambda: MLPBranch(4, True), TypeError, "hidden is True, a bool"),
        (lambda: MLPBranch(4, 4, 1.0), ValueError, "dropout is 1.0; it must be at least 0 and below 1"),
        (lambda: MLPBranch(4, 4, drop_path=-0.1), ValueError, "drop_path is -0.1"),
        (lambda: MLPBranch(4, 4, "0.1"), TypeError, "dropout is '0.1', a str"),
        (lambda: MLPBranch(4, 4, float("nan")), ValueError, "dropout is nan"),
        (lambda: AttentionBranch(12, 5), ValueError, "dim is 12, heads is 5: dim must be a multiple of heads"),
        (lambda: AttentionBranch(12, 0), ValueError, "heads is 0"),
        (lambda: AttentionBranch(12, 3, -1), ValueError, "dropout is -1"),
        (lambda: AttentionBranch(12, 3, drop_path=2), ValueError, "drop_path is 2"),
        (lambda: ConvNeXtBranch(4, kernel=4), ValueError, "kernel is 4; it must be odd"),
        (lambda: ConvNeXtBranch(4, expansion=0), ValueError, "expansion is 0"),
        (lambda: ConvNeXtBranch("4"), TypeError, "channels is '4', a str"),
        (lambda: LayerNorm2d(-1), ValueError, "channels is -1"),
        (lambda: LayerScale(0), ValueError, "channels is 0"),
        (lambda: DropPath(1), ValueError, "p is 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda a, x: a(x[..., :8]), ValueError, r"x has shape \(2, 5, 8\); it must be \(N, T, 12\)"),
        (lambda a, x: a(x, attn_mask=[[True]]), TypeError, "attn_mask is a list"),
        (lambda a, x: a(x, attn_mask=torch.ones(5, 5, dtype=torch.long)), TypeError, "attn_mask is torch.int64"),
        (lambda a, x: a(x, attn_mask=torch.ones(5, 4)), ValueError, r"attn_mask has shape \(5, 4\); .* \(2, 3, 5, 5\)"),
        (lambda a, x: a(x, attn_mask=torch.ones(1, 1, 1, 5, 5)), ValueError, "attn_mask has shape"),
        (lambda a, x: LayerNorm2d(4)(x), ValueError, r"x has shape \(2, 5, 12\); it must be \(N, 4, H, W\)"),
        (lambda a, x: tf.linear(LayerNorm2d(4)(x[0, 0]), x), ValueError, r"x has shape \(12,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call(SelfAttention(12, 3), torch.randn(2, 5, 12))


@every_branch
def test_copies_and_text(name):
    make, shape = BRANCHES[name]
    branch = spread(make(0.1, 0.2)).eval()
    twin = copy.deepcopy(branch)
    x = torch.randn(shape, dtype=WIDE)
    assert torch.equal(branch(x), twin(x))
    assert "p=0.2" in repr(branch)
