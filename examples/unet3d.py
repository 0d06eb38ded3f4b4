# SPDX-License-Identifier: Apache-2.0
"""Train a partially reversible 3-D U-Net to segment volumes: stored, reconstructed, and under a memory budget.

    pip install '.[torch]'                      # in a checkout
    python examples/unet3d.py
    python examples/unet3d.py --side 64 --blocks 4 --device cuda

The network is that of Bruegger, Baumgartner and Konukoglu 2019, "A Partially Reversible U-Net for Memory-Efficient
Volumetric Image Segmentation": chains of reversible blocks at every resolution, ordinary layers between them, skip
connections that are added. A chain keeps its output alone, which the skip connection needs anyway. With
``transitions="recompute"`` what lies between the chains is run again as well. The volumes are made here: bright
ellipsoids in noise, some of them hollow, which are another class.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import revkernels as rk
from revkernels.measure import peak_bytes
from revkernels.nn import ReversibleBlock, ReversibleSequential, checkpoint

CLASSES = 3  # background, ellipsoids, hollow ones


def volumes(count: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images [count, 1, side, side, side] and labels [count, side, side, side]."""
    draw = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, side)] * 3, indexing="ij"))  # [3, side, side, side]
    images, labels = torch.zeros(count, side, side, side), torch.zeros(count, side, side, side, dtype=torch.long)
    for image, label in zip(images, labels, strict=True):
        for number in range(6):
            centre, radii = torch.rand(2, 3, 1, 1, 1, generator=draw)
            distance = ((grid - (1.6 * centre - 0.8)) / (0.2 + 0.3 * radii)).square().sum(0)
            hollow = number % 2
            label[distance < 1] = 1 + hollow
            image[distance < 1] = 1.0
            if hollow:
                image[distance < 0.4] = 0.0
    return (images + 0.5 * torch.randn(images.shape, generator=draw)).unsqueeze(1), labels


def branch(channels: int) -> nn.Module:
    """A residual function of one stream: group norm, ReLU, convolution."""
    return nn.Sequential(nn.GroupNorm(4, channels), nn.ReLU(), nn.Conv3d(channels, channels, 3, padding=1, bias=False))


class UNet3d(nn.Module):
    """(N, 1, D, H, W) -> logits (N, CLASSES, D, H, W); the sides have to be divisible by 2 ** (resolutions - 1).

    Args:
        channels: of both streams together, a number for each resolution.
        blocks: reversible blocks of a chain; there is one on the way down and one on the way up.
        activations: of all chains; one `rk.MemoryBudget` is one bound over all of them.
        transitions: "store", or "recompute" what lies between the chains.
    """

    def __init__(
        self, channels: tuple[int, ...], blocks: int, activations: Any = "reconstruct", transitions: str = "store"
    ) -> None:
        super().__init__()

        def chain(width: int) -> nn.Module:
            pairs = [ReversibleBlock(branch(width // 2), branch(width // 2)) for _ in range(blocks)]
            return ReversibleSequential(pairs, activations=activations)

        self.transitions = transitions
        self.stem = nn.Conv3d(1, channels[0], 3, padding=1)
        steps = list(itertools.pairwise(channels))
        self.encoders = nn.ModuleList(chain(width) for width in channels)
        self.decoders = nn.ModuleList(chain(width) for width in channels[:-1])
        self.downs = nn.ModuleList(nn.Sequential(nn.MaxPool3d(2), nn.Conv3d(fine, coarse, 1)) for fine, coarse in steps)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv3d(coarse, fine, 1), nn.Upsample(scale_factor=2, mode="trilinear"))
            for fine, coarse in steps
        )
        self.head = nn.Conv3d(channels[0], CLASSES, 1)

    def between(self, layers: nn.Module, x: Tensor) -> Tensor:
        """``layers(x)`` of what is no chain."""
        return checkpoint(layers, x) if self.transitions == "recompute" else layers(x)

    def forward(self, x: Tensor) -> Tensor:
        x, skipped = self.between(self.stem, x), []
        for encoder, down in zip(self.encoders, self.downs, strict=False):  # the last encoder is the bottom
            x = encoder(x)
            skipped.append(x)
            x = self.between(down, x)
        x = self.encoders[-1](x)
        for decoder, up, skip in reversed(list(zip(self.decoders, self.ups, skipped, strict=True))):
            x = decoder(self.between(up, x) + skip)
        return self.between(self.head, x)


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """The Dice coefficient of each class but the background, over all voxels; soft, so that it can be trained on."""
    found = logits.softmax(1)[:, 1:].transpose(0, 1).flatten(1)
    true = functional.one_hot(labels, CLASSES)[..., 1:].movedim(-1, 0).flatten(1)
    return (2 * (found * true).sum(1) + 1) / (found.sum(1) + true.sum(1) + 1)


def train(model: UNet3d, data: tuple[Tensor, Tensor], batch: int, epochs: int) -> tuple[list[float], int, float]:
    """Return the losses of the epochs, the peak bytes of a step and its seconds, of those after the third."""
    images, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)
    losses, seconds, peak = [], [], 0

    def step(x: Tensor, label: Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        logits = model(x)
        loss = functional.cross_entropy(logits, label) + 1 - dice(logits, label).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=draw).split(batch):
            x, label = images[chosen], labels[chosen]
            if len(losses) == 2:  # gradients and the optimizer's state are there, and a budget has its plan
                peak = peak_bytes(lambda x=x, label=label: step(x, label), x.device)
                continue
            start = time.perf_counter()
            step(x, label)
            if len(losses) > 3:
                seconds.append(time.perf_counter() - start)
    steps = -(-len(images) // batch)
    means = [sum(losses[k : k + steps]) / steps for k in range(0, len(losses), steps)]
    return means, peak, sorted(seconds)[len(seconds) // 2]


def main(arguments: list[str] | None = None) -> dict[str, tuple[list[float], float, int, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="voxels along a side, divisible by 4")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64], help="at each resolution")
    parser.add_argument("--blocks", type=int, default=2, help="reversible blocks of a chain")
    parser.add_argument("--volumes", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--budget", default="25%", help="for the memory budget (default: a quarter of the way)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.side % 2 ** (len(options.channels) - 1):
        parser.error(f"--side {options.side} cannot be halved {len(options.channels) - 1} times")
    if options.epochs * -(-options.volumes // options.batch) < 5:
        parser.error("fewer than 5 steps: the first ones warm up, and none would be timed")

    torch.manual_seed(0)
    device = torch.device(options.device)
    data = tuple(t.to(device) for t in volumes(options.volumes, options.side, seed=0))
    unseen, truth = (t.to(device) for t in volumes(4, options.side, seed=1))
    first = UNet3d(tuple(options.channels), options.blocks, "store").to(device)
    ways: dict[str, dict[str, Any]] = {
        "stored": {"activations": "store"},
        "reconstructed": {"activations": "reconstruct"},
        "and what lies between": {"activations": "reconstruct", "transitions": "recompute"},
        f"budget of {options.budget}": {"activations": rk.MemoryBudget(options.budget)},
    }
    print(f"{'':22}{'first loss':>11}{'last loss':>11}{'Dice':>8}{'peak MiB':>10}{'s a step':>10}")
    found = {}
    for name, way in ways.items():
        model = UNet3d(tuple(options.channels), options.blocks, **way).to(device)
        model.load_state_dict(copy.deepcopy(first.state_dict()))
        losses, peak, seconds = train(model, data, options.batch, options.epochs)  # type: ignore[arg-type]
        model.eval()
        with torch.no_grad():
            score = dice(torch.cat([model(x) for x in unseen.split(options.batch)]), truth).mean().item()
        found[name] = losses, score, peak, seconds
        print(f"{name:22}{losses[0]:11.4f}{losses[-1]:11.4f}{score:8.3f}{peak / 2**20:10.1f}{seconds:10.3f}")
    return found


if __name__ == "__main__":
    main()
