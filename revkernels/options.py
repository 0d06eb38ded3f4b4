# SPDX-License-Identifier: Apache-2.0
"""The types of the options that chains, models and integrations take, for annotations of your own."""

from __future__ import annotations

from typing import Literal

from revkernels.budget import MemoryBudget
from revkernels.exact import Exact

__all__ = ["Activations", "ActivationsOption", "CouplingOption", "Transitions"]

#: Whether activations are rebuilt in the backward or kept.
Activations = Literal["reconstruct", "store"]
#: The same, or how much may be kept: see `revkernels.nn.ReversibleSequential`.
ActivationsOption = Activations | MemoryBudget
#: Of streams in floating point, or of ones that come back bit for bit.
CouplingOption = Literal["float", "exact"] | Exact
#: What a `revkernels.models.RevNet` keeps of its stem and transitions.
Transitions = Literal["store", "selective", "recompute"]
