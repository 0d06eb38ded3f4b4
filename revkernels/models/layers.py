# SPDX-License-Identifier: Apache-2.0
"""Parts shared by RevNet and ResNet: stem, head, initialisation, parameter groups.

Sizes and settings follow the networks of Gomez et al. 2017 (section 5 and the authors' published configuration):
pre-activation residual functions after He et al. 2016, batch normalisation with eps 1e-3 and a running average decay of
0.99, truncated normal convolution weights. Convolutions pad k // 2 on every side.
"""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from revkernels.nn.conv_branches import BLOCKS, BasicBranch, BottleneckBranch, PadShortcut, conv, norm_relu
from revkernels.nn.fusion import FusedSequential
from revkernels.options import ActivationsOption, CouplingOption

__all__ = ["BLOCKS", "BasicBranch", "BottleneckBranch", "PadShortcut", "param_groups"]


class ModelOptions(TypedDict, total=False):
    """Keywords of every network of this package."""

    in_channels: int
    activations: ActivationsOption
    coupling: CouplingOption
    backend: str | None


def build_stem(kind: str, in_channels: int, width: int) -> nn.Sequential:
    """The layers before the first stage; the output is already activated.

    "cifar": conv3x3, BN, ReLU. "imagenet": conv7x7 stride 2, BN, ReLU, max-pool 3x3 stride 2.
    """
    if kind == "cifar":
        return FusedSequential(conv(in_channels, width, 3), *norm_relu(width))
    return FusedSequential(
        conv(in_channels, width, 7, stride=2),
        *norm_relu(width),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def build_head(width: int, num_classes: int) -> nn.Sequential:
    """BN, ReLU, global average, linear: (N, width, H, W) -> (N, num_classes)."""
    return FusedSequential(*norm_relu(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def initialise(model: nn.Module) -> None:
    """Initial values of the authors' code, drawn from PyTorch's default generator.

    Convolutions k x k: normal, std sqrt(2 / (k * k * out)), redrawn beyond two std. Linear: uniform within sqrt(3 / in)
    (unit variance kept), bias 0. Batch normalisation: scale 1, shift 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            rows, columns = module.kernel_size
            std = math.sqrt(2 / (rows * columns * module.out_channels))
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, nn.Linear):
            bound = math.sqrt(3 / module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups: L2 on convolution and linear weights only, none on biases and norms (the paper's rule).

    Args:
        model: any module; each of its parameters is in exactly one group.
        weight_decay: the coefficient of the first group.

    Returns:
        ``[{"params": weights, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]``.
    """
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, layers)}
    weights = [p for p in model.parameters() if id(p) in decayed]
    rest = [p for p in model.parameters() if id(p) not in decayed]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


def check_images(x: Tensor, in_channels: int) -> None:
    """Check x by its name, before a convolution inside fails on its own argument."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a torch.Tensor")
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, {in_channels}, H, W)")
