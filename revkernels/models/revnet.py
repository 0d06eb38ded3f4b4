# SPDX-License-Identifier: Apache-2.0
"""RevNets (Gomez, Ren, Urtasun, Grosse 2017, "The Reversible Residual Network: Backpropagation Without Storing
Activations", arXiv 1707.04585): section 3.1 for the blocks, section 5 for the five networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from revkernels.models.layers import (
    BLOCKS,
    ModelOptions,
    build_head,
    build_stem,
    check_images,
    initialise,
)
from revkernels.models.options import WithChains
from revkernels.models.plan import Plan, check_positive
from revkernels.nn import Explanation, ReversibleBlock, ReversibleSequential, checkpoint, selective_checkpoint
from revkernels.nn.fusion import norms_by
from revkernels.nn.plan import Plan as NetPlan
from revkernels.nn.plan import plan_of
from revkernels.nn.streams import widened
from revkernels.options import ActivationsOption, CouplingOption, Transitions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RevNet", "Transition", "revnet38", "revnet56", "revnet104", "revnet110", "revnet164"]

Pair = tuple[Tensor, Tensor]
TRANSITIONS = get_args(Transitions)


class RevNetOptions(ModelOptions, total=False):
    """Keywords of every RevNet."""

    transitions: Transitions


class Transition(nn.Module):
    """First unit of a stage: changes width or resolution, so it is not invertible; its input is stored (section 3.1).

        y1 = F(x2) + S(x1)        y2 = G(y1) + S(x2)

    Under autocast the streams are float32, whatever dtype the branches return.

    F has the stride; S is the block's shortcut (basic: average pool and zero channels; bottleneck: a strided 1x1
    convolution for each half). Halves (N, in_channels, H, W) -> halves (N, out_channels, H / stride, W / stride).

    Args:
        block: "basic" or "bottleneck".
        in_channels, out_channels: width of one half before and after.
        stride: of F and of both shortcuts.
        preactivate: False omits F's first BN-ReLU (the very first unit: the stem has activated its input).
        recompute: True keeps only x1, x2 and y1, and runs F and G again in the backward.
    """

    def __init__(
        self,
        block: str,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        preactivate: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        branch = BLOCKS[block]
        self.F = branch(in_channels, out_channels, stride, preactivate)
        self.G = branch(out_channels, out_channels)
        self.shortcut1 = branch.shortcut(in_channels, out_channels, stride)
        self.shortcut2 = branch.shortcut(in_channels, out_channels, stride)

    def forward(self, pair: Pair) -> Pair:
        x1, x2 = pair
        run = checkpoint if self.recompute else _call
        y1 = run(self.F, x2) + self.shortcut1(x1)
        y2 = run(self.G, y1) + self.shortcut2(x2)
        return widened(y1), widened(y2)


def _call(module: nn.Module, x: Any) -> Any:
    return module(x)


class RevNet(WithChains):
    """A RevNet of any depth: stem, stages, head. (N, in_channels, H, W) -> logits (N, num_classes).

    A stage of n units is one Transition and one ReversibleSequential of n - 1 blocks. The stem's output is split once;
    the pair (x1, x2) passes through all stages and is joined in the head. Depth in the paper's count is 2 *
    sum(plan.units) * (2 for basic, 3 for bottleneck) + 2.

    Args:
        plan: blocks, depth and widths.
        num_classes, in_channels: of the data.
        activations: "reconstruct" (memory independent of depth), "store" or a MemoryBudget, as in ReversibleSequential.
            This and the next two options may also be set later.
        coupling: "float" or "exact", as in ReversibleSequential.
        backend: where couplings, norms and activations run; None picks the fused one for the tensors' device, "eager"
            is plain torch.
        transitions: "store" keeps what the stem and the transitions save, as in the paper; "selective" keeps that
            without outputs of norms (`revkernels.nn.selective_checkpoint`, which includes chains that store);
            "recompute" keeps only their inputs, and runs them again in the backward (`revkernels.nn.checkpoint`). They
            hold most of the activation memory of a RevNet with few units.

    Raises:
        ValueError, TypeError: an invalid size, kind or name, before any parameter is allocated.
    """

    def __init__(
        self,
        plan: Plan,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        activations: ActivationsOption = "reconstruct",
        coupling: CouplingOption = "float",
        backend: str | None = None,
        transitions: Transitions = "store",
    ) -> None:
        super().__init__(activations, coupling, backend)
        if transitions not in TRANSITIONS:
            raise ValueError(f"transitions is {transitions!r}; it must be one of {', '.join(map(repr, TRANSITIONS))}")
        num_classes = check_positive("num_classes", num_classes)
        in_channels = check_positive("in_channels", in_channels)
        plan.check_streams(2)
        self.in_channels = in_channels
        self.transitions = transitions
        self.stem = build_stem(plan.stem, in_channels, plan.stem_width)
        branch = BLOCKS[plan.block]
        stages: list[nn.Module] = []
        again = transitions == "recompute"
        half = plan.stem_width // 2
        for stage, (count, width, stride) in enumerate(plan.stages()):
            first: nn.Module
            if again and stride == 1 and 2 * half == width:  # shape unchanged: invertible
                units = branch(half, half, preactivate=stage > 0), branch(half, half)
                first = ReversibleBlock(*units, activations=activations, coupling=coupling, backend=backend)
            else:
                first = Transition(plan.block, half, width // 2, stride, preactivate=stage > 0, recompute=again)
            half = width // 2
            chain = ReversibleSequential(
                *(ReversibleBlock(branch(half, half), branch(half, half)) for _ in range(count - 1)),
                activations=activations,
                coupling=coupling,
                backend=backend,
            )
            if isinstance(first, ReversibleBlock):
                first.linked = chain.linked = True  # one chain with the state dict names of two
            stages.append(nn.Sequential(first, chain))
        self.stages = nn.Sequential(*stages)
        self.head = build_head(2 * half, num_classes)
        initialise(self)

    def chains(self) -> list[Any]:
        kinds = ReversibleSequential, ReversibleBlock
        return [part for stage in self.stages for part in stage if isinstance(part, kinds)]  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_channels)
        return selective_checkpoint(self._run, x) if self.transitions == "selective" else self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        with norms_by(self.backend, x):
            run = checkpoint if self.transitions == "recompute" else _call
            x1, x2 = run(self.stem, x).chunk(2, dim=1)
            if isinstance(self.stages[0][0], ReversibleBlock):  # type: ignore[index]
                x1, x2 = widened(x1), widened(x2)
            y1, y2 = self.stages((x1, x2))
            return self.head(torch.cat((y1, y2), dim=1))

    def plan(self, x: Tensor | None = None) -> NetPlan:
        """What is stored under ``activations=MemoryBudget(...)``, in all chains together: see
        `revkernels.nn.ReversibleSequential.plan`."""
        return plan_of(self, self.activations, x, (), {})

    def explain(self) -> Explanation:
        """Report for every branch of the chains which norms and activations are fused, and why others are not."""
        return Explanation(
            replace(branch, branch=f"stage {number}, {branch.branch}")
            for number, stage in enumerate(self.stages)
            for part in stage  # type: ignore[attr-defined]
            if not isinstance(part, Transition)
            for branch in part.explain()
        )


def revnet38(num_classes: int = 10, **options: Unpack[RevNetOptions]) -> RevNet:
    """RevNet-38 for CIFAR: 3-3-3 basic units of widths 32-64-112; 464,890 parameters.

    Keywords as in `RevNet`.
    """
    return RevNet(Plan("basic", (3, 3, 3), (32, 64, 112), stem_width=32), num_classes, **options)


def revnet110(num_classes: int = 10, **options: Unpack[RevNetOptions]) -> RevNet:
    """RevNet-110 for CIFAR: 9-9-9 basic units of widths 32-64-128; 1,729,194 parameters.

    Keywords as in `RevNet`.
    """
    return RevNet(Plan("basic", (9, 9, 9), (32, 64, 128), stem_width=32), num_classes, **options)


def revnet164(num_classes: int = 10, **options: Unpack[RevNetOptions]) -> RevNet:
    """RevNet-164 for CIFAR: 9-9-9 bottleneck units of widths 128-256-512; 1,748,778 parameters.

    Keywords as in `RevNet`.
    """
    return RevNet(Plan("bottleneck", (9, 9, 9), (128, 256, 512), stem_width=32), num_classes, **options)


def revnet56(num_classes: int = 1000, **options: Unpack[RevNetOptions]) -> RevNet:
    """RevNet-56 for ImageNet: 2-2-3-2 bottleneck units of widths 512 to 3328; 27,553,128 parameters.

    Keywords as in `RevNet`.
    """
    return RevNet(_imagenet((2, 2, 3, 2)), num_classes, **options)


def revnet104(num_classes: int = 1000, **options: Unpack[RevNetOptions]) -> RevNet:
    """RevNet-104 for ImageNet: 2-2-11-2 bottleneck units, widths 512 to 3328; 45,428,072 parameters.

    Keywords as in `RevNet`.
    """
    return RevNet(_imagenet((2, 2, 11, 2)), num_classes, **options)


def _imagenet(units: Sequence[int]) -> Plan:
    return Plan("bottleneck", units, (512, 1024, 2048, 3328), stem_width=128, stem="imagenet")
