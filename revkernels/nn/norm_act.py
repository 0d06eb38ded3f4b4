# SPDX-License-Identifier: Apache-2.0
"""A norm and the following activation as one module."""

from __future__ import annotations

from typing import Any

from torch import nn

from revkernels.autograd.fused import fusion
from revkernels.autograd.fused.known_layers import ACTIVATION_LAYERS, fusable_at
from revkernels.autograd.fused.norm_context import ambient
from revkernels.autograd.state.plain_layers import plain
from revkernels.nn.fusion import FusedSequential, norms_by

__all__ = ["NormAct"]


@plain
class NormAct(FusedSequential):
    """h = activation(norm(x)) in one kernel, with one kernel for its backward, saving only x in between.

        NormAct(nn.BatchNorm2d(64), nn.ReLU())        NormAct(nn.LayerNorm(384))

    The modules are kept as "0" and "1", as in ``nn.Sequential(norm, activation)``, with their parameters, buffers and
    modes. What the kernels do not support (see `FusedSequential`) runs as these modules.

    Args:
        norm: BatchNorm1d, 2d or 3d, LayerNorm or RMSNorm of one dimension, or GroupNorm.
        activation: ReLU, GELU or SiLU; None is none.
        backend: as in `revkernels.nn.ReversibleBlock`; inside a chain, the chain's backend applies.

    Raises:
        TypeError: a module is none of these (exactly: a subclass may do anything).
        BackendError: the backend cannot run here.
    """

    def __init__(self, norm: nn.Module, activation: nn.Module | None = None, backend: str | None = None) -> None:
        layers = [norm] if activation is None else [norm, activation]
        if isinstance(norm, nn.Module):
            found = fusable_at(layers, 0)
            if isinstance(found, str):
                raise TypeError(f"norm: {found}")
        else:
            raise TypeError(f"norm is a {type(norm).__name__}; it must be an nn.Module")
        if activation is not None and type(activation) not in ACTIVATION_LAYERS:
            known = ", ".join(layer.__name__ for layer in ACTIVATION_LAYERS)
            raise TypeError(f"activation is a {type(activation).__name__}; it must be one of {known}, or None")
        if backend is not None:
            fusion.backends.require(backend)
        super().__init__(*layers)
        self.backend = backend

    def forward(self, input: Any, **kwargs: Any) -> Any:
        """An input of any shape that the norm accepts -> h of that shape."""
        with norms_by(self.backend if ambient.kernels is None else None, input):
            return super().forward(input, **kwargs)

    forward.passes_keywords = True  # type: ignore[attr-defined]
