# SPDX-License-Identifier: Apache-2.0
"""The sizes of a network, checked before it is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from revkernels.integers import as_int
from revkernels.models.layers import BLOCKS

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """The kind of blocks of a RevNet or a ResNet, their number per stage, and their widths.

    Attributes:
        block: "basic" or "bottleneck".
        units: residual units of each stage.
        widths: channels of each stage, of both halves together in a RevNet. Multiples of 4 for bottleneck blocks; in a
            RevNet of 2, or of 8 for bottleneck. They never shrink in a basic network, whose shortcuts only add
            channels.
        stem_width: channels after the stem, even in a RevNet.
        stem: "cifar" (3x3) or "imagenet" (7x7 stride 2 and max-pool).
        strides: of each stage's first unit; empty is 1, 2, 2, ...

    Raises:
        ValueError, TypeError: an invalid size or name.
    """

    block: str
    units: Sequence[int]
    widths: Sequence[int]
    stem_width: int
    stem: str = "cifar"
    strides: Sequence[int] = ()

    def __post_init__(self) -> None:
        _check_name("block", self.block, BLOCKS)
        _check_name("stem", self.stem, ("cifar", "imagenet"))
        check_positive("stem_width", self.stem_width)
        if not self.units:
            raise ValueError("units is empty; it must have one entry per stage")
        if not self.strides:
            object.__setattr__(self, "strides", (1,) + (2,) * (len(self.units) - 1))
        for name, values in {"units": self.units, "widths": self.widths, "strides": self.strides}.items():
            for value in values:
                check_positive(f"an entry of {name}", value)
            if len(values) != len(self.units):
                raise ValueError(f"{name} has length {len(values)}, units has {len(self.units)}: they must be equal")
        widths = (self.stem_width, *self.widths)
        if self.block == "basic" and any(a > b for a, b in pairwise(widths)):
            raise ValueError(
                f"widths are {widths} with the stem's; they must never shrink, for a basic block's shortcut pads "
                f"channels and cannot drop any"
            )

    def check_streams(self, streams: int) -> None:
        """Check that the widths split into this number of streams of whole blocks."""
        if self.stem_width % streams:
            raise ValueError(f"stem_width is {self.stem_width}; it must be a multiple of {streams}, the streams")
        multiple = streams * (1 if self.block == "basic" else 4)
        for width in self.widths:
            if width % multiple:
                raise ValueError(
                    f"an entry of widths is {width}; it must be a multiple of {multiple} ({self.block} blocks)"
                )

    def stages(self) -> Iterator[tuple[int, int, int]]:
        """For every stage (units, width, stride of the first unit)."""
        return zip(self.units, self.widths, self.strides, strict=True)


def check_positive(name: str, value: int) -> int:
    """Return ``value``, an integer of at least 1, as an int."""
    value = as_int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be an int")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return value


def _check_name(name: str, value: str, known: Sequence[str] | dict[str, type]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, known))}")
