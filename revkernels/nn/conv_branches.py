# SPDX-License-Identifier: Apache-2.0
"""The residual functions of RevNet and ResNet, and their shortcuts (Gomez et al. 2017, section 5 and figure 1).

Pre-activation after He et al. 2016, batch normalisation with eps 1e-3 and a running average decay of 0.99 as in the
authors' published configuration. Convolutions pad k // 2 on every side.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from revkernels.autograd.state.plain_layers import plain
from revkernels.nn.fusion import FusedSequential

__all__ = ["BLOCKS", "BasicBranch", "BottleneckBranch", "PadShortcut", "conv", "norm_relu"]


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias whose output has ceil(size / stride) rows and columns."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)


def norm_relu(channels: int) -> Iterator[nn.Module]:
    """Batch normalisation followed by ReLU, each a separate layer."""
    # PyTorch's momentum is the weight of the new batch: 0.01 is a running average decay of 0.99.
    yield nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
    # In place on the norm's output, which neither the norm nor the ReLU saves for its backward.
    yield nn.ReLU(inplace=True)


@plain
class BasicBranch(FusedSequential):
    """Basic residual function: BN-ReLU-conv3x3(stride) - BN-ReLU-conv3x3 (Gomez et al. 2017, figure 1).

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)). The convolutions have no bias.

    Args:
        in_channels, out_channels: of the input and of both convolutions' outputs; in a reversible block they are equal.
        stride: of the first convolution; in a reversible block 1.
        preactivate: False omits the first BN-ReLU, for the first branch of a network, whose input is already activated.
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


@plain
class BottleneckBranch(FusedSequential):
    """Bottleneck residual function: BN-ReLU-conv1x1(stride) - BN-ReLU-conv3x3 - BN-ReLU-conv1x1 (the same figure).

    The inner width is a quarter of ``out_channels``, rounded down. Shapes and arguments as in `BasicBranch`; the stride
    is the first convolution's.
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
        return conv(in_channels, out_channels, 1, stride)  # linear: no norm after it


@plain
class PadShortcut(nn.Module):
    """Shortcut without parameters: average pool stride x stride, then zero channels, equally many on both sides.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)); an odd extra channel goes last.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (before, out_channels - in_channels - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            # ceil_mode gives the convolution's size on odd maps; a truncated window averages its elements.
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
