# SPDX-License-Identifier: Apache-2.0
"""Runs PyTorch Geometric's reversible graph networks (``torch_geometric.nn.GroupAddRev``) on this package's driver.

    from revkernels.integrations import pyg
    pyg.replace(model)

The classes of `revkernels.compat.pyg` are for new models; this is for existing ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from revkernels.compat.pyg import half_steps_of
from revkernels.integrations._swap import Replaced, Swapped, needs, own
from revkernels.integrations._swap import replace as _replace
from revkernels.nn import linked
from revkernels.nn.chain import run_inverse
from revkernels.options import Activations

__all__ = ["replace"]


def replace(model: Any, *, activations: Activations = "reconstruct", backend: str | None = None) -> Replaced:
    """Run every ``GroupAddRev`` in the model on this package's driver.

    The same function of the same parameters:

        y_0 = x_0 + convs[0](x_1 + ... + x_{C-1}, edge_index, ...)
        y_i = x_i + convs[i](y_{i-1}, edge_index, ...)               i = 1 .. C-1

    Layers called in sequence, ``for conv in self.convs: x = conv(x, edge_index)``, are one chain: only the last output
    is kept, at any depth. Unlike the original, the caller's x keeps its memory; dropout masks are the forward's;
    running statistics count a batch once; each conv runs once more in the backward, not twice; arguments computed by
    another network may be given to every layer; a second backward needs no ``num_bwd_passes``.

    Args:
        model: any nn.Module that contains such layers.
        activations: "reconstruct", or "store": plain activations, for comparison.
        backend: of the couplings; None takes the best on the tensors' device.

    Raises:
        MissingPackageError: PyTorch Geometric is not installed.
        ValueError: the model has no such layer. Layers with ``disable=True``, and other ``InvertibleModule``s, which
            define their own inverse, are not changed.
    """
    models = needs("torch_geometric.nn.models.rev_gnn", "torch_geometric")
    base, layer = models.InvertibleModule, models.GroupAddRev

    def look(module: nn.Module) -> tuple[type | None, str] | None:
        if not isinstance(module, base):
            return None
        if not isinstance(module, layer):
            return None, "an InvertibleModule of its own kind: only GroupAddRev is known to be additive"
        changed = own(module, layer, "forward", "inverse", "_forward", "_inverse", "_fn_apply", "_chunk")
        if changed:
            return None, changed
        if module.disable:
            return None, "disable=True: it stores its activations"
        return Layer, "GroupAddRev on the driver of revkernels"

    options = {"activations": activations, "backend": backend}
    return _replace(model, "torch_geometric", look, "a torch_geometric.nn.GroupAddRev", Layer, options)


class Layer(Swapped):
    """Replaces a ``GroupAddRev``."""

    convs: nn.ModuleList
    split_dim: int

    def forward(self, x: torch.Tensor, edge_index: Any, *args: Any) -> Any:
        """Map x, node features, to y of the same shape; see ``GroupAddRev``."""
        half_steps, words = half_steps_of(self, "x", x, edge_index, args)
        return linked.run(
            half_steps,
            x,
            len(self.convs),
            words.__getitem__,
            split_dim=self.split_dim,
            **self.revkernels_options,
        )

    def inverse(self, y: torch.Tensor, edge_index: Any, *args: Any) -> Any:
        """Return the x that `forward` maps to y, up to rounding. Differentiable, with stored activations."""
        half_steps, words = half_steps_of(self, "y", y, edge_index, args)
        return run_inverse(
            half_steps,
            y,
            len(self.convs),
            words.__getitem__,
            split_dim=self.split_dim,
            **self.revkernels_options,
        )
