# SPDX-License-Identifier: Apache-2.0
"""RevLib: its `ReversibleSequential` over all half-steps, in the memory mode that reconstructs (its default)."""

from __future__ import annotations

from torch import nn

from revkernels.bench.peers import Joined, Pairs

__all__ = ["NOTE", "chain"]

NOTE = "revlib keeps each half-step's RNG state and couples once more in the backward"


def chain(pairs: Pairs) -> nn.Module:
    """Return the half-steps F, G, F, G ... in sequence."""
    import revlib

    return Joined(revlib.ReversibleSequential(*(branch for pair in pairs for branch in pair), split_dim=1))
