# SPDX-License-Identifier: Apache-2.0
"""reformer-pytorch's ``ReversibleSequence`` (1.4.4), on the chain of this package.

from revkernels.compat.reformer import ReversibleSequence   # was: from reformer_pytorch.reversible import ...
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from revkernels.autograd.recomputing import recomputes
from revkernels.compat._chains import together
from revkernels.nn.chain import HalfStep, run

__all__ = ["ReversibleBlock", "ReversibleSequence"]


class _Branch(nn.Module):
    """``net``; with a signal, ``_reverse`` tells whether it runs in the backward, ``_depth`` in which block."""

    def __init__(self, net: nn.Module, depth: int | None, send_signal: bool) -> None:
        super().__init__()
        self.net = net
        self.depth = depth
        self.send_signal = send_signal
        self.revkernels_comes_back = send_signal  # to its forward's buckets, as LSH attention does

    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        if self.send_signal:
            kwargs = {**kwargs, "_reverse": recomputes(), "_depth": self.depth}
        return self.net(x, **kwargs)


class ReversibleBlock(nn.Module):
    """y1 = x1 + f(x2); y2 = x2 + g(y1), on the halves of x along dimension 2: one block of a `ReversibleSequence`."""

    def __init__(self, f: nn.Module, g: nn.Module, depth: int | None = None, send_signal: bool = False) -> None:
        super().__init__()
        self.f = _Branch(f, depth, send_signal)
        self.g = _Branch(g, depth, send_signal)
        self.depth = depth
        self.send_signal = send_signal

    def forward(
        self, x: torch.Tensor, f_args: dict[str, Any] | None = None, g_args: dict[str, Any] | None = None
    ) -> Any:
        """Map x to y, with keywords for f and for g."""
        store = self.send_signal and not self.training
        return _through([(0, self)], x, (f_args or {}, g_args or {}), store)


class ReversibleSequence(nn.Module):
    """y1 = x1 + f(x2); y2 = x2 + g(y1), block after block, on the halves of x [batch, length, 2 d] along dimension 2.

    Parameters have the original's names and order. Its state_dict contains each of them twice, under ``blocks`` and
    under ``irrev_blocks``; the second copy is skipped on loading, and is not in the state_dict made here.

    Unlike in the original: a second forward before the backward does not lose the first one's dropout masks; parameters
    get their gradients from ``torch.autograd.grad`` too, and if x does not require grad; an argument computed by
    another network may go to every g; there is a backward in eval mode; layer dropout on a sequence not longer than
    ``reverse_thres`` does not cut the gradient off; running statistics are updated once.

    Args:
        blocks: pairs (f, g) of modules that preserve the shape of their input.
        layer_dropout: in training, the probability that a block is skipped in a call, drawn from torch's generator for
            each block; the first block runs if none would be left.
        reverse_thres: sequences not longer than this (x.shape[1]) store activations, as plain torch does.
        send_signal: give f and g the keywords ``_reverse`` (True in the backward's second run) and ``_depth`` (the
            block's index), except if activations are stored: on short sequences, and in eval mode, in which branches
            that use the signal keep nothing for a second run (the original has no backward there). What such a branch
            keeps for its second run is its own responsibility: it is that of its last forward.

    Raises:
        TypeError: a block is not a pair of modules.
        ValueError: layer_dropout is not in [0, 1]; in the call, x is not 3-dimensional, or its last size is odd.
    """

    def __init__(
        self,
        blocks: Iterable[Any],
        layer_dropout: float = 0.0,
        reverse_thres: int = 0,
        send_signal: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= layer_dropout <= 1:
            raise ValueError(f"layer_dropout is {layer_dropout}; it must be between 0 and 1")
        pairs = [_pair(block, index) for index, block in enumerate(blocks)]
        self.blocks = nn.ModuleList(ReversibleBlock(f, g, i, send_signal) for i, (f, g) in enumerate(pairs))
        self.layer_dropout = layer_dropout
        self.reverse_thres = reverse_thres
        self.send_signal = send_signal
        self.register_load_state_dict_pre_hook(_pass_over_second_copy)

    def forward(self, x: torch.Tensor, arg_route: Sequence[bool] = (True, False), **kwargs: Any) -> Any:
        """Map x to y. The keywords go to every f if ``arg_route[0]``, and to every g if ``arg_route[1]``."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x is a {type(x).__name__}; it must be a tensor")
        if x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must have 3 dimensions (batch, length, 2 d)")
        if len(arg_route) != 2:
            raise ValueError(f"arg_route has {len(arg_route)} values; it needs two, one for f and one for g")
        calls = tuple({**kwargs} if route else {} for route in arg_route)
        blocks: list[Any] = [(number, self.blocks[number]) for number in self._kept_blocks()]
        if x.shape[1] <= self.reverse_thres or (self.send_signal and not self.training):
            return _through(blocks, x, calls, store=True)
        for alone, part in together([block for _, block in blocks]):
            if alone:
                x = part[0][1](x, f_args=calls[0], g_args=calls[1])
            else:
                x = _through([blocks[index] for index, _ in part], x, calls)
        return x

    def _kept_blocks(self) -> list[int]:
        """The indices of the blocks that layer dropout keeps, drawn as in the original."""
        everything = list(range(len(self.blocks)))
        if not self.training or self.layer_dropout == 0:
            return everything
        kept = (torch.rand(len(everything)) >= self.layer_dropout).tolist()
        return [number for number in everything if kept[number]] or everything[:1]


def _through(blocks: Sequence[tuple[int, Any]], x: Any, calls: Sequence[dict[str, Any]], store: bool = False) -> Any:
    """Run the blocks as one chain; without a signal if activations are stored."""
    half_steps, names = [], []
    for number, block in blocks:
        for target, (name, branch) in enumerate(block.named_children()):
            half_steps.append(HalfStep(branch.net if store else branch, target, (1 - target,), (), calls[target]))
            names.append(f"blocks[{number}].{name} ({type(branch.net).__name__})")
    activations = "store" if store else "reconstruct"
    return run(half_steps, x, name=names.__getitem__, split_dim=2, activations=activations)


def _pair(block: Any, index: int) -> tuple[nn.Module, nn.Module]:
    members = list(block) if isinstance(block, Iterable) else [block]
    if len(members) != 2 or not all(isinstance(member, nn.Module) for member in members):
        got = ", ".join(type(member).__name__ for member in members)
        raise TypeError(f"blocks[{index}] is a {type(block).__name__} ({got}); it must be a pair (f, g) of nn.Modules")
    return members[0], members[1]


def _pass_over_second_copy(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}irrev_blocks.")]:
        del state_dict[key]
