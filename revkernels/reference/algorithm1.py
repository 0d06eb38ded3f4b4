# SPDX-License-Identifier: Apache-2.0
"""The reversible residual block and Algorithm 1 of Gomez et al. 2017, line by line, in float64.

A residual function returns f, and from df the derivatives of its input and of its parameters, the latter in any form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]


class Residual(Protocol):
    """A residual function with its derivatives."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """f"""

    def vjp(self, x: np.ndarray, df: np.ndarray) -> tuple[np.ndarray, Any]:
        """(dx, dw)"""


Blocks = Sequence[tuple[Residual, Residual]]


def block_forward(x1: np.ndarray, x2: np.ndarray, F: Residual, G: Residual) -> Pair:
    """y1 = x1 + F(x2); y2 = x2 + G(y1)   (eq. 6)"""
    y1 = x1 + F(x2)
    y2 = x2 + G(y1)
    return y1, y2


def block_inverse(y1: np.ndarray, y2: np.ndarray, F: Residual, G: Residual) -> Pair:
    """x2 = y2 - G(y1); x1 = y1 - F(x2)   (eq. 7)"""
    x2 = y2 - G(y1)
    x1 = y1 - F(x2)
    return x1, x2


def block_backward(
    y1: np.ndarray, y2: np.ndarray, dy1: np.ndarray, dy2: np.ndarray, F: Residual, G: Residual
) -> tuple[Pair, Pair, tuple[Any, Any]]:
    """Algorithm 1, Reversible Residual Block Backprop. Returns (x1, x2), (dx1, dx2), (dwF, dwG)."""
    z1 = y1  # line 2
    x2 = y2 - G(z1)  # line 3
    x1 = z1 - F(x2)  # line 4
    dz1_through_G, dwG = G.vjp(z1, dy2)
    dz1 = dy1 + dz1_through_G  # line 5: z1 also reaches the loss through y2
    dx2_through_F, dwF = F.vjp(x2, dz1)
    dx2 = dy2 + dx2_through_F  # line 6
    dx1 = dz1  # line 7; lines 8 and 9 are dwF and dwG
    return (x1, x2), (dx1, dx2), (dwF, dwG)


def chain_forward(x1: np.ndarray, x2: np.ndarray, blocks: Blocks) -> Pair:
    """The blocks (F, G) in turn."""
    for F, G in blocks:
        x1, x2 = block_forward(x1, x2, F, G)
    return x1, x2


def chain_inverse(y1: np.ndarray, y2: np.ndarray, blocks: Blocks) -> Pair:
    """The inverse blocks, last first."""
    for F, G in reversed(blocks):
        y1, y2 = block_inverse(y1, y2, F, G)
    return y1, y2


def chain_backward(
    y1: np.ndarray, y2: np.ndarray, dy1: np.ndarray, dy2: np.ndarray, blocks: Blocks
) -> tuple[Pair, Pair, list[tuple[Any, Any]]]:
    """Algorithm 1 from the last block to the first. Returns (x1, x2), (dx1, dx2), one (dwF, dwG) per block."""
    derivatives: list[tuple[Any, Any]] = []
    for F, G in reversed(blocks):
        (y1, y2), (dy1, dy2), dw = block_backward(y1, y2, dy1, dy2, F, G)
        derivatives.insert(0, dw)
    return (y1, y2), (dy1, dy2), derivatives
