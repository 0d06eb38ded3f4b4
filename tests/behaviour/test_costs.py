# SPDX-License-Identifier: Apache-2.0
"""What reversibility promises: memory that does not grow with depth, for one extra forward of each branch."""

import gc
import weakref

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import WIDE, pairs_of, rows, torch, twins
from revkernels.autograd.driver_forward import Reversal
from revkernels.measure import peak_bytes
from revkernels.nn import is_recomputing

BATCH, WIDTH = 64, 64
BLOCK = 2 * BATCH * WIDTH * 8  # bytes of both streams
DEPTHS = (4, 16, 64)


def slim_branch(p=0.0):
    return nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(p)).to(WIDE)


def activation_bytes(net, x):
    """Peak of one training step, once the parameters' gradients are there."""

    def train():
        net(x).sum().backward()

    train()
    net.zero_grad(set_to_none=False)
    gc.collect()
    return peak_bytes(train)


def peaks(depths, activations, backend, make=slim_branch):
    x = rows(BATCH, 2 * WIDTH, requires_grad=False)
    return [activation_bytes(twins(pairs_of(make, d), backend=backend, activations=activations)[0], x) for d in depths]


def check_memory_is_flat(backend, depths=DEPTHS):
    shallow, *deeper = peaks(depths, "reconstruct", backend)
    for depth, peak in zip(depths[1:], deeper, strict=True):
        grown = peak - shallow
        assert abs(grown) <= BLOCK, f"depth {depth} takes {grown / BLOCK:.1f} blocks more than depth {depths[0]}"


def test_memory_is_flat(backend):
    """Row 2: live activation bytes at depth 4, 16 and 64 are equal within one block."""
    check_memory_is_flat(backend)


def test_stored_memory_grows(backend):
    """Row 2: the same meter sees stored activations grow by more than the streams of every block."""
    shallow, deep = peaks((4, 16), "store", backend)
    assert deep - shallow >= 12 * BLOCK


def test_dropout_keeps_the_generator_state_alone(backend):
    """Row 2: a branch that draws costs its generator's state, some 5 KB a half-step, and no more."""
    shallow, deep = peaks((4, 16), "reconstruct", backend, lambda: slim_branch(0.1))
    state = torch.get_rng_state().numel()
    half_steps = 2 * (16 - 4)
    assert half_steps * state <= deep - shallow + BLOCK
    assert deep - shallow <= half_steps * state * 1.1 + BLOCK


@pytest.mark.parametrize("kind", ["conv", "basic", "bottleneck"], indirect=True)
def test_memory_is_flat_with_batch_norm(kind, compiled):
    """Row 2: the library's own branches too; throw-away statistics are thrown away."""
    x = rows(4, 8, 16, 16, requires_grad=False)
    shallow, deep = (activation_bytes(kind.twins(depth, backend=compiled)[0], x) for depth in (4, 16))
    assert abs(deep - shallow) <= x.numel() * 8


class Counting(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, []

    def forward(self, x):
        self.calls.append(is_recomputing())
        return self.inner(x)


def check_calls(net, x, recomputes):
    """One forward of every branch and ``recomputes`` more, a step."""
    branches = [branch for block in net for branch in (block.F, block.G)]
    net(x).sum().backward()
    for number, branch in enumerate(branches):
        assert branch.calls == [False] + [True] * recomputes, f"branch {number}: {branch.calls}"
        branch.calls.clear()


def test_one_extra_forward(kind, backend):
    """Row 3: under "reconstruct" each branch runs exactly once more, the first too."""
    net, _ = kind.within(Counting).twins(5, backend=backend)
    for requires_grad in (True, False):
        check_calls(net, kind.x(requires_grad=requires_grad), recomputes=1)


def test_no_extra_forward_when_stored(kind, backend):
    """Row 3: under "store" none does."""
    net, _ = kind.within(Counting).twins(5, backend=backend, activations="store")
    check_calls(net, kind.x(), recomputes=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_extra_forward_without_gradients(context, kind, options):
    """Rows 3 and 16: nothing is recorded where no backward can come."""
    net, _ = kind.within(Counting).twins(3, **options)
    with context():
        y = net(kind.x())
    assert y.grad_fn is None
    assert [branch.calls for block in net for branch in (block.F, block.G)] == [[False]] * 6


def test_extra_forwards_of_two_gradients(kind, backend):
    """Rows 3 and 10: a gradient for the last block alone rebuilds nothing below it."""
    net, _ = kind.within(Counting).twins(4, backend=backend)
    y = net(kind.x())
    torch.autograd.grad(y.sum(), list(net[3].G.parameters()))
    assert [len(block.G.calls) for block in net] == [1, 1, 1, 2]
    assert [len(block.F.calls) for block in net] == [1, 1, 1, 1]


@pytest.mark.parametrize("kept", [None, 0, 0.5, "exact"])
def test_nothing_is_held_while_what_lies_in_front_is_at_work(kept, backend, monkeypatch):
    """Row 2: with the last of a chain's nodes go its outputs and the last branch's tensors, before the backward of the
    layers in front of it, and without the collector."""
    options = {"coupling": "exact"} if kept == "exact" else {}
    if kept in (0, 0.5):
        options = {"activations": rk.MemoryBudget(kept)}
    net, _ = twins(pairs_of(lambda: slim_branch().float(), 3), backend=backend, **options)
    front = nn.Linear(2 * WIDTH, 2 * WIDTH)
    x = rows(BATCH, 2 * WIDTH, requires_grad=False, dtype=torch.float32)
    calls, seen, finish = [], [], Reversal.finish

    def noting(self, *args):
        calls.append(weakref.ref(self))
        finish(self, *args)

    monkeypatch.setattr(Reversal, "finish", noting)
    gc.collect(), gc.disable()
    try:
        for _ in range(3):
            h = front(x)
            h.register_hook(lambda g: seen.append(calls[-1]() is None))
            loss = net(h).square().sum()
            del h
            loss.backward()
    finally:
        gc.enable()
    assert seen == [True] * 3
