# SPDX-License-Identifier: Apache-2.0
"""Couplings of a normalizing flow: some features of one tensor, shifted by a function of the others.

    y[shifted] = x[shifted] + net(x[read])        y[else] = x[else]        log |det dy/dx| = 0

(Dinh, Krueger, Bengio 2014, "NICE: Non-linear Independent Components Estimation", section 3.2.) The features differ
between couplings, and change with every permutation. So the whole tensor is one stream, to which a branch adds zero
wherever it reads: the branch then reads the same values before and after, which is all that a reversible chain needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from revkernels.nn import linked
from revkernels.nn.chain import HalfStep

#: A branch's function; its arguments are the features that it reads, and others.
Shift = Callable[..., torch.Tensor]


class Masked:
    """``shift`` as a branch of the whole tensor.

    Args:
        shift: called with the features that it reads, and further arguments.
        read, shifted: disjoint features of dimension 1: index tensors, or two slices that together cover the dimension.
        sign: -1 for the inverse.
    """

    def __init__(self, shift: Shift, read: Any, shifted: Any, sign: int = 1) -> None:
        self.shift, self.read, self.shifted, self.sign = shift, read, shifted, sign

    def __call__(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        f = self.shift(x[:, self.read], *args)
        if self.sign < 0:
            f = -f
        if isinstance(self.shifted, slice):
            nothing = f.new_zeros(()).expand(x[:, self.read].shape)
            return torch.cat((nothing, f) if self.shifted.start else (f, nothing), 1)
        return f.new_zeros(x.shape).index_copy(1, self.shifted, f)


def through(
    branches: Sequence[tuple[Masked, str, tuple[Any, ...]]], x: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Run branches, each with its name and further arguments, on all of x, continuing the call that returned x."""
    half_steps = [HalfStep(branch, 0, (0,), args) for branch, _, args in branches]
    names = [name for _, name, _ in branches]
    (y,) = linked.run(half_steps, (x,), 1, names.__getitem__, **options)
    return y
