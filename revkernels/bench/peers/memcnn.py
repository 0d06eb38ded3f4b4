# SPDX-License-Identifier: Apache-2.0
"""MemCNN: an `InvertibleModuleWrapper` around each additive coupling (van de Leemput et al. 2019)."""

from __future__ import annotations

from torch import nn

from revkernels.bench.peers import Joined, Pairs

__all__ = ["NOTE", "chain"]

# With weights in NCHW order it is only as fast as with channels-last ones, so the branches are unchanged.
NOTE = "memcnn runs F and G twice more in the backward, and makes its streams NCHW itself"


def chain(pairs: Pairs) -> nn.Module:
    """Return one wrapper per block, in sequence."""
    import memcnn

    blocks = (memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(F, G)) for F, G in pairs)
    return Joined(nn.Sequential(*blocks))
