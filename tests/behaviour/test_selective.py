# SPDX-License-Identifier: Apache-2.0
"""selective_checkpoint: outputs of norms and activations are made again, all else is kept, nothing runs twice."""

import copy
import gc
import weakref

import pytest
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import revkernels as rk
from behaviour.common import assert_raises, rows, torch
from revkernels.measure import peak_bytes
from revkernels.models import RevViT, resnet32, revnet38
from revkernels.nn import (
    BasicBranch,
    FusedSequential,
    MLPBranch,
    NormAct,
    ReversibleBlock,
    ReversibleSequential,
    checkpoint,
    selective_checkpoint,
)

IMAGES = (2, 3, 32, 32)


def convs():
    return FusedSequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0.2)),
        *(nn.Conv2d(8, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 3, 1)),
    )


class Own(nn.Module):
    """A forward of somebody's own, with a chain in the middle."""

    def __init__(self, activations, coupling="float"):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), NormAct(nn.BatchNorm2d(16), nn.ReLU())
        blocks = [ReversibleBlock(BasicBranch(8, 8), BasicBranch(8, 8)) for _ in range(2)]
        self.chain = ReversibleSequential(blocks, activations=activations, coupling=coupling)
        self.wide, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        return self.last(self.chain(self.wide(self.norm(self.stem(x)))).relu())


def vit():
    return RevViT(32, 2, 2, 5, image_size=16, patch_size=8, activations="store")


#: A network, and the shape of its input.
NETWORKS = {
    "convolutions": (convs, IMAGES),
    "a chain that stores": (lambda: Own("store"), IMAGES),
    "a chain that reconstructs": (lambda: Own("reconstruct"), IMAGES),
    # Exact, for two plans are made of two measurements, and what is not kept is rebuilt to within rounding
    "a chain with a budget": (lambda: Own(rk.MemoryBudget(0.5), rk.Exact(k=14)), IMAGES),
    "ResNet": (resnet32, IMAGES),
    "perceptrons": (lambda: nn.Sequential(MLPBranch(8, 16), MLPBranch(8, 16, 0.1)), (2, 5, 8)),
}


def taken(call, net, x, autocast=False):
    """One step: everything that comes of it."""
    torch.manual_seed(3)
    net.zero_grad()
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = call(net, x)
    y.float().square().mean().backward()
    state = [b.clone() for b in net.buffers()]
    return [y.detach(), x.grad, *(p.grad for p in net.parameters()), *state, torch.get_rng_state()]


def same(got, expected):
    assert len(got) == len(expected)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def plainly(net, x):
    return net(x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_bit_for_bit(name, training, autocast, made, compiled):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make().train(training)
    plain, x = copy.deepcopy(net), rows(*shape, dtype=torch.float32)
    for _ in range(3):
        same(taken(selective_checkpoint, net, x, autocast), taken(plainly, plain, x, autocast))
    assert made and all(ref() is None for ref in made)


@pytest.mark.parametrize(
    ("kept", "coupling", "plainly_kept"),
    [
        ("store", "float", "store"),
        ("reconstruct", "float", "reconstruct"),  # rebuilt to within rounding: by both
        (rk.MemoryBudget(1.0), "float", rk.MemoryBudget(1.0)),  # less would leave a choice, by measured times
        ("store", "exact", "store"),
        ("reconstruct", "exact", "store"),
        (rk.MemoryBudget(0.5), "exact", "store"),
    ],
    ids=str,
)
def test_transitions(kept, coupling, plainly_kept, made, compiled):
    """RevNet(transitions="selective") is RevNet: the same state dict, the same bits."""
    torch.manual_seed(0)
    net = revnet38(activations=copy.copy(kept), coupling=coupling, transitions="selective")
    plain = revnet38(activations=copy.copy(plainly_kept), coupling=coupling)
    plain.load_state_dict(net.state_dict())
    x = rows(*IMAGES, dtype=torch.float32)
    for _ in range(3):
        same(taken(plainly, net, x), taken(plainly, plain, x))
    assert made


def test_it_saves_the_memory(compiled):
    """A network of convolutions with norms between holds half; in front of and between chains it helps too."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)

    def peak(net, call=plainly):
        def step():
            call(net, x).square().mean().backward()

        step()
        return peak_bytes(step)

    net = resnet32()
    assert peak(net, selective_checkpoint) < 0.75 * peak(net)
    whole, less, least = (peak(revnet38(transitions=t)) for t in ("store", "selective", "recompute"))
    assert least < less < whole
    assert peak(revnet38(activations="store", transitions="selective")) < 0.7 * peak(revnet38(activations="store"))


def test_vision_transformer(made, compiled):
    torch.manual_seed(0)
    net = vit()
    plain, x = copy.deepcopy(net), rows(2, 3, 16, 16, dtype=torch.float32)
    same(taken(selective_checkpoint, net, x), taken(plainly, plain, x))


def test_inside_a_branch(made, compiled):
    """There it is the plain call: what a branch keeps is the chain's affair."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = FusedSequential(nn.LayerNorm(8), nn.Linear(8, 8))

        def forward(self, x):
            return selective_checkpoint(self.layers, x)

    torch.manual_seed(0)
    net = ReversibleSequential([ReversibleBlock(Branch(), Branch()) for _ in range(3)], split_dim=-1)
    net(rows(4, 16, dtype=torch.float32)).sum().backward()
    assert not made


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("other", ["checkpoint", "torch's checkpoint", "save_on_cpu"])
def test_with_other_ways_to_save_memory(other, inner, compiled):
    def around(call):
        if other == "save_on_cpu":

            def saving(net, x):
                with torch.autograd.graph.save_on_cpu():
                    return call(net, x)

            return saving
        if other == "checkpoint":
            return lambda net, x: checkpoint(lambda x: call(net, x), x)
        return lambda net, x: torch_checkpoint(lambda x: call(net, x), x, use_reentrant=False)

    torch.manual_seed(0)
    net = convs()
    net[1].momentum = 0.0  # torch's checkpoint counts a batch twice
    plain, x = copy.deepcopy(net), rows(*IMAGES, dtype=torch.float32)
    ours = around(selective_checkpoint)
    if inner:
        whole = around(plainly)

        def ours(net, x):
            return selective_checkpoint(lambda x: whole(net, x), x)

    got, expected = taken(ours, net, x), taken(plainly, plain, x)
    same(got[: 2 + len(list(net.parameters()))], expected[: 2 + len(list(net.parameters()))])


def test_backward_twice_and_in_parts(made, compiled):
    torch.manual_seed(0)
    net = nn.Sequential(convs()).eval()
    x = rows(*IMAGES, dtype=torch.float32)
    found = []
    for call in (selective_checkpoint, plainly):
        net.zero_grad()
        y = call(net, x)
        part = torch.autograd.grad(y.sum(), net[0][3].weight, retain_graph=True)
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()
        found.append([*part, *(p.grad.clone() for p in net.parameters())])
        del y
    same(*found)
    assert all(ref() is None for ref in made) and made


def test_gradients_of_gradients(compiled):
    torch.manual_seed(0)
    net = nn.Sequential(MLPBranch(8, 16).double())
    x = rows(2, 5, 8)
    found = []
    for call in (selective_checkpoint, plainly):
        net.zero_grad()
        (dx,) = torch.autograd.grad(call(net, x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_where_it_is_the_plain_call(made, compiled):
    torch.manual_seed(0)
    net = MLPBranch(8, 16).double()
    x = rows(2, 5, 8)
    with torch.no_grad():
        assert torch.equal(selective_checkpoint(net, x), net(x))
    _, pull = torch.func.vjp(lambda x: selective_checkpoint(net, x), x.detach())
    expected = torch.autograd.grad(net(x).sum(), x)[0]
    torch.testing.assert_close(pull(torch.ones_like(x))[0], expected)
    traced = torch.compile(lambda x: selective_checkpoint(net, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(traced(x).sum(), x)[0], expected)
    assert not made
    torch._dynamo.reset()


def test_changes_in_between_are_found(compiled):
    torch.manual_seed(0)
    net, x = convs(), rows(*IMAGES, dtype=torch.float32)
    for parameter in (net[0].weight, net[1].weight, net[4].bias):
        y = selective_checkpoint(net, x)
        with torch.no_grad():
            parameter.mul_(2)
        assert_raises(RuntimeError, ["modified by an inplace operation"], y.sum().backward)


def test_bad_input():
    assert_raises(TypeError, ["function is a int", "callable"], lambda: selective_checkpoint(3, 4))
    assert_raises(ValueError, ["transitions is 'less'", "'selective'"], lambda: revnet38(transitions="less"))


def fail(gradient):
    raise ValueError("somebody's hook")


@pytest.mark.parametrize("how", ["a failing backward", "a look at the graph"])
def test_no_graph_is_held_by_itself(how, compiled):
    """Not in a ring that the collector cannot see: after an error, and where somebody reads saved tensors."""
    net, gone = convs(), []
    net[3].register_forward_hook(lambda layer, inputs, y: gone.append(weakref.ref(y.untyped_storage())))
    hook = net[0].weight.register_hook(fail)
    for _ in range(3):
        y = selective_checkpoint(net, rows(*IMAGES, dtype=torch.float32))
        if how == "a failing backward":
            with pytest.raises(ValueError, match="somebody's hook"):
                y.sum().backward()
        else:
            assert y.grad_fn._saved_input.shape == y.shape
        del y
    hook.remove()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_inputs_of_norms_are_let_go(compiled):
    """With the last that has saved a norm's output: what lies in front is run again in the memory that they had."""
    torch.manual_seed(0)
    stem = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Conv2d(8, 8, 1), nn.Tanh())])
    body = FusedSequential(*[layer for _ in range(8) for layer in (nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))])
    x = torch.randn(4, 8, 24, 24)

    def peak(call):
        def step():
            call(body, checkpoint(stem, x)).mean().backward()

        step()
        return peak_bytes(step)

    assert peak(selective_checkpoint) < 0.8 * peak(plainly)


def test_the_graph_is_freed_without_the_collector(compiled):
    net, x = convs(), rows(*IMAGES, dtype=torch.float32)
    gone = []
    net[3].register_forward_hook(lambda layer, inputs, y: gone.append(weakref.ref(y.untyped_storage())))
    gc.collect(), gc.disable()
    try:
        for used in (False, True):
            y = selective_checkpoint(net, x)
            if used:
                y.sum().backward()
            del y
        assert [ref() for ref in gone] == [None] * 2
    finally:
        gc.enable()
