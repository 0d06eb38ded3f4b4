# SPDX-License-Identifier: Apache-2.0
"""Other libraries recompute outside autocast; contenders whose branches enter it themselves do not."""

import json

import pytest

torch = pytest.importorskip("torch")
from test_bench_network import STAGE, TINY  # noqa: E402
from torch import nn  # noqa: E402

from revkernels import cli  # noqa: E402
from revkernels.bench import network, networks  # noqa: E402
from revkernels.bench.contenders import CASTING, Contender, Way  # noqa: E402
from revkernels.bench.network import Job  # noqa: E402


class Checkpoints(nn.Module):
    """Recomputes outside autocast, as the other libraries do."""

    def __init__(self, pairs):
        super().__init__()
        self.branches = nn.ModuleList(branch for pair in pairs for branch in pair)

    def forward(self, pair):
        x, y = pair
        for branch in self.branches:
            x, y = y + Outside.apply(x, branch, *branch.parameters()), x
        return x, y


class Outside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, *parameters):
        ctx.x, ctx.branch, ctx.parameters = x, branch, parameters
        return branch(x)

    @staticmethod
    def backward(ctx, df):
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            x = ctx.x.detach().requires_grad_()
            f = ctx.branch(x)
            SEEN.append(f.dtype)
            dx, *rest = torch.autograd.grad(f, [x, *ctx.parameters], df.to(f.dtype), allow_unused=True)
        return dx, None, *rest


SEEN = []


@pytest.mark.parametrize("casting", [False, True])
def test_autocast_may_be_put_into_branches(casting):
    """For who recomputes outside it; whatever a branch returns, its products are those of its last convolution."""
    way = Way("peer", "peer", chain=Checkpoints, casting=casting)
    contender = Contender(way, STAGE, "bfloat16", "cpu", None)
    SEEN.clear()
    contender.step(network._data(Job("peers", "stage", STAGE, [way], batch=2, dtype="bfloat16")))
    assert set(SEEN) == {torch.bfloat16 if casting else torch.float32}
    assert all(parameter.grad is not None for parameter in contender.parameters)


def test_contenders_with_autocast_in_branches_are_those_of_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", TINY)
    words = ["bench", "network", "--network", "tiny", "--rounds", "2", "--only", CASTING[0].name]
    assert cli.main([*words, "--dtype", "float32", "bfloat16", "--json", str(tmp_path / "n.json")]) == 0
    tables = json.loads((tmp_path / "n.json").read_text())["tables"]
    shown = [table for table in tables if table["title"].startswith("training step")]
    assert [len(table["rows"]) for table in shown] == [1, 2]
