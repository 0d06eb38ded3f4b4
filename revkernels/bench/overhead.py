# SPDX-License-Identifier: Apache-2.0
"""What the driver itself costs: a chain of branches that do next to nothing, in every way and in plain torch.

A branch is x * w on 8 elements, so that what is timed is Python and the autograd engine, not arithmetic. To be run with
one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revkernels.bench.chains import plain_block
from revkernels.bench.clocks import Clock
from revkernels.bench.harness import Goal, Measurement, Trial, measure
from revkernels.nn import ReversibleBlock, ReversibleSequential

__all__ = ["HALF_STEPS", "run"]

HALF_STEPS = 128
_ELEMENTS = 8
_GOAL = Goal("ratio", 2.6)


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((_ELEMENTS,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def run(
    device: str, clock: Clock, rounds: int, begin: Callable[[str], None] = lambda step: None
) -> Iterator[Measurement]:
    """Measure a forward and backward; ``more["us_a_half_step"]`` is the median divided by the half-steps."""
    branches = nn.ModuleList(_Scale() for _ in range(HALF_STEPS)).to(device)
    pairs = list(zip(branches[::2], branches[1::2], strict=True))
    x = torch.randn(1, 2 * _ELEMENTS, device=device, requires_grad=True)

    def plain(x: Tensor) -> Tensor:
        streams = x.chunk(2, 1)
        for F, G in pairs:
            streams = plain_block(F, G, *streams)
        return torch.cat(streams, 1)

    def checkpointed(x: Tensor) -> Tensor:
        streams = x.chunk(2, 1)
        for F, G in pairs:
            streams = checkpoint(plain_block, F, G, *streams, use_reentrant=False)
        return torch.cat(streams, 1)

    ways: dict[str, Callable[[Tensor], Tensor]] = {"plain torch": plain, "checkpoint": checkpointed}
    for activations in ("store", "reconstruct"):
        for name, backend in (("eager", "eager"), ("fused", None)):
            blocks = (ReversibleBlock(F, G) for F, G in pairs)
            ways[f"{activations}, {name}"] = ReversibleSequential(*blocks, activations=activations, backend=backend)
    steps = {name: _step(forward, x) for name, forward in ways.items()}
    goals = {name: _GOAL for name in steps if name.startswith("reconstruct")}
    trial = Trial("plain torch", steps, goals=goals)
    for found in measure("overhead", f"{HALF_STEPS} half-steps of x * w", trial, clock, rounds, begin=begin):
        found.more["us_a_half_step"] = found.median_s * 1e6 / HALF_STEPS
        yield found


def _step(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def step() -> None:
        forward(x).sum().backward()

    return step
