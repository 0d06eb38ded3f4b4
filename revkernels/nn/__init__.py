# SPDX-License-Identifier: Apache-2.0
"""Reversible networks as torch modules."""

from revkernels.autograd.reversal import is_recomputing
from revkernels.nn.arguments import PerBlock
from revkernels.nn.reversible import ReversibleBlock, ReversibleSequential

__all__ = ["PerBlock", "ReversibleBlock", "ReversibleSequential", "is_recomputing"]
