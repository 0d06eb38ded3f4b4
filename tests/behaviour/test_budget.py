# SPDX-License-Identifier: Apache-2.0
"""activations=MemoryBudget(...): whatever is kept, and whatever is done with the network, it trains as if all was."""

import copy
import dataclasses
import math
import threading
import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn
from torch.utils.checkpoint import checkpoint

import revkernels as rk
from behaviour.common import (
    KINDS,
    WIDE,
    assert_raises,
    assert_same,
    conv,
    loss_of,
    mlp,
    norm_mlp,
    pairs_of,
    rows,
    step,
    torch,
    twins,
)
from behaviour.random_cases import SCENARIOS, cases
from behaviour.random_networks import networks_of
from behaviour.random_scenarios import outcome_of
from behaviour.test_exact import NARROW, assert_same_bits
from revkernels.nn import AttentionBranch, MLPBranch, ReversibleBlock, ReversibleSequential, is_recomputing
from revkernels.nn.exact import KeepsGrid

BUDGETS = [0, "10%", 0.25, 0.5, 0.9, 1.0, math.inf]
STEPS = 3  # the plan is in force from the second on


def check(net, plain, x, *args, steps=STEPS, same=assert_same, **kwargs):
    """Both take the same steps; then some are kept if the budget says so."""
    for number in range(steps):
        got, expected = step(net, x, *args, seed=number, **kwargs), step(plain, x, *args, seed=number, **kwargs)
        same(got, expected)
    return got


def kept_of(net):
    """What the half-steps keep by the plan, in words."""
    return [step.kept for step in net.plan().steps]


class Tweaked(nn.Module):
    """In-place operations behind a product, on what it alone has seen."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.second = nn.Linear(width, 8).to(WIDE), nn.Linear(8, width).to(WIDE)

    def forward(self, x):
        h = self.first(x).mul_(0.5).add_(0.25)
        return self.second(nn.functional.relu(h, inplace=True))


class Auxiliary(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width).to(WIDE)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return h, {"mean": h.square().mean(), "layer": h * 2}


class Attention(nn.Module):
    def __init__(self, width=4, p=0.2):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False).to(WIDE) for _ in range(3))
        self.p = p

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        h = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.p)
        return h + (q @ k.transpose(-1, -2)).softmax(-1) @ v


def shared():
    layer = mlp()
    return [(layer, layer), (mlp(), layer), (layer, mlp())]


def frozen():
    pairs = pairs_of(norm_mlp, 4)
    for F, G in pairs[1:3]:
        F.requires_grad_(False), G[2].requires_grad_(False)
    return pairs


def noticed(module, inputs, y):
    """What somebody logs: operators in the forward that the recompute does not have."""
    if not is_recomputing():
        y.detach().abs().mean()


def hooked():
    pairs = pairs_of(mlp, 3)
    pairs[0][0].register_forward_hook(lambda module, inputs, y: y * 1.5)
    pairs[1][1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    pairs[2][0].register_forward_hook(noticed)
    pairs[1][0][0].register_full_backward_hook(lambda module, gi, go: (gi[0] * 2,))
    return pairs


SITUATIONS = {
    "dropout": (lambda: pairs_of(lambda: norm_mlp(p=0.3), 3), (6, 8), 1),
    "batch norm": (lambda: pairs_of(conv, 3), (2, 8, 5, 6), 1),
    "library's": (lambda: KINDS["basic"].pairs(3), (2, 8, 5, 6), 1),
    "bottlenecks": (lambda: KINDS["bottleneck"].pairs(3), (2, 8, 5, 6), 1),
    "attention": (lambda: pairs_of(Attention, 3), (2, 5, 8), -1),
    "in place": (lambda: pairs_of(Tweaked, 3), (5, 8), 1),
    "auxiliary": (lambda: pairs_of(Auxiliary, 3), (5, 8), 1),
    "hooks": (hooked, (5, 8), 1),
    "shared": (shared, (5, 8), 1),
    "frozen": (frozen, (5, 8), 1),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SITUATIONS)
def test_as_stored(name, budget, compiled):
    make, shape, split_dim = SITUATIONS[name]
    net, plain = twins(make(), split_dim, activations=rk.MemoryBudget(budget))
    x = rows(*shape)
    check(net, plain, x)
    if budget == 1.0:
        assert {"everything"} == set(kept_of(net))


@pytest.mark.parametrize("name", ["dropout", "library's", "in place"])
def test_as_stored_unfused(name):
    make, shape, split_dim = SITUATIONS[name]
    check(*twins(make(), split_dim, activations=rk.MemoryBudget(0.5), backend="eager"), rows(*shape))


EXACT = {
    "conv": (lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.1)), 4, 1),
    "perceptron": (lambda: MLPBranch(8, 64, 0.1), 3, -1),
    "attention": (lambda: AttentionBranch(8, 2, 0.1), 3, -1),
    "plain layers": (lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8), nn.Tanh()), 3, -1),
}


def exact_pair(make, split_dim, budget, depth=4, groups=2):
    torch.manual_seed(depth)
    blocks = [ReversibleBlock(*[make() for _ in range(groups)]) for _ in range(depth)]
    net = ReversibleSequential(
        blocks, split_dim=split_dim, coupling=rk.Exact(k=14), activations=rk.MemoryBudget(budget)
    )
    stored = copy.deepcopy(net)
    stored.activations = "store"
    return net, stored


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("budget", ["10%", 0.5, 0.9])
@pytest.mark.parametrize("name", EXACT)
def test_bit_for_bit(name, budget, autocast, compiled):
    make, rank, split_dim = EXACT[name]
    net, stored = exact_pair(make, split_dim, budget)
    x = rows(*{3: (2, 9, 16), 4: (2, 16, 5, 6)}[rank], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check(net, stored, x, same=assert_same_bits)


def wanted_of(net, *, whole=(), some=(), count=99):
    """Have the plan keep all of some half-steps and the operators of others."""
    made = net.activations.planner.latest
    for k, cost in enumerate(made.calls[0].steps):
        ops = {op.number: op.print for op in cost.ops if op.keepable}
        menu = cost.choices()
        made.choices[0][k] = menu[-1] if k in whole else menu[0]._replace(ops=ops if k in some else {})
    return made


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_any_plan(name, groups, autocast, compiled):
    """Whichever the planner might choose: all half-steps of every kind, mixed, and bit for bit."""
    make, rank, split_dim = EXACT[name]
    net, stored = exact_pair(make, split_dim, 0.5, 3, groups)
    x = rows(*{3: (2, 9, 8 * groups), 4: (2, 8 * groups, 5, 6)}[rank], dtype=torch.float32)
    count, random = 3 * groups, torch.Generator().manual_seed(groups)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check(net, stored, x, steps=1, same=assert_same_bits)
        for number in range(6):
            kinds = [number if number < 3 else int(torch.randint(3, (), generator=random)) for _ in range(count)]
            wanted_of(
                net, whole=[k for k in range(count) if kinds[k] == 1], some=[k for k in range(count) if kinds[k] == 2]
            )
            check(net, stored, x, steps=1, same=assert_same_bits)


def test_kept_operators_are_not_run_again(compiled):
    """Counted by a custom operator: once in the forward, and in the recompute only if nothing is kept."""
    calls = []
    with torch.library._scoped_library("revkernels_tests", "FRAGMENT"):

        @torch.library.custom_op("revkernels_tests::counted", mutates_args=())
        def counted(x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return x * 2

        counted.register_autograd(lambda ctx, grad: grad * 2)

        class Branch(nn.Module):
            def forward(self, x):
                return torch.tanh(counted(x))

        net = ReversibleSequential(ReversibleBlock(Branch(), Branch()), activations=rk.MemoryBudget(0.5))
        x = rows()
        for some, whole, expected in ((), (), 4), ((0, 1), (), 2), ((0,), (1,), 2), ((1,), (), 3), ((), (0,), 3):
            if net.activations.planner is not None:
                wanted_of(net, some=some, whole=whole)
            calls.clear()
            step(net, x)
            assert len(calls) == expected


def test_a_pair(compiled):
    net, plain = twins(pairs_of(norm_mlp, 4), activations=rk.MemoryBudget(0.5))
    check(net, plain, (rows(5, 4), rows(5, 4)))


# ---- what one may do with a network


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
    *(inference_between, called_with_others, outer_hooks),
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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_branches(backend, compiled):
    """They stay compiled, with fullgraph too, which would tell; bit for bit, backward twice."""
    net, stored = exact_pair(EXACT["plain layers"][0], -1, 0.5, depth=2)
    for network in (net, stored):
        for block in network.children():
            block.F.compile(backend=backend, fullgraph=True), block.G.compile(backend=backend, fullgraph=True)
    x = rows(2, 9, 16, dtype=torch.float32)
    check(net, stored, x, same=assert_same_bits)
    for some, whole in ((), (0, 1, 2, 3)), ((0, 1, 2, 3), ()), ((1, 2), (3,)):
        wanted_of(net, some=some, whole=whole)
        for network in (net, stored):
            network.zero_grad()
            backward_twice(network, x)
        for p, q in zip(net.parameters(), stored.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    torch._dynamo.reset()


# ---- whatever was not thought of

QUIET = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
any_case = cases(dtypes=NARROW, scenarios=[*SCENARIOS, "one step"], depths=(0, 5), rank=4)


def play(case):
    """Three times on one network, under a budget and storing: bit for bit the same."""
    outcomes = []
    case = dataclasses.replace(case, activations="reconstruct")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nets = networks_of(case)[0], networks_of(case)[0]
        for net, activations in zip(nets, (rk.MemoryBudget(0.5), "store"), strict=True):
            for module in net.modules():
                if isinstance(module, KeepsGrid):
                    module.coupling, module.activations = "exact", activations
        for number in range(3):
            outcomes = []
            for net in nets:
                net.zero_grad()
                try:
                    outcomes.append(outcome_of(net, dataclasses.replace(case, number=case.number + number)))
                except (RuntimeError, TypeError) as error:
                    outcomes.append((type(error), str(error)))
            got, expected = outcomes
            if isinstance(got, tuple) or isinstance(expected, tuple):
                assert isinstance(got, tuple) and isinstance(expected, tuple), (got, expected)
                assert got[0] is expected[0]
                return False
            assert_same_bits(got, expected)
    return True


def test_random_chains(compiled):
    ended = []
    always = settings(max_examples=60, phases=[Phase.generate], **QUIET)
    seed(20265)(always(given(any_case)(lambda case: ended.append(play(case)))))()
    assert sum(ended) > 0.9 * len(ended)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("compiled")
@settings(max_examples=1500, **QUIET)
@given(any_case)
def test_many_random_chains(case):
    play(case)
