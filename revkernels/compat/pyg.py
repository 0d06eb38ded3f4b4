# SPDX-License-Identifier: Apache-2.0
"""PyTorch Geometric's ``torch_geometric.nn.GroupAddRev`` (2.8.1), on the chain of this package.

    from revkernels.compat.pyg import GroupAddRev       # was: from torch_geometric.nn import GroupAddRev

PyTorch Geometric is not imported: any module that is called as ``conv(x, edge_index, ...)`` works.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from revkernels.autograd.half_step import grouped
from revkernels.compat._chains import Part, together
from revkernels.nn.chain import HalfStep, run, run_inverse

__all__ = ["GroupAddRev", "GroupAddRevs"]


class GroupAddRev(nn.Module):
    """Grouped reversible graph network block (Li et al. 2021, Training Graph Neural Networks with 1000 Layers).

        y_0 = x_0 + convs[0](x_1 + ... + x_{C-1}, edge_index, ...)
        y_i = x_i + convs[i](y_{i-1}, edge_index, ...)               i = 1 .. C-1

    x is split into C equal groups along ``split_dim``. Parameters have the original's names, so its state_dict loads.

    Unlike in the original: the caller's x keeps its memory (there, its storage is emptied); each conv runs once more in
    the backward (there, twice), with the forward's dropout masks, and updates its running statistics once; a backward
    under ``retain_graph=True`` may run any number of times. The inverse is differentiable, but keeps its activations.

    Args:
        conv: the graph network of one group, copied for the other groups, whose copies get new parameters if it has a
            ``reset_parameters``; or an nn.ModuleList with one per group.
        split_dim: the dimension along which x is split.
        num_groups: the number of groups, 2 or more; ignored if conv is an nn.ModuleList.
        disable: True stores activations as plain torch does.
        num_bwd_passes: accepted, not needed.

    Raises:
        TypeError: conv is not an nn.Module, or num_groups is not an int.
        ValueError: fewer than two groups; in the call, a size that cannot be split into groups.
    """

    def __init__(
        self,
        conv: nn.Module,
        split_dim: int = -1,
        num_groups: int | None = None,
        disable: bool = False,
        num_bwd_passes: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(conv, nn.Module):
            raise TypeError(f"conv is a {type(conv).__name__}; it must be an nn.Module or an nn.ModuleList")
        self.convs = conv if isinstance(conv, nn.ModuleList) else nn.ModuleList(_copies(conv, num_groups))
        if len(self.convs) < 2:
            raise ValueError(
                f"conv is an nn.ModuleList of {len(self.convs)}; there must be one for each of 2 or more groups"
            )
        self.split_dim = split_dim
        self.disable = disable
        self.num_bwd_passes = num_bwd_passes

    @property
    def num_groups(self) -> int:
        """The number of groups C."""
        return len(self.convs)

    def reset_parameters(self) -> None:
        """Reset the parameters of every group's graph network."""
        for conv in self.convs:
            conv.reset_parameters()  # type: ignore[operator]

    def forward(self, x: torch.Tensor, edge_index: Any, *args: Any) -> Any:
        """Map x, node features, to y of the same shape.

        Each further argument goes to every conv; a tensor among them with x's size along ``split_dim`` is split into
        groups like x, and each conv gets its own.
        """
        return _through(run, [(0, self)], "x", x, edge_index, args)

    def inverse(self, y: torch.Tensor, edge_index: Any, *args: Any) -> Any:
        """Return the x that `forward` maps to y with the same arguments, up to rounding."""
        return _through(run_inverse, [(0, self)], "y", y, edge_index, args)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.convs[0]}, num_groups={self.num_groups})"


class GroupAddRevs(nn.ModuleList):
    """A list of `GroupAddRev`s that can be called: one chain, whose activation memory does not grow with its length.

        self.convs = GroupAddRevs([GroupAddRev(...), ...])      # was: nn.ModuleList(...)
        x = self.convs(x, edge_index, mask)                     # was: for conv in self.convs: x = conv(x, ...)

    Called one by one, each layer keeps its output. (The original keeps none, because a layer empties its input.) A new
    chain begins where split_dim, num_groups or disable changes, and a layer with hooks, or with its own ``forward``, is
    called by itself: each keeps one more output. Parameters have the names that the nn.ModuleList gives them. Not in
    the original.
    """

    def forward(self, x: torch.Tensor, edge_index: Any, *args: Any) -> Any:
        """Map x to y; every layer gets the same arguments. See `GroupAddRev.forward`."""
        for alone, part in self._parts():
            layer = part[0][1]
            x = layer(x, edge_index, *args) if alone else _through(run, part, "x", x, edge_index, args)
        return x

    def inverse(self, y: torch.Tensor, edge_index: Any, *args: Any) -> Any:
        """Return the x that `forward` maps to y with the same arguments, up to rounding."""
        for alone, part in reversed(self._parts()):
            layer = part[0][1]
            y = layer.inverse(y, edge_index, *args) if alone else _through(run_inverse, part, "y", y, edge_index, args)
        return y

    def _parts(self) -> list[tuple[bool, Part]]:
        return together(
            list(self), GroupAddRev.forward, lambda layer: (layer.split_dim, layer.num_groups, bool(layer.disable))
        )


def _through(
    direction: Callable[..., Any],
    layers: Sequence[tuple[int, GroupAddRev]],
    name: str,
    x: Any,
    edge_index: Any,
    args: tuple[Any, ...],
) -> Any:
    """Run layers with the same options as one chain, by `run` or `run_inverse`. ``name`` is x's in errors."""
    first = layers[0][1]
    half_steps, words = [], []
    for index, layer in layers:
        of_layer, names = half_steps_of(layer, name, x, edge_index, args)
        half_steps += of_layer
        words += [f"layer {index}, {word}" for word in names]
    activations = "store" if first.disable else "reconstruct"
    return direction(
        half_steps, x, first.num_groups, words.__getitem__, split_dim=first.split_dim, activations=activations
    )


def half_steps_of(
    layer: Any, name: str, x: Any, edge_index: Any, args: tuple[Any, ...]
) -> tuple[list[HalfStep], list[str]]:
    """The half-steps of a layer, this module's or the original, and a name for each. ``name`` is x's in errors."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    parts = [_parts(layer, arg, x) for arg in args]
    half_steps = [
        HalfStep(conv, *place, (edge_index, *(part[i] for part in parts)))
        for i, (conv, place) in enumerate(zip(layer.convs, grouped(len(layer.convs)), strict=True))
    ]
    return half_steps, [f"convs[{i}] ({type(conv).__name__})" for i, conv in enumerate(layer.convs)]


def _parts(layer: Any, arg: Any, x: torch.Tensor) -> Any:
    """Each group's argument: its own part of a tensor that is split like x, or the whole."""
    dim, groups = layer.split_dim, len(layer.convs)
    has_dim = isinstance(arg, torch.Tensor) and all(-t.dim() <= dim < t.dim() for t in (arg, x))
    if not has_dim or arg.shape[dim] != x.shape[dim] or x.shape[dim] % groups:
        return [arg] * groups
    return arg.chunk(groups, dim)


def _copies(conv: nn.Module, num_groups: int | None) -> list[nn.Module]:
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(
            f"num_groups is a {type(num_groups).__name__}; it must be an int, unless conv is an nn.ModuleList"
        )
    if num_groups < 2:
        raise ValueError(f"num_groups is {num_groups}; it must be 2 or more")
    copies = [conv, *(copy.deepcopy(conv) for _ in range(num_groups - 1))]
    for other in copies[1:]:
        if hasattr(other, "reset_parameters"):
            other.reset_parameters()  # type: ignore[operator]
    return copies
