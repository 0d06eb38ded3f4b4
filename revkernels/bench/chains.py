# SPDX-License-Identifier: Apache-2.0
"""The networks of the block and memory benchmarks: one chain of CIFAR basic blocks, trained in several ways.

All ways share the same branches, so they differ only in how activations are recovered in the backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revkernels.models.layers import BasicBranch
from revkernels.nn import ReversibleBlock, ReversibleSequential
from revkernels.nn.fusion import FusedSequential

__all__ = ["WAYS", "Chain", "Shape", "plain_block", "unfuse"]

Step = Callable[[], None]

#: Name to the settings of `ReversibleSequential`; "checkpoint" is plain torch and separate.
WAYS: dict[str, dict[str, Any] | None] = {
    "store, eager": {"activations": "store", "backend": "eager"},
    "store, fused": {"activations": "store", "backend": None},
    "checkpoint, eager": None,
    "reconstruct, eager": {"activations": "reconstruct", "backend": "eager"},
    "reconstruct, fused": {"activations": "reconstruct", "backend": None},
}


@dataclass(frozen=True)
class Shape:
    """Size of a chain and its input.

    Attributes:
        depth: number of branches (half-steps); a block has two.
        batch, width, side: a stream is (batch, width, side, side), float32; the block's input has twice the width.
    """

    depth: int = 18
    batch: int = 32
    width: int = 32
    side: int = 32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"depth {self.depth}, {self.batch}x{self.width}x{self.side}x{self.side} a stream"


class Chain:
    """The branches of one chain, its input, and a training step in each of the `WAYS`."""

    def __init__(self, shape: Shape) -> None:
        if shape.depth < 2 or shape.depth % 2:
            raise ValueError(f"depth is {shape.depth}; it must be even and at least 2: a block has two branches")
        self.shape = shape
        branches = nn.ModuleList(BasicBranch(shape.width, shape.width) for _ in range(shape.depth))
        self.branches = branches.to(shape.device)
        # For the checkpointed way, which must be plain torch outside any chain: the same parameters and buffers.
        shared = {id(tensor): tensor for tensor in (*branches.parameters(), *branches.buffers())}
        self.plain_branches = unfuse(copy.deepcopy(self.branches, shared))
        size = (shape.batch, shape.width, shape.side, shape.side)
        self.input = tuple(torch.randn(size, device=shape.device, requires_grad=True) for _ in range(2))
        self.gradient = tuple(torch.randn(size, device=shape.device) for _ in range(2))

    def step(self, way: str) -> Step:
        """Return one forward and backward; gradients accumulate over steps, so no step frees the last one's."""
        settings = WAYS[way]
        if settings is None:
            forward = self._checkpointed
        else:
            blocks = (ReversibleBlock(F, G) for F, G in zip(self.branches[::2], self.branches[1::2], strict=True))
            network = ReversibleSequential(*blocks, **settings)

            def forward() -> tuple[Tensor, Tensor]:
                return network(self.input)

        def step() -> None:
            torch.autograd.backward(forward(), self.gradient)

        return step

    def _checkpointed(self) -> tuple[Tensor, Tensor]:
        x1, x2 = self.input
        for F, G in zip(self.plain_branches[::2], self.plain_branches[1::2], strict=True):
            x1, x2 = checkpoint(plain_block, F, G, x1, x2, use_reentrant=False)
        return x1, x2


def plain_block(F: nn.Module, G: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """A block in plain torch."""
    y1 = x1 + F(x2)
    return y1, x2 + G(y1)


def unfuse(module: nn.Module) -> Any:
    """Turn every `FusedSequential` inside into an ordinary Sequential, in place: plain torch, whoever calls it.

    Backend "eager" does not suffice: another library does not know it, and the threads of a GPU's backward do not see
    `use_backend`.
    """
    for part in module.modules():
        if isinstance(part, FusedSequential):
            part.__class__ = nn.Sequential  # type: ignore[assignment]
    return module
