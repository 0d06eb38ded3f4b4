# SPDX-License-Identifier: Apache-2.0
"""RevTorch 0.2.4 on this package's driver: `ReversibleBlock` and `ReversibleSequence`.

The names, the signatures and the names in a ``state_dict`` are RevTorch's. Differences: dropout masks are the forward's
without ``fix_random_seed``, running statistics are updated once, the input need not require grad, ``autograd.grad``,
double backward and autocast work; a parameter changed between forward and backward, or an output changed in place,
raises instead of corrupting the gradient. ``block.backward_pass``, RevTorch's own loop, does not exist: gradients go
through torch's engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from revkernels.compat._chains import kind_of, together
from revkernels.nn.chain import HalfStep, run

__all__ = ["ReversibleBlock", "ReversibleSequence"]


class ReversibleBlock(nn.Module):
    """y1 = x1 + f_block(x2); y2 = x2 + g_block(y1).

    Called alone it is a chain of one block, with gradients; RevTorch's runs without gradients then.

    Args:
        f_block, g_block: modules that preserve the shape of their input.
        split_along_dim: the dimension along which the input is halved.
        fix_random_seed: accepted, not needed. Random numbers always come from torch's unchanged generators, and are the
            same in the backward; RevTorch reseeds them from Python's ``random``.
    """

    def __init__(
        self, f_block: nn.Module, g_block: nn.Module, split_along_dim: int = 1, fix_random_seed: bool = False
    ) -> None:
        super().__init__()
        self.f_block = f_block
        self.g_block = g_block
        self.split_along_dim = split_along_dim
        self.fix_random_seed = fix_random_seed

    def forward(self, x: torch.Tensor) -> Any:
        return _chain([(0, self)], x, self.split_along_dim)


class ReversibleSequence(nn.Module):
    """A chain of `ReversibleBlock`s, whose activation memory does not grow with its depth.

    Consecutive blocks that are halved along the same dimension are one chain. A new chain begins where the dimension
    changes, and a block with hooks, or with its own ``forward``, is called as a module and is a separate chain: each
    keeps one more output.

    Args:
        reversible_blocks: a ModuleList of `ReversibleBlock`s.
        eagerly_discard_variables: accepted, not needed. A second backward takes ``retain_graph=True``, as in plain
            torch, and memory is freed equally early.

    Raises:
        TypeError: reversible_blocks is not a ModuleList, or contains something else than a `ReversibleBlock`.
    """

    def __init__(self, reversible_blocks: nn.ModuleList, eagerly_discard_variables: bool = True) -> None:
        super().__init__()
        if not isinstance(reversible_blocks, nn.ModuleList):
            raise TypeError(f"reversible_blocks is a {type(reversible_blocks).__name__}; it must be an nn.ModuleList")
        for index, block in enumerate(reversible_blocks):
            if not isinstance(block, ReversibleBlock):
                raise TypeError(
                    f"reversible_blocks[{index}] is a {kind_of(block, ReversibleBlock)}; it must be a "
                    f"{__name__}.ReversibleBlock"
                )
        self.reversible_blocks = reversible_blocks
        self.eagerly_discard_variables = eagerly_discard_variables

    def forward(self, x: torch.Tensor) -> Any:
        blocks = list(self.reversible_blocks)
        for alone, part in together(blocks, ReversibleBlock.forward, lambda block: block.split_along_dim):
            block = part[0][1]
            x = block(x) if alone else _chain(part, x, block.split_along_dim)
        return x


def _chain(blocks: Iterable[tuple[int, Any]], x: Any, split_dim: int) -> Any:
    half_steps, names = [], []
    for index, block in blocks:
        half_steps += [HalfStep(block.f_block, 0, (1,)), HalfStep(block.g_block, 1, (0,))]
        names += [f"reversible_blocks[{index}].{part}" for part in ("f_block", "g_block")]
    return run(half_steps, x, name=names.__getitem__, split_dim=split_dim)
