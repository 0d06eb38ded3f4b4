# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel sends gradients while the chain's backward goes on, as it does with stored activations."""

import itertools

import pytest
from behaviour.common import assert_raises, mlp, torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from distributed.cases import ACTIVATIONS, BACKENDS, Cases
from distributed.networks import models, on_shard
from revkernels.autograd.recomputing import is_recomputing

cases = Cases()
DEPTH = 4
BUCKET_MIB = 1e-5  # 10 bytes: a bucket for each parameter


class Logged(nn.Module):
    """Notes when it is run again, and when its output's gradient arrives: its backward begins."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.log = lambda event: None

    def forward(self, x):
        if is_recomputing():
            self.log("recompute")
            return self.inner(x)
        f = self.inner(x)
        if f.requires_grad:
            f.register_hook(lambda gradient: self.log("backward"))
        return f


def branches(chain):
    """The branches in the order of the forward, each with its name."""
    return [(f"{index}.{name}", block.get_submodule(name)) for index, block in chain.named_children() for name in "FG"]


def events_of_a_step(model, chain):
    """Return (what, which branch) for each bucket sent and each backward and recompute of a branch, in order.

    A bucket's branch is that of its parameter, or None. DDP makes its buckets after the first step, in the order in
    which the gradients came: it is the third step that is logged.
    """
    events, owners = [], {}
    for name, branch in branches(chain):
        branch.log = lambda event, name=name: events.append((event, name))
        owners.update((id(parameter), name) for parameter in branch.parameters())

    def send(state, bucket):
        events.append(("bucket", owners.get(id(bucket.parameters()[0]))))
        return allreduce_hook(None, bucket)

    ddp = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MIB)
    ddp.register_comm_hook(None, send)
    for step in range(3):
        events.clear()
        on_shard(ddp, step)
    buckets = sum(what == "bucket" for what, _ in events)
    assert buckets == len(list(model.parameters())), f"{buckets} buckets: not one for each parameter"
    return events


def check_overlap(events, chain):
    """Every branch's gradients are on their way before the backward of the branch before it begins."""
    names = [name for name, _ in branches(chain)]
    for earlier, later in itertools.pairwise(names):
        begins = events.index(("backward", earlier))
        late = [event for event in events[begins:] if event == ("bucket", later)]
        assert not late, f"{len(late)} buckets of {later} are sent after the backward of {earlier} has begun: {events}"
        assert ("bucket", later) in events, f"{later} is never sent"


@cases.over(backend=BACKENDS, activations=ACTIVATIONS)
def overlap(options):
    """Row 23: all buckets but the first block's F's have left before its F's backward; the order is plain torch's."""
    net, plain = models(lambda: Logged(mlp()), DEPTH, **options)
    events, theirs = (events_of_a_step(model, model.chain) for model in (net, plain))
    check_overlap(events, net.chain)
    check_overlap(theirs, plain.chain)
    assert [event for event in events if event[0] != "recompute"] == theirs
    recomputes = sum(what == "recompute" for what, _ in events)
    assert recomputes == (2 * DEPTH if options["activations"] == "reconstruct" else 0)
    for (what, name), before in zip(events[1:], events, strict=False):
        assert what != "recompute" or before == ("backward", name), f"{name} is recomputed too soon: {events}"


class OneNode(nn.Module):
    """A chain whose backward is a single node that hands out every gradient at its end."""

    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def forward(self, x):
        return _Whole.apply(self.chain, x, *self.chain.parameters())


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain, x, *parameters):
        ctx.chain, ctx.parameters = chain, parameters
        ctx.save_for_backward(x)
        return chain(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.chain(x)
        return (None, *torch.autograd.grad(y, (x, *ctx.parameters), dy))


@cases.add
def overlap_is_missed():
    """Planted: a driver that does the whole backward in one node. The check finds it."""
    net, _ = models(lambda: Logged(mlp()), DEPTH, backend="eager")
    chain, net.chain = net.chain, OneNode(net.chain)
    events = events_of_a_step(net, chain)
    assert_raises(AssertionError, ["buckets of 0.G are sent after"], lambda: check_overlap(events, chain))


@pytest.mark.parametrize("case", cases)
def test_ddp_overlap(case, passes):
    passes(case)
