# SPDX-License-Identifier: Apache-2.0
"""FSDP2's mixed precision, bfloat16 parameters and float32 reduction: as plain torch under the same policy."""

import copy

import pytest
import torch.distributed as dist
from behaviour.common import WIDE, assert_raises, mlp, relative_error, torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distributed.cases import ACTIVATIONS, BACKENDS, Cases
from distributed.networks import (
    PLACES,
    batches,
    check_training,
    full,
    joined,
    loss_of,
    mesh,
    models,
    shard,
)
from revkernels.errors import ReconstructionError

cases = Cases()
DEPTH = 4
NARROW = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}


def narrow_models(depth, **options):
    return models(lambda: mlp().float(), depth, torch.float32, **options)


def on_shard(model, step):
    loss_of(model, batches(step, torch.float32)[dist.get_rank()]).backward()


def gradient_of(model):
    """All parameters' gradients as one vector."""
    return torch.cat([full(p.grad).flatten().to(WIDE) for p in model.parameters()])


def check_narrow(net, plain, activations, tolerance):
    """The plain network's training: bit for bit if activations are stored, within ``tolerance`` if they are rebuilt."""
    check_training(net, plain, on_shard, on_shard, 2, tolerance if activations == "reconstruct" else 1e-300)


@cases.over(backend=BACKENDS, activations=ACTIVATIONS)
def branches(options):
    """bfloat16 branches on float32 streams: a rebuilt stream is off by an ulp of 2^-23, and is rounded to 2^-9 before a
    branch reads it. It falls on the other side for one number in 2^14, and is off by 2^-8 then."""
    net, plain = narrow_models(DEPTH, **options)
    for model in (net, plain):
        for block in model.chain.children():
            for branch in (block.F, block.G):
                fully_shard(branch, mesh=mesh(), mp_policy=MixedPrecisionPolicy(**NARROW))
        fully_shard(model, mesh=mesh())
    check_narrow(net, plain, options["activations"], 2**-8)


@cases.over(place=PLACES, backend=("cpu",), activations=ACTIVATIONS)
def whole_model(place, options):
    """The policy on the root too, which makes the streams bfloat16.

    Each half-step of a rebuilt stream adds two roundings of 2^-9, of random sign: 2^-8.5 sqrt(2 depth) in a stream, and
    about that in a gradient. The distance to the float64 gradient stays the stored one's, within a quarter.
    """
    net, plain = narrow_models(DEPTH, **options)
    wide = copy.deepcopy(plain).to(WIDE)
    loss_of(wide, joined(batches(0))).backward()
    true = gradient_of(wide)
    # a plain block has no forward that FSDP could hook: where it is makes no difference to the numbers
    shard(net, place, mp_policy=MixedPrecisionPolicy(**NARROW))
    shard(plain, "branches", mp_policy=MixedPrecisionPolicy(**NARROW))
    for model in (net, plain):
        on_shard(model, 0)
    ours, stored = gradient_of(net), gradient_of(plain)
    if options["activations"] == "store":
        assert torch.equal(ours, stored)
    assert relative_error(ours, stored) < 2**-8.5 * (2 * DEPTH) ** 0.5
    assert 1e-4 < relative_error(ours, true) < 1.25 * relative_error(stored, true)


class Autocast(nn.Module):
    """A branch that computes in bfloat16 and is given what the stream holds."""

    def __init__(self):
        super().__init__()
        self.inner = mlp().float()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x)


@cases.over(backend=BACKENDS, activations=ACTIVATIONS)
def blocks(options):
    """Blocks with bfloat16 parameters on float32 streams: the policy must leave the streams alone. As in `branches`."""
    net, plain = models(Autocast, DEPTH, torch.float32, **options)
    policy = MixedPrecisionPolicy(**NARROW, cast_forward_inputs=False)
    for block in net.chain:
        fully_shard(block, mesh=mesh(), mp_policy=policy)
    for block in plain.chain.children():
        for branch in (block.F, block.G):
            fully_shard(branch, mesh=mesh(), mp_policy=policy)
    for model in (net, plain):
        fully_shard(model, mesh=mesh())
    check_narrow(net, plain, options["activations"], 2**-8)


@cases.add
def blocks_that_cast():
    """A policy that casts the streams between two blocks: that cannot be undone, and is refused."""
    net, _ = narrow_models(2)
    for block in net.chain:
        fully_shard(block, mesh=mesh(), mp_policy=MixedPrecisionPolicy(**NARROW))
    fully_shard(net, mesh=mesh())
    assert_raises(ReconstructionError, ["a hook of", "replaced the streams"], lambda: on_shard(net, 0))


@pytest.mark.parametrize("case", cases)
def test_fsdp_precision(case, passes):
    passes(case)
