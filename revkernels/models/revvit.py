# SPDX-License-Identifier: Apache-2.0
"""Reversible vision transformers (Mangalam, Fan, Li, Wu, Xiong, Feichtenhofer, Malik 2022, "Reversible Vision
Transformers", CVPR, arXiv 2302.04869): sizes of ViT (Dosovitskiy et al. 2021), settings of the authors' published
configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revkernels.models.layers import ModelOptions, check_images
from revkernels.models.options import WithChains
from revkernels.models.plan import check_positive
from revkernels.nn import Explanation, ReversibleBlock, ReversibleSequential
from revkernels.nn.branches import AttentionBranch, MLPBranch, check_probability
from revkernels.nn.plan import Plan as NetPlan
from revkernels.nn.plan import plan_of
from revkernels.nn.streams import widened
from revkernels.options import ActivationsOption, CouplingOption

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RevViT", "revvit_base", "revvit_large", "revvit_small"]

POOLS = ("mean", "class")
_EPS = 1e-6  # of every norm, as in the authors' code


class RevViT(WithChains):
    """A reversible vision transformer. (N, in_channels, H, W) -> logits (N, num_classes).

        t = tokens of the patches + position
        x1 = x2 = t
        y1 = x1 + Attention(x2)        y2 = x2 + MLP(y1)        in each of ``depth`` blocks
        logits = head(pool(norm(y1, y2)))

    Both streams are as wide as the tokens, so a block has the parameters of an ordinary one; the streams are
    concatenated before the final norm, so norm and head have twice as many features. Under autocast the streams are
    float32, whatever dtype the branches return.

    Args:
        dim: features of a token and of each stream, a multiple of ``heads``.
        depth: number of blocks.
        heads: of each attention.
        num_classes: of the data.
        image_size: rows and columns of the images, one number or a pair; multiples of ``patch_size``.
        patch_size: rows and columns of the patch that becomes a token.
        mlp_ratio: the MLPs' inner width in multiples of ``dim``.
        pool: "mean" of the tokens (the paper's) or "class", an extra token that is read at the end.
        dropout: probability that an element is dropped: of the tokens, the attention weights and the branches' outputs,
            and inside the MLPs. Above 0 it adds layers to the MLPs, which renames their parameters.
        drop_path: probability that a branch is dropped for a sample; from 0 at the first block to this at the last.
        in_channels: of the data.
        activations: "reconstruct" (memory independent of depth), "store" or a MemoryBudget, as in ReversibleSequential.
            This and the next two options may also be set later.
        coupling: "float" or "exact", as in ReversibleSequential.
        backend: where the blocks' couplings, norms and activations run; None picks the fused one for the tensors'
            device, "eager" is plain torch.

    Raises:
        ValueError, TypeError: an invalid size or name; in the call, images of another size.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        num_classes: int = 1000,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        mlp_ratio: int = 4,
        pool: str = "mean",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        in_channels: int = 3,
        activations: ActivationsOption = "reconstruct",
        coupling: CouplingOption = "float",
        backend: str | None = None,
    ) -> None:
        super().__init__(activations, coupling, backend)
        sizes = {"dim": dim, "depth": depth, "heads": heads, "num_classes": num_classes, "patch_size": patch_size}
        sizes |= {"mlp_ratio": mlp_ratio, "in_channels": in_channels}
        dim, depth, heads, num_classes, patch_size, mlp_ratio, in_channels = (
            check_positive(name, size) for name, size in sizes.items()
        )
        check_probability("dropout", dropout)
        check_probability("drop_path", drop_path)
        if pool not in POOLS:
            raise ValueError(f"pool is {pool!r}; it must be {' or '.join(map(repr, POOLS))}")
        self.in_channels, self.pool = in_channels, pool
        self.image_size = _image_size(image_size, patch_size)
        rows, columns = self.image_size
        tokens = (rows // patch_size) * (columns // patch_size) + (pool == "class")

        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        branches = [
            (
                AttentionBranch(dim, heads, dropout, drop_path=rate, eps=_EPS),
                MLPBranch(dim, mlp_ratio * dim, dropout, drop_path=rate, eps=_EPS),
            )
            for rate in rates
        ]
        self.patches = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "class" else None
        self.position = nn.Parameter(torch.zeros(1, tokens, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = ReversibleSequential(
            *(ReversibleBlock(*pair) for pair in branches),
            split_dim=-1,
            activations=activations,
            coupling=coupling,
            backend=backend,
        )
        self.norm = nn.LayerNorm(2 * dim, eps=_EPS)
        self.head = nn.Linear(2 * dim, num_classes)
        _initialise(self)

    def chains(self) -> list[Any]:
        return [self.blocks] if isinstance(self.blocks, ReversibleSequential) else []

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as after ``to_empty``: call after the ``reset_parameters`` of the layers."""
        _initialise(self)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_channels)
        if tuple(x.shape[2:]) != self.image_size:
            rows, columns = self.image_size
            raise ValueError(
                f"x has shape {tuple(x.shape)}; it must be (N, {self.in_channels}, {rows}, {columns}): every token's "
                f"position is learnt"
            )
        # Dense rows of tokens, not a transposed view, because the streams keep their strides through all blocks.
        tokens = self.patches(x).flatten(2).transpose(1, 2).contiguous()
        if self.class_token is not None:
            tokens = torch.cat((self.class_token.expand(len(tokens), -1, -1), tokens), dim=1)
        tokens = self.dropout(widened(tokens + self.position))
        y = self.norm(torch.cat(self.blocks((tokens, tokens)), dim=-1))
        return self.head(y.mean(dim=1) if self.class_token is None else y[:, 0])

    def plan(self, x: Tensor | None = None) -> NetPlan:
        """What is stored under ``activations=MemoryBudget(...)``, in all chains together: see
        `revkernels.nn.ReversibleSequential.plan`."""
        return plan_of(self, self.activations, x, (), {})

    def explain(self) -> Explanation:
        """Report for every branch which norms and activations are fused, and why others are not."""
        return self.blocks.explain()


def _image_size(size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"image_size has length {len(pair)}; it must be an int or a pair (rows, columns)")
    rows, columns = (check_positive("image_size", value) for value in pair)
    if rows % patch_size or columns % patch_size:
        raise ValueError(f"image_size is {size}; it must be a multiple of patch_size, {patch_size}")
    return rows, columns


def _initialise(model: RevViT) -> None:
    """Initial values of the authors' code: weights, position and class token normal with std 0.02, biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    for token in (model.position, model.class_token):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02)


class RevViTOptions(ModelOptions, total=False):
    """Keywords of the networks below; see RevViT."""

    image_size: int | tuple[int, int]
    patch_size: int
    pool: str
    dropout: float
    drop_path: float


def revvit_small(num_classes: int = 1000, **options: Unpack[RevViTOptions]) -> RevViT:
    """Rev-ViT-S/16 for 224 x 224: 12 blocks of width 384, 6 heads; 22,434,664 parameters. Authors' drop_path: 0.1.

    Keywords as in `RevViT`.
    """
    return RevViT(384, 12, 6, num_classes, **options)


def revvit_base(num_classes: int = 1000, **options: Unpack[RevViTOptions]) -> RevViT:
    """Rev-ViT-B/16 for 224 x 224: 12 blocks of width 768, 12 heads; 87,335,656 parameters. Authors' drop_path: 0.2.

    Keywords as in `RevViT`.
    """
    return RevViT(768, 12, 12, num_classes, **options)


def revvit_large(num_classes: int = 1000, **options: Unpack[RevViTOptions]) -> RevViT:
    """Rev-ViT-L/16 for 224 x 224: 24 blocks of width 1024, 16 heads; 305,350,632 parameters.

    Keywords as in `RevViT`.
    """
    return RevViT(1024, 24, 16, num_classes, **options)
