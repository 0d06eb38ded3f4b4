# SPDX-License-Identifier: Apache-2.0
"""Additive couplings of normalizing flows built with ``nflows``, on the driver of this package.

from revkernels.integrations import nflows
nflows.replace(flow)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from revkernels.integrations._masked import Masked, through
from revkernels.integrations._swap import Replaced, Swapped, needs, own
from revkernels.integrations._swap import replace as _replace
from revkernels.nn import linked
from revkernels.options import Activations

__all__ = ["replace"]


def replace(model: Any, *, activations: Activations = "reconstruct", backend: str | None = None) -> Replaced:
    """Run every ``AdditiveCouplingTransform`` in the model on this package's driver, with the permutations in between.

    The same function, inverse and log-determinant (0) of the same parameters. Consecutive couplings, ``Permutation``s
    and ``SqueezeTransform``s, in a ``CompositeTransform`` or however they are called, are one chain: only the last
    output is kept, at any depth, forward and inverse alike. Any other transform in between (an affine coupling,
    LULinear, BatchNorm) stores its activations as before, and interrupts the chain, which keeps one more output there.

    Args:
        model: any nn.Module that contains such transforms, such as a ``Flow``.
        activations: "reconstruct", or "store": plain activations, for comparison.
        backend: of the couplings; None takes the best on the tensors' device.

    Raises:
        MissingPackageError: nflows is not installed.
        ValueError: the model has no additive coupling.
    """
    base = needs("nflows.transforms.base", "nflows")
    couplings = needs("nflows.transforms.coupling", "nflows")
    permutations = needs("nflows.transforms.permutations", "nflows")
    reshapes = needs("nflows.transforms.reshape", "nflows")
    additive = couplings.AdditiveCouplingTransform
    passed_over = (base.CompositeTransform, base.InverseTransform, base.MultiscaleCompositeTransform)

    inner = ("_scale_and_shift", "_coupling_transform_forward", "_coupling_transform_inverse")

    def look(module: nn.Module) -> tuple[type | None, str] | None:
        if isinstance(module, additive):
            changed = own(module, additive, "forward", "inverse", *inner)
            if changed:
                return None, changed
            if module.unconditional_transform is not None:
                return None, "its unconditional transform is not additive"
            return Coupling, "additive coupling on the driver of revkernels"
        for kind in (permutations.Permutation, reshapes.SqueezeTransform):
            if isinstance(module, kind):
                changed = own(module, kind, "forward", "inverse")
                return (None, changed) if changed else (Rearranging, "part of the chain")
        if isinstance(module, base.Transform) and not isinstance(module, passed_over):
            return None, "not additive: stores its activations, and ends a chain"
        return None

    options = {"activations": activations, "backend": backend}
    return _replace(model, "nflows", look, "an nflows.transforms.AdditiveCouplingTransform", Coupling, options)


class Coupling(Swapped):
    """Replaces an ``AdditiveCouplingTransform``."""

    features: int
    identity_features: torch.Tensor
    transform_features: torch.Tensor
    transform_net: nn.Module

    def forward(self, inputs: torch.Tensor, context: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, D) or (N, C, H, W) to the same, and its log |det|, 0 of shape (N,)."""
        return self._couple(inputs, context, 1)

    def inverse(self, inputs: torch.Tensor, context: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse, also a coupling: the same net with the opposite sign."""
        return self._couple(inputs, context, -1)

    def _couple(self, inputs: torch.Tensor, context: Any, sign: int) -> tuple[torch.Tensor, torch.Tensor]:
        if inputs.dim() not in (2, 4):
            raise ValueError(f"inputs has shape {tuple(inputs.shape)}; it must be (N, features) or (N, features, H, W)")
        if inputs.shape[1] != self.features:
            raise ValueError(f"inputs has {inputs.shape[1]} features; it must have {self.features}")
        branch = Masked(self.transform_net, self.identity_features, self.transform_features, sign)
        outputs = through([(branch, "transform_net", (context,))], inputs, self.revkernels_options)
        return outputs, inputs.new_zeros(inputs.shape[0])


class Rearranging(Swapped):
    """Replaces a ``Permutation`` or a ``SqueezeTransform``: the same function, as a part of its chain."""

    def forward(self, inputs: torch.Tensor, context: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Transform``."""
        return self._rearrange(inputs, super().forward, super().inverse)  # type: ignore[misc]

    def inverse(self, inputs: torch.Tensor, context: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Transform``."""
        return self._rearrange(inputs, super().inverse, super().forward)  # type: ignore[misc]

    def _rearrange(
        self, inputs: torch.Tensor, there: Callable[..., Any], back: Callable[..., Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = linked.rearrange(inputs, lambda x: there(x)[0], lambda y: back(y)[0])
        return outputs, inputs.new_zeros(inputs.shape[0])
