# SPDX-License-Identifier: Apache-2.0
"""Half-steps that keep everything but outputs of norms and activations: which those are, and that they are right."""

import copy
import gc
import weakref

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import assert_raises, rows, step, torch
from behaviour.exact_chains import assert_same_bits
from revkernels.autograd.planning import rematerialize
from revkernels.measure import peak_bytes
from revkernels.nn import (
    AttentionBranch,
    BasicBranch,
    BottleneckBranch,
    MLPBranch,
    ReversibleBlock,
    ReversibleSequential,
)

COLUMNS = (2, 16, 5, 6)


class TwoReaders(nn.Module):
    """Two layers save the norm's output, one of them in another shape."""

    def __init__(self, width=8):
        super().__init__()
        self.norm = rk.nn.NormAct(nn.LayerNorm(width), nn.SiLU())
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        h = self.norm(x)
        return self.left(h) * self.right(h.reshape(-1, h.shape[-1])).view_as(h).tanh()


def conv(*layers):
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 3, padding=1))


#: A branch, the shape of the input, and the sizes of the outputs that can be made again, in those of a stream.
BRANCHES = {
    "basic": (lambda: BasicBranch(8, 8), COLUMNS, [1, 1]),
    "bottleneck": (lambda: BottleneckBranch(8, 8), COLUMNS, [1, 0.25, 0.25]),
    "group norm": (lambda: conv(nn.GroupNorm(2, 8), nn.SiLU()), COLUMNS, [1]),
    "perceptron": (lambda: MLPBranch(8, 32), (2, 5, 16), [1, 4]),
    "attention": (lambda: AttentionBranch(8, 2), (2, 5, 16), [1]),
    "GELU alone": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.SiLU()), (5, 16), [2]),
    "two readers": (TwoReaders, (2, 5, 16), [1]),
}


def chain(make, depth=2, coupling="exact", **options):
    """A chain whose half-steps are to keep everything but what can be made again, and the same chain stored."""
    torch.manual_seed(depth)
    blocks = [ReversibleBlock(make(), make()) for _ in range(depth)]
    net = ReversibleSequential(blocks, coupling=coupling, activations=rk.MemoryBudget(0.5), **options)
    stored = copy.deepcopy(net)
    stored.activations = "store"
    return net, stored


def split_of(shape):
    return 1 if len(shape) == 4 else -1


def planned(net, x, seed=0):
    """The plan after a step that measures, with that choice for every half-step which has it; how many these are."""
    step(net, x, seed=seed)
    made, found = net.activations.planner.latest, 0
    for k, cost in enumerate(made.calls[0].steps):
        made.choices[0][k] = cost.choices()[-1]._replace(makes_again=cost.made_again > 0)  # whatever was measured here
        found += cost.made_again > 0
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BRANCHES)
def test_as_stored(name, training, made, compiled):
    """Bit for bit; each output once a backward, and none is held on to."""
    make, shape, sizes = BRANCHES[name]
    net, stored = chain(make, split_dim=split_of(shape))
    x = rows(*shape, dtype=torch.float32)
    net.train(training), stored.train(training)
    assert planned(net, x) == 4
    for cost in net.activations.planner.latest.calls[0].steps:
        assert cost.made_again == sum(sizes) * cost.target
    step(stored, x, seed=0)
    made.clear()
    for number in range(2):
        assert_same_bits(step(net, x, seed=number), step(stored, x, seed=number))
    assert len(made) == 2 * 4 * len(sizes)
    assert all(ref() is None for ref in made)
    assert {kept.kept for kept in net.plan().steps} == {"everything but norms' outputs"}
    assert "everything but norms' outputs" in str(net.plan())


class Conjugate(nn.Module):
    """Saves a view of the norm's output whose sign is a bit of the view."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = rk.nn.NormAct(nn.GroupNorm(2, 8), nn.SiLU()), nn.Parameter(torch.ones(3))

    def forward(self, x):
        z = torch.view_as_complex(self.norm(x).unflatten(-1, (3, 2))).conj()
        return torch.cat([z.imag * self.weight, z.real], -1)


def hooked():
    layers = conv(nn.Linear(6, 6), nn.GELU())
    layers[1].register_forward_hook(lambda layer, inputs, h: h * 0.5)
    return layers


class OwnNorm(nn.GroupNorm):
    """Anybody's: not ours to run."""


#: Branches of which an output looks as if it could be made again, and cannot.
KEPT = {
    "ReLU alone": lambda: conv(nn.Conv2d(8, 8, 1), nn.ReLU()),
    "in place behind the norm": lambda: conv(nn.GroupNorm(2, 8), nn.Dropout(0.3, inplace=True)),
    "activation in place": lambda: conv(nn.Conv2d(8, 8, 1), nn.SiLU(inplace=True)),
    "hooked activation": hooked,
    "conjugate view": Conjugate,
    "a norm of their own": lambda: conv(OwnNorm(2, 8), nn.ReLU()),
    "output that nobody saves": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_all_the_same(name, made, compiled):
    net, stored = chain(KEPT[name])
    x = rows(*COLUMNS, dtype=torch.float32)
    assert planned(net, x) == 0
    step(stored, x, seed=0)
    made.clear()
    assert_same_bits(step(net, x, seed=1), step(stored, x, seed=1))
    assert not made


def test_hooks_on_every_module(made, compiled):
    net, _ = chain(BRANCHES["GELU alone"][0], split_dim=-1)
    x = rows(5, 16, dtype=torch.float32)
    hook = nn.modules.module.register_module_forward_hook(lambda layer, inputs, h: None)
    try:
        assert planned(net, x) == 0
    finally:
        hook.remove()


def test_hooks_that_come_later(made, compiled):
    """Planned without them: then what the hook made of the output is kept."""
    net, stored = chain(BRANCHES["GELU alone"][0], split_dim=-1)
    x = rows(5, 16, dtype=torch.float32)
    planned(net, x), step(stored, x, seed=0)
    for network in (net, stored):
        network[1].F[1].register_forward_hook(lambda layer, inputs, h: h * 0.5)
    assert_same_bits(step(net, x, seed=1), step(stored, x, seed=1))


def test_backward_twice_and_in_parts(made, compiled):
    """With the graph retained, and where not everybody who saved an output asks for it: nothing stays."""
    net, stored = chain(TwoReaders, split_dim=-1)
    x = rows(2, 5, 16, dtype=torch.float32)
    planned(net, x), step(stored, x, seed=0)
    for network in (net, stored):
        network.zero_grad()
        y = network(x)
        wanted = [network[1].G.left.weight, network[0].F.left.weight]
        network.found = torch.autograd.grad(y.square().sum(), wanted, retain_graph=True)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
        del y
    assert all(map(torch.equal, net.found, stored.found))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), stored.parameters(), strict=True))
    assert all(ref() is None for ref in made) and made


class Logged(nn.Module):
    """Looks at its norms' outputs with operators whose graph is thrown away, or is no part of the loss."""

    def __init__(self, aux, width=8):
        super().__init__()
        self.norms = nn.ModuleList(rk.nn.NormAct(nn.LayerNorm(width), nn.SiLU()) for _ in range(3))
        self.layers, self.aux = nn.ModuleList(nn.Linear(width, width) for _ in range(3)), aux

    def forward(self, x):
        y, seen = 0, 0
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = norm(x)
            y, seen = y + layer(h), seen + h.pow(2).mean()
        self.seen = seen.detach()
        return (y, seen) if self.aux else y


@pytest.mark.parametrize("aux", [False, True])
def test_who_saved_it_and_never_asks(aux, made, compiled):
    """Then the output is let go all the same, at the latest when the half-step before is at work."""
    net, _ = chain(lambda: Logged(aux), 4, split_dim=-1)
    x = rows(64, 64, 16, dtype=torch.float32)
    step(net, x)
    assert planned(net, x) == 8
    made.clear()
    most = 0

    def look():
        nonlocal most
        most = max(most, sum(ref() is not None for ref in made))

    for block in net:
        for branch in (block.F, block.G):
            branch.layers[0].weight.register_hook(lambda g: look())
    y = net(x)
    (y[0] if aux else y).square().sum().backward()
    assert len(made) >= 8 * 3 and most <= 3
    assert all(ref() is None for ref in made)


def test_gradients_of_gradients(compiled):
    net, stored = chain(lambda: MLPBranch(8, 16), split_dim=-1)
    x = rows(2, 5, 16, dtype=torch.float32)
    planned(net, x), step(stored, x, seed=0)
    found = []
    for network in (net, stored):
        (dx,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([p.grad.clone() for p in network.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_changed_before_the_backward(name, made, compiled):
    net, _ = chain(lambda: BasicBranch(8, 8))
    x = rows(*COLUMNS, dtype=torch.float32)
    planned(net, x)
    y = net(x)
    with torch.no_grad():
        getattr(net[1].F[0], name).mul_(2)
    assert_raises(rk.ReconstructionError, ["block 1, branch F", name], y.sum().backward)


def test_the_graph_is_freed_without_the_collector(compiled):
    net, _ = chain(lambda: BasicBranch(8, 8))
    x = rows(*COLUMNS, dtype=torch.float32)
    planned(net, x)
    gone = []
    net[0].F[2].register_forward_hook(lambda layer, inputs, y: gone.append(weakref.ref(y.untyped_storage())))
    gc.collect(), gc.disable()
    try:
        for _ in range(2):
            y = net(x)
            del y
        assert [ref() for ref in gone] == [None] * 2
    finally:
        gc.enable()


def test_it_saves_the_memory(compiled):
    """Peak of a step that keeps everything, and of one that makes norms' outputs again: two tensors of four a branch,
    but for the branch whose backward is at work."""
    depth = 6
    net, stored = chain(lambda: BasicBranch(8, 8), depth, coupling="float")
    x = rows(4, 16, 24, 24, dtype=torch.float32)
    assert planned(net, x) == 2 * depth

    def taken(network):
        return peak_bytes(lambda: network(x).sum().backward())

    for network in (net, stored):
        taken(network)
    half = x.numel() // 2 * 4
    saved = taken(stored) - taken(net)
    assert (2 * 2 * depth - 3) * half <= saved <= 2 * 2 * depth * half


# ---- by itself


def noted(h, x):
    outputs = rematerialize.Outputs()
    outputs.note(h, lambda x: x * 2, x)
    return outputs


def test_an_address_means_a_tensor_only_while_it_is_there():
    """Another tensor may come to lie where the noted one was, and what was written to is not what was noted."""
    x = torch.randn(64, 64, requires_grad=True)
    h = x * 2
    outputs = noted(h, x)
    view = outputs.find(h[3:5].detach())
    assert torch.equal(view.here(), h[3:5]) and view.output.saved == 1
    assert outputs.find(x) is None and outputs.find(torch.randn(2)) is None
    assert outputs.find(torch.eye(2).to_sparse()) is None
    with torch.no_grad():
        h.add_(1)
    assert outputs.find(h.detach()) is None
    g = x * 2
    outputs, at = noted(g, x), g.detach()
    del g
    assert outputs.find(at) is None


def test_what_it_is_made_of():
    """Without a gradient nothing is saved for sure; what was written to since is told."""
    x = torch.randn(4, requires_grad=True)
    with torch.no_grad():
        h = x * 2
    assert noted(h, x).find(h) is None
    h = x * 2
    outputs = noted(h, x)
    view = outputs.find(h)
    assert not view.output.changed()
    with torch.no_grad():
        x.mul_(1)
    assert view.output.changed() and outputs.find(h) is None  # who saves it now has it kept


def test_memory_that_was_freed():
    """As FSDP does with a parameter that it shards again: a kernel would see a norm without weight."""
    x, weight = torch.randn(4, requires_grad=True), torch.randn(4)
    h, outputs = x * weight, rematerialize.Outputs()
    outputs.note(h, torch.mul, x, weight)
    view = outputs.find(h)
    assert not view.output.changed()
    weight.untyped_storage().resize_(0)
    assert view.output.changed()
