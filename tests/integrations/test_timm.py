# SPDX-License-Identifier: Apache-2.0
"""timm's ViT and ResNet made reversible: the results of the same two streams written in plain torch."""

import copy

import pytest
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_close,
    assert_raises,
    check_step,
    loss_of,
    relative_error,
    rows,
    torch,
)
from torch import nn

from integrations.common import check_compiled, check_copies, check_untouched, generator_state, peaks_by_depth
from integrations.torchvision import timm_or_skip
from revkernels.errors import ReconstructionError
from revkernels.integrations import restore, timm
from revkernels.measure import branch_calls

pytestmark = pytest.mark.slow
timm_or_skip()
from timm.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer  # noqa: E402

SIZE = 16


def vit(depth=3, **options):
    options = {"qkv_bias": True, "init_values": 0.5, **options}
    return VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=12, depth=depth, num_heads=2, num_classes=3, mlp_ratio=2, **options
    ).to(WIDE)


def resnet(layers=(3, 4, 1, 2), block=BasicBlock, **options):
    options = {"channels": (8, 8, 12, 12), "stem_width": 8, "zero_init_last": False, **options}
    return ResNet(block, layers, num_classes=3, **options).to(WIDE)


def images(n=3, size=SIZE, **options):
    return rows(n, 3, size, size, **options)


def plain_vit(model):
    """A copy that runs the two streams in plain torch."""
    twin = copy.deepcopy(model)
    restore(twin)

    def forward(x, attn_mask=None):
        x1 = x2 = x
        for b in twin.blocks:
            x1 = x1 + b.drop_path1(b.ls1(b.attn(b.norm1(x2), attn_mask=attn_mask)))
            x2 = x2 + b.drop_path2(b.ls2(b.mlp(b.norm2(x1))))
        return (x1 + x2) / 2

    twin.blocks.forward = forward
    return twin


def body(block, x):
    """The layers of a ResNet block up to its sum."""
    if isinstance(block, BasicBlock):
        x = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
        x = block.bn2(block.conv2(x))
    else:
        x = block.act1(block.bn1(block.conv1(x)))
        x = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(x)))))
        x = block.bn3(block.conv3(x))
    x = x if block.se is None else block.se(x)
    return x if block.drop_path is None else block.drop_path(x)


def plain_resnet(model, runs):
    """A copy that runs the two streams in plain torch; ``runs``: (layer, first block, how many)."""
    twin = copy.deepcopy(model)
    restore(twin)
    for name, start, count in runs:
        stage = getattr(twin, name)

        def forward(x, stage=stage, start=start, count=count):
            blocks = list(stage)
            for block in blocks[:start]:
                x = block(x)
            streams = [x, x]
            for k, block in enumerate(blocks[start : start + count]):
                streams[k % 2] = streams[k % 2] + body(block, torch.relu(streams[1 - k % 2]))
            x = torch.relu((streams[0] + streams[1]) / 2)
            for block in blocks[start + count :]:
                x = block(x)
            return x

        stage.forward = forward
    return twin


VITS = {
    "plain": {},
    "drop": {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1},
    "no layer scale, class token off": {"init_values": None, "class_token": False, "global_pool": "avg"},
    "pre-norm": {"pre_norm": True, "reg_tokens": 2},
}


@pytest.mark.parametrize("options", VITS.values(), ids=VITS)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("activations", ["reconstruct", "store"])
def test_vit_steps_as_plain_torch(options, backend, activations, available):
    model = vit(**options)
    timm.make_reversible(model, activations=activations, backend=available(backend))
    check_step(model, plain_vit(model), images(), steps=2)


#: Blocks in each layer, their class, options; (layer, first block, number of blocks) of each run.
RESNETS = {
    "basic": ((3, 4, 1, 2), BasicBlock, {}, [("layer1", 1, 2), ("layer2", 1, 3)]),
    "the same width throughout": ((3, 2, 1, 1), BasicBlock, {"stem_type": "deep", "stem_width": 4}, [("layer1", 0, 3)]),
    "bottleneck": ((4, 3, 1, 1), Bottleneck, {"channels": (4,) * 4}, [("layer1", 1, 3), ("layer2", 1, 2)]),
    "attention": (
        (3, 1, 1, 1),
        Bottleneck,
        {"channels": (8,) * 4, "block_args": {"attn_layer": "se"}},
        [("layer1", 1, 2)],
    ),
    "drop": (
        (1, 1, 4, 3),
        BasicBlock,
        {"drop_path_rate": 0.3, "drop_block_rate": 0.2},
        [("layer3", 1, 3), ("layer4", 1, 2)],
    ),
    "dilated": ((2, 2, 3, 3), BasicBlock, {"output_stride": 8}, [("layer3", 1, 2), ("layer4", 0, 3)]),
}


@pytest.mark.parametrize("case", RESNETS.values(), ids=RESNETS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_resnet_steps_as_plain_torch(case, memory_format):
    """Statistics count a batch once; activations of the model are in place, and the streams are not written to."""
    layers, block, options, runs = case
    model = resnet(layers, block, **options).to(memory_format=memory_format)
    replaced = timm.make_reversible(model)
    assert set(replaced.modules) == {f"{name}.{start + k}" for name, start, count in runs for k in range(count)}
    x = images().detach().to(memory_format=memory_format).requires_grad_()
    check_step(model, plain_resnet(model, runs), x, steps=2)


def test_it_is_another_function_and_says_so():
    """The same weights give another output. With branches of zero it is the ordinary model."""
    for model in (vit(), resnet()):
        model.eval()
        x = images()
        ordinary = model(x)
        replaced = timm.make_reversible(model)
        assert "a new architecture: the same weights are another function now" in str(replaced)
        assert relative_error(model(x), ordinary) > 1e-3
    for model in (vit(init_values=1e-300), resnet(zero_init_last=True)):
        model.eval()
        x = images()
        ordinary = model(x)
        timm.make_reversible(model)
        assert_close(model(x), ordinary, 1e-12)


def test_masks_reach_the_attention():
    """Given to the model, which then calls block by block."""
    model = vit()
    timm.make_reversible(model)
    plain = plain_vit(model)
    mask = torch.rand(1, 1, 17, 17) > 0.3
    mask = mask | torch.eye(17, dtype=torch.bool)
    plain.forward = lambda x, attn_mask: plain.forward_head(
        plain.norm(plain.blocks.forward(plain._pos_embed(plain.patch_embed(x)), attn_mask))
    )
    check_step(model, plain, images(), attn_mask=mask)


def test_between_the_blocks_are_both_streams():
    """For hooks and for intermediate features, side by side."""
    model = vit(2)
    x = images()
    timm.make_reversible(model)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, y: seen.append(y))
    y = model.forward_features(x)
    assert [tuple(t.shape) for t in seen] == [(3, 17, 24), (3, 17, 12)]
    assert_close(model.norm(seen[1]), y, 1e-14)
    check_step(model, plain_vit(model), x)
    (features,) = model.forward_intermediates(x, indices=[0], norm=False, intermediates_only=True)
    assert features.shape == (3, 24, 4, 4)


def test_memory_is_flat_in_depth():
    few, many, x = 2, 8, images(8)
    stream = 8 * 17 * 12 * 8
    peaks = peaks_by_depth(vit, timm.make_reversible, x, (few, many))
    assert peaks[many][1] - peaks[few][1] < 0.25 * stream
    assert peaks[many][0] - peaks[few][0] > 10 * stream * (many - few)
    dropped = peaks_by_depth(lambda d: vit(d, drop_path_rate=0.2), timm.make_reversible, x, (few, many))
    assert dropped[many][1] - dropped[few][1] < 0.25 * stream + 2 * (many - few) * generator_state()

    stream = 4 * 8 * 16 * 16 * 4  # in float32: for float64 convolutions have buffers that hide the rest
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images(4, 64, dtype=torch.float32, requires_grad=False).to(memory_format=memory_format).requires_grad_()
        peaks = peaks_by_depth(
            lambda d, f=memory_format: resnet((d, 1, 1, 1)).float().to(memory_format=f),
            timm.make_reversible,
            x,
            (8, 20),
        )
        assert peaks[20][1] - peaks[8][1] < 0.25 * stream
        assert peaks[20][0] - peaks[8][0] > 3 * stream * 12


def test_each_branch_runs_once_more():
    model = vit(3)
    timm.make_reversible(model)
    halves = [half for block in model.blocks for half in (block.attn, block.mlp)]
    assert branch_calls(halves, lambda: model(images()).sum().backward()) == 12


@pytest.mark.parametrize("make", [vit, resnet])
def test_compiled(make):
    model = make(2) if make is vit else make((3, 1, 1, 1))
    timm.make_reversible(model)
    check_compiled(model, plain_vit(model) if make is vit else plain_resnet(model, [("layer1", 1, 2)]), images())


def test_autocast_and_frozen_blocks():
    model = vit(3)
    timm.make_reversible(model)
    model.blocks[1].requires_grad_(False)
    plain = plain_vit(model)
    check_step(model, plain, images())
    x = images().detach().float()
    gradients = []
    for network in (model.float(), plain.float()):
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = network(x)
        loss_of(y).backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    # the streams are float32; what drifts there is a unit of bfloat16, 2^-8, of a branch's input at most
    assert all(relative_error(a, b) < 2**-6 for a, b in zip(*gradients, strict=True))


def test_streams_are_float32_under_autocast():
    """A stem's convolution returns half precision, of which a chain would rebuild no more than that."""
    model = resnet((9, 1, 1, 1)).float()
    timm.make_reversible(model)
    stored = resnet((9, 1, 1, 1)).float()
    stored.load_state_dict(model.state_dict())
    timm.make_reversible(stored, activations="store")
    x, seen, gradients = images(4, 32).detach().float(), [], []
    model.layer1[1].register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    for network in (model, stored):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = network(x)
        loss_of(y).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert seen == [torch.float32]
    assert relative_error(*gradients) < 2**-6


@pytest.mark.parametrize("make", [vit, resnet])
def test_parameters_names_and_copies(make):
    model = make()
    replaced = check_untouched(timm.make_reversible, model)
    assert "timm 1.0" in str(replaced)
    ordinary = make()
    timm.make_reversible(model)
    ordinary.load_state_dict(model.state_dict())
    check_copies(model, images())
    assert restore(model) == list(replaced.modules)


class Own(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x)


def test_what_is_left_and_why():
    model = resnet((2, 2, 1, 1), channels=(8, 8, 8, 8), stem_width=4, stem_type="deep")
    replaced = timm.make_reversible(model)
    assert list(replaced.modules) == ["layer1.0", "layer1.1"]
    lone = "between others of another kind: alone it would save nothing"
    assert replaced.left == {
        **{f"layer{k}.0": "changes the shape" for k in (2, 3, 4)},
        "layer2.1": lone,
    }
    block = vit().blocks[0]
    again = nn.Sequential(block, vit().blocks[0], vit().blocks[0], block)
    assert timm.make_reversible(again).left == {"3": "is there twice"}
    own = nn.Sequential(Own(12, 2), vit().blocks[0], vit().blocks[0], ParallelScalingBlock(12, 2))
    left = timm.make_reversible(own).left
    assert left == {"0": "Own has a forward of its own", "3": "a block of another kind"}
    wanted = ["two or more ViT or stride 1 ResNet blocks in a row is looked for"]
    assert_raises(ValueError, [*wanted, "there is none"], lambda: timm.make_reversible(nn.Linear(2, 2)))
    assert_raises(ValueError, [*wanted, "changed before"], lambda: timm.make_reversible(own))
    assert_raises(ValueError, [*wanted, lone], lambda: timm.make_reversible(vit(1)))
    assert_raises(ValueError, ["backend is 'none'"], lambda: timm.make_reversible(vit(), backend="none"))
    assert_raises(TypeError, ["model is a str"], lambda: timm.make_reversible("vit"))


@pytest.mark.parametrize("make", [vit, resnet])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_a_trace(make, grad):
    """TorchScript asks the class of every module for a name that is an identifier."""
    model, x = make(), images()
    timm.make_reversible(model)
    model.eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x)
        assert_close(traced(x), model(x))


def test_wrong_use_is_named():
    model = vit(2)
    timm.make_reversible(model)
    assert_raises(ValueError, ["(2, 17, 11)", "halved into two streams"], lambda: model.blocks[1](rows(2, 17, 11)))
    y = model(images())
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(2)
    assert_raises(ReconstructionError, ["mlp: ", "fc1.weight was changed"], lambda: y.sum().backward())


def test_training_gets_somewhere():
    """A few steps of an optimizer, the loss falls as in plain torch."""
    losses, x, labels = [], images(8, requires_grad=False), torch.arange(8) % 3
    model = resnet((3, 3, 1, 1))
    timm.make_reversible(model)
    for network in (model, plain_resnet(model, [("layer1", 1, 2), ("layer2", 1, 2)])):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        run = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), labels)
            loss.backward()
            optimizer.step()
            run.append(loss.detach())
        losses.append(run)
    assert losses[0][-1] < losses[0][0]
    assert_all_close(*losses, 1e-9)
