# SPDX-License-Identifier: Apache-2.0
"""RevViT: sizes, arithmetic against an independent formulation, memory, refusals."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as tf  # noqa: E402

from revkernels import models  # noqa: E402
from revkernels.measure import angle, branch_calls, peak_bytes  # noqa: E402

WIDE = torch.float64
SIZES = {"revvit_small": (384, 12, 6), "revvit_base": (768, 12, 12), "revvit_large": (1024, 24, 16)}
PARAMETERS = {
    ("revvit_small", 1000): 22_434_664,
    ("revvit_base", 1000): 87_335_656,
    ("revvit_large", 1000): 305_350_632,
    ("revvit_small", 10): 21_673_354,
}


def small(depth=3, **options):
    options = {"image_size": (16, 24), "patch_size": 8, "num_classes": 5, **options}
    return models.RevViT(12, depth, 3, **options)


def images(n=2, dtype=torch.float32):
    return torch.randn(n, 3, 16, 24, dtype=dtype)


def spread(model):
    """Values that show a mistake, where the model starts with zeros and ones."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.to(WIDE)


def step(model, x, seed=1):
    """Logits and gradients of one step from a seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    logits = model(x)
    (logits * torch.linspace(-1, 1.5, logits.numel()).view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_parameter_count(name, classes):
    with torch.device("meta"):
        model = getattr(models, name)(num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, classes]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_vit(name):
    """The count from the shapes on paper: patches, position, blocks as in ViT, norm and head twice as wide."""
    d, depth, heads = SIZES[name]
    block = 2 * d + (3 * d * d + 3 * d) + (d * d + d) + 2 * d + (4 * d * d + 4 * d) + (4 * d * d + d)
    total = (3 * 16 * 16 * d + d) + 14 * 14 * d + depth * block + 2 * 2 * d + (2 * d * 1000 + 1000)
    assert PARAMETERS[name, 1000] == total
    with torch.device("meta"):
        model = getattr(models, name)()
    assert [m.heads for m in model.modules() if hasattr(m, "heads")] == [heads] * depth


@pytest.mark.parametrize("name", SIZES)
def test_shapes(name):
    with torch.device("meta"):
        model = getattr(models, name)(activations="store", backend="eager")
        seen = []
        model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        logits = model(torch.empty(2, 3, 224, 224))
    assert seen == [(2, 196, 2 * SIZES[name][0])]
    assert logits.shape == (2, 1000)


# The network once more, straight from a state dict: no module of the library takes part.


def norm(s, name, x):
    return tf.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-6)


def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def attention(s, at, x, heads):
    q, k, v = linear(s, f"{at}.1.qkv", norm(s, f"{at}.0", x)).chunk(3, -1)
    q, k, v = (t.reshape(*t.shape[:2], heads, -1) for t in (q, k, v))
    weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return linear(s, f"{at}.1.proj", torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))


def mlp(s, at, x):
    return linear(s, f"{at}.3", tf.gelu(linear(s, f"{at}.1", norm(s, f"{at}.0", x))))


def network(s, x, depth, heads, pool, patch):
    n, c, h, w = x.shape
    cut = x.reshape(n, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * patch**2)
    tokens = cut @ s["patches.weight"].flatten(1).T + s["patches.bias"]
    if pool == "class":
        tokens = torch.cat((s["class_token"].expand(n, 1, -1), tokens), 1)
    x1 = x2 = tokens + s["position"]
    for block in range(depth):
        x1 = x1 + attention(s, f"blocks.{block}.F", x2, heads)
        x2 = x2 + mlp(s, f"blocks.{block}.G", x1)
    y = norm(s, "norm", torch.cat((x1, x2), -1))
    return linear(s, "head", y[:, 0] if pool == "class" else y.mean(1))


@pytest.mark.parametrize("activations", ["reconstruct", "store"])
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_same_as_written_out(pool, activations):
    model = spread(small(pool=pool, activations=activations))
    x = images(dtype=WIDE)
    got = step(model, x)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits = network(leaves, x, depth=3, heads=3, pool=pool, patch=8)
    (logits * torch.linspace(-1, 1.5, logits.numel()).view_as(logits)).sum().backward()
    expected = [logits.detach(), *(p.grad for p in leaves.values())]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-11 * (1 + b.norm())  # float64, thousands of additions


# ---- gradients


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_reconstructed_gradients_are_the_stored_ones(rate):
    model = small(6, dropout=rate, drop_path=rate)
    x = images()
    rebuilt = step(model, x)
    model.blocks.activations = "store"
    stored = step(model, x)
    assert torch.equal(rebuilt[0], stored[0])
    assert angle(rebuilt[1:], stored[1:]) < 1e-4  # degrees: float32 streams rebuilt over 12 half-steps
    wide = spread(model)
    stored = step(wide, x.to(WIDE))
    model.blocks.activations = "reconstruct"
    for a, b in zip(step(wide, x.to(WIDE)), stored, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_dropout_changes_the_step_and_not_the_evaluation():
    model = small(dropout=0.3, drop_path=0.3)
    x = images()
    one, other, again = (step(model, x, seed)[0] for seed in (1, 2, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_drop_path_grows_with_depth():
    model = small(5, drop_path=0.4)
    rates = [[m.p for m in block.modules() if type(m).__name__ == "DropPath"] for block in model.blocks]
    assert rates[0] == []
    assert rates[1:] == [[pytest.approx(r)] * 2 for r in (0.1, 0.2, 0.3, 0.4)]
    assert [m for m in small(1, drop_path=0.4).modules() if type(m).__name__ == "DropPath"] == []


def test_eager_and_fused_agree():
    model = small()
    x = images()
    fused = step(model, x)
    model.blocks.backend = "eager"
    for a, b in zip(fused, step(model, x), strict=True):
        assert (a - b).norm() <= 1e-5 * (1 + b.norm())


def test_autocast_keeps_the_streams_wide():
    model = small(6, dropout=0.1, drop_path=0.1)
    x = images()
    seen = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    model.blocks[0].F.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    results = []
    for activations in ("reconstruct", "store"):
        model.blocks.activations = activations
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, x))
    assert set(seen) == {torch.float32}
    # bfloat16 products of streams 1e-7 apart round to neighbours, 0.4 % apart, here and there.
    assert angle(results[0][1:], results[1][1:]) < 0.5


def test_streams_are_dense_rows_of_tokens():
    model = small()
    seen = []
    model.blocks[1].F.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model(images().contiguous(memory_format=memory_format))
    assert all(x.is_contiguous() and x.shape == (2, 6, 12) for x in seen)
    assert len(seen) == 2


def test_learns():
    model = small(2)
    x, labels = images(8), torch.arange(8) % 5
    losses = []
    for _ in range(30):
        loss = tf.cross_entropy(model(x), labels)
        for p, dp in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data.sub_(dp, alpha=0.1)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# ---- memory and work


def test_memory_is_flat_in_depth():
    def peak(depth, activations):
        model = models.RevViT(32, depth, 4, 10, image_size=32, patch_size=4, activations=activations)
        x = torch.randn(8, 3, 32, 32)
        model(x).sum().backward()  # the parameters' gradients are there from now on
        return peak_bytes(lambda: model(x).sum().backward())

    stream = 8 * 64 * 32 * 4  # images, tokens, features, bytes
    assert peak(8, "reconstruct") - peak(2, "reconstruct") < stream
    assert peak(8, "store") - peak(2, "store") > 6 * 10 * stream


def test_each_branch_runs_twice_a_step():
    model = small()
    branches = [m for block in model.blocks for m in block.branches]
    assert branch_calls(branches, lambda: step(model, images())) == 2 * 6
    model.blocks.activations = "store"
    assert branch_calls(branches, lambda: step(model, images())) == 6


def test_every_norm_joins_the_coupling_in_front_of_it():
    said = small(2).explain()
    assert len(said) == 4
    assert all(branch.entry == "LayerNorm" and not branch.unfused for branch in said)
    assert all("eager" in branch.entry for branch in small(2, backend="eager").explain())


# ---- what does not fit


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"image_size": 20}, ValueError, "image_size is 20; it must be a multiple of patch_size, 8"),
        ({"image_size": (16, 20)}, ValueError, r"image_size is \(16, 20\)"),
        ({"image_size": (16, 16, 16)}, ValueError, "image_size has length 3"),
        ({"image_size": 16.0}, TypeError, "image_size is 16.0, a float"),
        ({"patch_size": 0}, ValueError, "patch_size is 0"),
        ({"num_classes": 0}, ValueError, "num_classes is 0"),
        ({"in_channels": "3"}, TypeError, "in_channels is '3', a str"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio is 0"),
        ({"depth": 0}, ValueError, "depth is 0"),
        ({"pool": "max"}, ValueError, "pool is 'max'; it must be 'mean' or 'class'"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
        ({"drop_path": -0.5}, ValueError, "drop_path is -0.5"),
        ({"drop_path": 1.0}, ValueError, "drop_path is 1.0"),
        ({"drop_path": "0.1"}, TypeError, "drop_path is '0.1', a str"),
        ({"activations": "forget"}, ValueError, "activations is 'forget'"),
        ({"coupling": "tight"}, ValueError, "coupling is 'tight'"),
        ({"backend": "abacus"}, ValueError, "abacus"),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, words):
    with pytest.raises(error, match=words):
        small(**options)


def test_dim_must_be_a_multiple_of_heads():
    with pytest.raises(ValueError, match="dim is 12, heads is 5"):
        models.RevViT(12, 2, 5)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ("x", TypeError, "x is a str"),
        (torch.randn(2, 1, 16, 24), ValueError, r"x has shape \(2, 1, 16, 24\); it must be \(N, 3, H, W\)"),
        (torch.randn(3, 16, 24), ValueError, r"it must be \(N, 3, H, W\)"),
        (torch.randn(2, 3, 24, 16), ValueError, r"it must be \(N, 3, 16, 24\)"),
    ],
)
def test_images_that_do_not_fit_are_named(x, error, words):
    with pytest.raises(error, match=words):
        small()(x)


def test_options_reach_their_place():
    model = small(in_channels=1, activations="store", backend="eager", patch_size=4, mlp_ratio=2)
    assert model(torch.randn(2, 1, 16, 24)).shape == (2, 5)
    assert (model.blocks.activations, model.blocks.backend) == ("store", "eager")
    assert model.position.shape == (1, 24, 12)
    assert [m.out_features for m in model.blocks[0].G if isinstance(m, nn.Linear)] == [24, 12]
    assert models.param_groups(model, 0.1)[0]["weight_decay"] == 0.1
