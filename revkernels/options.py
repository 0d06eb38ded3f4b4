# SPDX-License-Identifier: Apache-2.0
"""The types of the options of chains, models and integrations, for annotations."""

from __future__ import annotations

from typing import Literal

from revkernels.budget import MemoryBudget
from revkernels.exact import Exact

__all__ = ["Activations", "ActivationsOption", "CouplingOption", "Transitions"]

#: Whether activations are reconstructed in the backward or stored.
Activations = Literal["reconstruct", "store"]
#: The same, or how much may be stored: see `revkernels.nn.ReversibleSequential`.
ActivationsOption = Activations | MemoryBudget
#: Streams in floating point, or streams that are reconstructed bit for bit.
CouplingOption = Literal["float", "exact"] | Exact
#: What a `revkernels.models.RevNet` stores of its stem and transitions.
Transitions = Literal["store", "selective", "recompute"]
