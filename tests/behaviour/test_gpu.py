# SPDX-License-Identifier: Apache-2.0
"""Chains on a GPU against plain PyTorch there: its generator, its streams, its memory, its autograd thread.

No test names a backend: REVKERNELS_BACKEND decides, and else the default of a GPU. Everything is made on the device,
because that is torch's default device while a test runs.
"""

import contextlib
from collections import Counter

import pytest
from torch import nn

from behaviour.common import (
    assert_all_close,
    assert_same,
    check_step,
    conv,
    dropout_mlp,
    fresh,
    gathered,
    images,
    loss_of,
    mlp,
    norm_mlp,
    pairs_of,
    rows,
    step,
    torch,
    twins,
)
from behaviour.test_hooks import check_stashed_gradients, check_stashed_streams
from behaviour.test_precision import check_autocast
from revkernels import backends, eager
from revkernels.measure import peak_bytes

DEVICE = "cuda"

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


@pytest.fixture
def options(activations):
    return {"activations": activations}


def channels_last():
    return images().detach().to(memory_format=torch.channels_last).requires_grad_()


CHAINS = {
    "mlp": (mlp, rows),
    "batch norm": (norm_mlp, lambda: rows(6, 8)),
    "convolutions": (conv, lambda: images(3, 8, 33, 31)),
    "convolutions, channels-last": (conv, channels_last),
    "a pair of streams": (conv, lambda: (images(2, 4, 9, 7), images(2, 4, 9, 7))),
    "dropout": (lambda: dropout_mlp(p=0.5), rows),
}


def states():
    """The states of the generators that a branch may draw from."""
    return [torch.get_rng_state(), torch.cuda.get_rng_state()]


@pytest.mark.parametrize("chain", CHAINS)
def test_as_plain_pytorch(chain, options):
    """Rows 1, 4 and 6: outputs, all gradients, batch norm statistics and both generators, over two steps."""
    make, x = CHAINS[chain]
    net, plain = twins(pairs_of(make, 3), **options)
    got = check_step(net, plain, x(), steps=2)
    after = states()
    step(plain, x(), seed=1)
    assert_all_close(after, states())
    assert all(t.device.type == DEVICE for t in (*got.outputs, *got.inputs, *got.parameters.values()))


class Kernels:
    """Counts what is called of a backend."""

    def __init__(self, monkeypatch, module):
        self.calls = Counter()
        for name in ("couple", "uncouple", "accumulate"):
            monkeypatch.setattr(module, name, self.counting(name, getattr(module, name)))

    def counting(self, name, kernel):
        def counted(*arguments):
            self.calls[name] += 1
            return kernel(*arguments)

        return counted


def test_the_backend_of_the_environment_does_the_work(monkeypatch):
    """Every half-step is coupled and undone by its kernels, and gradients are added in place by them."""
    module = backends.select(torch.empty(1))
    if module is eager:
        pytest.skip('"eager" couples by plain torch calls')
    kernels = Kernels(monkeypatch, module)
    depth = 4
    net, plain = twins(pairs_of(mlp, depth))
    check_step(net, plain, rows())
    assert kernels.calls["couple"] >= 2 * depth
    assert kernels.calls["uncouple"] >= 2 * depth - 1  # the first half-step's input is asked for by nobody
    assert kernels.calls["accumulate"] >= 2 * (depth - 1)


def test_draws_between_forward_and_backward_are_the_caller_s(options):
    """Row 6: the backward neither repeats nor moves the device's generator, nor the host's."""
    results = []
    for network in twins(pairs_of(lambda: dropout_mlp(p=0.5), 3), **options):
        torch.manual_seed(7)
        x = rows()
        y = network(x)
        between = [torch.rand(3), torch.rand(3, device="cpu")]
        before = states()
        loss_of(y).backward()
        assert_all_close(states(), before)
        results.append([*between, torch.rand(3), x.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_two_forwards_before_one_backward(options):
    """Row 7: each has masks of its own."""
    results = []
    for network in twins(pairs_of(lambda: dropout_mlp(p=0.5), 3), **options):
        torch.manual_seed(7)
        a, b = rows(), rows()
        outputs = [network(a), network(b)]
        (outputs[0] * outputs[1]).sum().backward()
        results.append(gathered(network, outputs, [a, b]))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast(dtype, inside, activations):
    """Row 8: the recompute, on autograd's thread of the device, casts where the forward cast."""

    def outer():
        return torch.autocast(DEVICE, dtype)

    check_autocast(outer, outer if inside else contextlib.nullcontext, backend=None, activations=activations)


BATCH, WIDTH = 256, 128
BLOCK = 2 * BATCH * WIDTH * 4  # bytes of both streams


def peaks(depths, activations):
    """Peaks of a training step, once the parameters' gradients and the libraries' workspaces are there."""
    x = rows(BATCH, 2 * WIDTH, dtype=torch.float32, requires_grad=False)
    found = []
    for depth in depths:
        branches = pairs_of(lambda: nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH)), depth)
        net, _ = twins(branches, activations=activations)

        def train(net=net):
            net(x).sum().backward()

        train()
        found.append(peak_bytes(train, DEVICE))
    return found


def test_memory_is_flat():
    """Row 2: what the caching allocator holds at depth 4, 16 and 64 is equal within one block."""
    shallow, *deeper = peaks((4, 16, 64), "reconstruct")
    assert all(abs(peak - shallow) <= BLOCK for peak in deeper), (shallow, deeper)


def test_stored_memory_grows():
    """Row 2: the same meter sees it where activations are stored."""
    shallow, deep = peaks((4, 16), "store")
    assert deep - shallow >= 12 * BLOCK


def test_what_hooks_keep_does_not_change():
    """Row 22: memory is written over only where nobody holds it, which is asked on autograd's own thread here."""
    for check in (check_stashed_streams, check_stashed_gradients):
        check(twins(pairs_of(mlp, 4))[0])


@pytest.mark.parametrize("backward_on_it", [True, False], ids=["backward on it", "backward on the default stream"])
def test_on_a_side_stream(backward_on_it, options):
    """Forward and backward follow the forward's stream: each starts behind a wait of some milliseconds on it."""
    net, plain = twins(pairs_of(dropout_mlp, 3), **options)
    x = rows(64, 8, requires_grad=False)
    for network in (net, plain):
        network(x)  # so that loading a kernel does not wait below
    expected = step(plain, x.clone().requires_grad_())
    net.zero_grad()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    late = torch.zeros_like(x)
    with torch.cuda.stream(side):
        torch.manual_seed(3)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        leaves, leaf = fresh(late.requires_grad_())
        y = net(leaf)
        torch.cuda._sleep(20_000_000)
        loss = loss_of(y)
        if backward_on_it:
            loss.backward()
    torch.cuda.current_stream().wait_stream(side)
    if not backward_on_it:
        loss.backward()
    torch.cuda.synchronize()
    assert_same(gathered(net, y, leaves), expected)
