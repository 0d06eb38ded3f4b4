# SPDX-License-Identifier: Apache-2.0
"""The oracle: slow, plain NumPy, float64, with the paper's names. Shares no code with the kernels under test."""

from revkernels.reference.accumulate import accumulate
from revkernels.reference.algorithm1 import (
    block_backward,
    block_forward,
    block_inverse,
    chain_backward,
    chain_forward,
    chain_inverse,
)
from revkernels.reference.coupling import (
    amax_before_wrapping,
    amax_of,
    checksum_of,
    couple,
    reverse_step,
    uncouple,
    value_of,
)
from revkernels.reference.norm_act import (
    activate,
    derivative,
    norm_act,
    norm_act_backward,
    owners,
    statistics_of,
)
from revkernels.reference.rounding import bits_of, round_to

__all__ = [
    "accumulate",
    "activate",
    "amax_before_wrapping",
    "amax_of",
    "bits_of",
    "block_backward",
    "block_forward",
    "block_inverse",
    "chain_backward",
    "chain_forward",
    "chain_inverse",
    "checksum_of",
    "couple",
    "derivative",
    "norm_act",
    "norm_act_backward",
    "owners",
    "reverse_step",
    "round_to",
    "statistics_of",
    "uncouple",
    "value_of",
]
