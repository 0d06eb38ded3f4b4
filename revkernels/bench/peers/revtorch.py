# SPDX-License-Identifier: Apache-2.0
"""RevTorch: its `ReversibleSequence` of blocks."""

from __future__ import annotations

from torch import nn

from revkernels.bench.peers import Joined, Pairs

__all__ = ["NOTE", "chain"]

NOTE = "revtorch joins and cuts the streams in every block"


def chain(pairs: Pairs) -> nn.Module:
    """Return the blocks in sequence."""
    import revtorch

    blocks = (revtorch.ReversibleBlock(F, G, split_along_dim=1) for F, G in pairs)
    return Joined(revtorch.ReversibleSequence(nn.ModuleList(blocks)))
