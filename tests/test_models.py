# SPDX-License-Identifier: Apache-2.0
"""The paper's networks: exact sizes, arithmetic against an independent formulation, settings, refusals."""

import math

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as tf  # noqa: E402

from revkernels import models  # noqa: E402
from revkernels.measure import peak_bytes  # noqa: E402

PARAMETERS = {
    ("revnet38", 10): 464_890,
    ("revnet38", 100): 475_060,
    ("revnet110", 10): 1_729_194,
    ("revnet110", 100): 1_740_804,
    ("revnet164", 10): 1_748_778,
    ("revnet164", 100): 1_794_948,
    ("revnet56", 1000): 27_553_128,
    ("revnet104", 1000): 45_428_072,
    ("resnet32", 10): 464_154,
    ("resnet110", 10): 1_727_962,
    ("resnet164", 10): 1_703_258,
    ("resnet101", 1000): 44_541_480,
}
DEPTHS = {"basic": 2, "bottleneck": 3}
REVNETS = ["revnet38", "revnet56", "revnet104", "revnet110", "revnet164"]
PLAN = ("block", "units", "widths", "stem_width", "stem", "strides")
RESNETS = ["resnet32", "resnet101", "resnet110", "resnet164"]


def small(kind="basic", activations="store", backend=None, **options):
    widths = (8, 12, 20) if kind == "basic" else (16, 32, 48)
    plan = models.Plan(kind, (2, 1, 3), widths, stem_width=4)
    return models.RevNet(plan, activations=activations, backend=backend, **options)


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_parameter_count(name, classes):
    with torch.device("meta"):
        model = getattr(models, name)(num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, classes]


@pytest.mark.parametrize(("name", "classes"), [(n, c) for n, c in PARAMETERS if c != 100])
def test_default_classes_and_depth_of_the_name(name, classes):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert model.head[-1].out_features == classes
    main = [m for path, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in path]
    assert len(main) == int("".join(filter(str.isdigit, name)))


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("revnet38", 32, (112, 8)),
        ("revnet164", 32, (512, 8)),
        ("revnet56", 64, (3328, 2)),
        ("resnet32", 32, (64, 8)),
        ("resnet101", 64, (2048, 2)),
    ],
)
def test_shapes(name, size, features):
    """Stage widths and strides, seen at the head's input and output."""
    with torch.device("meta"):
        model = getattr(models, name)(activations="store", backend="eager")
        seen = []
        model.head[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        logits = model(torch.empty(2, 3, size, size))
    width, side = features
    assert seen == [(2, width, side, side)]
    assert logits.shape == (2, model.head[-1].out_features)


# The networks once more, straight from a state dict: no module of the library takes part.


class Weights:
    """Hands out the parameters in the order in which the paper's forward pass needs them."""

    def __init__(self, state):
        self.state = state

    def conv(self, x, path, stride=1):
        w = self.state[path + ".weight"]
        return tf.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)

    def norm_relu(self, x, path):
        mean = x.mean((0, 2, 3), keepdim=True)
        var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
        scale, shift = (self.state[f"{path}.{k}"].view(1, -1, 1, 1) for k in ("weight", "bias"))
        return ((x - mean) / (var + 1e-3).sqrt() * scale + shift).clamp(min=0)

    def branch(self, x, path, convolutions, stride=1, skip=False):
        at = 0
        for i in range(convolutions):
            if not (skip and i == 0):
                x, at = self.norm_relu(x, f"{path}.{at}"), at + 2
            x, at = self.conv(x, f"{path}.{at}", stride if i == 0 else 1), at + 1
        return x

    def shortcut(self, x, path, width, stride):
        if path + ".weight" in self.state:
            return self.conv(x, path, stride)
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // stride, stride, w // stride, stride).mean((3, 5))
        y = x.new_zeros(n, width, h // stride, w // stride)
        before = (width - c) // 2
        y[:, before : before + c] = x
        return y

    def head(self, x):
        x = self.norm_relu(x, "head.0").mean((2, 3))
        return x @ self.state["head.4.weight"].T + self.state["head.4.bias"]


def revnet_forward(state, x, units, widths, convolutions):
    net = Weights(state)
    x = net.norm_relu(net.conv(x, "stem.0"), "stem.1")
    x1, x2 = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    for s, (count, width) in enumerate(zip(units, widths, strict=True)):
        first, stride = f"stages.{s}.0", 1 if s == 0 else 2
        y1 = net.branch(x2, first + ".F", convolutions, stride, skip=s == 0)
        y1 = y1 + net.shortcut(x1, first + ".shortcut1", width // 2, stride)
        y2 = net.shortcut(x2, first + ".shortcut2", width // 2, stride)
        y2 = y2 + net.branch(y1, first + ".G", convolutions)
        for b in block_paths(state, f"stages.{s}.1.", count - 1):
            y1 = y1 + net.branch(y2, b + "F", convolutions)
            y2 = y2 + net.branch(y1, b + "G", convolutions)
        x1, x2 = y1, y2
    return net.head(torch.cat((x1, x2), 1))


def block_paths(state, prefix, count):
    """Prefixes of a chain's blocks, in order, wherever the chain keeps them."""
    found = dict.fromkeys(k[: k.index(".F.") + 1] for k in state if k.startswith(prefix) and ".F." in k)
    assert len(found) == count
    return list(found)


def resnet_forward(state, x, units, widths, convolutions):
    net, unit = Weights(state), 0
    x = net.norm_relu(net.conv(x, "stem.0"), "stem.1")
    for s, (count, width) in enumerate(zip(units, widths, strict=True)):
        for i in range(count):
            path, stride = f"units.{unit}", 2 if s > 0 and i == 0 else 1
            f = net.branch(x, path + ".F", convolutions, stride, skip=unit == 0)
            same = i > 0 or (x.shape[1] == width and stride == 1)
            x = f + (x if same else net.shortcut(x, path + ".shortcut", width, stride))
            unit += 1
    return net.head(x)


@pytest.mark.parametrize("kind", DEPTHS)
@pytest.mark.parametrize("family", ["RevNet", "ResNet"])
def test_forward_is_the_papers(family, kind):
    torch.manual_seed(0)
    units, widths = (2, 1, 3), (8, 12, 20) if kind == "basic" else (16, 32, 48)
    model = getattr(models, family)(models.Plan(kind, units, widths, stem_width=4), activations="store")
    model = model.double()
    for p in model.parameters():  # norms too: scale 1 and shift 0 would hide a swap
        nn.init.normal_(p, std=0.3)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    independent = revnet_forward if family == "RevNet" else resnet_forward
    expected = independent(model.state_dict(), x, units, widths, DEPTHS[kind])
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", DEPTHS)
def test_reconstruct_equals_store(kind):
    """Losses, every gradient and every buffer, down-sampling transitions between the chains included."""
    x, target = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 3, 9])
    results = []
    for activations in ("store", "reconstruct"):
        torch.manual_seed(1)
        model = small(kind, activations).double()
        loss = tf.cross_entropy(model(x), target)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        results.append({"loss": loss.detach(), **grads, **dict(model.named_buffers())})
    stored, rebuilt = results
    assert stored.keys() == rebuilt.keys()
    for name, value in stored.items():
        torch.testing.assert_close(rebuilt[name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind, stem_width", [("basic", 4), ("basic", 8), ("bottleneck", 4)])
def test_transitions_run_again(kind, stem_width):
    """They give what kept ones do, under the same names, and with less memory."""
    x, results, peaks = torch.randn(4, 3, 16, 16, dtype=torch.float64), [], []
    widths = (8, 12, 20) if kind == "basic" else (16, 32, 48)
    for transitions in ("store", "recompute"):
        torch.manual_seed(1)
        model = models.RevNet(models.Plan(kind, (2, 1, 3), widths, stem_width=stem_width), transitions=transitions)
        model = model.double()
        loss = model(x).square().mean()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        results.append({"loss": loss.detach(), **grads, **{n: b.clone() for n, b in model.named_buffers()}})
        peaks.append(peak_bytes(lambda m=model: m(x).square().mean().backward()))
    stored, again = results
    assert stored.keys() == again.keys()
    exactly = stem_width < widths[0]  # else the first unit changes no shape, and its input is rebuilt
    for name, value in stored.items():
        torch.testing.assert_close(again[name], value, rtol=0 if exactly else 1e-9, atol=0 if exactly else 1e-11)
    assert peaks[1] < 0.9 * peaks[0]


@pytest.mark.parametrize("size", [(15, 15), (13, 18)])
def test_odd_sizes(size):
    """Shortcut and strided convolution agree on ceil(size / 2)."""
    assert small()(torch.randn(2, 3, *size)).shape == (2, 10)


def test_pad_shortcut_averages_and_centres():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    y = models.layers.PadShortcut(1, 4, 2)(x)
    assert torch.equal(y[0, 1], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert y[0, [0, 2, 3]].count_nonzero() == 0
    assert torch.equal(models.layers.PadShortcut(4, 4, 1)(x.view(1, 4, 2, 2)), x.view(1, 4, 2, 2))


@pytest.mark.parametrize("name", ["revnet38", "resnet32"])
def test_initialisation(name):
    torch.manual_seed(0)
    model = getattr(models, name)()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            w, std = module.weight, math.sqrt(2 / (9 * module.out_channels))
            assert w.abs().max() <= 2 * std
            # The standard deviation of a normal cut off at two is 0.87962.
            assert w.std().item() == pytest.approx(0.87962 * std, rel=4 / math.sqrt(2 * w.numel()))
            assert abs(w.mean().item()) < 4 * std / math.sqrt(w.numel())
        elif isinstance(module, nn.Linear):
            bound = math.sqrt(3 / module.in_features)
            assert 0.95 * bound < module.weight.abs().max() <= bound
            assert module.bias.count_nonzero() == 0


@pytest.mark.parametrize("name", REVNETS + RESNETS)
def test_norm_settings_and_no_convolution_bias(name):
    with torch.device("meta"):
        model = getattr(models, name)()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {(m.eps, m.momentum, m.affine, m.track_running_stats) for m in norms} == {(1e-3, 0.01, True, True)}
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))


def test_only_the_first_branch_skips_its_norm():
    model = small()
    assert isinstance(model.stages[0][0].F[0], nn.Conv2d)
    others = [m for m in model.modules() if isinstance(m, models.BasicBranch)]
    others.remove(model.stages[0][0].F)
    assert len(others) == 2 * 6 - 1
    assert all(isinstance(m[0], nn.BatchNorm2d) for m in others)


def test_param_groups():
    model = small("bottleneck")
    decayed, rest = models.param_groups(model, 2e-4)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (2e-4, 0.0)
    assert all(p.dim() in (2, 4) for p in decayed["params"])
    assert all(p.dim() == 1 for p in rest["params"])
    together = [*decayed["params"], *rest["params"]]
    assert len(together) == len(set(map(id, together))) == len(list(model.parameters()))


def test_other_channels_and_classes():
    model = models.revnet38(7, in_channels=1, activations="store", backend="eager")
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("activations", ["reconstruct", None])
def test_resnet_refuses_to_reconstruct(name, activations):
    with pytest.raises(ValueError, match=r"activations.*no inverse in closed form"):
        getattr(models, name)(activations=activations)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": "wide"}, ValueError, "block is 'wide'; it must be one of 'basic', 'bottleneck'"),
        ({"stem": "mnist"}, ValueError, "stem is 'mnist'"),
        ({"units": (2, 0)}, ValueError, "units is 0; it must be at least 1"),
        ({"units": (2,)}, ValueError, "widths has length 2, units has 1"),
        ({"units": (2, 1.5)}, TypeError, "units is 1.5, a float; it must be an int"),
        ({"widths": (8, 13)}, ValueError, "widths is 13; it must be a multiple of 2"),
        ({"widths": (8, 6)}, ValueError, "widths are .* must never shrink"),
        (
            {"block": "bottleneck", "widths": (8, 20)},
            ValueError,
            "widths is 20; it must be a multiple of 8",
        ),
        ({"strides": (1,)}, ValueError, "strides has length 1, units has 2"),
        ({"units": (), "widths": ()}, ValueError, "units is empty"),
        ({"strides": (1, 0)}, ValueError, "strides is 0"),
        ({"stem_width": 5}, ValueError, "stem_width is 5; it must be a multiple of 2"),
        ({"num_classes": 0}, ValueError, "num_classes is 0"),
        ({"in_channels": True}, TypeError, "in_channels is True, a bool"),
        ({"activations": "recompute"}, ValueError, "activations"),
        (
            {"transitions": "keep"},
            ValueError,
            "transitions is 'keep'; it must be one of 'store', 'selective', 'recompute'",
        ),
        ({"backend": "metal"}, ValueError, "metal"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"block": "basic", "units": (2, 2), "widths": (8, 16), "stem_width": 4, **change}
    with pytest.raises(error, match=message):
        sizes = {key: arguments.pop(key) for key in PLAN if key in arguments}
        models.RevNet(models.Plan(**sizes), **arguments)


def test_resnet_checks_coupling_and_backend():
    with pytest.raises(ValueError, match="coupling is 'exact'; it must be 'float'"):
        models.resnet32(coupling="exact")
    with pytest.raises(ValueError, match="metal"):
        models.resnet32(backend="metal")


@pytest.mark.parametrize("model", [small, lambda: models.resnet32(in_channels=3)])
def test_bad_images(model):
    with pytest.raises(ValueError, match=r"x has shape \(2, 1, 8, 8\); it must be \(N, 3, H, W\)"):
        model()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(TypeError, match="x is a list"):
        model()([1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streams_are_float32_under_autocast(dtype):
    """And of the model's own dtype without it."""
    seen = []
    net = models.RevNet(models.Plan("bottleneck", (2, 2), (16, 32), stem_width=8))
    for stage in net.stages:
        stage[1].register_forward_hook(lambda module, inputs, output: seen.extend(y.dtype for y in output))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype):
        net(x)
    assert seen == [torch.float32] * 4
    seen.clear()
    net.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert seen == [torch.bfloat16] * 4
