# SPDX-License-Identifier: Apache-2.0
"""What a type checker makes of a user's code. Not run: `make lint` has mypy check it, strictly."""
# mypy: disallow-any-generics, disallow-untyped-calls, warn-return-any, no-implicit-reexport, strict-equality

import numpy as np
import torch
from torch import nn
from typing_extensions import assert_type

import revkernels as rk
from revkernels import diagnostics, models
from revkernels.nn import (
    FusedSequential,
    ReversibleBlock,
    ReversibleSequential,
    checkpoint,
    selective_checkpoint,
    stateless,
)


@stateless
class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


def blend(x: torch.Tensor, share: float) -> tuple[torch.Tensor, int]:
    return x * share, 1


x = torch.randn(2, 8)
net = ReversibleSequential([ReversibleBlock(F=Branch(), G=Branch())], activations="store", coupling="exact")
net.activations, net.coupling = rk.MemoryBudget("2GiB"), rk.Exact(storage="int16")

assert_type(Branch(), Branch)
assert_type(net[0], ReversibleBlock)
assert_type(net[:2], ReversibleSequential)
assert_type([block.split_dim for block in net], list[int])
assert_type(net.inverse(x), torch.Tensor)
assert_type(net.inverse((x, x)), tuple[torch.Tensor, ...])
assert_type(net[0].to_grid(x), torch.Tensor)
assert_type(FusedSequential(nn.LayerNorm(8), nn.GELU())[:1], FusedSequential)
assert_type(checkpoint(blend, x, share=0.5), tuple[torch.Tensor, int])
assert_type(selective_checkpoint(blend, x, 0.5), tuple[torch.Tensor, int])
assert_type(models.revnet38(num_classes=10).forward(x), torch.Tensor)
assert_type(str(diagnostics.memory_report(net, x)), str)

assert_type(rk.ops.couple(x, x), torch.Tensor)
assert_type(rk.ops.couple(np.ones(3), np.ones(3)), "np.ndarray[tuple[int], np.dtype[np.float64]]")

ReversibleSequential(activations="sotre")  # type: ignore[arg-type]
checkpoint(blend, x, portion=0.5)  # type: ignore[call-arg]
net.inverse(1)  # type: ignore[type-var]
