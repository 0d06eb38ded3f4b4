# SPDX-License-Identifier: Apache-2.0
"""A small training loop: SGD with momentum on randomly shifted images, with a cosine learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from revkernels.cli.digits import Digits
from revkernels.models import param_groups

__all__ = ["BATCH", "Epoch", "accuracy", "train"]

BATCH = 100
PEAK_RATE = 0.1
WARM_UP = 0.15  # share of the steps in which the rate rises: the first ones have untrained norms
MOMENTUM = 0.9
WEIGHT_DECAY = 2e-4


@dataclass(frozen=True)
class Epoch:
    """The result of one pass over the training images: their mean loss, and the share of test images that is right."""

    loss: float
    test_accuracy: float


def train(
    model: nn.Module, data: Digits, epochs: int, seed: int, on_epoch: Callable[[Epoch], None] | None = None
) -> list[Epoch]:
    """Train ``model`` in place.

    All randomness (order, shifts) comes from ``seed`` alone, so models with equal initial weights see equal batches.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(param_groups(model, WEIGHT_DECAY), lr=PEAK_RATE, momentum=MOMENTUM)
    batches = len(data.train_images) // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step / (epochs * batches)))
    history = []
    for _ in range(epochs):
        model.train()
        total = 0.0
        order = torch.randperm(len(data.train_images), generator=generator)
        for chosen in order[: batches * BATCH].split(BATCH):
            images = shifted(data.train_images[chosen], generator)
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(images), data.train_classes[chosen])
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        history.append(Epoch(total / batches, accuracy(model, data.test_images, data.test_classes)))
        if on_epoch is not None:
            on_epoch(history[-1])
    return history


def rate(progress: float) -> float:
    """Learning rate as a share of its peak, at a progress of 0..1: linear up, half a cosine down."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image shifted by -1, 0 or 1 pixel in each direction, zeros beyond the edge (the paper's random crop)."""
    count, _, rows, columns = images.shape
    padded = functional.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, count, 1, 1), generator=generator)
    row = down + torch.arange(rows).view(1, rows, 1)
    column = right + torch.arange(columns).view(1, 1, columns)
    picture = torch.arange(count).view(count, 1, 1)
    # Advanced indices around the channel slice put it last; the result is transposed to channels first.
    return padded[picture, :, row, column].permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The share of images that ``model`` classifies correctly, in eval mode."""
    model.eval()
    right = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(BATCH), classes.split(BATCH), strict=True)
    )
    return right / len(classes)
