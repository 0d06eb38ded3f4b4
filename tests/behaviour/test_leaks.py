# SPDX-License-Identifier: Apache-2.0
"""Whatever became of a call, nothing of it stays in memory."""

import gc
import weakref

import pytest
from torch import nn
from torch.utils.checkpoint import checkpoint

from behaviour.common import loss_of, mlp, pairs_of, rows, torch, twins
from behaviour.test_failures import Fails
from revkernels.autograd import driver_forward


@pytest.fixture
def alive(monkeypatch):
    """The calls of chains that are still in memory."""
    calls = weakref.WeakSet()
    init = driver_forward.Reversal.__init__

    def counting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        calls.add(self)

    monkeypatch.setattr(driver_forward.Reversal, "__init__", counting)
    return calls


class WithAuxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        f = self.inner(x)
        return f, f.square().mean()


def failing_forward(backend):
    net, _ = twins([(mlp(), mlp()), (mlp(), Fails("forward"))], backend=backend)
    with pytest.raises(KeyError):
        net(rows())


def failing_recompute(backend):
    net, _ = twins([(mlp(), mlp()), (mlp(), Fails("recompute")), (mlp(), mlp())], backend=backend)
    with pytest.raises(KeyError):
        loss_of(net(rows())).backward()


def forward_only(backend):
    twins(pairs_of(mlp, 2), backend=backend)[0](rows())


def auxiliary_outputs_unused(backend):
    twins(pairs_of(WithAuxiliary, 2), backend=backend)[0](rows())


def training_step(backend):
    loss_of(twins(pairs_of(WithAuxiliary, 2), backend=backend)[0](rows())).backward()


def inside_checkpoint(backend):
    net, _ = twins(pairs_of(mlp, 2), backend=backend)
    loss_of(checkpoint(net, rows(), use_reentrant=False)).backward()


def gradient_of_some(backend):
    net, _ = twins(pairs_of(mlp, 3), backend=backend)
    torch.autograd.grad(loss_of(net(rows())), next(iter(net[2].G.parameters())))


def second_order(backend):
    net, _ = twins(pairs_of(mlp, 2), backend=backend)
    x = rows()
    (dx,) = torch.autograd.grad(loss_of(net(x)), x, create_graph=True)
    torch.autograd.grad(dx.sum(), x)


LIVES = [
    *(failing_forward, failing_recompute, forward_only, auxiliary_outputs_unused),
    *(training_step, inside_checkpoint, gradient_of_some, second_order),
]


@pytest.mark.parametrize("life", LIVES)
def test_nothing_leaks(life, backend, alive):
    """Rows 21, 27 and 31: whatever became of a call, nothing of it stays in memory."""
    for _ in range(2):
        life(backend)
    gc.collect()
    assert len(alive) == 0, f"{len(alive)} calls are still in memory"
