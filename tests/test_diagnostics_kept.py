# SPDX-License-Identifier: Apache-2.0
"""`memory_report` of what is kept under a memory budget, or by a selective checkpoint: nobody has to rebuild it."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import revkernels as rk  # noqa: E402
from revkernels.autograd.planning.costs import Choice  # noqa: E402
from revkernels.diagnostics import memory_report  # noqa: E402
from revkernels.diagnostics.report import CHAIN, HELD, OUTSIDE, SAVED  # noqa: E402
from revkernels.models import revnet38  # noqa: E402
from revkernels.nn import BasicBranch, ReversibleBlock, ReversibleSequential, selective_checkpoint  # noqa: E402


class Selectively(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return selective_checkpoint(self.net, x)


def test_a_memory_budget():
    """Bytes that the plan keeps are the chain's, and as many as the plan says."""
    torch.manual_seed(0)
    blocks = [ReversibleBlock(BasicBranch(8, 8), BasicBranch(8, 8)) for _ in range(4)]
    net = ReversibleSequential(blocks, activations=rk.MemoryBudget(0.5))
    x = torch.randn(4, 16, 16, 16)
    for _ in range(2):
        net(x).sum().backward()
    assert any(step.kept.startswith("everything") for step in net.plan().steps)
    report = memory_report(net, x)
    assert report.total(OUTSIDE) == report.total(SAVED) == 0
    mine = [row for row in report.rows if row.kind == CHAIN and row.holder == "its memory budget"]
    kept = net.plan().kept
    # The plan counts every half-step's source stream, and two may be one tensor; statistics are small.
    assert 0.6 * kept < sum(row.bytes for row in mine) <= kept + 2**12
    assert not any("no reversible library" in sentence for sentence in report.advice)


def test_operators_under_a_memory_budget():
    """Their outputs are the budget's too."""
    torch.manual_seed(0)
    net = ReversibleSequential(ReversibleBlock(BasicBranch(8, 8), BasicBranch(8, 8)), activations=rk.MemoryBudget(0.5))
    x = torch.randn(4, 16, 16, 16)
    net(x).sum().backward()
    made = net.activations.planner.latest
    for k, cost in enumerate(made.calls[0].steps):
        ops = {op.number: op.print for op in cost.ops if op.name.startswith("aten.convolution")}
        made.choices[0][k] = Choice.nothing()._replace(ops=ops)
    report = memory_report(net, x)
    rows = [row for row in report.rows if row.kind == CHAIN and row.holder == "its memory budget"]
    assert sum(row.bytes for row in rows) == 4 * x.nbytes // 2  # two convolutions a branch, of half the channels


def test_a_selective_checkpoint():
    """What it keeps are saved tensors, of the modules that made them; what it does not keep is not there."""
    torch.manual_seed(0)
    net, x = revnet38(activations="store"), torch.randn(4, 3, 32, 32)
    whole, less = memory_report(net, x), memory_report(Selectively(net), x)
    assert less.total(OUTSIDE) == 0 and less.total(SAVED) > 0
    assert less.total(*HELD) < 0.7 * whole.total(*HELD)
    modules = {row.module.removeprefix("net.") for row in less.rows if row.kind == SAVED}
    assert "stem.0" in modules and modules <= {row.module for row in whole.rows} | {"net"}
    torch.testing.assert_close(torch.tensor(less.total(*HELD)), torch.tensor(less.held_bytes))
