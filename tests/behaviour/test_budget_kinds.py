# SPDX-License-Identifier: Apache-2.0
"""Which steps are alike: a plan holds for those alone, and what was not measured yet is measured when it comes."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import assert_raises, mlp, rows, torch
from revkernels.measure import peak_bytes
from revkernels.nn import ReversibleBlock, ReversibleSequential
from revkernels.nn.chain import HalfStep, run


def deep(p=0.0):
    return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Dropout(p))])


def network(activations, p=0.0, depth=6):
    torch.manual_seed(0)
    blocks = [ReversibleBlock(deep(p), deep(p)) for _ in range(depth)]
    return ReversibleSequential(blocks, split_dim=-1, activations=activations)


def step_of(net, x, frozen=False):
    def step():
        net.requires_grad_(not frozen)
        net(x.detach().requires_grad_(frozen)).square().mean().backward()
        net.requires_grad_(True)

    return step


def limits():
    """Of the network, trained: the peaks of rebuilding and of storing."""
    net = network(rk.MemoryBudget(0.5))
    step_of(net, torch.randn(256, 128))()
    return net.plan().reconstructing, net.plan().storing


@pytest.mark.parametrize("first", ["frozen", "evaluation"])
def test_frozen_or_in_evaluation_first(first, compiled):
    """A frozen branch saves less, and a dropout in evaluation nothing: a plan made then is not one for training."""
    least, most = limits()
    net, x = network(rk.MemoryBudget(round(0.7 * least + 0.3 * most)), p=0.1), torch.randn(256, 128)
    if first == "evaluation":
        [layer.eval() for layer in net.modules() if isinstance(layer, nn.Dropout)]
    for _ in range(3):
        step_of(net, x, first == "frozen")()
    net.train()
    train = step_of(net, x)
    for _ in range(3):
        train()
    assert peak_bytes(train) <= net.plan().limit
    if first == "frozen":  # in turn, as a discriminator: each has its plan
        for _ in range(3):
            step_of(net, x, True)(), train()
        assert len(net.activations.planner._plans) == 2


@pytest.mark.parametrize("how", ["bound", "closure"])
def test_branches_that_are_functions(how, compiled):
    """What they are bound to, or close over, tells as well."""
    torch.manual_seed(0)
    layers = [deep(0.1) for _ in range(8)]
    budget, x = rk.MemoryBudget(0.5), torch.randn(256, 128)

    def function_of(layer):
        return layer.forward if how == "bound" else lambda h: layer(h)

    branches = [function_of(layer) for layer in layers]  # the same ones in every call
    steps = [HalfStep(branch, k % 2, (1 - k % 2,)) for k, branch in enumerate(branches)]

    def train():
        run(steps, x.detach().requires_grad_(), split_dim=-1, activations=budget).square().mean().backward()

    for layer in layers:
        layer.requires_grad_(False).eval()
    for _ in range(3):
        train()
    for layer in layers:
        layer.requires_grad_(True).train()
    for _ in range(3):
        train()
    assert peak_bytes(train) <= budget.planner.latest.limit
    assert len(budget.planner._plans) == 2


def test_a_side_input_that_is_learnt_later(compiled):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, memory):
            return (self.q(x) * self.k(memory)).tanh()

    torch.manual_seed(0)
    blocks = [ReversibleBlock(Cross(), Cross()) for _ in range(5)]
    net = ReversibleSequential(blocks, split_dim=-1, activations=rk.MemoryBudget(0.5)).requires_grad_(False)
    x, memory = torch.randn(256, 128, requires_grad=True), torch.randn(256, 64)

    def train():
        net(x, memory=memory).square().mean().backward()

    for _ in range(3):
        train()
    memory.requires_grad_()
    for _ in range(3):
        train()
    assert peak_bytes(train) <= net.plan().limit and len(net.activations.planner._plans) == 2


def test_more_is_trained_later(compiled):
    """Of a network whose first blocks were frozen all is kept, once they are not, if the budget has it."""
    net, x = network(rk.MemoryBudget(1.0)), torch.randn(64, 128)
    for block in net[:4]:
        block.requires_grad_(False)
    for _ in range(2):
        net(x).square().mean().backward()
    net.requires_grad_(True)
    for _ in range(2):
        net(x).square().mean().backward()
    assert {step.kept for step in net.plan().steps} == {"everything"} and len(net.plan().steps) == 12


def test_the_first_backward_is_of_a_part(compiled):
    net, x = network(rk.MemoryBudget(1.0)), torch.randn(64, 128)
    torch.autograd.grad(net(x).square().mean(), net[5].G[2].weight)
    assert len(net.plan().steps) == 1
    for _ in range(3):
        net(x).square().mean().backward()
    assert len(net.plan().steps) == 12 and all(step.kept == "everything" for step in net.plan().steps)
    torch.autograd.grad(net(x).square().mean(), net[5].G[2].weight)
    assert len(net.plan().steps) == 12


@pytest.mark.parametrize("held", ["another chain's", "its own"])
def test_an_output_whose_backward_does_not_come(held, compiled):
    """A second head that is not trained on, or a validation loss that somebody forgot: planned all the same."""
    budget = rk.MemoryBudget(1.0)
    first, second = network(budget), network(budget)
    x, kept = torch.randn(64, 128), []
    for _ in range(5):
        y, z = first(x), (second if held == "another chain's" else first)(x)
        y.square().mean().backward()
        kept.append(z)
        kept[:-1] = []
    plan = first.plan()
    assert plan.measured_seconds > 0
    assert [step for step in plan.steps if step.kept == "everything"], plan
    (z + first(x)).square().mean().backward()  # it does come, later
    kept.clear()
    del y, z
    for _ in range(3):
        (first(x) + (second if held == "another chain's" else first)(x)).square().mean().backward()
    assert {(step.chain, step.kept) for step in first.plan().steps} == {(0, "everything"), (1, "everything")}


class Differentiates(nn.Module):
    """A branch that takes a gradient while it runs."""

    def __init__(self):
        super().__init__()
        self.body, self.energy = mlp(32, 64).float(), nn.Linear(32, 1)

    def forward(self, x):
        (slope,) = torch.autograd.grad(self.energy(x).square().sum(), self.energy.weight, create_graph=True)
        return self.body(x) + slope


def test_a_branch_that_differentiates(compiled):
    """That is no end of the step: two chains that share a budget stay within it."""
    budget = rk.MemoryBudget(0.6)
    torch.manual_seed(0)
    nets = [
        ReversibleSequential(
            [ReversibleBlock(Differentiates(), Differentiates()) for _ in range(5)], split_dim=-1, activations=budget
        )
        for _ in range(2)
    ]
    x = torch.randn(256, 64)

    def step():
        nets[1](nets[0](x)).square().mean().backward()

    for _ in range(4):
        step()
    plan = nets[0].plan()
    assert {step.chain for step in plan.steps} == {0, 1}
    assert peak_bytes(step) <= plan.limit


class Unseen(nn.Module):
    """It writes to what an operator, or a norm, has returned, where torch counts no write."""

    def __init__(self, how):
        super().__init__()
        self.norm = rk.nn.NormAct(nn.LayerNorm(32), nn.SiLU())
        self.first, self.second, self.how = nn.Linear(32, 32), nn.Linear(32, 32), how

    def forward(self, x):
        h = self.norm(x)
        y = self.first(x)
        if self.how == "data":
            h.data.clamp_(-0.1, 0.5), y.data.mul_(2)
        else:
            h.detach().numpy()[...] *= 2
        return self.second(h) + y.tanh()


def check_as_stored(make, share, shape):
    """Under a budget of that share, also in the steps behind the one that is measured."""
    torch.manual_seed(0)
    blocks = [ReversibleBlock(make(), make()) for _ in range(4)]
    net = ReversibleSequential(blocks, split_dim=-1, activations=rk.MemoryBudget(share))
    x, found = torch.randn(shape), []
    for activations in (net.activations, "store"):
        net.activations = activations
        for _ in range(3):
            net.zero_grad()
            net(x).square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["data", "NumPy"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_writes_that_no_version_tells(how, share, compiled):
    check_as_stored(lambda: Unseen(how), share, (64, 64))


class UnsafeChunks(nn.Module):
    """It writes, as a GRU does, to parts of an operator's output that torch does not tell to be views of it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(512, 512)

    def forward(self, x):
        y = torch.cat([part.sigmoid_() for part in self.layer(x).unsafe_chunk(2, -1)], -1)
        for _ in range(6):  # which saves a lot and takes little: the layer's output is what a budget keeps first
            y = y.sin()
        return y


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_writes_to_what_is_no_view_by_its_words(share, compiled):
    check_as_stored(UnsafeChunks, share, (16, 1024))


def test_errors_of_a_plan(compiled):
    net = network(rk.MemoryBudget(0.5))
    for x in ("x", 3):
        assert_raises(TypeError, ["x is a", "a tensor in it"], lambda x=x: net.plan(x))
    net.requires_grad_(False)
    assert_raises(ValueError, ["nothing in the network requires grad"], lambda: net.plan(torch.randn(2, 128)))


def test_one_byte_is_hardly_meant():
    """1 is bytes, 1.0 a share, and all of it."""
    net = ReversibleSequential(ReversibleBlock(mlp(), mlp()), activations=rk.MemoryBudget(1))
    net(rows()).sum().backward()
    parts = ["MemoryBudget(1)", "for a share write 1.0: an int is bytes"]
    assert_raises(ValueError, parts, lambda: net(rows()).sum().backward())
