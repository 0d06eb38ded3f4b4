# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel over branches whose ranks do not compute alike: batch statistics, and masks drawn by each.

There is no joined batch that would give the same. The reference is each rank's plain network on its own batch, with
its gradients averaged by hand. SyncBatchNorm is not here: torch refuses CPU tensors in its training forward.
"""

import pytest
import torch.distributed as dist
from behaviour.common import WIDE, dropout_mlp, norm_mlp, relative_error, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed.cases import ACTIVATIONS, BACKENDS, Cases
from distributed.networks import average_gradients, check_training, models, on_own_numbers
from distributed.processes import WORLD

cases = Cases()
MODES = {"default": {}, "find_unused": {"find_unused_parameters": True}, "static_graph": {"static_graph": True}}


def broadcast_buffers(network):
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)


def check_ranks(net, plain, broadcast=True, **options):
    """DDP's training against the plain network's by hand, both from the same random numbers, others on each rank."""
    state = None

    def ours(ddp, step):
        nonlocal state
        state = on_own_numbers(ddp, step)

    def by_hand(plain, step):
        if broadcast:
            broadcast_buffers(plain)
        assert torch.equal(on_own_numbers(plain, step), state), f"step {step}: the generator's state differs"
        average_gradients(plain)

    check_training(DistributedDataParallel(net, broadcast_buffers=broadcast, **options), plain, ours, by_hand)


@cases.over(broadcast=(False, True), backend=BACKENDS, activations=ACTIVATIONS)
def batch_norm(broadcast, options):
    """Local statistics: those of rank 0 before each forward if buffers are broadcast, else each rank's own."""
    net, plain = models(norm_mlp, **options)
    check_ranks(net, plain, broadcast)
    mean = net.chain[0].F[0].running_mean
    everywhere = [torch.empty_like(mean) for _ in range(WORLD)]
    dist.all_gather(everywhere, mean)
    assert relative_error(*everywhere) > 1e-3, "the ranks' statistics are the same: this would show nothing"


@cases.over(mode=MODES, backend=BACKENDS, activations=ACTIVATIONS)
def dropout(mode, options):
    """Each rank has masks of its own, and the recompute draws them again; next to local statistics."""
    net, plain = models(lambda: nn.Sequential(norm_mlp(), dropout_mlp(p=0.4)), **options)
    check_ranks(net, plain, **MODES[mode])


@cases.over(backend=BACKENDS, activations=ACTIVATIONS)
def frozen_statistics(options):
    """BatchNorm in eval mode: the buffers, broadcast before each forward, are read in the backward."""
    net, plain = models(norm_mlp, **options)
    for model in (net, plain):
        model.eval()
    check_ranks(net, plain)


def spectral():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh()).to(WIDE)


@cases.over(backend=BACKENDS, activations=ACTIVATIONS)
def spectral_norm(options):
    """Buffers that the output depends on, written in each forward: the recompute starts from those of then."""
    net, plain = models(spectral, **options)
    check_ranks(net, plain)


@pytest.mark.parametrize("case", cases)
def test_ddp_norms(case, passes):
    passes(case)
