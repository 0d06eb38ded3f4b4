# SPDX-License-Identifier: Apache-2.0
"""reformer-pytorch: its `ReversibleSequence`, which many reversible transformers copied.

It splits along dimension 2 only, so the streams are joined there: rows for images, and channels for tokens.
"""

from __future__ import annotations

from torch import nn

from revkernels.bench.peers import Joined, Pairs

__all__ = ["NOTE", "chain"]

NOTE = "reformer-pytorch joins and cuts the streams in every block, along dimension 2, and keeps each block's RNG state"


def chain(pairs: Pairs) -> nn.Module:
    """Return the blocks in sequence."""
    from reformer_pytorch.reversible import ReversibleSequence

    return Joined(ReversibleSequence(nn.ModuleList(nn.ModuleList(pair) for pair in pairs)), dim=2)
