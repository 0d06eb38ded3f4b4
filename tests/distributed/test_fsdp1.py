# SPDX-License-Identifier: Apache-2.0
"""The FSDP before `fully_shard`, a module round others, in two processes: as one does on the joined batch."""

import pytest
from behaviour.common import WIDE, assert_close, mlp, norm_mlp, torch
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from distributed.cases import ACTIVATIONS, BACKENDS, Cases
from distributed.networks import models, on_joined, on_shard, optimizer_of
from revkernels.nn import ReversibleBlock

cases = Cases()
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
MARK = "_fsdp_wrapped_module."


def wrapped(module, strategy):
    strategy = ShardingStrategy[strategy]
    return FullyShardedDataParallel(
        module, sharding_strategy=strategy, device_id=torch.device("cpu"), use_orig_params=True
    )


def in_place(net, place, strategy):
    """The model in one, or the chain, or each branch, in one of its own besides."""
    if place == "chain":
        net.chain = wrapped(net.chain, strategy)
    if place == "branches":
        for block in net.chain:
            block.F, block.G = wrapped(block.F, strategy), wrapped(block.G, strategy)
    return wrapped(net, strategy)


@cases.over(place=("root", "chain", "branches"), strategy=STRATEGIES, backend=BACKENDS, activations=ACTIVATIONS)
def training(place, strategy, options):
    """Row 24: parameters and gradients of two steps."""
    net, alone = models(mlp, depth=2, dtype=WIDE, **options)
    net = in_place(net, place, strategy)
    optimizers = optimizer_of(net), optimizer_of(alone)
    for step in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        on_shard(net, step)
        on_joined(alone, step)
        with FullyShardedDataParallel.summon_full_params(net, with_grads=True):
            ours = {name.replace(MARK, ""): parameter for name, parameter in net.named_parameters()}
            theirs = dict(alone.named_parameters())
            assert ours.keys() == theirs.keys()
            for name, parameter in theirs.items():
                assert_close(ours[name].detach(), parameter.detach(), what=name)
                assert_close(ours[name].grad, parameter.grad, what=f"the gradient of {name}")
        for optimizer in optimizers:
            optimizer.step()


@cases.over(backend=("eager",))
def round_a_block(options):
    """A chain needs its blocks themselves."""
    net, _ = models(norm_mlp, depth=1, **options)
    block = wrapped(net.chain[0], "FULL_SHARD")
    assert not isinstance(block, ReversibleBlock)
    with pytest.raises(TypeError, match="FullyShardedDataParallel"):
        type(net.chain)(block)


@pytest.mark.parametrize("case", cases)
def test_fsdp1(case, passes):
    passes(case)
