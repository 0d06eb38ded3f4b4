# SPDX-License-Identifier: Apache-2.0
"""The options that blocks and chains share, checked wherever they are set."""

from __future__ import annotations

from typing import Any

from revkernels.nn.exact import KeepsGrid
from revkernels.nn.streams import check_option
from revkernels.options import ActivationsOption, CouplingOption

#: Each option and its default.
OPTIONS: dict[str, Any] = {"split_dim": 1, "activations": "reconstruct", "coupling": "float", "backend": None}


class WithOptions(KeepsGrid):
    """A module with these options. What they mean: `revkernels.nn.ReversibleBlock`."""

    def _set_options(
        self, split_dim: int, activations: ActivationsOption, coupling: CouplingOption, backend: str | None
    ) -> None:
        """Set all of them."""
        self.split_dim = split_dim
        self.activations = activations
        self.coupling = coupling
        self.backend = backend

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            check_option(name, value)
        super().__setattr__(name, value)


def check_block(chain: Any, block: Any, index: int) -> None:
    """Raise ValueError for an option of a chain's block that the chain would not use."""
    for name, default in OPTIONS.items():
        own, whole = getattr(block, name), getattr(chain, name)
        if own != default and own != whole:
            raise ValueError(
                f"blocks[{index}] has {name}={own!r}, the chain {name}={whole!r}: in a chain the chain's options "
                f"hold. Give {name}={own!r} to the ReversibleSequential"
            )
