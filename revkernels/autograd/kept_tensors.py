# SPDX-License-Identifier: Apache-2.0
"""What is kept from a forward: a chain's outputs, saved on an autograd node, and kept saved tensors."""

from __future__ import annotations

from typing import Any

import torch

from revkernels.autograd.planning.offload import OffloadedTensor
from revkernels.autograd.planning.rematerialize import SavedView
from revkernels.autograd.state.versions import version_of


class Kept(torch.autograd.Function):
    """A node that holds the chain's outputs as saved tensors, so that autograd checks their versions and frees them."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*outputs)
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise RuntimeError("this node only holds tensors")  # nothing ever depends on its output


class KeptTensor:
    """What autograd holds for a saved tensor that is kept: the tensor, or what yields it.

    Attributes:
        tensor: detached, since a node that held its own output would never be freed.
        step: the half-step that saved it, in a chain.
    """

    __slots__ = ("__weakref__", "_version", "step", "tensor")

    def __init__(self, tensor: torch.Tensor | OffloadedTensor | SavedView, version: int = 0, step: int = -1) -> None:
        self.tensor, self._version, self.step = tensor, version, step

    def changed(self) -> bool:
        """Whether it, or what it is recomputed from, was written to since. (Undetected for tensors in host memory.)"""
        if isinstance(self.tensor, SavedView):
            return self.tensor.output.changed()
        return isinstance(self.tensor, torch.Tensor) and version_of(self.tensor) != self._version
