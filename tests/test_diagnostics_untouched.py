# SPDX-License-Identifier: Apache-2.0
"""What measures a network leaves it alone, whatever hangs on it; and what it says is so from the first call on."""

import subprocess
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import revkernels as rk  # noqa: E402
from revkernels.diagnostics import DriftMonitor, drift, memory_report  # noqa: E402
from revkernels.measure import peak_bytes  # noqa: E402
from revkernels.models import revnet38  # noqa: E402
from revkernels.nn import BasicBranch, ReversibleBlock, ReversibleSequential  # noqa: E402


def network(**options):
    torch.manual_seed(0)
    return ReversibleSequential([ReversibleBlock(BasicBranch(8, 8), BasicBranch(8, 8)) for _ in range(3)], **options)


X = torch.randn(4, 16, 12, 12)


def measurements(net, monitor):
    yield "memory_report", lambda: memory_report(net, X)
    yield "drift", lambda: drift(net, X, depths=[1])
    yield "compare", lambda: monitor.compare(lambda: net(X).square().mean().backward())
    yield "plan", lambda: net.plan(X)


def test_an_optimizer_in_the_backward():
    """Hooks behind the gradients step it: in training, and not while something is measured."""
    net = network(activations=rk.MemoryBudget(0.5))
    optimizers = {p: torch.optim.SGD([p], lr=1.0) for p in net.parameters()}

    def take(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(take)
    monitor = DriftMonitor(net, angle_every=1)
    for name, measure in measurements(net, monitor):
        before = [p.detach().clone() for p in net.parameters()]
        measure()
        assert all(map(torch.equal, before, net.parameters())), name
    net(X).square().mean().backward()
    assert not all(map(torch.equal, before, net.parameters())), "the hooks are there again"


def test_a_monitor_does_not_count_measurements():
    net = network(activations=rk.MemoryBudget(0.5))
    with DriftMonitor(net, every=2, angle_every=1) as monitor:
        net(X).square().mean().backward()
        for name, measure in measurements(net, monitor):
            measure()
            assert len(monitor.history) == 1, name
        net(X).square().mean().backward()
        net(X).square().mean().backward()
        assert [record.step for record in monitor.history] == [0, 2]


def test_a_monitor_of_linked_chains():
    """Each sees its own input rebuilt, where they would otherwise be one chain."""
    torch.manual_seed(0)
    net = revnet38(transitions="recompute")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with DriftMonitor(net, threshold=1e-3) as monitor:
            net(torch.randn(2, 3, 16, 16)).square().mean().backward()
    assert {record.chain for record in monitor.history} == {"stages.0.0", "stages.0.1", "stages.1.1", "stages.2.1"}
    assert max(record.rms_error for record in monitor.history) < 1e-5


def test_a_fresh_network_with_a_budget():
    """The first report is not of the step that the planner measures."""
    net = network(activations=rk.MemoryBudget(0.5))
    first, second = memory_report(net, X), memory_report(net, X)
    assert first.peak_bytes >= first.held_bytes
    assert abs(first.peak_bytes - second.peak_bytes) < 0.1 * second.peak_bytes


def test_the_measured_peak_of_a_plan():
    """From the entry of the first chain on, its input included: of a chain alone, that of the step and its input."""
    net = network(activations=rk.MemoryBudget("10%"))
    measured = net.plan(X).measured_peak
    streams = X.numel() * X.element_size()

    def step():
        net(X).square().mean().backward()

    step(), net.zero_grad(set_to_none=False)
    gradients = sum(p.numel() * 4 for p in net.parameters())
    assert peak_bytes(step) <= measured - streams <= peak_bytes(step) + gradients + 2**14
    small = revnet38(activations=rk.MemoryBudget(0.0))
    plan = small.plan(torch.randn(2, 3, 9, 9))
    assert plan.measured_peak > 2 * 16 * 9 * 9 * 4  # of the first chain the streams alone


FRESH = """
import torch, revkernels as rk
from torch import nn
from revkernels.nn import ReversibleBlock, ReversibleSequential

def branch():
    return nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))

blocks = [ReversibleBlock(branch(), branch()) for _ in range(4)]
net = ReversibleSequential(blocks, activations=rk.MemoryBudget("16MiB"))
for _ in range(3):
    net(torch.randn(8, 64, 16, 16)).square().mean().backward()
print(net.plan().reconstructing)
"""


def test_the_first_step_of_a_process():
    """What torch imports for it is not the step's: the budget would be refused."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 2**20


def test_drift_however_it_is_called():
    """A chain that is called by keyword, and without grad mode; lists that are none are named."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = network()

        def forward(self, x):
            return self.chain(x=x)

    with torch.no_grad():
        rows = drift(Named(), X, depths=[1], precisions=["float32"]).rows
    assert {row.coupling for row in rows} >= {"float"} and all(row.problem is None for row in rows)
    for options, word in (
        ({"depths": 2}, "depths"),
        ({"couplings": "exact"}, "couplings"),
        ({"precisions": "f"}, "pre"),
    ):
        with pytest.raises(TypeError, match=f"{word}.*must be a list"):
            drift(network(), X, **options)
