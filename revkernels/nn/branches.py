# SPDX-License-Identifier: Apache-2.0
"""Residual functions of transformers and ConvNeXts, for F and G of a reversible block.

Each is an `nn.Sequential` of numbered layers, with the state dict of a plain Sequential of the same layers, and begins
with its norm, which a reversible chain fuses with the preceding coupling.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from revkernels.autograd.fused.known_layers import NORM_LAYERS
from revkernels.autograd.state.plain_layers import plain
from revkernels.nn.conv_branches import BasicBranch, BottleneckBranch
from revkernels.nn.fusion import FusedSequential

__all__ = [
    "AttentionBranch",
    "BasicBranch",
    "BottleneckBranch",
    "ConvNeXtBranch",
    "DropPath",
    "LayerNorm2d",
    "LayerScale",
    "MLPBranch",
    "SelfAttention",
]


@plain
class MLPBranch(FusedSequential):
    """Feed-forward residual function of a pre-norm transformer: LayerNorm - Linear - GELU - Linear.

    (..., dim) -> (..., dim). With ``dropout`` there is a Dropout after GELU and another at the end, and the second
    Linear is child 4 instead of 3; with ``drop_path`` a `DropPath` is the last child.

    Args:
        dim, hidden: features outside and inside.
        dropout: probability that an element is dropped, 0 <= dropout < 1.
        drop_path: probability that a whole sample is dropped, likewise.
        eps: of the norm.

    Raises:
        TypeError, ValueError: an invalid size or probability.
    """

    def __init__(
        self, dim: int, hidden: int, dropout: float = 0.0, *, drop_path: float = 0.0, eps: float = 1e-5
    ) -> None:
        _check_sizes(dim=dim, hidden=hidden)
        super().__init__(
            nn.LayerNorm(dim, eps=eps),
            nn.Linear(dim, hidden),
            nn.GELU(),
            *_dropout(dropout),
            nn.Linear(hidden, dim),
            *_dropout(dropout),
            *_drop_path(drop_path),
        )


@plain
class AttentionBranch(FusedSequential):
    """Attention residual function of a pre-norm transformer: LayerNorm - `SelfAttention`.

    (N, T, dim) -> (N, T, dim). A keyword ``attn_mask`` given to the chain reaches the attention.

    Args:
        dim, heads, dropout, causal: see `SelfAttention`.
        drop_path: probability that a whole sample is dropped, 0 <= drop_path < 1; a `DropPath` is then the last child.
        eps: of the norm.

    Raises:
        TypeError, ValueError: an invalid size or probability.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        drop_path: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        _check_sizes(dim=dim)
        super().__init__(nn.LayerNorm(dim, eps=eps), SelfAttention(dim, heads, dropout, causal), *_drop_path(drop_path))


@plain
class ConvNeXtBranch(FusedSequential):
    """Residual function of ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s", figure 4).

    Depthwise convolution - `LayerNorm2d` - 1x1 convolution - GELU - 1x1 convolution - `LayerScale`, and with
    ``drop_path`` a `DropPath` at the end. (N, channels, H, W) -> (N, channels, H, W).

    Args:
        channels: outside; ``expansion`` times as many inside.
        kernel: rows and columns of the depthwise convolution, odd.
        layer_scale: initial scale of each channel; None omits `LayerScale`.
        drop_path: probability that a whole sample is dropped, 0 <= drop_path < 1.

    Raises:
        TypeError, ValueError: an invalid size or probability.
    """

    def __init__(
        self,
        channels: int,
        expansion: int = 4,
        kernel: int = 7,
        layer_scale: float | None = 1e-6,
        *,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        _check_sizes(channels=channels, expansion=expansion, kernel=kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; it must be odd, for the branch has to keep the size of its input")
        super().__init__(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels),
            LayerNorm2d(channels, eps=eps),
            nn.Conv2d(channels, expansion * channels, 1),
            nn.GELU(),
            nn.Conv2d(expansion * channels, channels, 1),
            *(() if layer_scale is None else (LayerScale(channels, layer_scale),)),
            *_drop_path(drop_path),
        )


@plain
class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2): (N, T, dim) -> (N, T, dim).

        q, k, v = heads of x W_qkv + b_qkv
        y       = softmax(q k^T / sqrt(dim / heads) + mask) v W_proj + b_proj

    Args:
        dim: features, a multiple of ``heads``.
        heads: number of heads, dim / heads features each.
        dropout: probability that an attention weight is dropped, and that an element of y is; 0 <= dropout < 1.
        causal: position t attends to positions up to t only.

    Raises:
        TypeError, ValueError: an invalid size or probability; in the call, an x or a mask that does not fit.
    """

    narrows_input = True  # autocast narrows x, for the linear layer

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        _check_sizes(dim=dim, heads=heads)
        check_probability("dropout", dropout)
        if dim % heads:
            raise ValueError(f"dim is {dim}, heads is {heads}: dim must be a multiple of heads")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Return y. ``attn_mask`` broadcasts to (N, heads, T, T): boolean, True takes part; or floating, added.

        With ``causal`` both masks apply. A position that may attend to nothing gets NaN or 0, as in PyTorch.
        """
        if x.dim() < 2 or x.shape[-1] != self.proj.in_features:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, T, {self.proj.in_features})")
        # (..., T, 3 dim) -> three times (..., heads, T, dim / heads), views of one array. Unbound before the transpose:
        # their gradients then come in the array's order and together form its gradient.
        q, k, v = (part.transpose(-3, -2) for part in self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3))
        mask = None if attn_mask is None else self._mask(attn_mask, q)
        y = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and mask is None,
        )
        y = self.proj(y.transpose(-3, -2).flatten(-2))
        return functional.dropout(y, self.dropout, self.training) if self.dropout else y

    def _mask(self, mask: Tensor, q: Tensor) -> Tensor:
        """The mask combined with the causal mask; PyTorch accepts only one of the two."""
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"attn_mask is a {type(mask).__name__}; it must be a torch.Tensor")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"attn_mask is {mask.dtype}; it must be bool (True takes part) or floating point (added)")
        whole = (*q.shape[:-1], q.shape[-2])
        if mask.dim() > len(whole) or any(
            m not in (1, w) for m, w in zip(reversed(mask.shape), reversed(whole), strict=False)
        ):
            raise ValueError(f"attn_mask has shape {tuple(mask.shape)}; it must broadcast to {whole} (N, heads, T, T)")
        if self.causal:
            past = torch.ones(whole[-2:], dtype=torch.bool, device=q.device).tril()
            mask = mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)
        return mask if mask.dtype == torch.bool else mask.to(q.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}, causal={self.causal}"


@plain
class LayerNorm2d(nn.Module):
    """Layer normalisation of each position over its channels, dimension 1: (N, channels, ...) -> the same.

        y = (x - mean) / sqrt(variance + eps) * weight + bias

    The parameters are those of `nn.LayerNorm(channels)`. The result is in channels-last memory.

    Raises:
        ValueError: x has a different number of channels.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        _check_sizes(channels=channels)
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (N, {self.channels}, H, W)")
        # PyTorch's norm works on the last dimension, in one pass, and is accurate where the mean is large.
        h = functional.layer_norm(x.movedim(1, -1), (self.channels,), self.weight, self.bias, self.eps)
        return h.movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


NORM_LAYERS[LayerNorm2d] = ("layer", 1)


@plain
class LayerScale(nn.Module):
    """f * gamma, with one learned factor per channel, dimension 1 (Touvron et al. 2021, CaiT, section 2).

    Args:
        channels: the size of dimension 1.
        start: initial value of every factor.

    Raises:
        TypeError, ValueError: ``channels`` is not an int of at least 1.
    """

    def __init__(self, channels: int, start: float = 1e-6) -> None:
        super().__init__()
        _check_sizes(channels=channels)
        self.gamma = nn.Parameter(torch.full((channels,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(-1, *(1,) * (x.dim() - 2))

    def extra_repr(self) -> str:
        return str(self.gamma.numel())


@plain
class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, f of a sample (dimension 0) is 0, or f / (1 - p).

    Args:
        p: probability of 0, 0 <= p < 1; the same for every sample, independent.

    Raises:
        TypeError, ValueError: ``p`` is not such a number.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        check_probability("p", p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = 1 - self.p
        return x * x.new_empty((x.shape[0], *(1,) * (x.dim() - 1))).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _dropout(p: float) -> Iterator[nn.Module]:
    check_probability("dropout", p)
    if p:
        yield nn.Dropout(p)


def _drop_path(p: float) -> Iterator[nn.Module]:
    check_probability("drop_path", p)
    if p:
        yield DropPath(p)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} is {size!r}, a {type(size).__name__}; it must be an int")
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


def check_probability(name: str, p: float) -> None:
    """``p`` is a number, at least 0 and below 1."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name} is {p!r}, a {type(p).__name__}; it must be a number")
    if not 0 <= p < 1:
        raise ValueError(f"{name} is {p}; it must be at least 0 and below 1")
