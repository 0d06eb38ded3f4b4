# SPDX-License-Identifier: Apache-2.0
"""torch.export and torch.jit.trace record a chain as the plain operations that it computes, torch.fx as a whole."""

import copy
import warnings

import pytest
from torch import fx, nn

import revkernels as rk
from behaviour.common import assert_raises, torch
from revkernels.models import revnet38
from revkernels.nn import AttentionBranch, BasicBranch, MLPBranch, ReversibleBlock, ReversibleSequential

ACTIVATIONS = ["reconstruct", "store", rk.MemoryBudget(0.5)]


def chain(make, split_dim, **options):
    torch.manual_seed(0)
    return ReversibleSequential([ReversibleBlock(*make()) for _ in range(2)], split_dim=split_dim, **options).eval()


def convolutions(**options):
    return chain(lambda: (BasicBranch(8, 8), BasicBranch(8, 8)), 1, **options), torch.randn(2, 16, 5, 6)


def transformer(**options):
    return chain(lambda: (AttentionBranch(8, 2), MLPBranch(8, 16)), -1, **options), torch.randn(2, 5, 16)


def traced(net, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net, x, check_trace=False)


def exported(net, x):
    return torch.export.export(net, (x,), strict=False).module()


@pytest.mark.parametrize("record", [traced, exported])
@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("make", [convolutions, transformer])
@pytest.mark.parametrize("grad", [True, False])
def test_a_chain(make, activations, record, grad, compiled):
    net, x = make(activations=activations)
    with torch.set_grad_enabled(grad):
        recorded = record(net, x)
    other = torch.randn_like(x)
    with torch.no_grad():
        torch.testing.assert_close(recorded(other), net(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("record", [traced, exported])
def test_a_network_in_training(record, compiled):
    """What is recorded trains too: the gradients are those of the network."""
    torch.manual_seed(0)
    net, x = revnet38(), torch.randn(4, 3, 32, 32)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    recorded = record(net, x)
    recorded(x).square().mean().backward()
    found = {name: p.grad.clone() for name, p in recorded.named_parameters()}
    net.zero_grad()
    net(x).square().mean().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.02 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("record", [traced, exported])
@pytest.mark.parametrize("transitions", ["selective", "recompute"])
def test_what_lies_between_chains(transitions, record, compiled):
    """In grad mode: checkpoints are the plain call there."""
    torch.manual_seed(0)
    net, x = revnet38(transitions=transitions).eval(), torch.randn(2, 3, 32, 32)
    recorded = record(net, x)
    with torch.no_grad():
        torch.testing.assert_close(recorded(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("record", [traced, exported])
def test_refusals(record, compiled):
    net, x = convolutions(coupling="exact")
    assert_raises(rk.ReconstructionError, ["exact coupling", "coupling='float'"], lambda: record(net, x))
    net, x = convolutions()
    net[0].register_forward_hook(lambda block, inputs, y: None)
    assert_raises(rk.ReconstructionError, ["blocks have hooks"], lambda: record(net, x))


class Between(nn.Module):
    """Chains between other layers: given a tensor, a pair, an argument beside it; and a block alone."""

    def __init__(self, activations):
        super().__init__()
        pairs = [(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.2))) for _ in range(3)]
        self.chain, self.pair = (ReversibleSequential(ReversibleBlock(*p), activations=activations) for p in pairs[:2])
        self.block = ReversibleBlock(*pairs[2], activations=activations)
        self.scaled = ReversibleBlock(Scaled(), nn.Tanh(), activations=activations)

    def forward(self, x, scale):
        x = self.scaled(self.block(self.chain(x.sin())), scale=scale.exp())
        y1, y2 = self.pair(x.chunk(2, 1))
        return y1 * y2


class Scaled(nn.Module):
    def forward(self, h, scale):
        return h.cos() * scale


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
def test_torch_fx(activations, backend):
    """Its graph calls chains as it does torch's own layers, and trains as the network does."""
    torch.manual_seed(0)
    net = Between(activations).double()
    graph = fx.symbolic_trace(copy.deepcopy(net))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == [
        "chain",
        "block",
        "scaled",
        "pair",
    ]
    x, scale = torch.randn(5, 8).double(), torch.randn(4).double().requires_grad_()
    found = []
    for network in (net, graph):
        torch.manual_seed(1)
        network.zero_grad()
        scale.grad = None
        y = network(x, scale)
        y.sin().sum().backward()
        found.append(
            [y, scale.grad, {name: p.grad for name, p in network.named_parameters()}, dict(network.state_dict())]
        )
    torch.testing.assert_close(*found)


class ArgumentAlone(Between):
    """What torch.fx gives a symbol for is the argument, or a half of the pair."""

    def forward(self, x, scale):
        y1, y2 = self.pair((torch.ones(5, 4, dtype=torch.float64), x.chunk(2, 1)[0]))
        return self.scaled(torch.ones(5, 8, dtype=torch.float64), scale=scale) + torch.cat([y1, y2], 1)


def test_torch_fx_of_an_argument_alone():
    torch.manual_seed(0)
    net, given = ArgumentAlone("store").double().eval(), [torch.randn(5, 8).double(), torch.randn(4).double()]
    torch.testing.assert_close(fx.symbolic_trace(net)(*given), net(*given))


def test_torch_fx_of_a_chain_by_itself():
    net, _ = convolutions()
    parts = ["traces a ReversibleSequential by itself", "trace a network that holds it"]
    assert_raises(TypeError, parts, lambda: fx.symbolic_trace(net))
