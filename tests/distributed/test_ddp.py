# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel: two processes train as one does on the joined batch, in every mode of DDP."""

import contextlib

import pytest
import torch.distributed as dist
from behaviour.common import WIDE, mlp, torch, twins
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from distributed.cases import ACTIVATIONS, BACKENDS, Cases
from distributed.networks import (
    assert_same_training,
    batches,
    check_training,
    joined,
    loss_of,
    models,
    on_joined,
    on_shard,
)
from distributed.processes import WORLD

cases = Cases()
DEPTHS = (1, 3)
MODES = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
}


@cases.over(mode=MODES, backend=BACKENDS, activations=ACTIVATIONS, depth=DEPTHS)
def mode(mode, depth, options):
    """Row 23: gradients and parameters after each of three steps."""
    net, alone = models(depth=depth, **options)
    check_training(DistributedDataParallel(net, **MODES[mode]), alone, on_shard, on_joined)


@cases.over(mode=MODES, backend=BACKENDS, activations=ACTIVATIONS)
def no_sync(mode, options):
    """Row 23: micro-batches, of which only the last one's backward communicates."""

    def micro_batches(step):
        # A static graph is learnt from the first backward, which must communicate: plain torch crashes likewise.
        return range(10 * step, 10 * step + (1 if mode == "static_graph" and step == 0 else 3))

    def ours(ddp, step):
        for seed in micro_batches(step):
            with contextlib.nullcontext() if seed == micro_batches(step)[-1] else ddp.no_sync():
                on_shard(ddp, seed)

    def theirs(alone, step):
        for seed in micro_batches(step):
            on_joined(alone, seed)

    net, alone = models(**options)
    check_training(DistributedDataParallel(net, **MODES[mode]), alone, ours, theirs)


class OneOfTwo(nn.Module):
    """Uses one of its two inner networks, and never its spare parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.spare = mlp(), mlp(), nn.Linear(2, 2).to(WIDE)

    def forward(self, x, which):
        return (self.first, self.second)[which](x)


@cases.over(view=(False, True), backend=BACKENDS, activations=ACTIVATIONS)
def unused(view, options):
    """Row 23: parameters that nobody uses, and parameters that one rank uses in one step and the other does not."""

    def which(step, rank):
        return (step == 1) == (rank == 0)  # the second step the other way round, the third as the first

    def ours(ddp, step):
        on_shard(ddp, step, which=which(step, dist.get_rank()))

    def theirs(alone, step):
        for rank, batch in enumerate(batches(step)):
            (loss_of(alone, batch, which=which(step, rank)) / WORLD).backward()

    net, alone = models(OneOfTwo, **options)
    check_training(
        DistributedDataParallel(net, find_unused_parameters=True, gradient_as_bucket_view=view), alone, ours, theirs
    )


@cases.over(mode=MODES, backend=BACKENDS, activations=ACTIVATIONS)
def chain_alone(mode, options):
    """DDP round the chain itself: a pair goes in and a pair comes out, and a single tensor."""

    def halves(step):
        generator = torch.Generator().manual_seed(step)
        return torch.randn(2, WORLD, 3, 4, generator=generator, dtype=WIDE)

    def ours(ddp, step):
        x1, x2 = halves(step)[:, dist.get_rank()]
        y = ddp(torch.cat((x1, x2), 1)) if step == 1 else torch.cat(ddp((x1, x2)), 1)
        y.square().mean().backward()

    def theirs(alone, step):
        alone(torch.cat(halves(step).flatten(1, 2).unbind(), 1)).square().mean().backward()

    net, alone = twins([(mlp(), mlp()) for _ in range(2)], **options)
    check_training(DistributedDataParallel(net, **MODES[mode]), alone, ours, theirs)


@cases.over(backend=BACKENDS, activations=ACTIVATIONS)
def frozen(options):
    """Row 23: a chain whose F are frozen, and whose stem is."""
    net, alone = models(**options)
    for model in (net, alone):
        model.stem.requires_grad_(False)
        for block in model.chain.children():
            block.F.requires_grad_(False)
    check_training(DistributedDataParallel(net), alone, on_shard, on_joined)


@cases.over(mode=("default", "find_unused"), backend=BACKENDS, activations=ACTIVATIONS)
def two_forwards(mode, options):
    """Two forwards of one DDP module, then one backward through both."""

    def ours(ddp, step):
        first, second = (batches(2 * step + i)[dist.get_rank()] for i in range(2))
        (loss_of(ddp, first) + loss_of(ddp, second)).backward()

    def theirs(alone, step):
        first, second = (joined(batches(2 * step + i)) for i in range(2))
        (loss_of(alone, first) + loss_of(alone, second)).backward()

    net, alone = models(**options)
    check_training(DistributedDataParallel(net, **MODES[mode]), alone, ours, theirs)


@cases.over(backend=BACKENDS, activations=ACTIVATIONS)
def compressed(options):
    """Gradients that travel in float16: as those of the plain network that is compressed alike.

    Both send the same numbers up to float64's rounding, which can make a rounding to float16 fall on the other side: an
    ulp of 2^-10, before the sum and after it.
    """
    net, plain = models(**options)
    ddps = DistributedDataParallel(net), DistributedDataParallel(plain)
    for ddp in ddps:
        ddp.register_comm_hook(None, fp16_compress_hook)
    for step in range(2):
        for ddp in ddps:
            ddp.zero_grad()
            on_shard(ddp, step)
        assert_same_training(*ddps, f"step {step}", tolerance=2**-9)
        gradient = net.stem.weight.grad
        assert torch.equal(gradient, gradient.half().to(WIDE)), "the hook did not compress"


@pytest.mark.parametrize("case", cases)
def test_ddp(case, passes):
    passes(case)
