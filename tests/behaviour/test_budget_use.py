# SPDX-License-Identifier: Apache-2.0
"""activations=MemoryBudget(...): what one may do with a network under a plan, as without one."""

import copy
import threading
import warnings

import pytest
from torch import nn
from torch._functorch import config
from torch.utils.checkpoint import checkpoint

import revkernels as rk
from behaviour.common import WIDE, assert_raises, loss_of, mlp, norm_mlp, pairs_of, rows, step, torch, twins
from behaviour.exact_chains import assert_same_bits
from behaviour.test_budget import EXACT, check, exact_pair, kept_of, wanted_of
from revkernels.nn import ReversibleBlock, ReversibleSequential, is_recomputing


def planned(budget=0.5, make=None, depth=4, **options):
    """A network under a plan, its twin, and an input."""
    net, plain = twins(
        pairs_of(make or (lambda: norm_mlp(p=0.2)), depth), activations=rk.MemoryBudget(budget), **options
    )
    x = rows(6, 8)
    check(net, plain, x, steps=2)
    return net, plain, x


def same_gradients(net, plain):
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-10 * (1 + q.grad.norm()), name
    for (name, b), c in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(b, c, rtol=1e-12), name


def both(net, plain, action, times=3):
    """Do the action with each network, from the same seed, and compare what it returns and the gradients."""
    for number in range(times):
        outcomes = []
        for network in (net, plain):
            torch.manual_seed(number)
            network.zero_grad()
            outcomes.append([t for t in action(network) or [] if t is not None])
        for got, expected in zip(*outcomes, strict=True):
            assert (got - expected).norm() <= 1e-10 * (1 + expected.norm())
        same_gradients(net, plain)


def two_forwards(network, x):
    first, second = network(x), network(x * 2)
    loss_of([first, second]).backward()


def forwards_in_turn(network, x):
    """Backward of the first when the second is under way, as in a pipeline."""
    first = network(x)
    second = network(x * 2)
    loss_of(first).backward()
    third = network(x * 3)
    loss_of(second).backward()
    loss_of(third).backward()


def backward_twice(network, x):
    loss = loss_of(network(x))
    loss.backward(retain_graph=True)
    loss.backward()


def second_order(network, x):
    x = x.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_of(network(x)), x, create_graph=True)
    (first.square().sum()).backward()
    return [first.detach(), x.grad]


def some_gradients(network, x):
    x = x.detach().clone().requires_grad_()
    wanted = [x, *list(network.parameters())[1::3]]
    return torch.autograd.grad(loss_of(network(x)), wanted)


def accumulated(network, x):
    for factor in (1, 2, 3):
        loss_of(network(x * factor)).backward()


def thrown_away(network, x):
    network(x)
    loss_of(network(x)).backward()


def inference_between(network, x):
    y = network(x)
    network.eval()
    with torch.no_grad():
        network(x)
    network.train()
    loss_of(y).backward()


def called_with_others(network, x):
    values = {name: (p * 1.25).detach().requires_grad_() for name, p in network.named_parameters()}
    loss_of(torch.func.functional_call(network, values, (x,))).backward()
    return [value.grad for value in values.values()]


def called_with_computed(network, x):
    """Which is measured anew; torch warns where the gradient of what is no leaf is read, and must have no reason to."""
    network.activations = rk.MemoryBudget(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            values = {name: p * 1.25 for name, p in network.named_parameters()}
            loss_of(torch.func.functional_call(network, values, (x,))).backward()


def checkpointed(network, x):
    x = x.detach().clone().requires_grad_()
    with torch.random.fork_rng():
        loss_of(checkpoint(network, x, use_reentrant=False)).backward()
    return [x.grad]


def outer_hooks(network, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = network(x)
    loss_of(y).backward()


ACTIONS = [
    *(two_forwards, forwards_in_turn, backward_twice, second_order, some_gradients, accumulated, thrown_away),
    *(inference_between, called_with_others, called_with_computed, outer_hooks),
]


@pytest.mark.parametrize("budget", [0.5, 1.0])
@pytest.mark.parametrize("action", ACTIONS)
def test_actions(action, budget, compiled):
    net, plain, x = planned(budget)
    both(net, plain, lambda network: action(network, x.detach()))
    check(net, plain, x, steps=1)


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_inside_a_checkpoint(budget, compiled):
    net, plain, x = planned(budget, mlp)
    both(net, plain, lambda network: checkpointed(network, x))


@pytest.mark.parametrize("action", [backward_twice, two_forwards, forwards_in_turn, second_order])
@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_a_checkpoint_that_runs_again_under_a_plan(action, budget, compiled):
    """What its first run saved without one is made again by the second: the outputs too, though a plan may keep all."""
    net, plain = twins(pairs_of(mlp, 2), activations=rk.MemoryBudget(budget))
    x = rows(6, 8)

    def inside(network):
        return action(lambda x: checkpoint(network, x, use_reentrant=False), x)

    both(net, plain, inside)


def test_a_chain_inside_a_branch(compiled):
    def nested():
        budget = rk.MemoryBudget(0.5)
        return ReversibleSequential(
            ReversibleBlock(mlp(2), mlp(2)), ReversibleBlock(mlp(2), mlp(2)), activations=budget
        )

    pairs = [(nested(), mlp()), (mlp(), nested())]
    net, plain = twins(pairs, activations=rk.MemoryBudget(0.5))
    for module in plain.modules():
        if isinstance(module, ReversibleSequential):
            module.activations = "store"
    check(net, plain, rows(5, 8), steps=4)


def test_batches_of_several_sizes(compiled):
    """Each is measured once, and planned from then on."""
    net, plain, _ = planned()
    planner = net.activations.planner
    for number in range(3):
        for size in (3, 6, 4):
            check(net, plain, rows(size, 8), steps=1)
            if number == 0:
                assert len(planner._plans) == {3: 2, 6: 2, 4: 3}[size]
    assert len(planner._plans) == 3


def test_copied_in_training(compiled):
    net, plain, x = planned()
    again = copy.deepcopy(net)
    assert again.activations is not net.activations and again.activations.planner is None
    check(again, plain, x)


@pytest.mark.parametrize("when", ["forward", "recompute"])
@pytest.mark.parametrize("place", range(6))
def test_exceptions(place, when, compiled):
    """They come out, and the steps after it are as if it had not been: planned, and right."""
    net, plain, x = planned(depth=3, make=mlp)
    branch = [module for block in net.children() for module in (block.F, block.G)][place]

    def fail(module, inputs):
        if is_recomputing() == (when == "recompute"):
            raise KeyError("mine")

    kept = kept_of(net)[place]
    hook = branch.register_forward_pre_hook(fail)
    if when == "recompute" and kept == "everything":
        step(net, x)
    else:
        assert_raises(KeyError, ["mine"], lambda: step(net, x))
    hook.remove()
    order = list(net.activations.planner._plans)
    check(net, plain, x)
    assert list(net.activations.planner._plans) == order, "what was broken off counts as a call"


@pytest.mark.parametrize("kind", ["parameter", "side input"])
@pytest.mark.parametrize("budget", [0, 0.5, 1.0])
def test_changed_in_between(kind, budget, compiled):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4).to(WIDE)

        def forward(self, x, scale):
            return torch.tanh(self.layer(x)) * scale

    net = ReversibleSequential(
        [ReversibleBlock(Scaled(), Scaled()) for _ in range(3)], activations=rk.MemoryBudget(budget)
    )
    x, scale = rows(6, 8), torch.rand(4, dtype=WIDE)
    for _ in range(2):
        net(x, scale=scale).sum().backward()
    for place, block in enumerate(net.children()):
        y = net(x, scale=scale)
        with torch.no_grad():
            (block.G.layer.weight if kind == "parameter" else scale).mul_(1.01)
        what = [f"block {place}", "layer.weight"] if kind == "parameter" else ["side input scale"]
        assert_raises(rk.ReconstructionError, [*what, "changed in place"], y.sum().backward)
        net(x, scale=scale).sum().backward()


def test_threads(compiled):
    """A model each, step by step in turn; and one budget for both."""
    made = [planned(0.5, mlp) for _ in range(2)]
    made[1][0].activations = made[0][0].activations
    problems = []

    def train(net, plain, x):
        try:
            for number in range(10):
                loss_of(net(x * number)).backward()
        except BaseException as error:
            problems.append(error)

    for net, plain, x in made:
        net.zero_grad(), plain.zero_grad()
        for number in range(10):
            loss_of(plain(x * number)).backward()
    threads = [threading.Thread(target=train, args=one) for one in made]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not problems
    for net, plain, _ in made:
        same_gradients(net, plain)


@pytest.fixture
def second_backwards():
    """What is compiled may have two backwards, which torch refuses otherwise."""
    with config.patch(donated_buffer=False):
        yield


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_branches(backend, compiled, second_backwards):
    """They stay compiled, with fullgraph too, which would tell (torch 2.14; older ones compile nothing of a bare
    nn.Sequential); bit for bit, backward twice."""
    net, stored = exact_pair(EXACT["plain layers"][0], -1, 0.5, depth=2)
    for network in (net, stored):
        for block in network.children():
            block.F.compile(backend=backend, fullgraph=True), block.G.compile(backend=backend, fullgraph=True)
    x = rows(2, 9, 16, dtype=torch.float32)
    check(net, stored, x, same=assert_same_bits)
    for kinds in (1, 1, 1, 1), (2, 2, 2, 2), (0, 2, 2, 1):
        wanted_of(net, kinds)
        for network in (net, stored):
            network.zero_grad()
            backward_twice(network, x)
        for p, q in zip(net.parameters(), stored.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    torch._dynamo.reset()
