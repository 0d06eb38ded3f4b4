# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: the recompute casts where the forward cast; scaling, clipping and accumulating gradients."""

import contextlib
import functools

import pytest
from torch import nn

from behaviour.common import (
    Plain,
    assert_all_close,
    assert_same,
    gathered,
    loss_of,
    pairs_of,
    relative_error,
    rows,
    torch,
    twins,
)
from behaviour.common import fresh as copies_of
from revkernels.nn import ReversibleBlock, checkpoint


class Logged(nn.Module):
    """Writes down the dtypes that go into and come out of every layer, call by call; may switch autocast itself."""

    def __init__(self, inner, dtype=None, enabled=None):
        super().__init__()
        self.inner = inner.float()
        self.switch = dtype, enabled
        self.log = []

    def forward(self, x):
        dtype, enabled = self.switch
        seen = [x.dtype]

        def note(layer, inputs, output):
            seen.append((type(layer).__name__, inputs[0].dtype, output.dtype))

        hooks = [layer.register_forward_hook(note) for layer in self.inner.modules()]
        with contextlib.nullcontext() if enabled is None else torch.autocast("cpu", dtype, enabled=enabled):
            f = self.inner(x)
        for hook in hooks:
            hook.remove()
        self.log.append(seen)
        return f


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


def check_autocast(kind, outer, around_backward, backend, activations, inside=(None, None)):
    """Row 8, as a function: a recompute logs what its forward logged; the error is no worse than stored + drift."""
    kind = kind.within(lambda branch: Logged(branch, *inside))
    net, plain = kind.twins(3, backend=backend, activations=activations)
    exact = kind.twins(3)[1]
    exact.load_state_dict(plain.state_dict())
    for branch in branches_of(exact):
        branch.switch = None, None
    x = kind.x(dtype=torch.float32)
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
def test_autocast(outer, around_backward, kind, options):
    """Row 8: outer autocast in bf16 and fp16, the backward outside it or inside another one."""
    check_autocast(kind, outer, around_backward, **options)


def test_backward_inside_autocast_that_the_forward_did_not_have(kind, options):
    """Row 8: the forward ran in fp32, and so does the recompute."""
    check_autocast(kind, contextlib.nullcontext, bf16, **options)


@pytest.mark.parametrize("order", ["forward first", "backward first"])
@pytest.mark.parametrize("then", [torch.bfloat16, torch.float16])
def test_weights_cast_to_two_dtypes_in_one_autocast(order, then, kind, options):
    """Row 8: torch keeps casts of weights until the outermost autocast ends. Those of the recompute are not taken for
    those of another forward in there, nor the other way round."""

    def train(network, now):
        leaves, x = copies_of(kind.x(dtype=torch.float32, requires_grad=False).requires_grad_())
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", then):
            y = network(x)
        with torch.autocast("cpu", now):
            if order == "backward first":
                y.float().square().mean().backward()
            z = network(x)
            loss = z.float().square().mean()
            (loss if order == "backward first" else loss + y.float().square().mean()).backward()
        return gathered(network, [y, z], leaves)

    now = torch.float16 if then is torch.bfloat16 else torch.bfloat16
    net, plain = kind.within(lambda branch: Logged(branch)).twins(3, **options)
    outcomes = []
    for network in (net, plain):
        torch.manual_seed(0)
        outcomes.append(train(network, now))
    for mine, theirs in zip(branches_of(net), branches_of(plain), strict=True):
        assert {str(seen) for seen in mine.log} == {str(seen) for seen in theirs.log}
    assert_same(*outcomes, tolerance=0.1)  # roundings of half precision, in small gradients; the logs tell the rest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_inside_a_branch(dtype, enabled, kind, options):
    """Row 8: a branch switches autocast on, or off inside an outer one."""
    outer = contextlib.nullcontext if enabled else bf16
    check_autocast(kind, outer, contextlib.nullcontext, **options, inside=(dtype, enabled))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stream_of_half_precision(dtype, options):
    """Row 8: a stream and branches in half precision stay in it, and so do their gradients."""
    net, plain = twins(pairs_of(lambda: nn.Linear(16, 16).to(dtype), 2), **options)
    x = 0.25 * rows(6, 32, requires_grad=False).to(dtype)
    got, expected = (train_under(n, x.clone().requires_grad_(), contextlib.nullcontext) for n in (net, plain))
    assert got.outputs[0].dtype is got.inputs[0].dtype is dtype
    # In the stream's own precision rebuilding drifts by some roundings; more precise than that it cannot be.
    assert_same(got, expected, tolerance=0.05 if dtype == torch.bfloat16 else 0.01)


NORMS = [nn.Identity, *(lambda norm=norm: norm(16) for norm in (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d))]


@pytest.mark.parametrize("norm", NORMS, ids=["bare", "layer norm", "RMS norm", "batch norm"])
@pytest.mark.parametrize("training", [True, False])
def test_narrow_stream_with_wide_branches(norm, training, options):
    """Row 8: nor does a branch of higher precision widen it, as torch's promotion would; a norm in front of it, which
    the stream enters, is the stream's."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16).double()

        def forward(self, x):
            return self.linear(x.double())

    class Narrowed(Wide):
        def forward(self, x):
            return super().forward(x).to(x.dtype)

    net, _ = twins(pairs_of(lambda: nn.Sequential(norm(), Wide()), 3), **options)
    _, plain = twins(pairs_of(lambda: nn.Sequential(norm(), Narrowed()), 3))
    net.train(training), plain.train(training)
    plain.load_state_dict(net.state_dict())
    x = rows(6, 32, dtype=torch.float32)
    got, expected = (train_under(n, x, contextlib.nullcontext) for n in (net, plain))
    assert got.outputs[0].dtype is got.inputs[0].dtype is torch.float32
    # one rounding of f less than where it is narrowed first, in each of six half-steps
    assert_same(got, expected, tolerance=1e-5)


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


def scaled_steps(network, xs, outer, scale):
    """Train on each of ``xs`` as one does under a gradient scaler; return its scale after each step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    scales = []
    for x in xs:
        optimizer.zero_grad()
        with outer():
            loss = network(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_gradient_scaler(kind, options):
    """Row 9: scaled loss, unscaled and clipped gradients, an optimizer's steps."""
    nets = kind.twins(3, **options)
    xs = [kind.x() for _ in range(4)]
    scales = [scaled_steps(network, xs, contextlib.nullcontext, 2.0**10) for network in nets]
    assert scales[0] == scales[1] == [2.0**10, 2.0**11, 2.0**11, 2.0**12]
    assert_all_close(*(list(network.parameters()) for network in nets))


def test_gradient_scaler_that_skips_a_step(kind, options):
    """Row 9: a batch that overflows is found, its step is left out, and the next one is right."""
    nets = kind.twins(3, **options)
    xs = [kind.x() for _ in range(3)]
    with torch.no_grad():
        xs[1].view(-1)[0] = float("inf")
    scales = [scaled_steps(network, xs, contextlib.nullcontext, 2.0**10) for network in nets]
    assert scales[0] == scales[1] == [2.0**10, 2.0**9, 2.0**9]
    assert_all_close(*(list(network.parameters()) for network in nets))


def test_gradient_scaler_under_autocast(kind, options):
    """Row 9: the usual loop in fp16 moves the parameters as it does with stored activations."""
    nets = kind.twins(3, **options)
    xs = [kind.x(dtype=torch.float32) for _ in range(3)]
    moves = []
    for network in nets:
        before = [p.detach().clone() for p in network.float().parameters()]
        scaled_steps(network, xs, fp16, 2.0**8)
        moves.append(torch.cat([(p - b).flatten() for p, b in zip(network.parameters(), before, strict=True)]))
    assert moves[0].norm() > 0
    assert relative_error(*moves) < 10 * 2.0**-11  # a rebuilt value may round to its neighbour in fp16


@pytest.mark.parametrize("foreach", [False, True])
def test_training_with_adam(foreach, kind, options):
    """Row 9: steps of an optimizer after each backward never look like a change between forward and backward."""
    nets = kind.twins(3, **options)
    xs = [kind.x() for _ in range(5)]
    for network in nets:
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, eps=1e-3, foreach=foreach)
        for x in xs:
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    assert_all_close(*(list(network.parameters()) for network in nets))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation(set_to_none, kind, options):
    """Row 9: micro-batches add up in .grad, in place."""
    net, plain = kind.twins(3, **options)
    xs = [kind.x() for _ in range(4)]
    for network in (net, plain):
        loss_of(network(xs[0])).backward()
        network.zero_grad(set_to_none=set_to_none)
        grads = []
        for x in xs:
            loss_of(network(x)).backward()
            grads.append([p.grad for p in network.parameters()])
        assert all(a is b for a, b in zip(grads[0], grads[-1], strict=True))
    assert_all_close(*([p.grad for p in network.parameters()] for network in (net, plain)))


class MakesTensors(nn.Module):
    """What it adds and what it draws are of torch's default dtype, and so are the numbers that it draws."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.linear(x + torch.linspace(0.1, 0.9, 4)).tanh() * (torch.rand(len(x), 1) < 0.7)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("recomputed_by", ["chain", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_default_dtype_of_the_forward_alone(dtype, recomputed_by, options):
    """Row 8: as trainers set it where all of a network is of one dtype."""
    net, plain = twins([(MakesTensors(), MakesTensors()) for _ in range(3)], **options)
    ours = (net, net) if recomputed_by == "chain" else (functools.partial(checkpoint, plain), plain)
    found = []
    for run, network in (ours, (plain, plain)):
        x = torch.linspace(-1, 1, 48).double().reshape(6, 8).requires_grad_()
        network.zero_grad()
        torch.manual_seed(4)
        with default_dtype(dtype):
            y = run(x)
        y.sin().sum().backward()
        assert torch.get_default_dtype() == torch.float32  # left as it is there
        found.append([y, x.grad, *(p.grad.clone() for p in network.parameters()), torch.rand(1)])
    assert_all_close(*found)


def test_default_dtypes_of_layers_in_a_loop():
    """Two that are linked are one call only if the second runs under what the first did."""
    pairs, found = [(MakesTensors(), MakesTensors()) for _ in range(2)], []
    blocks = [ReversibleBlock(F, G) for F, G in pairs]
    for block in blocks:
        block.linked = True
    for first, second in (blocks, [Plain([pair]) for pair in pairs]):
        x = torch.linspace(-1, 1, 48).double().reshape(6, 8).requires_grad_()
        torch.manual_seed(4)
        with default_dtype(torch.bfloat16):
            y = first(x)
        with default_dtype(torch.float64):
            y = second(y)
        y.sin().sum().backward()
        found.append([y, x.grad])
    assert_all_close(*found)
