# SPDX-License-Identifier: Apache-2.0
"""The recompute gathers no parameters: a step has the collectives that it has with stored activations."""

from collections import Counter

import pytest
from behaviour.common import assert_raises, mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from distributed.cases import ACTIVATIONS, Cases
from distributed.networks import PLACES, models, on_shard, shard

cases = Cases()
DEPTH = 3
#: How many groups of parameters there are: those of stem and head, and those of the chain.
GROUPS = {"branches": 1 + 2 * DEPTH, "blocks": 1 + DEPTH, "chain": 2, "root": 1, "everywhere": 1 + 2 * DEPTH}
RESHARD = {"reshard": True, "keep": False}


class Checkpointed(nn.Module):
    """``torch.utils.checkpoint`` round a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Collectives(TorchDispatchMode):
    """Counts the calls of each collective."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            self.counts[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def collectives(model):
    """(all-gathers, reduce-scatters, others) of a training step."""
    with Collectives() as mode:
        on_shard(model, 0)
    gathers, scatters = (mode.counts.pop(name, 0) for name in ("_allgather_base_", "_reduce_scatter_base_"))
    return gathers, scatters, mode.counts.total()


def check_collectives(model, groups, reshard):
    """Every group is gathered for the forward, once more for the backward if it was given up, and reduced once."""
    for step in range(2):
        expected = groups * (2 if reshard else 1), groups, 0
        got = collectives(model)
        assert got == expected, f"step {step}: {got} all-gathers, reduce-scatters and others, expected {expected}"


@cases.over(place=PLACES, after_forward=RESHARD, backend=("cpu",), activations=ACTIVATIONS)
def gathers(place, after_forward, options):
    """No more than each group's own."""
    net, plain = models(depth=DEPTH, **options)
    reshard = RESHARD[after_forward]
    shard(net, place, reshard_after_forward=reshard)
    check_collectives(net, GROUPS[place], reshard)
    if place in ("branches", "chain", "root"):  # what a plain network, whose blocks are only called in parts, can have
        shard(plain, place, reshard_after_forward=reshard)
        check_collectives(plain, GROUPS[place], reshard)


@cases.over(after_forward=RESHARD)
def gathers_under_checkpoint(after_forward):
    """As many as with ``torch.utils.checkpoint`` inside each branch."""
    _, plain = models(lambda: Checkpointed(mlp()), DEPTH)
    shard(plain, "branches", reshard_after_forward=RESHARD[after_forward])
    check_collectives(plain, GROUPS["branches"], RESHARD[after_forward])


class Twice(nn.Module):
    """Runs a module twice."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return (self.inner(x) + self.inner(x)) / 2


@cases.add
def more_gathers_are_counted():
    """Planted: a chain that runs its branches twice gathers them twice as often. The check finds it."""
    _, plain = models(depth=DEPTH)
    shard(plain, "branches", reshard_after_forward=True)
    plain.chain = Twice(plain.chain)
    assert_raises(AssertionError, ["(26, 7, 0)"], lambda: check_collectives(plain, GROUPS["branches"], True))


@pytest.mark.parametrize("case", cases)
def test_fsdp_gathers(case, passes):
    passes(case)
