# SPDX-License-Identifier: Apache-2.0
"""Makes vision transformers and ResNets of ``timm`` reversible: **new architectures** from their blocks.

    from revkernels.integrations import timm
    timm.make_reversible(model)

A ViT or ResNet has one stream, x + F(x), which is not invertible. With two it is: Mangalam et al. 2022, "Reversible
Vision Transformers", section 3; for residual networks Gomez et al. 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from revkernels.integrations._swap import (
    Replaced,
    Swapped,
    check,
    needs,
    nothing_found,
    own,
    package_and_version,
    swap,
)
from revkernels.nn import linked
from revkernels.nn.chain import HalfStep
from revkernels.nn.streams import widened
from revkernels.options import Activations

__all__ = ["make_reversible"]

_NOTE = (
    "a new architecture: the same weights are another function now. Pre-trained ones are a place to start training "
    "from, no more"
)


def make_reversible(model: Any, *, activations: Activations = "reconstruct", backend: str | None = None) -> Replaced:
    """Turn the model's blocks into chains of two streams: **a new architecture**, another function of the weights.

    A run of blocks, x -> y in the ordinary model, becomes

        x1 = x2 = x                                         the input is both streams (as in Mangalam et al.)
        x1 <- x1 + F_1(x2);  x2 <- x2 + F_2(x1);  x1 <- x1 + F_3(x2) ...
        y = (x1 + x2) / 2                                   their mean

    - ViT (``timm.models.vision_transformer.Block``): F_1, F_2 are the attention and the MLP of a block, with its norm,
      layer scale and drop path inside. Mangalam et al. concatenate the streams at the end instead of their mean, which
      needs a norm and a head of twice the width, unlike the model's: `revkernels.models.revvit_base` has them.
    - ResNet (``BasicBlock``, ``Bottleneck`` of stride 1 without downsampling): F_k is a block without its sum and last
      activation. That activation runs before F_k instead, out of place, and once more after the mean, because in the
      streams it would not be invertible. Streams have all channels; halved ones, as in Gomez et al., would not fit the
      weights.

    All parameters and buffers are kept, under their names, and none is new: a state_dict can be exchanged with the
    ordinary model. Blocks that change the shape stay ordinary, and are the boundaries between runs, where a tensor is
    stored; so does a run of a single block. Between the blocks of a run both streams are one tensor, adjacent in the
    last dimension (ViT) or the channels (ResNet): hooks, and ``forward_intermediates``, see that tensor; with
    ``norm=True``, which applies a norm of the ordinary width, request only the run's last block. Under autocast the
    streams are float32, unlike the branches: half-precision streams would be reconstructed badly. Remove blocks
    (``prune_intermediate_layers``) before, not after.

    Args:
        model: a timm model, or any nn.Module with nn.Sequentials of such blocks.
        activations: "reconstruct", or "store": plain activations, for comparison.
        backend: of the couplings; None takes the best on the tensors' device.

    Raises:
        MissingPackageError: timm is not installed.
        ValueError: there is no run of two blocks or more.
    """
    vit = needs("timm.models.vision_transformer", "timm")
    resnet = needs("timm.models.resnet", "timm")
    kinds: dict[type, type[Block]] = {
        vit.Block: TransformerBlock,
        resnet.BasicBlock: ResidualBlock,
        resnet.Bottleneck: ResidualBlock,
    }
    alike = (vit.ResPostBlock, vit.ParallelScalingBlock, vit.DiffParallelScalingBlock, vit.ParallelThingsBlock)
    options = {"activations": activations, "backend": backend}
    check(model, **options)
    seen: set[int] = set()

    def look(name: str, block: nn.Module) -> _Found:
        again = id(block) in seen
        seen.add(id(block))
        kind = next((kind for kind in kinds if isinstance(block, kind)), None)
        if isinstance(block, Swapped):
            return _Found(name, block, None, "changed before")
        if kind is None:
            return _Found(name, block, None, "a block of another kind" if isinstance(block, alike) else "")
        why = own(block, kind, "forward") or kinds[kind].why_not(block) or ("is there twice" if again else "")
        return _Found(name, block, None if why else kinds[kind], why)

    runs: list[list[_Found]] = []
    left: dict[str, str] = {}
    for name, container in model.named_modules():
        if isinstance(container, nn.Sequential):
            prefix = f"{name}." if name else ""
            for run in _runs(
                [look(prefix + key, block) for key, block in container._modules.items() if block is not None]
            ):
                if run[0].way is not None and len(run) > 1:
                    runs.append(run)
                else:
                    lone = "between others of another kind: alone it would save nothing"
                    left.update({found.name: found.why or lone for found in run if found.way or found.why})
    if not runs:
        raise nothing_found(model, "an nn.Sequential with two or more ViT or stride 1 ResNet blocks in a row", left)
    for run in runs:
        steps = 0
        for found in run:
            place = {"first": found is run[0], "last": found is run[-1], "target": steps % 2}
            swap(found.block, found.way, **options, place=place)
            steps += found.way.steps
    modules = {found.name: found.way.what for run in runs for found in run}
    return Replaced(package_and_version("timm"), modules, left, (_NOTE,), model)


class _Found(NamedTuple):
    """A block, how it is swapped, and for a similar block that is not swapped the reason."""

    name: str
    block: nn.Module
    way: Any
    why: str


def _runs(found: Sequence[_Found]) -> list[list[_Found]]:
    """Consecutive blocks that are swapped in the same way; any other module by itself."""
    runs: list[list[_Found]] = []
    for item in found:
        if item.way is not None and runs and runs[-1][-1].way is item.way:
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


class Block(Swapped):
    """A block as one or two half-steps, which continue those of the previous block."""

    dim: int  # the dimension in which the streams are adjacent
    steps: int
    what: str

    @staticmethod
    def why_not(block: Any) -> str:
        """Why this block cannot be swapped, or ""."""
        return ""

    def branches(self) -> Sequence[tuple[str, InOrder]]:
        """The residual functions, with their names."""
        raise NotImplementedError

    def merged(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        """Merges the two streams into one."""
        return (x1 + x2) / 2

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """A run's first block takes one stream and its last returns one; otherwise x and y are both streams."""
        options, branches = dict(self.revkernels_options), self.branches()
        place = options.pop("place")
        target = place["target"]
        half_steps = [
            HalfStep(branch, (target + k) % 2, ((target + k + 1) % 2,), (), kwargs if branch.taking else {})
            for k, (_, branch) in enumerate(branches)
        ]
        names = [name for name, _ in branches].__getitem__
        streams = torch.cat((widened(x),) * 2, self.dim) if place["first"] else x
        y = linked.run(half_steps, streams, 2, names, split_dim=self.dim, **options)
        return self.merged(*y.chunk(2, self.dim)) if place["last"] else y


class InOrder:
    """Modules in sequence, as a branch. ``taking`` is the one that gets the keywords."""

    def __init__(self, modules: Sequence[nn.Module | None], taking: nn.Module | None = None) -> None:
        self.modules, self.taking = [module for module in modules if module is not None], taking

    def __call__(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if getattr(self.modules[0], "inplace", False):
            x = x.clone()  # it is a stream and must not be written
        for module in self.modules:
            x = module(x, **kwargs) if module is self.taking else module(x)
        return x


class TransformerBlock(Block):
    """Replaces a ViT's ``Block``: x1 + attention(x2), x2 + mlp(x1). Keywords, such as masks, go to attention."""

    dim, steps, what = -1, 2, "attention and MLP are F and G of a reversible block"

    def branches(self) -> Sequence[tuple[str, InOrder]]:
        block: Any = self
        return (
            ("attn", InOrder([block.norm1, block.attn, block.ls1, block.drop_path1], block.attn)),
            ("mlp", InOrder([block.norm2, block.mlp, block.ls2, block.drop_path2])),
        )


class ResidualBlock(Block):
    """Replaces a ResNet's ``BasicBlock`` or ``Bottleneck``: x1 + body(activation(x2)), with alternating streams."""

    dim, steps, what = 1, 1, "its layers are F or G of a reversible block, its last activation comes first"

    @staticmethod
    def why_not(block: Any) -> str:
        """A block that changes the shape is not invertible."""
        return "" if block.downsample is None else "changes the shape"

    def branches(self) -> Sequence[tuple[str, InOrder]]:
        block: Any = self
        last = self._last_activation
        if last is block.act2:  # BasicBlock
            body = [block.drop_block, block.act1, block.aa, block.conv2, block.bn2]
        else:
            body = [block.act1, block.conv2, block.bn2, block.drop_block, block.act2, block.aa, block.conv3, block.bn3]
        return (("body", InOrder([last, block.conv1, block.bn1, *body, block.se, block.drop_path])),)

    @property
    def _last_activation(self) -> Any:
        block: Any = self
        return block.act3 if hasattr(block, "act3") else block.act2

    def merged(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        return self._last_activation(super().merged(x1, x2))
