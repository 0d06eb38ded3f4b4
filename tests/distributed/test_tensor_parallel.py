# SPDX-License-Identifier: Apache-2.0
"""Branches that talk to other processes as they run: two processes, each with a half of every branch's weights, train
as one does on the same batch."""

import pytest
from behaviour.common import WIDE, assert_close, mlp, rows, torch
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import revkernels as rk
from distributed.cases import BACKENDS, Cases
from distributed.networks import check_training, mesh, models, on_joined
from distributed.processes import WORLD

cases = Cases()
EXACT = rk.Exact(k=16)
BUDGETS = {"half": rk.MemoryBudget(0.5), "all": rk.MemoryBudget(1.0)}
ACTIVATIONS = {"reconstruct": "reconstruct", "store": "store", **BUDGETS}


def cut(net):
    """Let each process have a half of every branch's layers; what they return is still on its way."""
    for block in net.chain:
        for branch in (block.F, block.G):
            parallelize_module(branch, mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return net


class Averaged(nn.Module):
    """Talks by hand: the mean over the processes, which have the same."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return all_reduce(self.inner(x) / WORLD)


@cases.over(kept=ACTIVATIONS, backend=BACKENDS)
def tensor_parallel(kept, options):
    """Row 24. Under a budget nothing is kept: by the times that it measures, one process might keep what the other
    rebuilds, and each would take what the other sends for something else."""
    net, alone = models(depth=3, activations=ACTIVATIONS[kept], **options)
    check_training(cut(net), alone, on_joined, on_joined, steps=4)
    if kept in BUDGETS:
        assert net.chain.plan().kept == 0


@cases.over(kept=ACTIVATIONS, backend=BACKENDS)
def by_hand(kept, options):
    """The same of collectives in a branch's own code."""
    net, alone = models(Averaged, depth=3, activations=ACTIVATIONS[kept], **options)
    check_training(net, alone, on_joined, on_joined, steps=4)
    if kept in BUDGETS:
        assert net.chain.plan().kept == 0


@cases.over(backend=BACKENDS)
def exact(options):
    """Rebuilding and storing, to the bit."""
    nets = [
        cut(models(dtype=torch.float32, coupling=EXACT, activations=activations, **options)[0])
        for activations in ("reconstruct", "store")
    ]
    check_training(*nets, on_joined_in_float32, on_joined_in_float32, steps=2, tolerance=1e-30)


def on_joined_in_float32(model, step):
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    model(x).square().sum().backward()


@cases.over(backend=BACKENDS)
def inverse(options):
    """Of a chain that is given what is on its way, too."""
    net, alone = models(depth=2, **options)
    parallelize_module(cut(net).stem, mesh(), RowwiseParallel(input_layouts=Replicate()))
    x = rows(3, 8, requires_grad=False)
    with torch.no_grad():
        assert_close(net.chain.inverse(alone.chain(x)), x, what="the inverse")
        given = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=WIDE)
        assert_close(net.chain(net.stem(given)), alone.chain(alone.stem(given)), what="the output")


@pytest.mark.parametrize("case", cases)
def test_tensor_parallel(case, passes):
    passes(case)
