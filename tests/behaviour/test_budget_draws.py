# SPDX-License-Identifier: Apache-2.0
"""Under a memory budget: operators that draw random numbers and do not say so are run again, from where they drew."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import torch
from revkernels.nn import ReversibleBlock, ReversibleSequential

OWN = torch.Generator()


def operator(name, work, generator=None):
    """A custom operator, not tagged as random, that takes its time."""

    @torch.library.custom_op(f"revkernels_draws::{name}", mutates_args=())
    def drop(x: torch.Tensor, p: float) -> torch.Tensor:
        for _ in range(work):
            x @ x.transpose(-1, -2)
        return x * (torch.rand(x.shape, generator=generator) > p) if p else x.clone()

    drop.register_autograd(lambda ctx, gradient: (gradient, None))
    return drop


slow, fast, theirs = operator("slow", 40), operator("fast", 0), operator("theirs", 40, OWN)


class Draws(nn.Module):
    def __init__(self, first, second, p=0.3):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.first, self.second, self.p, self.generator = first, second, p, OWN

    def forward(self, x):
        return self.c(self.second(self.b(self.first(self.a(x), self.p))))


BEHIND = {
    "another such": lambda x: fast(x, 0.3),
    "a dropout": lambda x: nn.functional.dropout(x, 0.3),
}


def gradients(activations, first, second, changes):
    """Of the third and fourth step, the latter with another probability if it ``changes``."""
    torch.manual_seed(0)
    blocks = [ReversibleBlock(Draws(first, second), Draws(first, second)) for _ in range(3)]
    net = ReversibleSequential(blocks, split_dim=-1, activations=activations)
    x, found = torch.randn(64, 32, 32), []
    for number in range(4):
        for module in net.modules():
            if isinstance(module, Draws):
                module.p = 0.0 if changes and number < 3 else 0.3
        torch.manual_seed(number), OWN.manual_seed(number)
        net.zero_grad()
        net(x).square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    return [gradient for step in found[2:] for gradient in step]


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("which", ["default", "its own"])
@pytest.mark.parametrize("changes", [False, True])
def test_as_stored(behind, which, changes, compiled):
    first = {"default": slow, "its own": theirs}[which]
    expected = gradients("store", first, BEHIND[behind], changes)
    for share in (0.4, 0.7):
        found = gradients(rk.MemoryBudget(share), first, BEHIND[behind], changes)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
