# SPDX-License-Identifier: Apache-2.0
"""revnet-zero's reversible blocks and transformer, on the chain of this package.

    from revkernels.compat.revnet_zero import RevBlock, RevTransformer      # was: from revnet_zero import ...

The original runs its blocks one by one, and each keeps its output: memory grows with depth. `RevBlocks` replaces its
nn.ModuleList of blocks, and runs them as one chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from revkernels.compat._chains import Part, together
from revkernels.nn.chain import HalfStep, run, run_inverse

__all__ = ["RevBlock", "RevBlocks", "RevTransformer", "RevTransformerBlock"]


class RevBlock(nn.Module):
    """y1 = x1 + f_fn(x2); y2 = x2 + g_fn(y1), on the halves of x [..., d] along its last dimension.

    Unlike in the original: dropout masks in the backward are the forward's; f_fn and g_fn run once more there, not
    twice; gradients reach ``torch.autograd.grad``, also if the input does not require grad; running statistics are
    updated once.

    Args:
        f_fn, g_fn: modules that preserve the shape of their input.

    Raises:
        TypeError: f_fn or g_fn is not callable.
        ValueError: in the call, the last size of x is odd.
    """

    def __init__(self, f_fn: nn.Module, g_fn: nn.Module) -> None:
        super().__init__()
        for name, branch in (("f_fn", f_fn), ("g_fn", g_fn)):
            if not callable(branch):
                raise TypeError(f"{name} is a {type(branch).__name__}; it must be an nn.Module or another callable")
        self.f_fn = f_fn
        self.g_fn = g_fn

    def forward(self, x: torch.Tensor) -> Any:
        """Map x to y of the same shape."""
        return _through(run, [(0, self)], x)

    @torch.no_grad()
    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Return the x that `forward` maps to y, up to rounding, without a gradient."""
        return _through(run_inverse, [(0, self)], y)


class RevBlocks(nn.ModuleList):
    """A list of `RevBlock`s that can be called: one chain, whose activation memory does not grow with its length.

        self.blocks = RevBlocks([RevBlock(f, g), ...])      # was: nn.ModuleList(...)
        h = self.blocks(h)                                  # was: for block in self.blocks: h = block(h)

    A block with hooks, or with its own ``forward``, is called by itself, and keeps one more output. Parameters have the
    names that the nn.ModuleList gives them. Not in the original.
    """

    def forward(self, x: torch.Tensor) -> Any:
        """Map x [..., d] to y of the same shape."""
        for alone, part in self._parts():
            x = part[0][1](x) if alone else _through(run, part, x)
        return x

    @torch.no_grad()
    def inverse(self, y: torch.Tensor) -> Any:
        """Return the x that `forward` maps to y, up to rounding, without a gradient."""
        for alone, part in reversed(self._parts()):
            y = part[0][1].inverse(y) if alone else _through(run_inverse, part, y)
        return y

    def _parts(self) -> list[tuple[bool, Part]]:
        return together(list(self), RevBlock.forward)


class _MultiHeadAttn(nn.Module):
    """out(softmax(q k^T / sqrt(d_head)) v) of the normalised input, x [batch, length, d_half]."""

    def __init__(self, d_half: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_half, 3 * d_half, bias=False)
        self.out = nn.Linear(d_half, d_half, bias=False)
        self.norm = nn.LayerNorm(d_half)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.n_heads, -1)).movedim(1, -2).unbind(1)
        p = self.drop.p if self.drop.training else 0.0
        return self.out(functional.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2))


class _FFN(nn.Module):
    """Two linear layers with GELU between them, on the normalised input, x [..., d_half]."""

    def __init__(self, d_half: int, expansion: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        wide = d_half * expansion
        self.norm = nn.LayerNorm(d_half)
        self.net = nn.Sequential(
            nn.Linear(d_half, wide), nn.GELU(), nn.Dropout(dropout), nn.Linear(wide, d_half), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.norm(x))


class RevTransformerBlock(RevBlock):
    """A `RevBlock` of multi-head self-attention (f_fn) and a feed-forward network (g_fn), each d_model / 2 wide.

    Raises:
        ValueError: d_model is odd, or half of it is not divisible by n_heads.
    """

    def __init__(self, d_model: int, n_heads: int, ffn_expansion: int = 4, dropout: float = 0.0) -> None:
        half, odd = divmod(d_model, 2)
        if odd or half % n_heads:
            raise ValueError(f"d_model is {d_model}; it must be divisible by 2 n_heads = {2 * n_heads}")
        super().__init__(_MultiHeadAttn(half, n_heads, dropout), _FFN(half, ffn_expansion, dropout))
        self.d_model = d_model
        self.n_heads = n_heads


class RevTransformer(nn.Module):
    """A transformer encoder of `RevTransformerBlock`s between an embedding and a linear head.

    Parameters have the original's names, order and initialisation.

    Args:
        vocab_size: the size of the vocabulary; 0 for a model from embeddings to features.
        d_model, n_heads, ffn_expansion, dropout: see `RevTransformerBlock`.
        n_layers: the number of blocks.
        max_seq_len: the number of position embeddings.

    Raises:
        ValueError: in the call, token_ids=True without a vocabulary; a sequence longer than max_seq_len.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_heads: int,
        n_layers: int,
        max_seq_len: int = 4096,
        ffn_expansion: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model) if vocab_size > 0 else None
        self.pos_embed = nn.Embedding(max_seq_len, d_model)
        self.drop = nn.Dropout(dropout)
        blocks = [RevTransformerBlock(d_model, n_heads, ffn_expansion, dropout) for _ in range(n_layers)]
        self.blocks = RevBlocks(blocks)
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size) if vocab_size > 0 else None
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: torch.Tensor, token_ids: bool = True) -> torch.Tensor:
        """Map tokens [batch, length], or embeddings [batch, length, d_model], to logits or to features."""
        if token_ids and self.embed is None:
            raise ValueError("token_ids is True; a model with vocab_size=0 takes embeddings: pass token_ids=False")
        length, positions = x.shape[1], self.pos_embed.num_embeddings
        if length > positions:
            raise ValueError(f"x has shape {tuple(x.shape)}; its length must be at most max_seq_len={positions}")
        h = self.embed(x) if token_ids and self.embed is not None else x
        h = self.norm(self.blocks(self.drop(h + self.pos_embed.weight[:length])))
        return h if self.head is None else self.head(h)


def _through(direction: Callable[..., Any], blocks: Sequence[tuple[int, RevBlock]], x: torch.Tensor) -> Any:
    """Run the blocks as one chain, forward (`run`) or inverse (`run_inverse`)."""
    half_steps, names = [], []
    for index, block in blocks:
        half_steps += [HalfStep(block.f_fn, 0, (1,)), HalfStep(block.g_fn, 1, (0,))]
        names += [f"block {index}, {name} ({type(getattr(block, name)).__name__})" for name in ("f_fn", "g_fn")]
    return direction(half_steps, x, name=names.__getitem__, split_dim=-1)
