# SPDX-License-Identifier: Apache-2.0
"""Train a deep reversible graph network of PyTorch Geometric, as it is and on the driver of revkernels.

    pip install '.[torch]' torch_geometric      # in a checkout
    python examples/revgnn.py
    python examples/revgnn.py --layers 112 --nodes 10000

The network is that of PyTorch Geometric's own example (examples/rev_gnn.py): GroupAddRev layers in a loop, one dropout
mask that they share (Li et al. 2021, "Training Graph Neural Networks with 1000 Layers"). The data are made here: nodes
of a few communities, most edges inside a community, features that say little of it. The network is trained three times,
from the same weights: with stored activations, with PyTorch Geometric's own driver, and with `pyg.replace(model)`.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.nn import GroupAddRev, SAGEConv

from revkernels.integrations import pyg
from revkernels.measure import peak_bytes

COMMUNITIES, FEATURES = 4, 8


class Graph(NamedTuple):
    x: Tensor  # [nodes, FEATURES]
    edge_index: Tensor  # [2, edges]
    label: Tensor  # [nodes]
    train: Tensor  # [nodes], bool


def communities(nodes: int) -> Graph:
    """A graph of communities: eight edges a node, three of four to the same community."""
    label = torch.arange(nodes) % COMMUNITIES
    source = torch.arange(nodes).repeat(8)
    anywhere = torch.randint(nodes, (8 * nodes,))
    same = anywhere - anywhere % COMMUNITIES + label[source]
    target = torch.where(torch.rand(8 * nodes) < 0.75, same.clamp(max=nodes - 1), anywhere)
    x = torch.randn(nodes, FEATURES) + 0.5 * functional.one_hot(label, FEATURES)
    return Graph(x, torch.stack((source, target)), label, torch.rand(nodes) < 0.5)


class GNNBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = SAGEConv(channels, channels)

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        self.conv.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        x = self.norm(x).relu()
        if self.training and dropout_mask is not None:
            x = x * dropout_mask
        return self.conv(x, edge_index)


class RevGNN(nn.Module):
    def __init__(self, hidden: int, layers: int, dropout: float, groups: int = 2) -> None:
        super().__init__()
        self.dropout = dropout
        self.lin1 = nn.Linear(FEATURES, hidden)
        self.lin2 = nn.Linear(hidden, COMMUNITIES)
        self.norm = nn.LayerNorm(hidden)
        self.convs = nn.ModuleList(GroupAddRev(GNNBlock(hidden // groups), num_groups=groups) for _ in range(layers))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.lin1(x)
        mask = None
        if self.training and self.dropout > 0:
            mask = torch.zeros_like(x).bernoulli_(1 - self.dropout) / (1 - self.dropout)
        for conv in self.convs:
            x = conv(x, edge_index, mask)
        return self.lin2(functional.dropout(self.norm(x).relu(), self.dropout, self.training))


def train(model: RevGNN, graph: Graph, epochs: int) -> tuple[list[float], float, int, float]:
    """Return the losses, the accuracy on the other nodes, the peak bytes and the seconds of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(1)
    losses: list[float] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss = functional.cross_entropy(model(graph.x, graph.edge_index)[graph.train], graph.label[graph.train])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model.train()
    step()  # gradients and the optimizer's state are there from now on
    peak = peak_bytes(step)
    start = time.perf_counter()
    for _ in range(epochs - 2):
        step()
    seconds = (time.perf_counter() - start) / max(epochs - 2, 1)
    model.eval()
    with torch.no_grad():
        right = model(graph.x, graph.edge_index).argmax(1) == graph.label
    return losses, right[~graph.train].float().mean().item(), peak, seconds


def main(arguments: list[str] | None = None) -> dict[str, tuple[list[float], float, int, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64, help="features of a node")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=20, help="2 or more")
    parser.add_argument("--dropout", type=float, default=0.2)
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first one warms up")

    torch.manual_seed(0)
    graph = communities(options.nodes)
    model = RevGNN(options.hidden, options.layers, options.dropout)
    models = {
        "stored activations": copy.deepcopy(model),
        "PyTorch Geometric": copy.deepcopy(model),
        "revkernels": model,
    }
    for conv in models["stored activations"].convs:
        conv.disable = True
    print(pyg.replace(model))
    print(f"\n{'':20}{'last loss':>10}{'accuracy':>10}{'peak MiB':>10}{'s a step':>10}")
    found = {}
    for name, candidate in models.items():
        losses, accuracy, peak, seconds = found[name] = train(candidate, graph, options.epochs)
        print(f"{name:20}{losses[-1]:10.4f}{accuracy:10.1%}{peak / 2**20:10.1f}{seconds:10.2f}")
    return found


if __name__ == "__main__":
    main()
