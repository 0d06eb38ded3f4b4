# SPDX-License-Identifier: Apache-2.0
"""Row 32: a branch that differentiates while it runs, where torch's engine computes that in a thread of its own."""

import threading

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import WIDE, assert_all_close, loss_of, mlp, rows, torch, twins
from revkernels.autograd import accumulate, ownership


class Reentrant(torch.autograd.Function):
    """The identity, whose backward calls itself: a backward within a backward, so many deep. The innermost calls f."""

    @staticmethod
    def forward(ctx, x, f, depth):
        ctx.f, ctx.depth = f, depth
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if not ctx.depth:
            ctx.f()
        else:
            with torch.enable_grad():
                x = torch.ones((), requires_grad=True)
                torch.autograd.grad(Reentrant.apply(x, ctx.f, ctx.depth - 1), x)
        return gradient, None, None


class DifferentiatesElsewhere(nn.Module):
    """Batch norm, and the gradient of a chain inside it, computed in a thread that torch's engine starts: on the host
    it does so beyond 60 backwards within each other, on a device always."""

    def __init__(self, depth, when):
        super().__init__()
        layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
        self.inner = rk.nn.ReversibleSequential(rk.nn.ReversibleBlock(layers, nn.Tanh())).to(WIDE)
        self.depth, self.when, self.threads = depth, when, []

    def forward(self, x):
        with torch.enable_grad():
            leaf, gradients = x.detach().requires_grad_(), []
            y = self.inner(leaf) if self.when == "before" else None

            def differentiate():
                with torch.enable_grad():
                    loss = loss_of(self.inner(leaf) if y is None else y)
                gradients.extend(torch.autograd.grad(loss, leaf))
                self.threads.append(threading.get_ident())

            one = torch.ones((), requires_grad=True)
            torch.autograd.grad(Reentrant.apply(one, differentiate, self.depth), one)
        return self.inner(x) + gradients[0]


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_branch_that_differentiates_in_a_thread_of_the_engine(backend, when):
    """Its recomputes have the turn that the branch has, in the forward and in the recompute: none waits for the other.
    The inner chain's forward was before the backward, or within it."""
    net, plain = twins([(DifferentiatesElsewhere(70, when), mlp())], backend=backend)
    x, outcomes = rows(6, 8), []

    def both():
        for network in (net, plain):
            y = network(x)
            outcomes.append([y, *torch.autograd.grad(loss_of(y), [x, *network.parameters()]), *network.buffers()])

    thread = threading.Thread(target=both, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for itself"
    assert_all_close(*outcomes)
    assert net[0].F.threads and thread.ident not in net[0].F.threads


@pytest.mark.skipif(not ownership.COUNTABLE, reason="torch does not count references here")
def test_counts_that_another_thread_of_the_engine_would_have_learnt(monkeypatch):
    """The first chain of a process may be called inside a backward, in which torch moves the next one to a thread."""
    for depth in range(57, 64):
        monkeypatch.setattr(accumulate, "_free", {})
        x = torch.ones((), requires_grad=True)
        torch.autograd.grad(Reentrant.apply(x, accumulate.prepare, depth), x)
        assert all(map(len, accumulate._free.values())), f"learnt from nothing, {depth} deep"
