# SPDX-License-Identifier: Apache-2.0
"""Chains as stages of torch's pipelines: several micro-batches in flight, and backwards in two parts."""

import pytest

pytest.importorskip("torch.distributed.pipelining")

import torch.distributed as dist
from behaviour.common import assert_close, dropout_mlp, pairs_of, torch, twins
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from distributed.cases import BACKENDS, Cases
from distributed.networks import optimizer_of
from distributed.processes import WORLD

cases = Cases()
#: Of each schedule, how many stages a process has.
SCHEDULES = {
    "gpipe": (ScheduleGPipe, 1),
    "1f1b": (Schedule1F1B, 1),
    "interleaved": (ScheduleInterleaved1F1B, 2),
    "zero-bubble": (ScheduleInterleavedZeroBubble, 2),
}
MICRO_BATCHES, ROWS, WIDTH = 4, 3, 8


def branch():
    return nn.Sequential(nn.LayerNorm(4, dtype=torch.float64), nn.GELU(), dropout_mlp(p=0.3))


def stages(**options):
    """This process's stages, of chains and of plain ones: number -> (chain, plain)."""
    found = {}
    for number in range(dist.get_rank(), options.pop("count"), WORLD):
        torch.manual_seed(number)
        found[number] = twins(pairs_of(branch, 2), **options)
    return found


def schedule_of(kind, parts, count):
    """torch's schedule of this process's ``parts``, number -> module, in a pipeline of ``count`` stages."""
    made = []
    for number, module in parts.items():
        # Where the shapes are not told, torch runs every stage on uninitialized memory first.
        given, returned = (torch.empty(ROWS, WIDTH, dtype=torch.float64) for _ in range(2))
        shapes = {"input_args": given.requires_grad_(number > 0), "output_args": returned.requires_grad_()}
        made.append(PipelineStage(module, number, count, torch.device("cpu"), **shapes))
    loss = nn.MSELoss()
    return kind(made[0] if len(made) == 1 else made, n_microbatches=MICRO_BATCHES, loss_fn=loss)


@cases.over(schedule=SCHEDULES, backend=BACKENDS)
def pipeline(schedule, options):
    """Gradients, parameters and random numbers of three steps, as of the plain network in the same schedule."""
    kind, each = SCHEDULES[schedule]
    count = each * WORLD
    parts = stages(count=count, **options)
    nets = [{number: pair[which] for number, pair in parts.items()} for which in (0, 1)]
    schedules = [schedule_of(kind, net, count) for net in nets]
    optimizers = [optimizer_of(nn.ModuleList(net.values())) for net in nets]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(2, MICRO_BATCHES * ROWS, WIDTH, generator=generator, dtype=torch.float64)
        states = []
        for runs, optimizer in zip(schedules, optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(100 * step + dist.get_rank())
            runs.step(*((x,) if 0 in parts else ()), **({"target": target} if count - 1 in parts else {}))
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
        for net, plain in parts.values():
            for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
                assert_close(ours.grad, theirs.grad, what=f"step {step}: the gradient of {name}")
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("case", cases)
def test_pipelines(case, passes):
    if torch.torch_version.TorchVersion(torch.__version__) < "2.13" and "gpipe" not in case:
        pytest.skip("the processes of torch 2.6's 1F1B wait for each other's messages over gloo")
    passes(case)
