# SPDX-License-Identifier: Apache-2.0
"""Additive couplings of invertible networks built with ``FrEIA``, on the driver of this package.

from revkernels.integrations import freia
freia.replace(inn)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Run every ``NICECouplingBlock`` in the model on this package's driver, with the permutations in between.

        y1 = x1 + F(x2, c)        y2 = x2 + G(y1, c)        log |det dy/dx| = 0

    The same function, inverse (``rev=True``) and log-determinant of the same parameters, including conditions.
    Consecutive couplings, ``PermuteRandom``, ``Reshape`` and ``Flatten``, in a ``SequenceINN`` or a ``GraphINN``, are
    one chain: only the last output is kept, at any depth, in both directions. Any other module in between (an affine
    coupling, including GIN's, ActNorm, a wavelet, Split) stores its activations as before, and interrupts the chain,
    which keeps one more output there.

    A ``GraphINN`` holds every node's output until its forward returns. Here it releases an output after the last node
    that reads it.

    Args:
        model: any nn.Module that contains such blocks.
        activations: "reconstruct", or "store": plain activations, for comparison.
        backend: of the couplings; None takes the best on the tensors' device.

    Raises:
        MissingPackageError: FrEIA is not installed.
        ValueError: the model has no additive coupling.
    """
    modules = needs("FrEIA.modules", "FrEIA")
    framework = needs("FrEIA.framework", "FrEIA")
    nice = modules.NICECouplingBlock
    fixed = (modules.PermuteRandom, modules.Reshape, modules.Flatten)

    def look(module: nn.Module) -> tuple[type | None, str] | None:
        if isinstance(module, nice):
            changed = own(module, nice, "forward", "_coupling1", "_coupling2")
            return (None, changed) if changed else (Coupling, "additive coupling on the driver of revkernels")
        for kind in fixed:
            if isinstance(module, kind):
                changed = own(module, kind, "forward")
                return (None, changed) if changed else (Rearranging, "part of the chain")
        if isinstance(module, framework.GraphINN):
            changed = own(module, framework.GraphINN, "forward", "_check_output")
            return (None, changed) if changed else (Graph, "lets go of outputs that were read")
        if isinstance(module, modules.InvertibleModule) and not isinstance(module, framework.SequenceINN):
            return None, "not additive: stores its activations, and ends a chain"
        return None

    options = {"activations": activations, "backend": backend}
    return _replace(model, "FrEIA", look, "a FrEIA.modules.NICECouplingBlock", Coupling, options)


class Coupling(Swapped):
    """Replaces a ``NICECouplingBlock``."""

    F: nn.Module
    G: nn.Module
    split_len1: int
    conditional: bool

    def forward(self, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> tuple[tuple[torch.Tensor], float]:
        """See ``NICECouplingBlock``."""
        given = tuple(c) if self.conditional else ()
        first, second = slice(0, self.split_len1), slice(self.split_len1, None)
        sign = -1 if rev else 1
        branches = [
            (Masked(_Conditioned(self.F), second, first, sign), "F", given),
            (Masked(_Conditioned(self.G), first, second, sign), "G", given),
        ]
        y = through(branches[::-1] if rev else branches, x[0], self.revkernels_options)
        return (y,), 0.0


class _Conditioned:
    """A subnetwork that takes its conditions as further features."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, u: torch.Tensor, *c: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat((u, *c), 1) if c else u)


class Rearranging(Swapped):
    """Replaces a ``PermuteRandom``, ``Reshape`` or ``Flatten``: the same function, as a part of its chain."""

    def forward(self, x_or_z: Any, *args: Any, rev: bool = False, **kwargs: Any) -> Any:
        """See ``InvertibleModule``."""
        theirs = super().forward

        def towards(rev: bool) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda x: theirs((x,), *args, rev=rev, **kwargs)[0][0]

        return (linked.rearrange(x_or_z[0], towards(rev), towards(not rev)),), 0.0


class Graph(Swapped):
    """Replaces a ``GraphINN``: the same function, but it releases an output after the last node that reads it."""

    in_nodes: Sequence[Any]
    out_nodes: Sequence[Any]
    condition_nodes: Sequence[Any]
    node_list: Sequence[Any]
    force_tuple_output: bool

    def forward(self, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True, **kwargs: Any) -> Any:
        """See ``GraphINN``."""
        given = (x_or_z,) if torch.is_tensor(x_or_z) else tuple(x_or_z)
        conditions = (c,) if torch.is_tensor(c) else tuple(c or ())
        starts, ends = (self.out_nodes, self.in_nodes) if rev else (self.in_nodes, self.out_nodes)
        if kwargs or len(given) != len(starts) or len(conditions) != len(self.condition_nodes):
            return super().forward(x_or_z, c, rev, jac, **kwargs)  # asks for all outputs, or is invalid
        outputs = {(node, 0): x for node, x in zip(starts, given, strict=True)}
        of_condition = dict(zip(self.condition_nodes, conditions, strict=True))
        jacobian = given[0].new_zeros(given[0].shape[0])
        for node in self.node_list[:: -1 if rev else 1]:
            if node.module is None:  # an end of the graph
                continue
            inputs = tuple(outputs.pop(place) for place in (node.outputs if rev else node.inputs))  # its only reader
            options = {"c": tuple(of_condition[condition] for condition in node.conditions)} if node.conditions else {}
            try:
                made = node.module(inputs, **options, rev=rev, jac=jac)
            except Exception as error:
                raise RuntimeError(f"{node} encountered an error.") from error  # as in the original
            made, of_node = self._check_output(node, made, jac, rev)  # type: ignore[operator]
            outputs.update({(node, index): y for index, y in enumerate(made)})
            if jac:
                jacobian = jacobian + of_node
            del inputs, made
        results = tuple(outputs[(end.outputs if rev else end.inputs)[0]] for end in ends)
        return (results[0] if len(results) == 1 and not self.force_tuple_output else results), jacobian
