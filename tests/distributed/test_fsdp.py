# SPDX-License-Identifier: Apache-2.0
"""FSDP2, wherever `fully_shard` is put: two processes train as one does on the joined batch."""

import functools
import itertools

import pytest
import torch.distributed as dist
from behaviour.common import WIDE, assert_close, dropout_mlp, mlp, norm_mlp, rows, torch, twins
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from distributed.cases import ACTIVATIONS, BACKENDS, Cases
from distributed.networks import (
    PLACES,
    average_gradients,
    batches,
    check_training,
    joined,
    loss_of,
    mesh,
    models,
    on_joined,
    on_own_numbers,
    on_shard,
    shard,
)
from distributed.processes import WORLD

cases = Cases()
RESHARD = {"reshard": True, "keep": False}


@cases.over(place=PLACES, after_forward=RESHARD, backend=BACKENDS, activations=ACTIVATIONS)
def training(place, after_forward, options):
    """Row 24: gradients and parameters after each of two steps."""
    net, alone = models(depth=2, **options)
    shard(net, place, reshard_after_forward=RESHARD[after_forward])
    check_training(net, alone, on_shard, on_joined, steps=2)


@cases.over(backend=BACKENDS, activations=ACTIVATIONS)
def without_root(options):
    """Row 24: F and G sharded, and no module above them; a chain that is called with a pair."""

    def pair(step):
        generator = torch.Generator().manual_seed(step)
        return torch.randn(2, WORLD, 3, 4, generator=generator, dtype=WIDE)

    def ours(net, step):
        torch.cat(net(tuple(pair(step)[:, dist.get_rank()])), 1).square().mean().backward()

    def theirs(alone, step):
        torch.cat(alone(tuple(pair(step).flatten(1, 2))), 1).square().mean().backward()

    net, alone = twins([(mlp(), mlp()) for _ in range(2)], **options)
    for block in net:
        fully_shard(block.F, mesh=mesh())
        fully_shard(block.G, mesh=mesh())
    check_training(net, alone, ours, theirs, steps=2)


@cases.over(place=PLACES, backend=("cpu",))
def accumulation(place, options):
    """Three micro-batches, of which only the last one's backward reduces gradients."""

    def ours(net, step):
        for index in range(3):
            net.set_requires_gradient_sync(index == 2)
            on_shard(net, 3 * step + index)

    def theirs(alone, step):
        for index in range(3):
            on_joined(alone, 3 * step + index)

    net, alone = models(depth=2, **options)
    shard(net, place)
    check_training(net, alone, ours, theirs, steps=2)


@cases.over(place=PLACES, backend=("cpu",))
def two_forwards(place, options):
    """Two forwards, then one backward through both."""

    def ours(net, step):
        first, second = (batches(2 * step + i)[dist.get_rank()] for i in range(2))
        (loss_of(net, first) + loss_of(net, second)).backward()

    def theirs(alone, step):
        first, second = (joined(batches(2 * step + i)) for i in range(2))
        (loss_of(alone, first) + loss_of(alone, second)).backward()

    net, alone = models(depth=2, **options)
    shard(net, place)
    check_training(net, alone, ours, theirs, steps=2)


def noisy():
    return nn.Sequential(norm_mlp(), dropout_mlp(p=0.4))


@cases.over(place=PLACES, backend=BACKENDS)
def own_numbers(place, options):
    """BatchNorm's local statistics and each rank's own dropout masks: as plain torch on each rank's batch."""
    state = None

    def ours(net, step):
        nonlocal state
        state = on_own_numbers(net, step)

    def by_hand(plain, step):
        assert torch.equal(on_own_numbers(plain, step), state), f"step {step}: the generator's state differs"
        average_gradients(plain)

    net, plain = models(noisy, depth=2, **options)
    shard(net, place)
    check_training(net, plain, ours, by_hand, steps=2)


@cases.over(place=("branches", "blocks"), backend=BACKENDS)
def frozen(place, options):
    """F frozen within a group that learns, or alone in its own."""
    net, alone = models(depth=2, **options)
    for model in (net, alone):
        for block in model.chain.children():
            block.F.requires_grad_(False)
    shard(net, place)
    check_training(net, alone, on_shard, on_joined, steps=2)


class Detached(nn.Module):
    """Its output has no gradient: no backward passes through it."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x).detach()


@cases.over(place=("branches", "everywhere"), backend=BACKENDS)
def detached(place, options):
    """A branch that is recomputed and has no backward, which would tell FSDP to gather its parameters."""
    makers = itertools.cycle((Detached, mlp))
    net, alone = models(lambda: next(makers)(), depth=3, **options)
    shard(net, place)
    check_training(net, alone, on_shard, on_joined, steps=2)


class WithAux(nn.Module):
    """Returns its hidden layer beside f."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4).to(WIDE), nn.Linear(4, 4).to(WIDE)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.second(hidden), hidden


@cases.over(place=("branches", "everywhere"), backend=BACKENDS)
def aux_alone(place, options):
    """A gradient that enters in the middle: the half-steps after it are recomputed and have no backward."""

    def loss(model, x):
        _, aux = model.chain(torch.tanh(model.stem(x)))
        return aux[1].square().mean()

    def ours(net, step):
        net(batches(step)[dist.get_rank()][0]).backward()

    def theirs(alone, step):
        loss(alone, joined(batches(step))[0]).backward()

    net, alone = models(WithAux, depth=3, **options)
    net.forward = functools.partial(loss, net)
    shard(net, place)
    check_training(net, alone, ours, theirs, steps=2)


@cases.over(place=("branches", "chain"), backend=BACKENDS)
def inverse(place, options):
    """`inverse` of a chain whose branches gather their own parameters, or that says that it is a forward too."""
    net, alone = models(depth=2, **options)
    shard(net, place)
    if place == "chain":
        register_fsdp_forward_method(net.chain, "inverse")
    x = rows(3, 8, requires_grad=False)
    y = alone.chain(x)
    with torch.no_grad():
        assert_close(net.chain.inverse(y), x, what="the inverse")


@pytest.mark.parametrize("case", cases)
def test_fsdp(case, passes):
    passes(case)
