# SPDX-License-Identifier: Apache-2.0
"""Reversible networks as torch modules.

    ReversibleBlock, ReversibleSequential           two or more residual functions; a chain of such blocks
    BasicBranch, BottleneckBranch, ConvNeXtBranch, MLPBranch, AttentionBranch
                                                    ready residual functions
    FusedSequential, NormAct                        norms and activations as one kernel, anywhere in a model
    checkpoint, selective_checkpoint                for what lies between chains, or without any
    PerBlock, is_recomputing                        an argument for each block; whether a branch runs again
    stateless                                       declares that a class keeps no state, which saves searching for it

`revkernels.nn.chain` runs half-steps in any order, and `revkernels.nn.linked` joins modules that a network calls one by
one to one chain.
"""

from revkernels.autograd.recomputing import is_recomputing
from revkernels.autograd.state.plain_layers import stateless
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
    "stateless",
]
