# SPDX-License-Identifier: Apache-2.0
"""The streams that a chain returns one by one are tensors of the graph like any other: their gradients have what the
last branch sends back to the one that it reads."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import KINDS, assert_all_close, rows, step, torch, twins
from behaviour.exact_chains import STORED
from revkernels.nn import BasicBranch, MLPBranch
from revkernels.nn.chain import HalfStep, run


def seen(network, x, blocks=()):
    """What retain_grad, a hook and autograd.grad say of the outputs, and hooks of streams behind ``blocks``."""
    leaves, slots = [t.detach().clone().requires_grad_() for t in x], []

    def watch(t):
        place = len(slots)
        slots.append(None)
        t.register_hook(lambda g: slots.__setitem__(place, g.clone()))

    hooks = [block.register_forward_hook(lambda module, inputs, y: [watch(t) for t in y] and None) for block in blocks]
    network.zero_grad()
    y = network(tuple(leaves))
    for t in y:
        t.retain_grad(), watch(t)
    loss = sum((t * t.sin()).sum() * number for number, t in enumerate(y, 1))
    found = torch.autograd.grad(loss, y, retain_graph=True)
    loss.backward()
    [hook.remove() for hook in hooks]
    of_parameters = [p.grad for p in network.parameters()]
    return [*found, *(t.grad for t in y), *slots, *(leaf.grad for leaf in leaves), *of_parameters]


@pytest.mark.parametrize("depth", [1, 3])
def test_gradients_of_a_pair(depth, kind, options):
    """Row 36: as in plain torch."""
    net, plain = kind.twins(depth, **options)
    x = kind.pair()
    got, expected = seen(net, x), seen(plain, x)
    assert len(got) == len(expected)
    assert_all_close(got, expected)


@pytest.mark.parametrize("name", KINDS)
def test_under_a_budget(name, compiled):
    kind = KINDS[name]
    net, plain = kind.twins(3, activations=rk.MemoryBudget(0.5))
    x = kind.pair()
    step(net, x), step(plain, x)
    for _ in range(2):
        assert_all_close(seen(net, x), seen(plain, x))


@pytest.mark.parametrize("activations", ["reconstruct", "store"])
@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("make", [lambda: BasicBranch(8, 8), lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh())])
def test_exact(make, storage, activations, compiled):
    """On the grid, up to the noise that it adds."""
    torch.manual_seed(1)
    net, plain = twins([(make(), make()) for _ in range(2)], coupling=STORED[storage], activations=activations)
    x = [rows(2, 8, 5, 6, dtype=torch.float32) for _ in range(2)]
    assert_all_close(seen(net, x), seen(plain, x), tolerance={"float32": 1e-3, "int16": 0.15}[storage])


@pytest.mark.parametrize("activations", ["reconstruct", "store"])
@pytest.mark.parametrize("storage", STORED)
def test_a_stream_that_two_branches_read(storage, activations, compiled):
    """And none writes: its gradient has both parts."""
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)]
    x = [rows(5, 4, dtype=torch.float32) for _ in range(3)]
    steps = [HalfStep(branch, k, (2,)) for k, branch in enumerate(branches)]
    y = run(steps, tuple(x), groups=3, coupling=STORED[storage], activations=activations)
    (got,) = torch.autograd.grad(sum(t.sin().sum() for t in y), y[2])
    plain = (x[0] + branches[0](x[2]), x[1] + branches[1](x[2]), x[2])
    (expected,) = torch.autograd.grad(sum(t.sin().sum() for t in plain), x[2])
    assert_all_close([got], [expected], tolerance={"float32": 1e-3, "int16": 0.05}[storage])


def test_three_streams(options):
    """Row 36: h = s0 + s1 for the last of three, and both are returned as they were read."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(MLPBranch(4, 8).double() for _ in range(6))

        def steps(self):
            places = [(k % 3, tuple(j for j in range(3) if j != k % 3)) for k in range(6)]
            return [HalfStep(branch, *place) for branch, place in zip(self.branches, places, strict=True)]

        def forward(self, x):
            return run(self.steps(), x, groups=3, **options)

    class Plain(Three):
        def forward(self, x):
            x = list(x)
            for branch, target, sources, *_ in self.steps():
                x[target] = x[target] + branch(sum(x[source] for source in sources))
            return tuple(x)

    torch.manual_seed(0)
    net, plain = Three(), Plain()
    plain.load_state_dict(net.state_dict())
    x = rows(5, 4), rows(5, 4), rows(5, 4)
    assert_all_close(seen(net, x), seen(plain, x))


def test_streams_between_blocks_that_have_hooks(kind, options):
    """A forward hook's tensors too: those are read by the branch before, and by the one behind."""
    net, plain = kind.twins(3, **options)
    x = kind.pair()
    got = seen(net, x, [net[0], net[2]])

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.F, self.G = block.F, block.G

        def forward(self, x1, x2):
            y1 = x1 + self.F(x2)
            return y1, x2 + self.G(y1)

    class Blocks(nn.Sequential):
        def forward(self, x):
            with rk.use_backend("eager"):
                for block in self:
                    x = block(*x)
            return x

    blocks = Blocks(*map(Block, plain.children()))
    assert_all_close(got, seen(blocks, x, [blocks[0], blocks[2]]))
