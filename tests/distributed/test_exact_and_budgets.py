# SPDX-License-Identifier: Apache-2.0
"""Exact couplings and memory budgets under DDP and FSDP2, in two processes."""

import pytest
import torch.distributed as dist
from behaviour.common import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import revkernels as rk
from distributed.cases import BACKENDS, Cases
from distributed.networks import batches, check_training, loss_of, models, on_joined, on_shard, optimizer_of, shard

cases = Cases()
COUPLINGS = {"float32": "exact", "int16": rk.Exact(storage="int16")}
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": lambda net: shard(net, "branches")}


def branch(width=4):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(0.1), nn.Tanh())


@cases.over(wrapper=WRAPPERS, storage=COUPLINGS, backend=BACKENDS)
def exact(wrapper, storage, options):
    """Rows 23 and 24: parameters and gradients of every step, rebuilding and storing, to the bit."""
    trained = []
    for activations in ("reconstruct", "store"):
        net, _ = models(branch, dtype=torch.float32, coupling=COUPLINGS[storage], activations=activations, **options)
        net = WRAPPERS[wrapper](net) or net
        optimizer, seen = optimizer_of(net), []
        for number in range(4):
            torch.manual_seed(7 * number + dist.get_rank())
            optimizer.zero_grad()
            loss_of(net, batches(number, torch.float32)[dist.get_rank()]).backward()
            optimizer.step()
            seen += [p.grad.clone() for p in net.parameters()] + [p.detach().clone() for p in net.parameters()]
        trained.append(seen)
    for got, expected in zip(*trained, strict=True):
        assert torch.equal(*(t.to_local() if isinstance(t, DTensor) else t for t in (got, expected)))


@cases.over(wrapper=WRAPPERS, share=(0.5, 1.0), backend=BACKENDS)
def budget(wrapper, share, options):
    """Rows 23 and 24: the plan holds from the second step on."""
    net, alone = models(depth=3, activations=rk.MemoryBudget(share), **options)
    wrapped = WRAPPERS[wrapper](net) or net
    check_training(wrapped, alone, on_shard, on_joined, steps=4)
    assert net.chain.plan().kept > 0


@pytest.mark.parametrize("case", cases)
def test_exact_and_budgets(case, passes):
    passes(case)
