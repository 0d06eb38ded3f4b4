# SPDX-License-Identifier: Apache-2.0
"""The cost of the driver itself: a chain of branches on very few elements, in every way, in plain torch and in other
libraries.

This times Python and the autograd engine, not arithmetic. The goal is set for branches of x * w; branches of several
layers have more parameters and saved tensors to handle. Run it with one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revkernels.bench.chains import plain_block
from revkernels.bench.clocks import Clock
from revkernels.bench.harness import Measurement, Trial, measure
from revkernels.bench.peers import PEERS
from revkernels.nn import ReversibleBlock, ReversibleSequential, stateless

__all__ = ["BRANCHES", "HALF_STEPS", "goal", "run"]

HALF_STEPS = 128
_ELEMENTS = 8
_MOST_TIMES_PLAIN = 2.6
_MOST_ABOVE_PLAIN = 60.0  # us per half-step: the limit if plain torch is fast, that is:
_FAST = 30.0  # us per half-step or less


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((_ELEMENTS,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


@stateless
class _Stateless(_Scale):
    pass


def _convolution() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))


def _mlp() -> nn.Module:
    layers = nn.LayerNorm(_ELEMENTS), nn.Linear(_ELEMENTS, _ELEMENTS), nn.GELU(), nn.Dropout(0.1)
    return nn.Sequential(*layers, nn.Linear(_ELEMENTS, _ELEMENTS))


#: A kind of branch by name: its description, a function that makes it, and the shape of its two streams together.
BRANCHES: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "scale": ("x * w on 8 elements", _Scale, (1, 2 * _ELEMENTS)),
    "stateless": ("x * w on 8 elements, declared stateless", _Stateless, (1, 2 * _ELEMENTS)),
    "conv": ("BN-ReLU-convolution on 2 x 4 x 2 x 2 elements", _convolution, (2, 8, 2, 2)),
    "mlp": ("LN-linear-GELU-dropout-linear on 2 x 8 elements", _mlp, (2, 2 * _ELEMENTS)),
}


def run(
    device: str,
    clock: Clock,
    rounds: int,
    begin: Callable[[str], None] = lambda step: None,
    branch: str = "scale",
    failed: Callable[[str, Exception], None] = lambda name, error: None,
) -> Iterator[Measurement]:
    """Measure a forward and backward; ``more["us_a_half_step"]`` is the median divided by the half-steps.

    Args:
        branch: which of `BRANCHES`.
        failed: called for another library that does not run these branches.
    """
    what, make, shape = BRANCHES[branch]
    branches = nn.ModuleList(make() for _ in range(HALF_STEPS)).to(device)
    pairs = list(zip(branches[::2], branches[1::2], strict=True))
    x = torch.randn(shape, device=device, requires_grad=True)

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
    for peer in PEERS:
        try:
            step = _step(_joined(peer.chain(pairs)), x)
            step()
        except Exception as error:  # any exception
            failed(peer.name, error)
        else:
            steps[peer.name] = step
    trial = Trial("plain torch", steps)
    measured = measure("overhead", f"{HALF_STEPS} half-steps of {what}", trial, clock, rounds, begin=begin)
    for found in measured:
        us, plain_us = (one.median_s * 1e6 / HALF_STEPS for one in (found, measured[0]))
        found.more["us_a_half_step"] = us
        if found.variant.startswith("reconstruct") and branch == "scale":
            found.goal = goal(us, plain_us, found.ratio)
        yield found


def _joined(chain: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat(chain(x.chunk(2, 1)), 1)


def goal(us: float, plain_us: float, ratio: float) -> dict[str, Any]:
    """At most 2.6 times plain torch; if that takes 30 us per half-step or less, at most 60 us above it."""
    if plain_us <= _FAST:
        quantity, limit, value = "extra_us", _MOST_ABOVE_PLAIN, us - plain_us
    else:
        quantity, limit, value = "ratio", _MOST_TIMES_PLAIN, ratio
    return {"quantity": quantity, "at_most": limit, "of": "plain torch", "value": value, "met": value <= limit}


def _step(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def step() -> None:
        forward(x).sum().backward()

    return step
