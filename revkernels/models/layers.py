# SPDX-License-Identifier: Apache-2.0
"""Parts shared by RevNet and ResNet: residual functions, shortcuts, stem, head, initialisation, parameter groups.

Sizes and settings follow the networks of Gomez et al. 2017 (section 5 and the authors' published configuration):
pre-activation residual functions after He et al. 2016, batch normalisation with eps 1e-3 and a running average decay of
0.99, truncated normal convolution weights. Convolutions pad k // 2 on every side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BLOCKS", "BasicBranch", "BottleneckBranch", "PadShortcut", "param_groups"]


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias whose output has ceil(size / stride) rows and columns."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)


def norm_relu(channels: int) -> Iterator[nn.Module]:
    """Batch normalisation and the ReLU behind it, each a layer of its own."""
    # PyTorch's momentum is the weight of the new batch: 0.01 is a running average decay of 0.99.
    yield nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
    # In place on the norm's output, which neither the norm nor the ReLU keeps for its backward.
    yield nn.ReLU(inplace=True)


class BasicBranch(nn.Sequential):
    """Basic residual function: BN-ReLU-conv3x3(stride) - BN-ReLU-conv3x3 (paper, figure 1).

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)). ``preactivate=False`` leaves out
    the first BN-ReLU: for the first branch of a network, whose input is already activated.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, preactivate: bool = True) -> None:
        super().__init__(
            *(norm_relu(in_channels) if preactivate else ()),
            conv(in_channels, out_channels, 3, stride),
            *norm_relu(out_channels),
            conv(out_channels, out_channels, 3),
        )

    @staticmethod
    def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        return PadShortcut(in_channels, out_channels, stride)


class BottleneckBranch(nn.Sequential):
    """Bottleneck residual function: BN-ReLU-conv1x1(stride) - BN-ReLU-conv3x3 - BN-ReLU-conv1x1 (figure 1).

    A quarter as wide inside as at its end. Shapes and ``preactivate`` as in BasicBranch.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, preactivate: bool = True) -> None:
        inner = out_channels // 4
        super().__init__(
            *(norm_relu(in_channels) if preactivate else ()),
            conv(in_channels, inner, 1, stride),
            *norm_relu(inner),
            conv(inner, inner, 3),
            *norm_relu(inner),
            conv(inner, out_channels, 1),
        )

    @staticmethod
    def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        if in_channels == out_channels and stride == 1:
            return nn.Identity()
        return conv(in_channels, out_channels, 1, stride)  # linear: no norm behind it


class PadShortcut(nn.Module):
    """Shortcut without parameters: average pool stride x stride, then zero channels, equally many on both sides.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)); an odd extra channel goes behind.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (before, out_channels - in_channels - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            # ceil_mode meets the convolution's size on odd maps; a cut-off window averages what it holds.
            x = functional.avg_pool2d(x, self.stride, ceil_mode=True)
        if any(self.padding):
            x = functional.pad(x, (0, 0, 0, 0, *self.padding))
        return x

    def extra_repr(self) -> str:
        return f"padding={self.padding}, stride={self.stride}"


BLOCKS: dict[str, type[BasicBranch | BottleneckBranch]] = {
    "basic": BasicBranch,
    "bottleneck": BottleneckBranch,
}


class ModelOptions(TypedDict, total=False):
    """Keywords that every network of this package takes."""

    in_channels: int
    activations: Any
    coupling: Any
    backend: str | None


def build_stem(kind: str, in_channels: int, width: int) -> nn.Sequential:
    """What stands before the first stage, output already activated.

    "cifar": conv3x3, BN, ReLU. "imagenet": conv7x7 stride 2, BN, ReLU, max-pool 3x3 stride 2.
    """
    if kind == "cifar":
        return nn.Sequential(conv(in_channels, width, 3), *norm_relu(width))
    return nn.Sequential(
        conv(in_channels, width, 7, stride=2),
        *norm_relu(width),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def build_head(width: int, num_classes: int) -> nn.Sequential:
    """BN, ReLU, global average, linear: (N, width, H, W) -> (N, num_classes)."""
    return nn.Sequential(*norm_relu(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def initialise(model: nn.Module) -> None:
    """Start values of the authors' code, drawn from PyTorch's default generator.

    Convolutions k x k: normal, std sqrt(2 / (k * k * out)), redrawn beyond two std. Linear: uniform within
    sqrt(3 / in) (unit variance kept), bias 0. Batch normalisation: scale 1, shift 0.
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
        model: any module; each of its parameters lands in exactly one group.
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
    """Name the argument before a convolution deep inside complains about its own."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}; it must be a torch.Tensor")
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, {in_channels}, H, W)")
