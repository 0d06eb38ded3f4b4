# SPDX-License-Identifier: Apache-2.0
"""The pre-activation ResNets that the RevNet paper compares with (Gomez et al. 2017, section 5): the same residual
functions, shortcuts and settings as RevNet at full width, with stored activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from revkernels.backends import require
from revkernels.models.layers import (
    BLOCKS,
    ModelOptions,
    build_head,
    build_stem,
    check_images,
    initialise,
)
from revkernels.models.plan import Plan, check_positive
from revkernels.nn.fusion import norms_by
from revkernels.options import ActivationsOption, CouplingOption

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ResNet", "Unit", "resnet32", "resnet101", "resnet110", "resnet164"]


class Unit(nn.Module):
    """y = F(x) + S(x): F has the stride, S is the block's shortcut (identity if the shape stays)."""

    def __init__(
        self,
        block: str,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        preactivate: bool = True,
    ) -> None:
        super().__init__()
        branch = BLOCKS[block]
        self.F = branch(in_channels, out_channels, stride, preactivate)
        self.shortcut = branch.shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.F(x) + self.shortcut(x)


class ResNet(nn.Module):
    """A pre-activation ResNet of any depth. (N, in_channels, H, W) -> logits (N, num_classes).

    The stored-activation baseline: ``backend="eager"`` is plain PyTorch throughout, others fuse norms and activations.
    Depth is sum(plan.units) * (2 for basic, 3 for bottleneck) + 2.

    Args:
        plan: blocks, depth and widths.
        num_classes, in_channels: of the data.
        activations: "store", the only choice.
        coupling: "float", the only choice.
        backend: as in RevNet.

    Raises:
        ValueError: ``activations="reconstruct"`` or a memory budget (y = x + F(x) cannot be solved for x without
            iterating), or an invalid size, kind or name.
        TypeError: a size that is not an integer.
    """

    def __init__(
        self,
        plan: Plan,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        activations: ActivationsOption = "store",
        coupling: CouplingOption = "float",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if activations != "store":
            raise ValueError(
                f"activations is {activations!r}; it must be 'store': a ResNet's unit y = x + F(x) has no inverse in "
                f"closed form, so inputs cannot be reconstructed from outputs; a RevNet of the same depth can"
            )
        if coupling != "float":
            raise ValueError(f"coupling is {coupling!r}; it must be 'float': a ResNet has no coupling to invert")
        if backend is not None:
            require(backend)
        num_classes = check_positive("num_classes", num_classes)
        in_channels = check_positive("in_channels", in_channels)
        plan.check_streams(1)
        self.in_channels = in_channels
        self.backend = backend
        self.stem = build_stem(plan.stem, in_channels, plan.stem_width)
        layers: list[Unit] = []
        before = plan.stem_width
        for count, width, first_stride in plan.stages():
            for unit in range(count):
                stride = first_stride if unit == 0 else 1
                layers.append(Unit(plan.block, before, width, stride, preactivate=bool(layers)))
                before = width
        self.units = nn.Sequential(*layers)
        self.head = build_head(before, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_channels)
        with norms_by(self.backend, x):
            return self.head(self.units(self.stem(x)))


def resnet32(num_classes: int = 10, **options: Unpack[ModelOptions]) -> ResNet:
    """ResNet-32 for CIFAR: 5-5-5 basic units of widths 16-32-64; 464,154 parameters.

    Keywords as in `ResNet`.
    """
    return ResNet(Plan("basic", (5, 5, 5), (16, 32, 64), stem_width=16), num_classes, **options)


def resnet110(num_classes: int = 10, **options: Unpack[ModelOptions]) -> ResNet:
    """ResNet-110 for CIFAR: 18-18-18 basic units of widths 16-32-64; 1,727,962 parameters.

    Keywords as in `ResNet`.
    """
    return ResNet(Plan("basic", (18, 18, 18), (16, 32, 64), stem_width=16), num_classes, **options)


def resnet164(num_classes: int = 10, **options: Unpack[ModelOptions]) -> ResNet:
    """ResNet-164 for CIFAR: 18-18-18 bottleneck units of widths 64-128-256; 1,703,258 parameters.

    Keywords as in `ResNet`.
    """
    return ResNet(Plan("bottleneck", (18, 18, 18), (64, 128, 256), stem_width=16), num_classes, **options)


def resnet101(num_classes: int = 1000, **options: Unpack[ModelOptions]) -> ResNet:
    """ResNet-101 for ImageNet: 3-4-23-3 bottleneck units, widths 256 to 2048; 44,541,480 parameters.

    Keywords as in `ResNet`.
    """
    widths = (256, 512, 1024, 2048)
    return ResNet(Plan("bottleneck", (3, 4, 23, 3), widths, stem_width=64, stem="imagenet"), num_classes, **options)
