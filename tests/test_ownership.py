# SPDX-License-Identifier: Apache-2.0
"""Whose memory may be written over. torch is asked through functions that it does not document: if an update takes them
away, results stay right, and memory and speed are lost without a word. So this is where it is said."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from revkernels.autograd import accumulate, ownership  # noqa: E402
from revkernels.nn import ReversibleBlock, ReversibleSequential  # noqa: E402
from revkernels.reference import backend as kernels  # noqa: E402

BLOCKS = 5
SUMS = 2 * BLOCKS - 1  # of the kernels, in a chain that returns a pair


def test_this_torch_counts_the_holders_of_a_tensor():
    """The private functions are there, and every kind of holder is seen."""
    assert ownership.COUNTABLE
    tensor = torch.zeros(4)
    alone = ownership.holders(tensor)
    same = tensor
    assert ownership.holders(tensor) == (alone[0] + 1, alone[1], alone[2])
    del same
    view = tensor[1:]
    assert ownership.holders(tensor)[2] > alone[2]
    del view
    assert ownership.holders(tensor) == alone
    leaf = torch.zeros(4, requires_grad=True)
    leaf.grad = tensor  # held from C++
    assert ownership.holders(tensor)[1] > alone[1]


def test_memory_is_free():
    """Only if nothing else uses it, and no part of it is left out."""
    tensor = torch.zeros(4)
    assert ownership.memory_is_free(tensor)
    view = tensor.view(2, 2)
    assert not ownership.memory_is_free(tensor)
    del view
    assert ownership.memory_is_free(tensor)
    assert not ownership.memory_is_free(torch.zeros(4)[1:])
    assert not ownership.memory_is_free(torch.zeros(1).expand(4))


def chain():
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2 * BLOCKS)]
    blocks = map(ReversibleBlock, branches[::2], branches[1::2])
    return ReversibleSequential(*blocks, backend="reference").double()


def record(monkeypatch, name):
    """Let the kernel run as ever, and keep what it wrote to and the first thing that it read."""
    kernel, seen = getattr(kernels, name), []

    def recording(*args):
        seen.append(args[:2])
        return kernel(*args)

    monkeypatch.setattr(kernels, name, recording)
    return seen


@pytest.mark.parametrize("held", [False, True])
def test_a_chain_accumulates_its_gradients_in_place(held, monkeypatch):
    """Algorithm 1's two sums a block, each over one of its terms; with a hook that keeps the terms, never. The last sum
    is torch's own, for it belongs to a stream that the caller holds."""
    net, pair = chain(), [torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    y1, y2 = net(tuple(pair))
    loss = (y1 * y2).sum()
    kept = []
    if held:
        original = torch.autograd.graph.Node  # every gradient that any node of the graph is given
        pending, visited = [loss.grad_fn], set()
        while pending:
            node = pending.pop()
            if isinstance(node, original) and node not in visited:
                visited.add(node)
                node.register_prehook(kept.append)
                pending += [next_node for next_node, _ in node.next_functions if next_node is not None]
    sums, made = record(monkeypatch, "accumulate"), record(monkeypatch, "couple")
    loss.backward()
    elsewhere = [out for out, x in made if out is not x]
    if held:
        assert kept
        assert len(sums) == 0
        assert len(elsewhere) == SUMS
    else:
        assert len(sums) == SUMS
        assert not elsewhere
    del sums, made, elsewhere
    monkeypatch.undo()
    got = [t.grad for t in (*pair, *net.parameters())]
    for tensor in (*pair, *net.parameters()):
        tensor.grad = None
    net.activations = "store"
    y1, y2 = net(tuple(pair))
    (y1 * y2).sum().backward()
    for gradient, tensor in zip(got, (*pair, *net.parameters()), strict=True):
        torch.testing.assert_close(gradient, tensor.grad, rtol=1e-12, atol=1e-13)


AFTER_A_FAILED_TRACE = """
import contextlib, torch
from test_ownership import SUMS, chain
from revkernels.reference import backend as kernels

def fails(x):
    torch._dynamo.graph_break()
    return x

with contextlib.suppress(torch._dynamo.exc.Unsupported):
    torch.compile(fails, backend="eager", fullgraph=True)(torch.ones(2))
written, accumulate = [], kernels.accumulate
kernels.accumulate = lambda *args: (written.append(1), accumulate(*args))
y1, y2 = chain()(tuple(torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)))
(y1 * y2).sum().backward()
print(len(written), SUMS)
"""


def test_in_place_also_after_an_error_of_torch_compile():
    """From then on torch calls every Python function of the process in another way, and more references are held."""
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", AFTER_A_FAILED_TRACE], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    count, expected = done.stdout.split()
    assert count == expected


def test_a_free_gradient_is_learnt_on_the_host(monkeypatch):
    """Whatever torch's default device is: another device has a thread of its own, where nothing would be learnt."""
    monkeypatch.setattr(accumulate, "_free", {})
    devices = []
    apply = accumulate._Twin.apply

    def watched(s):
        devices.append(s.device.type)
        return apply(s)

    monkeypatch.setattr(accumulate._Twin, "apply", watched)
    with torch.device("meta"):
        accumulate.prepare()
    assert devices == ["cpu"]
    assert [len(counts) for counts in accumulate._free.values()] == [3]
