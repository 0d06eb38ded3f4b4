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
    KINDS,
    assert_all_close,
    assert_close,
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
    tensors_in,
    torch,
    twins,
)
from behaviour.test_hooks import check_stashed_gradients, check_stashed_streams
from behaviour.test_precision import check_autocast
from revkernels import backends, eager
from revkernels.autograd import output_check
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
    "basic": (KINDS["basic"].make, KINDS["basic"].x),
    "bottleneck": (KINDS["bottleneck"].make, KINDS["bottleneck"].x),
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
@pytest.mark.parametrize("name", ["mlp", "basic", "bottleneck"])
def test_autocast(name, dtype, inside, activations):
    """Row 8: the recompute, on autograd's thread of the device, casts where the forward cast."""

    def outer():
        return torch.autocast(DEVICE, dtype)

    around_backward = outer if inside else contextlib.nullcontext
    check_autocast(KINDS[name], outer, around_backward, backend=None, activations=activations)


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
    check_stashed_streams(twins(pairs_of(mlp, 4))[0], (rows(5, 4), rows(5, 4)))
    check_stashed_gradients(twins(pairs_of(mlp, 4))[0], rows())


@pytest.mark.parametrize("backward_on_it", [True, False], ids=["backward on it", "backward on the default stream"])
def test_on_a_side_stream(backward_on_it, options):
    """Row 30: forward and backward follow the forward's stream: each starts behind a wait of milliseconds on it."""
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


# ---- row 30: CUDA graphs, and more than one device

#: Before, torch could neither read nor set a CUDA generator's state during a capture, and a chain's forward reads it.
needs_generators_in_captures = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 10), reason="torch.cuda.get_rng_state in a capture"
)


def captured_step(network, x, loss_of):
    """Record a training step on ``x`` as a CUDA graph. Return it and the outputs that a replay writes.

    As torch's notes on CUDA graphs ask: warmed up on a side stream, without gradients when the recording starts, so
    that they are made in the graph's own memory and replays write to the same.
    """
    leaves = [*tensors_in(x), *network.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loss_of(network(x)).backward()
            for leaf in leaves:
                leaf.grad = None
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = network(x)
        loss_of(y).backward()
    return graph, y


@needs_generators_in_captures
@pytest.mark.parametrize("chain", [name for name in CHAINS if name != "dropout"])
def test_captured_as_a_cuda_graph(chain, options):
    """Row 30: forward and backward in one graph; replays on other inputs are right, statistics included."""
    make, inputs = CHAINS[chain]
    net, plain = twins(pairs_of(make, 3), **options)
    leaves, x = fresh(inputs())
    graph, y = captured_step(net, x, loss_of)
    plain.load_state_dict(net.state_dict())  # the warm-up has updated statistics, the recording has not
    for _ in range(3):
        with torch.no_grad():
            for leaf in leaves:
                leaf.normal_()
        torch.manual_seed(3)
        graph.replay()
        got = gathered(net, y, leaves)
        assert_same(got, step(plain, x))


@needs_generators_in_captures
def test_dropout_in_a_cuda_graph(options):
    """Row 30: each replay draws new masks, and its recompute the same ones again.

    Without bias and non-linearity y = A x and dx = A^T dy, so that <y, dy> = <x, dx> if A was the same both ways.
    """
    net, _ = twins(pairs_of(lambda: nn.Sequential(nn.Linear(4, 4, bias=False).double(), nn.Dropout(0.5)), 4), **options)
    x, dy = rows(), torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(5, 8)
    graph, y = captured_step(net, x, lambda y: (y * dy).sum())
    seen = []
    for _ in range(3):
        graph.replay()
        assert_close((x * x.grad).sum(), (y * dy).sum())
        seen.append(y.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@needs_generators_in_captures
def test_graphed_callable(options):
    """Row 30: torch.cuda.make_graphed_callables, which records the forward and the backward separately."""
    net, plain = twins(pairs_of(mlp, 3), **options)
    x = rows()
    expected = step(plain, x)
    graphed = torch.cuda.make_graphed_callables(net, (x.detach().clone().requires_grad_(),))
    for _ in range(2):
        net.zero_grad()
        torch.manual_seed(3)
        leaves, leaf = fresh(x)
        y = graphed(leaf)
        loss_of(y).backward()
        assert_same(gathered(net, y, leaves), expected)


@pytest.mark.parametrize("chain", CHAINS)
def test_nothing_waits_for_the_device(chain, options):
    """Row 30: neither forward nor backward reads from the device; what does could not be captured, and is slow."""
    make, inputs = CHAINS[chain]
    net, _ = twins(pairs_of(make, 3), **options)
    x = inputs()
    for _ in range(output_check.TIMES):  # and libraries may wait while they set themselves up
        loss_of(net(x)).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(net(x)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


DEVICES = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


@pytest.mark.parametrize("device", DEVICES[2:] or [pytest.param(None, marks=pytest.mark.skip("one device"))], ids=str)
def test_on_another_device_than_the_current_one(device, options):
    """Row 30: kernels and generators are those of the tensors' device."""
    assert torch.cuda.current_device() != device.index
    with torch.device(device):
        net, plain = twins(pairs_of(lambda: dropout_mlp(p=0.5), 3), **options)
        x = rows()
        got = check_step(net, plain, x, steps=2)
        state = torch.cuda.get_rng_state(device)
        step(plain, x, seed=1)
        assert torch.equal(torch.cuda.get_rng_state(device), state)
    assert all(t.device == device for t in (*got.outputs, *got.inputs, *got.parameters.values()))


def test_chains_on_every_device_in_one_graph(options, monkeypatch):
    """Row 30: a tensor goes through a chain on the host and on each GPU, and back; generators are told apart.

    Each device has its own default backend: one that was named would be asked for on all of them.
    """
    monkeypatch.delenv("REVKERNELS_BACKEND", raising=False)
    results = []
    pairs = []
    for device in DEVICES:
        with torch.device(device):
            pairs.append(twins(pairs_of(lambda: dropout_mlp(p=0.5), 2), **options))
    given = rows()
    for networks in zip(*pairs, strict=True):
        torch.manual_seed(5)
        leaves, y = fresh(given)
        for device, network in zip((*DEVICES, *DEVICES), (*networks, *networks), strict=True):
            y = network(y.to(device))
        loss_of(y).backward()
        results.append([y.detach(), leaves[0].grad, *(p.grad for network in networks for p in network.parameters())])
        results[-1] += [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    assert_all_close(*results)
