# SPDX-License-Identifier: Apache-2.0
"""The networks that ``bench network`` and ``bench peers`` train, and a training step of each on one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from revkernels import models
from revkernels.bench.chains import Shape
from revkernels.models import BasicBranch, Plan, RevNet
from revkernels.nn import ReversibleBlock, ReversibleSequential

__all__ = ["NETWORKS", "Data", "Network", "Stage", "Workload", "find"]

Backward = Callable[[Any], None]
#: An input, its leaves that get gradients, and a function that runs the backward from the output.
Data = tuple[Any, list[Tensor], Backward]


class Workload(Protocol):
    """Something to train, whose reversible chains can run in several ways."""

    @property
    def title(self) -> str:
        """For people."""

    def make(self, activations: Any, backend: str | None, coupling: Any = "float", **more: Any) -> nn.Module:
        """Return it with weights drawn from torch's default generator; its chains are `ReversibleSequential`s.

        ``activations`` and ``coupling`` are theirs; they share the given objects, such as a `MemoryBudget`. ``more``:
        options of the network.
        """

    def data(self, batch: int, dtype: torch.dtype = torch.float32) -> Data:
        """Return random data; the random numbers do not depend on the dtype."""


@dataclass(frozen=True)
class Network:
    """A classifier of images.

    Attributes:
        title: for people.
        batch: the default.
        side: rows and columns of an image.
        build: the network, given ``activations``, ``coupling`` and ``backend``.
        classes: number of classes.
        device: "cpu" or "cuda[:n]".
        stages: whether there are transitions between its chains, which can be recomputed.
    """

    title: str
    batch: int
    side: int
    build: Callable[..., nn.Module]
    classes: int = 10
    device: str = "cpu"
    stages: bool = True

    def make(self, activations: Any, backend: str | None, coupling: Any = "float", **more: Any) -> nn.Module:
        """Return the network in channels-last order."""
        made = self.build(self.classes, activations=activations, coupling=coupling, backend=backend, **more)
        return made.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def data(self, batch: int, dtype: torch.dtype = torch.float32) -> Data:
        """Return random images, no leaves, and the backward of the cross entropy with random labels."""
        images = torch.randn(batch, 3, self.side, self.side, device=self.device)
        labels = torch.randint(self.classes, (batch,), device=self.device)

        def backward(logits: Tensor) -> None:
            functional.cross_entropy(logits.to(dtype), labels).backward()

        return images.to(dtype, memory_format=torch.channels_last), [], backward


class _Chain(nn.Module):
    """The chain as a network's child, where chains are looked for."""

    def __init__(self, chain: ReversibleSequential) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, pair: tuple[Tensor, Tensor]) -> Any:
        return self.chain(pair)


@dataclass(frozen=True)
class Stage:
    """One stage of a RevNet alone: reversible blocks, which every library can run.

    The streams are leaves, whose gradients are compared too. ``shape.batch`` is only a default.
    """

    shape: Shape

    @property
    def title(self) -> str:
        """Blocks and size."""
        s = self.shape
        return f"{s.depth // 2} reversible blocks, {s.width}x{s.side}x{s.side} a stream"

    @property
    def name(self) -> str:
        """For result lines."""
        s = self.shape
        return f"stage {s.depth} branches {s.width}x{s.side}x{s.side}"

    def make(self, activations: Any, backend: str | None, coupling: Any = "float", **more: Any) -> nn.Module:
        """Return the chain in channels-last order."""
        width = self.shape.width
        blocks = (
            ReversibleBlock(BasicBranch(width, width), BasicBranch(width, width)) for _ in range(self.shape.depth // 2)
        )
        chain = _Chain(ReversibleSequential(*blocks, activations=activations, coupling=coupling, backend=backend))
        return chain.to(self.shape.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def data(self, batch: int, dtype: torch.dtype = torch.float32) -> Data:
        """Return a pair of streams, the same as leaves, and a backward from random gradients."""
        s = self.shape
        made = (torch.randn(batch, s.width, s.side, s.side, device=s.device) for _ in range(4))
        x1, x2, *gradients = (t.to(dtype, memory_format=torch.channels_last) for t in made)
        streams = [x1.requires_grad_(), x2.requires_grad_()]

        def backward(pair: tuple[Tensor, Tensor]) -> None:
            torch.autograd.backward(pair, gradients)

        return tuple(streams), streams, backward


def _bottleneck(num_classes: int, **options: Any) -> RevNet:
    plan = Plan("bottleneck", (3, 3, 3, 3), (256, 512, 1024, 2048), stem_width=64, stem="imagenet")
    return RevNet(plan, num_classes, **options)


def _model(name: str) -> Callable[..., nn.Module]:
    def build(num_classes: int, **options: Any) -> nn.Module:
        made: nn.Module = getattr(models, name)(num_classes, **options)
        return made

    return build


#: The choices of --network. A Rev-ViT is available if this package's models have it.
NETWORKS = {
    "revnet38": Network("RevNet-38", 100, 32, _model("revnet38")),
    "revnet110": Network("RevNet-110", 100, 32, _model("revnet110")),
    "bottleneck": Network("bottleneck RevNet, maps of 56, 28, 14, 7", 4, 224, _bottleneck, 1000),
    "revnet104": Network("RevNet-104", 4, 224, _model("revnet104"), 1000),
    "revvit_small": Network("Rev-ViT-S", 8, 224, _model("revvit_small"), 1000, stages=False),
    "revvit_base": Network("Rev-ViT-B", 4, 224, _model("revvit_base"), 1000, stages=False),
}


def find(name: str, device: str = "cpu") -> Network:
    """Return a network by its name, on a device.

    Raises:
        ValueError: the name is unknown, or this package's models lack it.
    """
    if name not in NETWORKS:
        raise ValueError(f"network is {name!r}; it must be one of {', '.join(NETWORKS)}")
    if name.startswith("rev") and not hasattr(models, name):
        there = ", ".join(other for other in NETWORKS if hasattr(models, other) or not other.startswith("rev"))
        raise ValueError(f"network is {name!r}, which revkernels.models does not have; there are {there}")
    return replace(NETWORKS[name], device=device)
