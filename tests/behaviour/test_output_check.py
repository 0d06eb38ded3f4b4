# SPDX-License-Identifier: Apache-2.0
"""Rows 33 and 34 where nothing else can tell: a branch whose recompute returns something else than its forward did."""

import random
import types

import numpy as np
import pytest
from torch import nn

import revkernels as rk
from behaviour.common import WIDE, torch
from revkernels import ReconstructionError
from revkernels.autograd import output_check
from revkernels.nn import ReversibleBlock, ReversibleSequential, checkpoint, is_recomputing, linked


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4, dtype=WIDE), 0

    def forward(self, x):
        self.calls += 1
        return torch.sin(self.layer(x) * self.calls)


class DrawsFromPython(Counts):
    """With a generator that is out of sight."""

    def __init__(self):
        super().__init__()
        self.aside = types.SimpleNamespace(generator=random.Random(0))

    def forward(self, x):
        return self.layer(x) * self.aside.generator.random()


class DrawsFromNumPy(Counts):
    def __init__(self):
        super().__init__()
        self.aside = types.SimpleNamespace(generator=np.random.default_rng(0))

    def forward(self, x):
        return self.layer(x) * torch.from_numpy(self.aside.generator.random(x.shape) < 0.5)


class KeepsAside(Counts):
    """A recurrent state in an object that is no container: as a cache is."""

    def __init__(self):
        super().__init__()
        self.cache = types.SimpleNamespace(h=torch.zeros(2, 4, dtype=WIDE))

    def forward(self, x):
        self.cache.h = torch.tanh(self.layer(x) + self.cache.h).detach()
        return self.layer(x) * self.cache.h


NOT_THE_SAME_TWICE = [Counts, DrawsFromPython, DrawsFromNumPy, KeepsAside]


def chain(kind, **options):
    torch.manual_seed(0)
    return ReversibleSequential(*(ReversibleBlock(kind(), kind()) for _ in range(3)), **options)


def step(net, dtype=WIDE):
    x = torch.randn(2, 8, dtype=dtype, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = net(x)
    (y[0] if type(y) is tuple else y).square().sum().backward()
    return x.grad


@pytest.mark.parametrize("kind", NOT_THE_SAME_TWICE)
def test_what_is_not_the_same_twice_is_found(kind, backend):
    """Row 34: in the first backward, by name, with what to do."""
    with pytest.raises(
        ReconstructionError, match=r"block 2, branch G \(\w+\): the recompute returned other values.*a generator that"
    ):
        step(chain(kind, backend=backend))
    step(chain(kind, backend=backend, activations="store"))


@pytest.mark.parametrize("kind", NOT_THE_SAME_TWICE)
def test_in_a_checkpoint(kind):
    """Row 34."""
    module = kind()
    x = torch.randn(2, 4, dtype=WIDE, requires_grad=True)
    with pytest.raises(ReconstructionError, match="returned other values than the forward"):
        checkpoint(module, x).square().sum().backward()


def test_functions():
    """Row 34: a branch that is no module."""
    calls = []

    def counts(x):
        calls.append(1)
        return torch.sin(x * len(calls))

    with pytest.raises(ReconstructionError, match="returned other values"):
        step(ReversibleSequential(ReversibleBlock(counts, torch.tanh)))


def test_linked_calls():
    """Row 34: modules called one by one."""
    branches = [Counts() for _ in range(4)]

    def net(x):
        for branch in branches:
            x = linked.run([linked.HalfStep(branch, 0, (1,)), linked.HalfStep(torch.tanh, 1, (0,))], x, 2, str)
        return x

    with pytest.raises(ReconstructionError, match="returned other values"):
        step(net)


def test_it_is_looked_at_so_often(monkeypatch):
    """The first three recomputes of a branch with code of its own, and none of torch's layers."""
    compared = []
    difference = output_check.OutputSample.difference
    monkeypatch.setattr(
        output_check.OutputSample, "difference", lambda *given: compared.append(1) or difference(*given)
    )

    class Tanh(Counts):
        def forward(self, x):
            return torch.tanh(self.layer(x))

    net = chain(Tanh)
    for times in (1, 2, 3, 3, 3):
        step(net)
        assert len(compared) == 6 * times
    compared.clear()
    step(chain(lambda: nn.Linear(4, 4, dtype=WIDE)))
    assert not compared


def test_what_comes_later_is_not_found():
    """What is documented: the check ends."""
    net = chain(Counts)
    for module in net.modules():
        if isinstance(module, Counts):
            module.forward = types.MethodType(lambda self, x: torch.tanh(self.layer(x)), module)
    for _ in range(3):
        step(net)
    for module in net.modules():
        module.__dict__.pop("forward", None)
    step(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-9])
def test_next_to_nothing(dtype, scale):
    """A branch that returns nothing, or rounding alone, is the same twice."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(scale, dtype=dtype))

        def forward(self, x):
            return (x - x.mean(-1, keepdim=True)) * self.weight

    net = ReversibleSequential(*(ReversibleBlock(Small(), Small()) for _ in range(4)))
    x = torch.full((3, 8), 1 / 3, dtype=dtype, requires_grad=True)
    net(x).sum().backward()
    assert x.grad.isfinite().all()


def test_not_finite():
    """A step that overflows is the gradient scaler's affair."""

    class Overflows(nn.Module):
        def forward(self, x):
            return x * float("inf")

    assert not step(chain(Overflows)).isfinite().any()


def test_only_the_recompute_is_not_finite():
    """Row 34."""

    class Overflows(Counts):
        def forward(self, x):
            return self.layer(x) * (float("nan") if is_recomputing() else 1.0)

    with pytest.raises(ReconstructionError, match="returned other values"):
        step(chain(Overflows))


class Laid(Counts):
    """Another layout in the recompute; beside whole numbers."""

    def forward(self, x):
        f = self.layer(x.movedim(1, -1)).movedim(-1, 1)
        return (f.contiguous() if is_recomputing() else f), {"whole": x.argmax(), "none": None}


def test_layouts_and_whole_numbers():
    """Elements are compared where they are the same ones."""
    net = ReversibleSequential(ReversibleBlock(Laid(), Laid()))
    x = torch.randn(2, 8, 3, 3, dtype=WIDE, requires_grad=True)
    net(x)[0].sum().backward()


def test_narrow_streams():
    """They drift far, and are not compared; those of an exact coupling tell at any time."""

    class Narrow(Counts):
        def forward(self, x):
            self.calls += 1
            return torch.sin(x * self.calls)

    with pytest.raises(ReconstructionError, match="returned other values"):
        step(chain(Narrow), torch.float32)
    step(chain(Narrow), torch.bfloat16)


def test_a_budget(backend):
    """What is kept is not run again, and nothing can be wrong; what is, is compared."""
    with pytest.raises(ReconstructionError, match="returned other values"):
        step(chain(Counts, backend=backend, activations=rk.MemoryBudget(0.5)))
