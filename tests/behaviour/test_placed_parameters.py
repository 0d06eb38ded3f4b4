# SPDX-License-Identifier: Apache-2.0
"""Row 33 for parameters that the branch's own forward writes, casts, or has other tensors in the place of."""

import functools

import pytest
from torch import nn
from torch.nn import functional

from behaviour.common import WIDE, Plain, assert_all_close, assert_raises, rows, torch
from revkernels.errors import ReconstructionError
from revkernels.nn import ReversibleBlock, ReversibleSequential


def test_a_parameter_that_the_forward_writes():
    branch = nn.Embedding(10, 4, max_norm=0.1)

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = branch

        def forward(self, h):
            return h.tanh() + self.table(torch.arange(5))

    y = ReversibleSequential(ReversibleBlock(Adds(), nn.Tanh()))(rows(dtype=torch.float32)).sum()
    assert_raises(ReconstructionError, ["table.weight", "own forward", "not rewound"], y.backward)


class Fast:
    """Where weights come from that are not a module's own, as those of an inner loop are."""

    def __init__(self, weight):
        self.weight = weight


class TakesFast(nn.Module):
    """Puts the weight of now in its parameter's place, as monkey-patched modules do."""

    def __init__(self, fast):
        super().__init__()
        self.fast, self.weight = fast, nn.Parameter(torch.zeros(4, 4, dtype=WIDE))

    def forward(self, h):
        self._parameters["weight"] = self.fast.weight
        return functional.linear(h, self.weight).tanh()


@pytest.mark.parametrize("before", [False, True], ids=["by the forward", "before it too"])
@pytest.mark.parametrize("moved", [False, True], ids=["same", "moved on"])
def test_a_parameter_that_the_forward_puts_in_place(moved, before, options):
    """The recompute would take the latest: refused where that is another one, right where it is the same."""
    first, x = torch.randn(4, 4, dtype=WIDE).requires_grad_(), rows()
    found = []
    for make in (functools.partial(ReversibleBlock, **options), lambda F, G: Plain([(F, G)])):
        branch = TakesFast(Fast(first))
        if before:
            branch._parameters["weight"] = first
        y = make(branch, nn.Tanh())(x).sin().sum()
        if moved:
            branch.fast.weight = first.detach() * 2
        if moved and not found and options["activations"] == "reconstruct":
            parts = ["branch F", "weight", "own forward", "another tensor now", "'store'"]
            assert_raises(ReconstructionError, parts, lambda y=y: torch.autograd.grad(y, [first, x]))
            return
        found.append(torch.autograd.grad(y, [first, x]))
    assert_all_close(*found)


class Computes(nn.Module):
    """Puts a weight in its parameter's place, and a buffer in that of another, that it makes anew in each run."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.ones(4, 1))
        self.inner = nn.Linear(4, 4, bias=False)
        self.register_buffer("count", torch.ones(()))

    def forward(self, h):
        self._parameters["weight"] = self.inner.weight * self.scale
        self.count = self.count + 1
        return functional.linear(h, self.weight).tanh() / self.count


def test_a_parameter_that_the_forward_computes(options):
    """The recompute computes it again: it is another tensor of the same values."""
    branches, x = [Computes().to(WIDE) for _ in range(4)], rows()
    blocks = [ReversibleBlock(*pair) for pair in zip(branches[::2], branches[1::2], strict=True)]
    found = []
    for net in (ReversibleSequential(*blocks, **options), Plain([(block.F, block.G) for block in blocks])):
        for _ in range(2):
            learnt = [x, *(p for branch in branches for p in (branch.scale, branch.inner.weight))]
            for branch in branches:
                branch.count.fill_(1)
            found.append(torch.autograd.grad(net(x).sin().sum(), learnt))
    for one in found[1:]:
        assert_all_close(one, found[0])


class ComputesFrom(nn.Module):
    """What it puts in its parameter's place ``of`` makes of another weight and the input."""

    def __init__(self, of):
        super().__init__()
        self.inner, self.weight, self.of = nn.Linear(4, 4), nn.Parameter(torch.zeros(4, 4)), of

    def forward(self, h):
        self._parameters["weight"] = self.of(self.inner.weight, h)
        weight = self.weight.dequantize().to(h.dtype) if self.weight.is_quantized else self.weight
        return functional.linear(self.inner(h), weight.nan_to_num()).tanh()


COMPUTED = {
    "of the input": lambda weight, h: weight @ (h.mT @ h).sin(),
    "not a number": lambda weight, h: weight.masked_fill(torch.eye(4, dtype=torch.bool), float("nan")),
    "quantised": lambda weight, h: torch.quantize_per_tensor(weight.detach().float(), 0.01, 0, torch.qint8),
}


@pytest.mark.parametrize("of", COMPUTED.values(), ids=COMPUTED)
def test_a_parameter_that_the_forward_computes_of_what_is_rebuilt(of, options):
    """Where it depends on the input it is another one by the rounding of that."""
    branches, x = [ComputesFrom(of).to(WIDE) for _ in range(12)], rows()
    blocks = [ReversibleBlock(*pair) for pair in zip(branches[::2], branches[1::2], strict=True)]
    found = []
    for net in (ReversibleSequential(*blocks, **options), Plain([(block.F, block.G) for block in blocks])):
        learnt = [x, *(branch.inner.weight for branch in branches)]
        found.append(torch.autograd.grad(net(x).sin().sum(), learnt))
    assert_all_close(*found)


def test_a_parameter_that_hooks_cast():
    """Of layers whose weights are stored narrow, and cast for the time of their forward: not a change behind it."""
    layer = nn.Linear(4, 4).bfloat16()
    layer.register_forward_pre_hook(lambda layer, _: layer.float() and None)
    layer.register_forward_hook(lambda layer, *_: layer.bfloat16() and None)
    y = ReversibleSequential(ReversibleBlock(nn.Sequential(layer), nn.Tanh()))(rows(dtype=torch.float32)).sum()
    assert_raises(ReconstructionError, ["0.weight", "own forward", "hook that casts", "'store'"], y.backward)


def test_a_parameter_that_cannot_be_asked():
    """What torch puts in a parameter's place for gradients of single samples."""
    module = pytest.importorskip("torch.nn.utils._per_sample_grad")
    net, x = ReversibleSequential(ReversibleBlock(nn.Linear(4, 4), nn.Tanh())), rows(dtype=torch.float32)
    call = module.call_for_per_sample_grads(net)
    assert_raises(ReconstructionError, ["weight", "ExpandedWeight", "'store'"], lambda: call(x))
    net.activations = "store"
    call(x).sum().backward()
    assert net[0].F.weight.grad_sample.shape == (5, 4, 4)
