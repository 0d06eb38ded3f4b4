# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: the recompute casts where the forward cast; scaling, clipping and accumulating gradients."""

import contextlib

import pytest
from torch import nn

from behaviour.common import (
    assert_all_close,
    assert_same,
    gathered,
    pairs_of,
    relative_error,
    rows,
    torch,
    twins,
)
from behaviour.common import fresh as copies_of


class Logged(nn.Module):
    """Writes down the dtypes that it sees, call by call."""

    def __init__(self, dtype=None, enabled=None):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)
        self.inner = dtype, enabled
        self.log = []

    def forward(self, x):
        dtype, enabled = self.inner
        inside = contextlib.nullcontext() if enabled is None else torch.autocast("cpu", dtype, enabled=enabled)
        with inside:
            h = self.norm(x)
            f = self.linear(h)
        self.log.append((x.dtype, h.dtype, f.dtype))
        return torch.tanh(f)


def train_under(network, x, outer, around_backward=contextlib.nullcontext):
    leaves, x = copies_of(x)
    network.zero_grad(set_to_none=True)
    with outer():
        y = network(x)
        loss = y.float().square().mean()
    with around_backward():
        loss.backward()
    return gathered(network, [y], leaves)


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def fp16():
    return torch.autocast("cpu", torch.float16)


def branches_of(network):
    return [branch for block in network.children() for branch in (block.F, block.G)]


def check_autocast(outer, around_backward, backend, activations, make=Logged):
    """Row 8, as a function: a recompute logs what its forward logged; the error is no worse than stored + drift."""
    net, plain = twins(pairs_of(make, 3), backend=backend, activations=activations)
    exact = twins(pairs_of(make, 3))[1]
    exact.load_state_dict(plain.state_dict())
    x = rows(6, 32, dtype=torch.float32)
    got, expected = (train_under(network, x, outer, around_backward) for network in (net, plain))
    truth = train_under(exact, x, contextlib.nullcontext)
    for mine, theirs in zip(branches_of(net), branches_of(plain), strict=True):
        (only,) = theirs.log
        assert mine.log == [only] * (2 if activations == "reconstruct" else 1)
    for name, right in truth.parameters.items():
        stored, ours = (relative_error(o.parameters[name], right) for o in (expected, got))
        assert ours <= 1.5 * stored + 1e-3, f"{name}: {ours:.2g} off, stored {stored:.2g}"
    return got, expected


@pytest.mark.parametrize("outer", [bf16, fp16])
@pytest.mark.parametrize("around_backward", [contextlib.nullcontext, bf16], ids=["outside", "inside"])
def test_autocast(outer, around_backward, options):
    """Row 8: outer autocast in bf16 and fp16, the backward outside it or inside another one."""
    check_autocast(outer, around_backward, **options)


def test_backward_inside_autocast_that_the_forward_did_not_have(options):
    """Row 8: the forward ran in fp32, and so does the recompute."""
    check_autocast(contextlib.nullcontext, bf16, **options)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_inside_a_branch(enabled, options):
    """Row 8: a branch switches autocast on, or off inside an outer one."""
    outer = contextlib.nullcontext if enabled else bf16
    check_autocast(outer, contextlib.nullcontext, **options, make=lambda: Logged(torch.bfloat16, enabled))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stream_of_half_precision(dtype, options):
    """Row 8: a stream and branches in half precision stay in it, and so do their gradients."""
    net, plain = twins(pairs_of(lambda: nn.Linear(16, 16).to(dtype), 2), **options)
    x = 0.25 * rows(6, 32, requires_grad=False).to(dtype)
    got, expected = (train_under(n, x.clone().requires_grad_(), contextlib.nullcontext) for n in (net, plain))
    assert got.outputs[0].dtype is got.inputs[0].dtype is dtype
    # In the stream's own precision rebuilding drifts by some roundings; more precise than that it cannot be.
    assert_same(got, expected, tolerance=0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_wide_stream_with_narrow_branches(wide, options):
    """Row 8: the stream keeps its dtype whatever the branch returns, and each side gets a gradient of its own dtype."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16).to(torch.bfloat16)

        def forward(self, x):
            return self.linear(x.to(torch.bfloat16))

    net, plain = twins(pairs_of(Narrow, 3), **options)
    x = rows(6, 32, dtype=wide)
    got, expected = (train_under(n, x, contextlib.nullcontext) for n in (net, plain))
    assert got.outputs[0].dtype is wide
    assert_same(got, expected, tolerance=0.02)


def test_gradient_scaler(options):
    """Row 9: scaled loss, unscaled and clipped gradients, an optimizer's steps."""
    nets = twins(pairs_of(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double(), 3), **options)
    for network in nets:
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(network(rows(5, 16)).square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
    assert_all_close(*(list(network.parameters()) for network in nets))


@pytest.mark.parametrize("foreach", [False, True])
def test_training_with_adam(foreach, options):
    """Row 9: steps of an optimizer after each backward never look like a change between forward and backward."""
    nets = twins(pairs_of(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double(), 3), **options)
    for network in nets:
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, foreach=foreach)
        for _ in range(5):
            optimizer.zero_grad()
            network(rows(5, 16)).square().mean().backward()
            optimizer.step()
    assert_all_close(*(list(network.parameters()) for network in nets))


def test_gradient_accumulation(options):
    """Row 9: micro-batches add up in .grad, in place."""
    net, plain = twins(pairs_of(lambda: nn.Linear(8, 8).double(), 3), **options)
    for network in (net, plain):
        torch.manual_seed(5)
        for _ in range(4):
            network(rows(5, 16)).square().mean().backward()
    assert_all_close(*([p.grad for p in network.parameters()] for network in (net, plain)))
