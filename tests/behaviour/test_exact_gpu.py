# SPDX-License-Identifier: Apache-2.0
"""The exact coupling and the memory budget on a GPU: what is read late there, and what its allocator tells.

No test names a backend: REVKERNELS_BACKEND decides, and else the default of a GPU.
"""

import copy

import numpy as np
import pytest
from torch import nn

import revkernels as rk
from behaviour.common import assert_raises, rows, step, torch
from behaviour.exact_chains import KINDS, STORED, assert_same_bits, pair_of
from revkernels.measure import peak_bytes
from revkernels.models import revnet38
from revkernels.nn import ReversibleBlock, ReversibleSequential

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_device():
    """The lemma presumes kernels that do the same twice."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.device("cuda"):
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [1, 8, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", STORED)
def test_bit_for_bit(storage, kind, depth, autocast):
    make, shape, split_dim = KINDS[kind]
    net, stored = pair_of(make, depth, split_dim, STORED[storage])
    for number in range(2):
        x = rows(*shape, dtype=torch.float32)
        with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
            assert_same_bits(step(net, x, seed=number), step(stored, x, seed=number))
    net.eval()
    with torch.no_grad():
        assert torch.equal(net.inverse(net(x)), net.to_grid(x))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.random = nn.Linear(4, 4), np.random.default_rng(0)

    def forward(self, x):
        return self.layer(x) + float(self.random.standard_normal()) * 0.1


@pytest.mark.parametrize("storage", STORED)
def test_what_is_found_late_is_told(storage):
    """Checksums when the backward is over, ranges when the forward is: both name the half-step."""
    blocks = [ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)), ReversibleBlock(nn.Linear(4, 4), Noisy())]
    net = ReversibleSequential(*blocks, coupling=STORED[storage])
    y = net(rows(3, 8, dtype=torch.float32))
    assert_raises(rk.ReconstructionError, ["block 1, branch G (Noisy)", "bit for bit"], y.sum().backward)
    with torch.no_grad():
        blocks[0].F.bias.fill_(float("nan"))
    assert_raises(rk.ReconstructionError, ["block 0, branch F", "NaN"], lambda: net(rows(3, 8, dtype=torch.float32)))


@pytest.mark.parametrize("coupling", [rk.Exact(k=14), "exact"], ids=["given", "chosen"])
def test_a_capture_is_refused(coupling):
    net = ReversibleSequential(ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)), coupling=coupling)
    x = rows(3, 8, dtype=torch.float32, requires_grad=False)
    net(x)
    torch.cuda.synchronize()

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            net(x)

    assert_raises(rk.ReconstructionError, ["CUDA graph", "coupling='float'"], capture)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_budget_is_kept_to(share, offload):
    """The allocator's peak above what there was as the first chain began, and gradients as when storing.

    In float64: in float32, where convolutions take TF32, ReLUs flip and gradients differ by degrees.
    """
    torch.manual_seed(0)
    stored = revnet38(activations="store").to(torch.float64, memory_format=torch.channels_last)
    net = revnet38(activations=rk.MemoryBudget(share, offload=offload))
    net = net.to(torch.float64, memory_format=torch.channels_last)
    net.load_state_dict(copy.deepcopy(stored.state_dict()))
    x = rows(64, 3, 32, 32).detach().to(memory_format=torch.channels_last)
    for number in range(4):
        got, expected = step(net, x, seed=number), step(stored, x, seed=number)
        for name, gradient in expected.parameters.items():
            torch.testing.assert_close(got.parameters[name], gradient, rtol=1e-6, atol=1e-8)
    plan = net.plan(x)
    assert plan.measured_peak <= plan.limit * 1.02  # the allocator rounds up to 512 bytes
    assert plan.measured_seconds > 0


def test_a_planned_step_in_a_cuda_graph():
    """Planned before the capture, it is recorded as planned; nothing is measured while it is."""
    torch.manual_seed(0)
    net = revnet38(activations=rk.MemoryBudget(0.5)).to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)

    def train():
        net.zero_grad(set_to_none=False)
        net(x).square().mean().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            train()
    torch.cuda.current_stream().wait_stream(side)
    expected = [p.grad.clone() for p in net.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    graph.replay()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
    assert net.plan().kept > 0


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "inside" not in kind and "unfused" not in kind])
def test_norm_outputs_made_again(kind, autocast):
    """Bit for bit, from the kernels' other path: with statistics given."""
    make, shape, split_dim = KINDS[kind]
    net, stored = pair_of(make, 3, split_dim)
    net.activations = rk.MemoryBudget(0.5)
    x = rows(*shape, dtype=torch.float32)
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        step(net, x, seed=0), step(stored, x, seed=0)
        made = net.activations.planner.latest
        assert all(cost.made_again for cost in made.calls[0].steps)
        for k, cost in enumerate(made.calls[0].steps):
            made.choices[0][k] = cost.choices()[-1]._replace(makes_again=True)
        for number in range(2):
            assert_same_bits(step(net, x, seed=number), step(stored, x, seed=number))


def test_selective_checkpoint():
    """The bits of the plain call, with less at the peak."""
    torch.manual_seed(0)
    net = revnet38(activations="store", transitions="selective").to(memory_format=torch.channels_last)
    plain = revnet38(activations="store").to(memory_format=torch.channels_last)
    plain.load_state_dict(net.state_dict())
    x = rows(64, 3, 32, 32, dtype=torch.float32).detach().to(memory_format=torch.channels_last)
    peaks = []
    for network in (net, plain):
        step(network, x)
        peaks.append(peak_bytes(lambda network=network: network(x).square().mean().backward(), "cuda"))
    assert peaks[0] < 0.8 * peaks[1]
    got, expected = step(net, x, seed=1), step(plain, x, seed=1)
    for name, gradient in expected.parameters.items():
        torch.testing.assert_close(got.parameters[name], gradient, rtol=1e-3, atol=1e-4)
