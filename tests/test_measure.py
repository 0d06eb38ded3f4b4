# SPDX-License-Identifier: Apache-2.0
"""The meters against steps whose cost is known."""

import math

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from revkernels.measure import angle, branch_calls, multiply_adds, peak_bytes  # noqa: E402

MIB = 1 << 20


def block(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_nothing_allocated_is_zero():
    assert peak_bytes(lambda: None) == 0


def test_peak_is_what_lives_at_once_not_the_sum():
    def step():
        a, b = block(1), block(2)
        del a
        c = block(1)
        del b, c
        block(2)

    assert peak_bytes(step) == 3 * MIB


def test_memory_from_before_does_not_count_when_it_is_freed():
    held = [block(8)]

    def step():
        held.clear()
        block(3)

    assert peak_bytes(step) == 3 * MIB


def test_what_outlives_the_step_counts_once():
    kept = []
    assert peak_bytes(lambda: kept.append(block(2))) == 2 * MIB
    assert peak_bytes(lambda: kept.append(block(1))) == MIB


def test_saved_activations_of_a_chain():
    """Each sigmoid saves its output; a backward node adds the gradient it reads and the one it writes."""
    x = block(1).float().requires_grad_()

    def step(depth):
        y = x
        for _ in range(depth):
            y = y.sigmoid()
        y.backward(gradient)

    gradient = torch.ones_like(x)
    step(1)  # x.grad exists from here on
    shallow, deep = (peak_bytes(lambda d=d: step(d)) for d in (4, 12))
    assert deep - shallow == 8 * 4 * MIB
    assert shallow == (4 + 2) * 4 * MIB


class AllocatesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        block(16)
        return dy


def test_backward_is_seen():
    x = torch.zeros(4, requires_grad=True)
    peak = peak_bytes(lambda: AllocatesInBackward.apply(x).sum().backward())
    assert 16 * MIB <= peak < 16 * MIB + 1024


def test_memory_inside_an_operator_is_seen():
    """Matrix exponential keeps powers of its input: more than the one output a tensor count would see."""
    a = torch.eye(256)
    assert peak_bytes(lambda: torch.matrix_exp(a)) >= 3 * a.nbytes


def test_same_network_same_number():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(2, 4, 16, 16)

    def step():
        net(x).sum().backward()

    step()
    assert peak_bytes(step) == peak_bytes(step) > 8 * 2 * 14 * 14 * 4


def test_exception_propagates_and_the_meter_works_afterwards():
    def fails():
        raise KeyError("from fn")

    with pytest.raises(KeyError, match="from fn"):
        peak_bytes(fails)
    assert peak_bytes(lambda: block(1)) == MIB


def test_bad_arguments():
    with pytest.raises(TypeError, match="fn is a Tensor; it must be callable"):
        peak_bytes(block(1))
    with pytest.raises(ValueError, match="device is meta; it must be"):
        peak_bytes(lambda: None, device="meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak():
    def step():
        a = torch.empty(MIB, dtype=torch.uint8, device="cuda")
        del a
        torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")

    assert peak_bytes(step, "cuda") == 2 * MIB


def test_multiply_adds_of_forward_and_backward():
    """A linear layer of 3 x 5 on 7 rows: one product forward, two backward, 105 multiply-adds each."""
    layer, x = nn.Linear(3, 5, bias=False), torch.ones(7, 3, requires_grad=True)
    assert multiply_adds(lambda: layer(x)) == 105
    assert multiply_adds(lambda: layer(x).sum().backward()) == 3 * 105


def test_multiply_adds_sees_a_recompute():
    # The sigmoid saves its output, so that checkpoint cannot stop before the product.
    layer = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Sigmoid())
    x = torch.ones(7, 3, requires_grad=True)

    def step():
        checkpoint(layer, x, use_reentrant=False).sum().backward()

    assert multiply_adds(step) == 4 * 105


def test_branch_calls_counts_recomputes_and_leaves_no_hook():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.ones(2, 3, requires_grad=True)

    def step():
        b(checkpoint(a, x, use_reentrant=False)).sum().backward()

    assert branch_calls([a, b], step) == 3
    assert branch_calls([b], step) == 1
    assert not a._forward_pre_hooks and not b._forward_pre_hooks


@pytest.mark.parametrize("degrees", [0.0, 1e-9, 1e-3, 30.0, 90.0, 179.0])
def test_angle(degrees):
    """Turned by a known angle, at another length, cut into tensors of other shapes."""
    turned = 7 * torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], dtype=torch.float64)
    axis = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    assert angle([axis], list(turned)) == pytest.approx(degrees, rel=1e-6, abs=1e-13)


def test_angle_refuses_what_has_no_direction():
    with pytest.raises(ValueError, match=r"b has norm 0\.0; it must be"):
        angle([torch.ones(2)], [torch.zeros(2)])
    with pytest.raises(ValueError, match="a has norm nan; it must be"):
        angle([torch.tensor([math.nan])], [torch.ones(1)])
    with pytest.raises(ValueError, match="b has 3 elements, a has 2: they must be equal"):
        angle([torch.ones(2)], [torch.ones(3)])
