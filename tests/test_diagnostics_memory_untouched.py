# SPDX-License-Identifier: Apache-2.0
"""`memory_report` changes nothing of what runs under it, and leaves nothing behind."""

import pytest

torch = pytest.importorskip("torch")
from diagnostics_cases import images  # noqa: E402
from one_thread import one_thread_here  # noqa: E402, F401
from torch import nn  # noqa: E402

from revkernels.autograd.driver_forward import Reversal  # noqa: E402
from revkernels.autograd.fused import fusion  # noqa: E402
from revkernels.diagnostics import memory_report  # noqa: E402
from revkernels.diagnostics.watching import Watch  # noqa: E402
from revkernels.measure import peak_bytes  # noqa: E402


@pytest.mark.parametrize("backend", [None, "eager"])
def test_watching_does_not_change_what_runs(backend):
    net, x = images(6, backend=backend), torch.randn(8, 16, 12, 12)

    def step():
        net(x).square().mean().backward()

    watch = Watch(net)

    def watched():
        with watch.modules():
            with watch, watch.saved_tensors():
                loss = net(x).square().mean()
            loss.backward()

    step()
    ordinary = peak_bytes(step)
    assert peak_bytes(watched) == ordinary
    for p in net.parameters():
        p.grad = None
    fresh = peak_bytes(step)
    assert memory_report(net, x, loss=lambda y: y.square().mean()).peak_bytes == fresh


def test_nothing_is_left_behind():
    net = nn.Sequential(nn.Conv2d(3, 16, 1), images(2), nn.Dropout(0.5)).train()
    net[1][0].F.eval()
    for p in list(net.parameters())[::2]:
        p.grad = torch.randn_like(p)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    watched = (nn.Module.__call__, fusion.fused, Reversal._run, Reversal.finish, Reversal._rebuild)

    def state():
        return (
            [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in net.parameters()],
            [(id(b), b._version, b.clone()) for b in net.buffers()],
            [(p._version, p.clone()) for p in net.parameters()],
            torch.get_rng_state(),
            [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(vars(m))) for m in net.modules()],
        )

    before = state()
    memory_report(net, x)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert x.grad is None
    assert (nn.Module.__call__, fusion.fused, Reversal._run, Reversal.finish, Reversal._rebuild) == watched


def test_nothing_is_left_behind_by_a_network_that_fails():
    class Fails(nn.Module):
        def forward(self, x):
            raise ArithmeticError("no")

    net = nn.Sequential(nn.BatchNorm1d(4), Fails())
    call, version = nn.Module.__call__, net[0].num_batches_tracked._version
    with pytest.raises(ArithmeticError):
        memory_report(net, torch.randn(3, 4))
    assert nn.Module.__call__ is call
    assert net[0].num_batches_tracked._version == version
