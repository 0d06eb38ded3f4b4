# SPDX-License-Identifier: Apache-2.0
"""Under a memory budget what operators allocate inside themselves counts: the columns of torch's convolution, say."""

import gc
import warnings

import pytest
from torch import nn
from torch.profiler import ProfilerActivity, profile

import revkernels as rk
from behaviour.common import assert_raises, torch
from revkernels.autograd.planning import op_workspace
from revkernels.measure import peak_bytes
from revkernels.nn import ReversibleBlock, ReversibleSequential

BYTES = 2**20  # of a tensor below


def branch():
    """A kernel of 5 x 5 that oneDNN has not, in float64, nor in bfloat16 on most processors: 25 times its input."""
    return nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2))


class Sorts(nn.Module):
    """An operator that writes in place, and one that is made of many."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        h = self.layer(x).cumsum(0)
        order = torch.argsort(torch.arange(x.numel()).reshape(x.shape).sin(), 0)
        sums = torch.zeros_like(h).scatter_(0, order, h).clone()
        return sums.index_put_((order[:, 0] % 7,), h, accumulate=True).mul_(1e-6)  # large ones would not come back


CASES = {
    "float64": (branch, (4, 16, 20, 20), torch.float64, False),
    "bfloat16": (branch, (2, 16, 12, 12), torch.bfloat16, False),
    "autocast": (branch, (2, 16, 12, 12), torch.float32, True),
    "in place": (Sorts, (2048, 64), torch.float32, False),
}


def stepping(case, activations, warm=3):
    make, shape, dtype, autocast = CASES[case]
    torch.manual_seed(0)
    blocks = [ReversibleBlock(make(), make()) for _ in range(4)]
    net = ReversibleSequential(blocks, activations=activations).to(dtype)
    x = torch.randn(shape).to(dtype)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
        y.square().mean().backward()

    for _ in range(warm):
        step()
    return net, step


@pytest.mark.parametrize("case", CASES)
def test_the_peak(case, compiled):
    least = peak_bytes(stepping(case, "reconstruct")[1])
    for share in (0, 0.4, 1.0):
        net, step = stepping(case, rk.MemoryBudget(share))
        plan = net.plan()
        assert peak_bytes(step) <= plan.predicted_peak <= plan.limit
        assert plan.reconstructing >= least
    net, step = stepping(case, rk.MemoryBudget((plan.reconstructing + plan.storing) // 2))
    assert peak_bytes(step) <= net.plan().limit


def test_a_budget_that_the_columns_exceed(compiled):
    """Refused in the second step, as any other; what the error names does."""
    least = peak_bytes(stepping("float64", "reconstruct")[1])
    step = stepping("float64", rk.MemoryBudget(round(0.95 * least)), warm=1)[1]
    error = assert_raises(ValueError, ["The least budget"], step)
    amount = int(str(error).rpartition(" bytes")[0].rpartition(" ")[2])
    assert amount >= least
    assert peak_bytes(stepping("float64", rk.MemoryBudget(amount))[1]) <= amount


class Collects(nn.Module):
    """Python's garbage collector may run anywhere in a step, and frees what was left before it."""

    def __init__(self):
        super().__init__()
        self.layers = branch()

    def forward(self, x):
        gc.collect()
        return self.layers(x)


def test_garbage_of_before_the_step_is_no_memory_that_it_gives_back(compiled, monkeypatch):
    monkeypatch.setitem(CASES, "collects", (Collects, *CASES["float64"][1:]))
    least, most = (peak_bytes(stepping("collects", way)[1]) for way in ("reconstruct", "store"))
    net, step = stepping("collects", rk.MemoryBudget((least + most) // 2), warm=0)
    gc.disable()
    try:
        garbage = [torch.zeros(most, dtype=torch.uint8)]
        garbage.append(garbage)
        del garbage
        step()
    finally:
        gc.enable()
    step()
    assert peak_bytes(step) <= net.plan().predicted_peak <= net.plan().limit


def test_a_profiler_of_the_users(compiled):
    """It sees the measured step as any other, whose plan then knows nothing of the columns."""
    net, step = stepping("float64", rk.MemoryBudget(0.5), warm=0)
    with profile(activities=[ProfilerActivity.CPU]) as session:
        step()
    assert any("conv" in event.key for event in session.key_averages())
    step()
    blind = net.plan()
    assert blind.reconstructing < stepping("float64", rk.MemoryBudget(0.5))[0].plan().reconstructing
    assert not torch.autograd._profiler_enabled()


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        assert len(ctx.saved_tensors) == 1
        if Fails.failing:
            raise KeyError
        return gradient


def test_a_backward_that_fails_while_it_is_measured(compiled):
    """Nothing is left running, and the next step is measured."""
    torch.manual_seed(0)

    class Branch(nn.Linear):
        def forward(self, x):
            return Fails.apply(super().forward(x))

    blocks = [ReversibleBlock(Branch(8, 8), Branch(8, 8)) for _ in range(2)]
    net, x = ReversibleSequential(blocks, split_dim=-1, activations=rk.MemoryBudget(0.5)), torch.randn(4, 16)
    Fails.failing = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a profiler that ended with the node
        with pytest.raises(KeyError):
            net(x).sum().backward()
    assert not torch.autograd._profiler_enabled()
    Fails.failing = False
    for _ in range(2):
        net(x).sum().backward()
    assert net.plan().steps


def test_a_chain_inside_a_branch(compiled):
    """Both have a budget; the outer one sees what the inner one's operators do."""
    torch.manual_seed(0)
    budget, found = rk.MemoryBudget(0.5), []

    def inner():
        blocks = [ReversibleBlock(*[nn.Conv2d(4, 4, 5, padding=2) for _ in "FG"])]
        return ReversibleSequential(blocks, activations=rk.MemoryBudget(0.5))

    for activations in ("reconstruct", budget):
        torch.manual_seed(0)
        blocks = [ReversibleBlock(inner(), inner()) for _ in range(2)]
        net = ReversibleSequential(blocks, activations=activations).double()
        x = torch.randn(4, 16, 20, 20, dtype=torch.float64)

        def step(net=net, x=x):
            net(x).square().mean().backward()

        for _ in range(3):
            step()
        found.append(peak_bytes(step))
    assert found[1] <= budget.planner.latest.limit and found[0] <= budget.planner.latest.reconstructing


def test_stretches_on_the_host():
    """The peak above the beginning, of one within another too; what was there before does not count."""
    cpu = torch.device("cpu")
    outer = op_workspace.begin(cpu)
    held = torch.empty(BYTES, dtype=torch.uint8)
    inner = op_workspace.begin(cpu)
    torch.empty(3 * BYTES, dtype=torch.uint8)
    assert inner.end() == 3 * BYTES and inner.end() == 3 * BYTES
    torch.empty(2 * BYTES, dtype=torch.uint8)
    del held
    torch.empty(BYTES, dtype=torch.uint8)
    assert outer.end() == 4 * BYTES
    assert not torch.autograd._profiler_enabled()
    with profile(activities=[ProfilerActivity.CPU]):
        assert op_workspace.begin(cpu) is None
    assert op_workspace.begin(torch.device("meta")) is None


def test_stretches_on_a_device(monkeypatch):
    """By counters alone: a new peak is exact, else the sum of a few allocations is a bound, of many it says nothing."""
    now = {}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(now))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now["at"])

    def told(count, total, peak):
        keys = "allocation.all.allocated", "allocated_bytes.all.allocated", "allocated_bytes.all.peak"
        now.update(dict(zip(keys, (count, total, peak), strict=True)), at=100)

    for later, most in {(12, 1030, 500): 30, (12, 1900, 500): 400, (12, 1700, 600): 500, (90, 1900, 500): 0}.items():
        told(10, 1000, 500)
        stretch = op_workspace.begin(torch.device("cuda", 0))
        told(*later)
        assert stretch.end() == most
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert op_workspace.begin(torch.device("cuda", 0)) is None
