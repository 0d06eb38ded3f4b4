# SPDX-License-Identifier: Apache-2.0
"""activations=MemoryBudget(...): the peak is kept to, nothing is left behind, and `net.plan()` says what is kept."""

import gc
import math
import weakref

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import assert_raises, mlp, rows, torch, unwritten
from revkernels.autograd.planning.costs import CallCost, StepCost
from revkernels.autograd.planning.kept_ops import OpCost
from revkernels.autograd.planning.knapsack import Option
from revkernels.autograd.planning.planner import Made
from revkernels.measure import peak_bytes
from revkernels.models import revnet38
from revkernels.models.layers import BottleneckBranch
from revkernels.nn import MLPBranch, ReversibleBlock, ReversibleSequential

SHARES = [0, 0.25, 0.5, 0.75, 1.0]


class Attention(nn.Module):
    """With an explicit softmax, so that the scores are kept or rebuilt."""

    def __init__(self, width=16):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class TanhFirst(nn.Module):
    """It does not save its input: a neighbour's stream has to be kept for it."""

    def __init__(self, width=32):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return self.layer(torch.tanh(x))


def conv(channels_last=False):
    layers = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False)
    more = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False)
    return nn.Sequential(*layers, *more).to(memory_format=(torch.preserve_format, torch.channels_last)[channels_last])


NETWORKS = {
    "conv": (conv, (4, 16, 24, 24), 1, 2, {}),
    "conv, channels last": (lambda: conv(True), (4, 16, 24, 24), 1, 2, {"memory_format": torch.channels_last}),
    "bottleneck": (lambda: BottleneckBranch(8, 8), (4, 16, 24, 24), 1, 2, {}),
    "perceptron": (lambda: MLPBranch(32, 128), (8, 64, 64), -1, 2, {}),
    "attention": (Attention, (4, 64, 32), -1, 2, {}),
    "tanh first": (TanhFirst, (512, 64), 1, 2, {}),
    "three streams": (TanhFirst, (512, 96), 1, 3, {}),
    "bfloat16": (lambda: MLPBranch(32, 128), (8, 64, 64), -1, 2, {"autocast": True}),
}


def step_of(net, x, autocast=False):
    gradient = torch.ones(())

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x.detach().clone().requires_grad_())
        y.backward(gradient.to(y.dtype).expand_as(y))

    return step


def peak_of(name, activations, warm=2):
    make, shape, split_dim, groups, options = NETWORKS[name]
    torch.manual_seed(0)
    blocks = [ReversibleBlock(*[make() for _ in range(groups)]) for _ in range(5)]
    net = ReversibleSequential(blocks, split_dim=split_dim, activations=activations)
    x = torch.randn(shape).contiguous(memory_format=options.get("memory_format", torch.contiguous_format))
    step = step_of(net, x, options.get("autocast", False))
    for _ in range(warm):
        step()
    return peak_bytes(step), net


QUICK = ("conv, channels last", "bfloat16")
EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NETWORKS]


@pytest.mark.parametrize("name", EACH)
def test_the_peak(name, compiled):
    """Of the third step, by the allocator's events: never above the limit, and used where it helps."""
    least, most = peak_of(name, "reconstruct")[0], peak_of(name, "store")[0]
    measured = []
    for share in SHARES:
        peak, net = peak_of(name, rk.MemoryBudget(share))
        plan = net.plan()
        assert peak <= plan.predicted_peak <= plan.limit
        measured.append(peak)
    assert measured[0] <= 1.02 * least + 2**13
    assert measured[-1] <= 1.02 * most + 2**15
    assert peak_of(name, rk.MemoryBudget(math.inf))[0] == most
    assert measured[2] > least + 0.25 * (most - least)  # half of the way would be 0.5: estimates are upper bounds
    for amount in (round(0.6 * plan.reconstructing + 0.4 * plan.storing + 2**13), plan.storing + 2**13):
        peak, net = peak_of(name, rk.MemoryBudget(amount))
        assert peak <= amount == net.plan().limit


def test_a_whole_network(compiled):
    """RevNet-38, three chains that share a budget: with what lies between them."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    for budget in (0.3, 0.7):
        net = revnet38(num_classes=10, activations=rk.MemoryBudget(budget))

        def step(net=net):
            net(x).square().sum().backward()

        for _ in range(2):
            step()
        plan = net.plan(x)
        assert plan.measured_peak <= plan.limit
        assert plan.limit == pytest.approx(plan.reconstructing + budget * (plan.storing - plan.reconstructing))
        text = str(plan)
        assert len(text.splitlines()) > 6 and f"MemoryBudget({budget})" in text
        assert {step.chain for step in plan.steps} == {0, 1, 2}


def test_a_budget_that_cannot_be_kept(compiled):
    """An error in the second step; what it names does."""
    x = torch.randn(512, 64)

    def network(amount):
        torch.manual_seed(0)
        blocks = [ReversibleBlock(TanhFirst(), TanhFirst()) for _ in range(4)]
        return ReversibleSequential(blocks, activations=rk.MemoryBudget(amount))

    step_of(network("0 B"), x)()  # whatever a library allocates the first time
    for _ in range(3):
        net = network(1000)
        step = step_of(net, x)
        step()
        error = assert_raises(ValueError, ["MemoryBudget(1000)", "The least budget"], step)
        assert_raises(ValueError, ["The least budget"], step)
        assert_raises(ValueError, ["The least budget"], lambda net=net: net.plan(x))
        assert "write" not in str(error)
        least = int(str(error).rpartition(" bytes")[0].rpartition(" ")[2])
        net = network(least)
        step = step_of(net, x)
        for _ in range(3):
            step()
        assert peak_bytes(step) <= least
        net(torch.randn(3, 64)).sum().backward()  # a smaller batch does with it


def test_a_refused_step_is_let_go(compiled):
    """The error, which later steps raise again, does not hold what the refused step had in memory."""
    net = ReversibleSequential(ReversibleBlock(mlp(), mlp()), activations=rk.MemoryBudget(1000))

    def step():
        stem = rows(512, 8).tanh()
        weakref.finalize(stem.untyped_storage(), freed.append, 1)
        net(stem).sum().backward()

    freed = []
    step()
    for _ in range(2):
        with pytest.raises(ValueError, match="least budget"):
            step()
    gc.collect()
    assert len(freed) == 3


def made_of(budget, seconds=(1.0, 3.0, 0.5)):
    """The plan for one and the same measurement."""
    sizes = [1000, 2000, 3000]
    ops = tuple(OpCost(k, f"op {k}", seconds[k], sizes[k], True, 2000, k) for k in range(3))
    step = StepCost("branch", ops, 5.0, 9.0, 7000, 1000, 1000, 300, None, None, True)
    return Made(rk.MemoryBudget(budget), [CallCost(2000, [step] * 6, 20.0), CallCost(2000, [step] * 3, 20.0)], 100.0)


def test_more_memory_saves_more_time():
    """By what is predicted, for one and the same measurement."""
    plans = [made_of(share / 40) for share in range(41)]
    saved = [made.saved for made in plans]
    assert saved == sorted(saved) and saved[0] < saved[20] < saved[40] == 9 * 5.0
    assert all(made.peak <= made.limit for made in plans)
    assert plans[-1].choices == [[made_of(0.5).calls[0].steps[0].choices()[-1]] * count for count in (6, 3)]
    for amount in (plans[0].reconstructing, plans[20].limit, 10**6):
        assert made_of(round(amount)).peak <= amount
    with pytest.raises(ValueError, match="is too small"):
        made_of(plans[0].reconstructing - 1)


def test_the_menu_of_a_half_step():
    """Nothing, the operators by the time they save for their bytes, and everything."""
    menu = made_of(0.5).calls[0].steps[0].choices()
    assert menu[0].option == Option(0, 0.0) and menu[-1].option == Option(8000, 5.0, True, 1000, True)
    assert [set(choice.ops) for choice in menu[1:-1]] == [{1}, {0, 1}, {0, 1, 2}]
    assert [choice.option.kept for choice in menu[1:-1]] == [2000, 3000, 6000]


# ---- nothing is left behind


def planned(budget=0.5, depth=4, steps=2):
    net = ReversibleSequential(
        [ReversibleBlock(mlp(), mlp()) for _ in range(depth)], activations=rk.MemoryBudget(budget)
    )
    x = rows(64, 8)
    for _ in range(steps):
        net(x).sum().backward()
    return net, x


def alive():
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


@pytest.mark.parametrize("budget", [0, 0.5, 1.0])
def test_nothing_grows(budget, compiled):
    """Over 50 steps, with graphs thrown away, inference and errors between."""
    net, x = planned(budget, steps=4)

    def fail(module, inputs):
        raise KeyError

    def steps(count):
        for number in range(count):
            net(x)
            y = net(x)
            with torch.no_grad():
                net(x)
            y.sum().backward()
            if number % 5 == 0:
                hook = next(net.children()).G.register_forward_pre_hook(fail)
                with pytest.raises(KeyError):
                    net(x)
                hook.remove()
        return alive()

    assert steps(6) == steps(50)
    planner = net.activations.planner
    assert len(planner._plans) == len(planner._costs) == 1 and len(planner._calls) <= 2


def test_forwards_alone_do_not_pile_up(compiled):
    """Somebody who forgot no_grad; and then trains under the plan of before."""
    net, x = planned()
    before = net.plan()
    for _ in range(20):
        net(x)
    assert len(net.activations.planner._calls) <= 1
    net(x).sum().backward()
    assert net.plan().steps == before.steps and len(net.activations.planner._plans) == 1


@pytest.mark.parametrize("budget", [0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_graphs_are_freed_without_the_collector(budget, steps, compiled):
    net, x = planned(budget, steps=steps)
    freed = []

    def watch(module, inputs, y):
        weakref.finalize(y.untyped_storage(), freed.append, 1)

    hooks = [module.register_forward_hook(watch) for module in net.modules() if isinstance(module, nn.Tanh)]
    gc.collect()
    gc.disable()
    try:
        for used in (False, True):
            freed.clear()
            y = net(x)
            if used:
                y.sum().backward()
            del y
            assert len(freed) >= len(hooks)
    finally:
        gc.enable()


def test_a_step_holds_what_the_plan_says(compiled):
    """The bytes between forward and backward: what is kept, and input and output."""
    for budget in (0, 0.4, 0.8, 1.0):
        net, x = planned(budget, steps=3)
        plan = net.plan()
        held = []

        def step(net=net, x=x, held=held):
            y = net(x)
            held.append(y)

        step(), held.clear()
        streams = x.numel() * x.element_size()
        assert peak_bytes(step) <= plan.kept + 8 * streams
        held.clear()


# ---- what the planner forgets, and what a plan is


def test_branches_are_not_kept_alive(compiled):
    """Nor what a plain function closes over."""
    budget = rk.MemoryBudget(0.5)
    net = ReversibleSequential(ReversibleBlock(mlp(), mlp()), activations=budget)
    for _ in range(2):
        net(rows(5, 8)).sum().backward()
    branch = weakref.ref(next(net.children()).F)
    del net
    gc.collect()
    assert branch() is None and len(budget.planner._plans) == 1
    from revkernels.nn.chain import HalfStep, run

    weight = torch.randn(4, 4, requires_grad=True, dtype=torch.float64)
    layer, gone = nn.Linear(4, 4).double(), []
    budget = rk.MemoryBudget(0.5)
    for _ in range(3):
        big = torch.randn(100)
        gone.append(weakref.ref(big))
        steps = [HalfStep(lambda h, big=big: (h @ weight).tanh(), 0, (1,)), HalfStep(layer.forward, 1, (0,))]
        run(steps, rows(5, 8), activations=budget).sum().backward()
        del steps, big
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    planned_for = rk.MemoryBudget(0.5)
    for _ in range(2):  # a bound method is another object each time, and the same branch
        run([HalfStep(layer.forward, 1, (0,))], rows(5, 8), activations=planned_for).sum().backward()
    assert len(planned_for.planner._plans) == 1 and planned_for.planner.latest.times


def test_two_forwards_keep_to_the_limit_too(compiled):
    """After steps of one: the first of two calls leaves room for the second, once that has been seen."""
    torch.manual_seed(0)
    blocks = [ReversibleBlock(TanhFirst(), TanhFirst()) for _ in range(5)]
    net = ReversibleSequential(blocks, activations=rk.MemoryBudget(1))
    x = torch.randn(512, 64)

    def once():
        net(x.clone().requires_grad_()).sum().backward()

    def twice():
        (net(x.clone().requires_grad_()) + net(x.clone().requires_grad_())).sum().backward()

    net.activations = rk.MemoryBudget(0)
    once(), twice()
    made = net.activations.planner.latest
    limit = round(made.reconstructing * 1.5)
    for order in ((once, twice), (twice, once)):
        net.activations = rk.MemoryBudget(limit)
        for step in order:
            step(), step()
        for step in (*order, *order):
            assert peak_bytes(step) <= limit


def test_errors_of_plan(compiled):
    x = rows(5, 8)
    net = ReversibleSequential(ReversibleBlock(mlp(), mlp()))
    for activations, part in (("reconstruct", "'reconstruct'"), ("store", "'store'")):
        net.activations = activations
        for args in ((), (x,)):
            assert_raises(ValueError, [part, "MemoryBudget"], lambda args=args: net.plan(*args))
    net.activations = rk.MemoryBudget(math.inf)
    assert_raises(ValueError, ["nothing to plan"], net.plan)
    net.activations = rk.MemoryBudget(0.5)
    assert_raises(ValueError, ["no step has been measured"], net.plan)
    with torch.no_grad():
        net(x)
        assert_raises(ValueError, ["no_grad"], lambda: net.plan(x))
    assert_raises(ValueError, ["no step has been measured"], net.plan)
    net(x).sum().backward()
    plan = net.plan()
    assert plan.measured_peak is None and plan.measured_seconds is None and "not measured" in str(plan)
    net(x).sum().backward()
    assert net.plan().measured_seconds > 0


def test_plan_leaves_nothing_behind(compiled):
    net = ReversibleSequential(
        *[ReversibleBlock(*[nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.2)) for _ in "FG"])] * 2,
        activations=rk.MemoryBudget(0.5),
    )
    x = torch.randn(4096, 8, requires_grad=True)
    for had in (False, True):
        if had:
            net(x).sum().backward()
            x.grad = None
        with unwritten(net, x):
            plan = net.plan(x)
        assert x.grad is None and all((p.grad is not None) == had for p in net.parameters())
        assert plan.measured_peak > 0 and plan.measured_seconds > 0 and len(plan.steps) == 4
        assert plan.kept == sum(step.bytes for step in plan.steps)
        assert plan.reconstructing_seconds >= plan.predicted_seconds
