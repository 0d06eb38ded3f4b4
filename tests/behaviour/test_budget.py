# SPDX-License-Identifier: Apache-2.0
"""activations=MemoryBudget(...): whatever is kept, and whatever is done with the network, it trains as if all was."""

import copy
import dataclasses
import math
import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn

import revkernels as rk
from behaviour.common import (
    KINDS,
    WIDE,
    assert_same,
    conv,
    mlp,
    norm_mlp,
    pairs_of,
    rows,
    step,
    torch,
    twins,
)
from behaviour.exact_chains import NARROW, assert_same_bits
from behaviour.random_cases import SCENARIOS, cases
from behaviour.random_networks import networks_of
from behaviour.random_scenarios import outcome_of
from revkernels.autograd.planning.costs import Choice
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


def wanted_of(net, kinds):
    """Have the plan keep of every half-step: 0 nothing, 1 everything, 2 its operators, 3 all but norms' outputs."""
    made = net.activations.planner.latest
    for k, (cost, kind) in enumerate(zip(made.calls[0].steps, kinds, strict=True)):
        ops = {op.number: op.print for op in cost.ops if op.keepable}
        nothing, everything = Choice.nothing(), cost.choices()[-1]
        most = everything._replace(makes_again=True)  # whatever was measured here
        made.choices[0][k] = (nothing, everything, nothing._replace(ops=ops), most)[kind]
        assert kind != 3 or cost.made_again, "nothing to make again"
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
        for number in range(8):
            wanted_of(
                net, [number if number < 4 else int(torch.randint(4, (), generator=random)) for _ in range(count)]
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
        for kinds, expected in ((0, 0), 4), ((2, 2), 2), ((2, 1), 2), ((0, 2), 3), ((1, 0), 3):
            if net.activations.planner is not None:
                wanted_of(net, kinds)
            calls.clear()
            step(net, x)
            assert len(calls) == expected


def test_a_pair(compiled):
    net, plain = twins(pairs_of(norm_mlp, 4), activations=rk.MemoryBudget(0.5))
    check(net, plain, (rows(5, 4), rows(5, 4)))


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
    always = settings(max_examples=30, phases=[Phase.generate], **QUIET)
    seed(20265)(always(given(any_case)(lambda case: ended.append(play(case)))))()
    assert sum(ended) > 0.9 * len(ended)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("compiled")
@settings(max_examples=1500, **QUIET)
@given(any_case)
def test_many_random_chains(case):
    play(case)
