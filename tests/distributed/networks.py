# SPDX-License-Identifier: Apache-2.0
"""A small model round a reversible chain, its batches, and one process's steps on the batches of all ranks."""

from __future__ import annotations

import copy

import torch.distributed as dist
from behaviour.common import WIDE, assert_close, mlp, pairs_of, torch, twins
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distributed.processes import WORLD

ROWS, WIDTH, CLASSES = 3, 8, 2  # rows of one rank's batch, of the chain's input, and of the head's output


class Model(nn.Module):
    """head(chain(tanh(stem(x))))."""

    def __init__(self, stem, chain, head):
        super().__init__()
        self.stem, self.chain, self.head = stem, chain, head

    def forward(self, x, **kwargs):
        return self.head(self.chain(torch.tanh(self.stem(x)), **kwargs))


def models(make=mlp, depth=3, dtype=WIDE, **options):
    """Return a reversible model and a plain one with the same parameters, the same on every rank."""
    torch.manual_seed(1)
    stem, head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)
    chain, plain = twins(pairs_of(make, depth), **options)
    return Model(stem, chain, head).to(dtype), Model(copy.deepcopy(stem), plain, copy.deepcopy(head)).to(dtype)


def batches(seed, dtype=WIDE):
    """Return every rank's (input, target) of a step; all ranks draw the same."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(WORLD, ROWS, 5, generator=generator, dtype=WIDE).to(dtype)
    target = torch.randn(WORLD, ROWS, CLASSES, generator=generator, dtype=WIDE).to(dtype)
    return list(zip(x, target, strict=True))


def joined(shards):
    """One batch of the ranks' batches."""
    return tuple(map(torch.cat, zip(*shards, strict=True)))


def loss_of(model, batch, **kwargs):
    """The mean square error: its mean over the ranks is that of the joined batch."""
    x, target = batch
    return (model(x, **kwargs) - target).square().mean()


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def full(tensor):
    """The whole of a tensor that may be sharded (a collective then)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_training(got, expected, what, tolerance=1e-10):
    """Parameters, their gradients, and buffers. Both may be wrapped by DDP, or sharded by FSDP."""
    got, expected = getattr(got, "module", got), getattr(expected, "module", expected)
    theirs = dict(expected.named_parameters())
    ours = dict(got.named_parameters())
    assert ours.keys() == theirs.keys(), f"{sorted(ours)} against {sorted(theirs)}"
    for name in theirs:
        gradients = full(ours[name].grad), full(theirs[name].grad)
        assert_close(*gradients, tolerance, f"{what}: the gradient of {name}")
        assert_close(full(ours[name]).detach(), full(theirs[name]).detach(), tolerance, f"{what}: {name}")
    ours, theirs = dict(got.named_buffers()), dict(expected.named_buffers())
    assert ours.keys() == theirs.keys(), f"{sorted(ours)} against {sorted(theirs)}"
    for name in theirs:
        assert_close(ours[name], theirs[name], tolerance, f"{what}: buffer {name}")


def check_training(wrapped, alone, ours, theirs, steps=3, tolerance=1e-10):
    """``ours(wrapped, step)`` and ``theirs(alone, step)`` run a step's backwards; optimizers step; all stays equal."""
    optimizers = optimizer_of(wrapped), optimizer_of(alone)
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        ours(wrapped, step)
        theirs(alone, step)
        for optimizer in optimizers:
            optimizer.step()
        assert_same_training(wrapped, alone, f"step {step}", tolerance)


def on_shard(model, step, **kwargs):
    """One rank's part of a step: forward and backward on its own batch."""
    loss_of(model, batches(step)[dist.get_rank()], **kwargs).backward()


def on_own_numbers(model, step, **kwargs):
    """`on_shard`, from random numbers that differ from rank to rank. Returns the generator's state after it."""
    torch.manual_seed(1000 * step + dist.get_rank())
    on_shard(model, step, **kwargs)
    return torch.get_rng_state()


def average_gradients(network):
    """What a data-parallel wrapper does, by hand."""
    for parameter in network.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= WORLD


def on_joined(model, step, **kwargs):
    """The whole step in one process."""
    loss_of(model, joined(batches(step)), **kwargs).backward()


# ---- FSDP2

PLACES = ("branches", "blocks", "chain", "root", "everywhere")


def mesh():
    """All ranks in a row, on the CPU."""
    return init_device_mesh("cpu", (WORLD,))


def shard(model, place, **options):
    """`fully_shard` the model's branches, blocks, chain or none of them, or all of these; and always its root."""
    options = {"mesh": mesh(), **options}
    for block in model.chain.children():
        if place in ("branches", "everywhere"):
            fully_shard(block.F, **options)
            fully_shard(block.G, **options)
        if place in ("blocks", "everywhere"):
            fully_shard(block, **options)
    if place in ("chain", "everywhere"):
        fully_shard(model.chain, **options)
    fully_shard(model, **options)
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert not whole, f"{whole} are not sharded"
    return model
