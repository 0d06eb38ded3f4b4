# SPDX-License-Identifier: Apache-2.0
"""Reversible networks as torch modules."""

from revkernels.autograd.driver_forward import is_recomputing
from revkernels.nn.arguments import PerBlock
from revkernels.nn.branches import AttentionBranch, BasicBranch, BottleneckBranch, ConvNeXtBranch, MLPBranch
from revkernels.nn.checkpoint import checkpoint, selective_checkpoint
from revkernels.nn.fusion import Explanation, FusedSequential
from revkernels.nn.norm_act import NormAct
from revkernels.nn.plan import Plan
from revkernels.nn.reversible import ReversibleBlock, ReversibleSequential

__all__ = [
    "AttentionBranch",
    "BasicBranch",
    "BottleneckBranch",
    "ConvNeXtBranch",
    "Explanation",
    "FusedSequential",
    "MLPBranch",
    "NormAct",
    "PerBlock",
    "Plan",
    "ReversibleBlock",
    "ReversibleSequential",
    "checkpoint",
    "is_recomputing",
    "selective_checkpoint",
]
