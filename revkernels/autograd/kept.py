# SPDX-License-Identifier: Apache-2.0
"""What a chain keeps of its forward: its outputs, in the custody of torch's engine."""

from __future__ import annotations

from typing import Any

import torch


class Kept(torch.autograd.Function):
    """A node that holds the chain's outputs as saved tensors, so that autograd checks their versions and frees them."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*outputs)
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise RuntimeError("this node only holds tensors")  # nothing ever depends on its output
