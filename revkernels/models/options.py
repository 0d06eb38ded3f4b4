# SPDX-License-Identifier: Apache-2.0
"""Exposes the options of a model's chains as the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from revkernels.nn.streams import check_options
from revkernels.options import ActivationsOption, CouplingOption

__all__ = ["WithChains"]


class WithChains(nn.Module):
    """A model whose ``activations``, ``coupling`` and ``backend`` read and set those of all its chains."""

    def __init__(self, activations: ActivationsOption, coupling: CouplingOption, backend: str | None) -> None:
        super().__init__()
        #: For a model whose chains have been replaced.
        self._options = {"activations": activations, "coupling": coupling, "backend": backend}

    def chains(self) -> Sequence[Any]:
        """The chains; options are read from the first."""
        raise NotImplementedError

    @property
    def activations(self) -> ActivationsOption:
        """One of "reconstruct", "store" and a `MemoryBudget`: see `revkernels.nn.ReversibleSequential`."""
        found: ActivationsOption = self._get("activations")
        return found

    @activations.setter
    def activations(self, value: ActivationsOption) -> None:
        self._set(activations=value)

    @property
    def coupling(self) -> CouplingOption:
        """One of "float", "exact" and an `Exact`: see `revkernels.nn.ReversibleSequential`."""
        found: CouplingOption = self._get("coupling")
        return found

    @coupling.setter
    def coupling(self, value: CouplingOption) -> None:
        self._set(coupling=value)

    @property
    def backend(self) -> str | None:
        """Backend of couplings, norms and activations; None picks the fused one for the tensors' device."""
        found: str | None = self._get("backend")
        return found

    @backend.setter
    def backend(self, value: str | None) -> None:
        self._set(backend=value)

    def _get(self, name: str) -> Any:
        chains = self.chains()
        return getattr(chains[0], name) if chains else self._options[name]

    def _set(self, **option: Any) -> None:
        check_options(1, **{"activations": "store", "coupling": "float", "backend": None} | option)
        self._options |= option
        for chain in self.chains():
            for name, value in option.items():
                setattr(chain, name, value)
