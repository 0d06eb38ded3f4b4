# SPDX-License-Identifier: Apache-2.0
"""Branches of one class that differ in a number or in the shape of their streams, under torch.compile.

dynamo compiles the first of them for its number and shape alone, and the second for any. The code for any fits the
first too, and would be found in its place in the recompute.
"""

import gc
import weakref

import pytest
from torch import nn

from behaviour.common import (
    WIDE,
    assert_close,
    assert_same,
    check_step,
    loss_of,
    mlp,
    pairs_of,
    rows,
    step,
    torch,
    twins,
)
from behaviour.compiling import compiled, fresh_compiler, graphs  # noqa: F401
from revkernels.autograd import compiling
from revkernels.errors import ReconstructionError
from revkernels.nn import FusedSequential, PerBlock
from revkernels.nn.branches import AttentionBranch, DropPath
from revkernels.nn.chain import HalfStep, run

#: The partitioner that "inductor" has: it chooses by size what is saved.
BACKEND = "aot_eager_decomp_partition"


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.body, self.scale = mlp(), scale

    keywords = ("factor",)

    def forward(self, x, factor=1.0):
        return self.body(x) * self.scale * factor


def attentions():
    """A chain on (N, T, 8), and a plain one."""
    return twins(pairs_of(lambda: AttentionBranch(4, 2).to(WIDE), 2), split_dim=-1)


@pytest.mark.parametrize("backend", ["aot_eager", BACKEND])
def test_a_number_of_its_own_in_every_block(backend):
    """Row 25: the first step is right as well, which was refused."""
    net, plain = twins([(Scaled(0.1 * k), Scaled(0.1 * k + 0.05)) for k in range(1, 4)])
    check_step(compiled(net, "reconstruct", backend), plain, rows(5, 8), steps=2)


def test_an_argument_of_its_own_in_every_block():
    net, plain = twins([(Scaled(0.5), Scaled(0.5)) for _ in range(3)])
    check_step(compiled(net, "reconstruct"), plain, rows(5, 8), steps=2, factor=PerBlock([0.3, 0.5, 0.7]))


def test_more_rates_than_dynamo_compiles_a_function_for():
    """Row 25: a branch is compiled for its rate alone, and none is left to Python for being the ninth."""
    net, plain = twins(pairs_of(lambda: nn.Sequential(mlp(), DropPath(0.5)), 5))
    for k, block in enumerate(net):
        block.F[1].p, block.G[1].p = 0.05 * k + 0.01, 0.05 * k + 0.03
    for k, block in enumerate(plain.children()):
        block.F[1].p, block.G[1].p = 0.05 * k + 0.01, 0.05 * k + 0.03
    check_step(compiled(net, "reconstruct"), plain, rows(5, 8), steps=2)
    assert graphs() == 10


def test_code_is_not_kept_of_all_networks_that_ever_were():
    """As of a search over rates: of the latest alone, and of those that are still there."""
    first = Scaled(0.0)
    frames = [weakref.ref(compiling._frame_of(first, ()))]
    frames += [weakref.ref(compiling._frame_of(Scaled(0.001 * k), ())) for k in range(1, 400)]
    gc.collect()
    assert sum(frame() is not None for frame in frames) <= 257
    assert compiling._frame_of(first, ()) is frames[0]()


class Pyramid(nn.Module):
    """Two chains of branches of one structure, the second on half of the tokens."""

    def __init__(self, fine, coarse):
        super().__init__()
        self.fine, self.coarse = fine, coarse

    def forward(self, x):
        return self.coarse(self.fine(x)[:, ::2].contiguous())


def test_chains_on_streams_of_several_shapes():
    """Row 25: each shape has code of its own, made for this shape."""
    symbols = []

    def backend(graph, inputs):
        symbols.extend(i for i in inputs if isinstance(i, torch.SymInt))
        return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)

    net, plain = (Pyramid(*chains) for chains in zip(attentions(), attentions(), strict=True))
    check_step(compiled(net, "reconstruct", backend), plain, rows(3, 6, 8), steps=2)
    assert graphs() == 3  # and of the indexing between them
    assert symbols == []


def test_functions_made_anew_in_every_call():
    """They are told apart by their code alone: not every shape and number has code of its own."""
    layers = mlp(), mlp()

    def call(x, factor):
        steps = [HalfStep(lambda h, f=f: f(h) * factor, k, (1 - k,)) for k, f in enumerate(layers)]
        return run(steps, x)

    network = torch.compile(call, backend="aot_eager")
    for size in range(5, 11):
        x = rows(size, 8)
        got, expected = (torch.autograd.grad(loss_of(f(x, 0.1 * size)), x)[0] for f in (network, call))
        assert_close(got, expected)
    assert graphs() <= 3  # for the first, for any, and of what surrounds the chain


def test_two_shapes_in_the_first_step():
    """Row 25: of one branch the second shape's code may take the place of the first's: right, or refused by a message
    whose advice helps."""
    chains = twins(pairs_of(lambda: nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4, track_running_stats=False)).to(WIDE), 1))
    compiled(chains[0], "reconstruct", BACKEND)
    net, plain = (Twice(chain) for chain in chains)
    x = rows(15, 8)
    with pytest.raises(ReconstructionError, match=r"torch\.compile was at work.*once with inputs of every shape"):
        step(net, x)
    torch._dynamo.reset()
    net(x)
    assert_same(step(net, x), step(plain, x))


class Twice(nn.Module):
    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def forward(self, x):
        return torch.cat([self.chain(x[:5]), self.chain(x[5:])])


def test_a_fused_sequential_that_is_compiled_by_hand():
    """Row 25: a chain does not run the layers of such a branch one by one, past what ``compile()`` has made of it."""
    layers = [nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4)]
    net, plain = twins(pairs_of(lambda: FusedSequential(*layers).to(WIDE), 1))
    for branch in (net[0].F, net[0].G):
        branch.compile(backend="aot_eager", fullgraph=True)
    check_step(net, plain, rows(5, 8), steps=2)
    assert graphs() == 1
