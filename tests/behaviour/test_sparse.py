# SPDX-License-Identifier: Apache-2.0
"""Branches with sparse tensors: a graph's adjacency as a buffer, an attribute or an argument, and what they make."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import WIDE, check_step, pairs_of, rows, torch, twins
from revkernels import diagnostics
from revkernels.nn import ReversibleBlock, ReversibleSequential

ACTIVATIONS = ["reconstruct", "store", rk.MemoryBudget("50%"), rk.MemoryBudget("100%")]


def adjacency(layout=torch.sparse_coo):
    return torch.eye(5, dtype=WIDE).roll(1, 0).to_sparse(layout=layout)


class OnAGraph(nn.Module):
    """The neighbours' features, by a matrix that hangs on the module in one way or another."""

    def __init__(self, held, layout):
        super().__init__()
        self.layer = nn.Linear(4, 4).to(WIDE)
        self.held = held
        if held.startswith("buffer"):
            self.register_buffer("a", adjacency(layout))
        elif held == "attribute":
            self.a = adjacency(layout)

    def forward(self, x):
        if self.held == "made":
            return self.layer(x).relu().to_sparse().to_dense()
        if self.held == "buffer, written":
            self.a.mul_(0.5)
        elif self.held == "buffer, replaced":
            self.a = self.a * 0.5
        return torch.sparse.mm(self.a, self.layer(x).tanh())

    def __deepcopy__(self, memo):  # torch copies no compressed ones
        other = OnAGraph(self.held, self.a.layout if hasattr(self, "a") else torch.sparse_coo)
        other.layer.load_state_dict(self.layer.state_dict())
        return other


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("held", ["buffer", "buffer, written", "buffer, replaced", "attribute", "made"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_held(held, activations, compiled):
    net, plain = twins(pairs_of(lambda: OnAGraph(held, torch.sparse_coo), 3), activations=activations)
    check(net, plain)


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_compressed(activations, compiled):
    net, plain = twins(pairs_of(lambda: OnAGraph("buffer", torch.sparse_csr), 3), activations=activations)
    check(net, plain)


class Given(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4).to(WIDE)

    def forward(self, x, a):
        return torch.sparse.mm(a, self.layer(x).tanh())


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
def test_given(activations, compiled):
    net, plain = twins(pairs_of(Given, 3), activations=activations)
    check_step(net, plain, rows(5, 8), adjacency(), steps=3)


class Looked(nn.Module):
    """Adds what a table says of each row."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * self.table((x.detach()[:, 0].abs() * 3).long().clamp(max=9))


def test_drift_of_sparse_gradients():
    net = ReversibleSequential([ReversibleBlock(Looked(), Looked()) for _ in range(2)])
    for row in diagnostics.drift(net, rows(5, 8, dtype=torch.float32), depths=[2], precisions=["float32"]).rows:
        assert row.angle_degrees is not None and row.angle_degrees < 0.1


def check(net, plain):
    """Steps with the buffers compared as dense ones."""
    for network in (net, plain):
        network.named_buffers = lambda network=network: (
            (name, b.to_dense()) for name, b in nn.Module.named_buffers(network)
        )
    check_step(net, plain, rows(5, 8), steps=3)
