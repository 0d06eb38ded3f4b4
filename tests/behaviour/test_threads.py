# SPDX-License-Identifier: Apache-2.0
"""Row 32: several threads, each with a model, a step or a backward of its own, or sharing one."""

import contextlib
import random
import sys
import threading
import time

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_same,
    dropout_mlp,
    fresh,
    gathered,
    loss_of,
    mlp,
    norm_mlp,
    pairs_of,
    rows,
    step,
    torch,
    twins,
)
from revkernels.autograd.state.snapshot import Snapshot
from revkernels.nn import is_recomputing


@pytest.fixture(autouse=True)
def eager_switching():
    """Threads take turns every ten microseconds, not every five milliseconds: a race has 500 times the chances."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*jobs):
    """Run the jobs in threads that start together; an exception in any of them is raised here."""
    barrier, problems = threading.Barrier(len(jobs)), []

    def run(job):
        try:
            barrier.wait(30)
            job()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    if problems:
        raise problems[0]


def test_a_thread_a_model(options):
    """Four threads train four models at once, with statistics of their own."""
    nets = [twins(pairs_of(norm_mlp, 3), **options) for _ in range(4)]
    inputs = [rows(6, 8) for _ in nets]

    def train(pair, x):
        for _ in range(10):
            results = []
            for network in pair:
                leaves, copied = fresh(x)
                network.zero_grad()
                loss_of(network(copied)).backward()
                results.append([leaves[0].grad, *(p.grad for p in network.parameters()), *network.buffers()])
            assert_all_close(*results)

    at_once(*(lambda pair=pair, x=x: train(pair, x) for pair, x in zip(nets, inputs, strict=True)))


def test_one_model_in_several_threads(options):
    """Each thread its own forward and backward, for the inputs' gradients."""
    net, plain = twins(pairs_of(mlp, 3), **options)
    inputs = [rows() for _ in range(4)]
    grads = [[] for _ in inputs]

    def run(index):
        for _ in range(10):
            grads[index] += torch.autograd.grad(loss_of(net(inputs[index])), inputs[index])

    at_once(*(lambda index=index: run(index) for index in range(4)))
    for x, got in zip(inputs, grads, strict=True):
        expected = torch.autograd.grad(loss_of(plain(x)), x)[0]
        assert_all_close(got, [expected] * 10)


def test_gradients_of_one_model_accumulated_by_several_threads(options):
    """`.grad` of shared parameters gets every thread's part: the sum of all batches."""
    net, plain = twins(pairs_of(mlp, 3), **options)
    batches = [rows(requires_grad=False) for _ in range(12)]
    for batch in batches:
        loss_of(plain(batch)).backward()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)  # the first writer of an absent gradient is torch's own race

    def run(part):
        for batch in part:
            gradients = torch.autograd.grad(loss_of(net(batch)), list(net.parameters()))
            with lock:
                for p, gradient in zip(net.parameters(), gradients, strict=True):
                    p.grad += gradient

    lock = threading.Lock()
    at_once(*(lambda i=i: run(batches[i::4]) for i in range(4)))
    assert_all_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_forward_in_one_thread_and_backward_in_another(options):
    """A graph may be run backwards elsewhere than where it was made."""
    net, plain = twins(pairs_of(dropout_mlp, 3), **options)
    x = rows()
    for seed in range(5):
        expected = step(plain, x, seed=seed)
        torch.manual_seed(seed)
        leaves, copied = fresh(x)
        net.zero_grad()
        y = net(copied)

        at_once(lambda y=y: loss_of(y).backward())
        assert_same(gathered(net, [y], leaves), expected)


def test_a_graph_handed_on_while_the_next_is_made(options):
    """A pipeline: one thread runs forwards, another the backwards of those before."""
    net, plain = twins(pairs_of(mlp, 3), **options)
    inputs = [rows() for _ in range(12)]
    outputs, made = [], threading.Semaphore(0)

    def forwards():
        for x in inputs:
            outputs.append(net(x))
            made.release()

    def backwards():
        for index in range(len(inputs)):
            assert made.acquire(timeout=30)
            loss_of(outputs[index]).backward()

    at_once(forwards, backwards)
    got = [x.grad for x in inputs] + [p.grad for p in net.parameters()]
    for x in inputs:
        x.grad = None
        loss_of(plain(x)).backward()
    assert_all_close(got, [x.grad for x in inputs] + [p.grad for p in plain.parameters()])


def test_backwards_through_one_graph_at_once(options):
    """Under retain_graph every thread gets the whole gradient, whoever rebuilds at the time."""
    net, plain = twins(pairs_of(dropout_mlp, 4), **options)
    x = rows()
    losses = []
    for network in (net, plain):
        torch.manual_seed(5)
        losses.append(loss_of(network(x)))
    wanted = [[x, *network.parameters()] for network in (net, plain)]
    expected = torch.autograd.grad(losses[1], wanted[1])
    results = []

    def backward():
        for _ in range(5):
            results.append(torch.autograd.grad(losses[0], wanted[0], retain_graph=True))

    state = torch.get_rng_state()
    at_once(*[backward] * 4)
    assert len(results) == 20
    for got in results:
        assert_all_close(got, expected)
    assert torch.equal(state, torch.get_rng_state())


def test_two_losses_of_one_graph_at_once(options):
    """A backward through either output, in a thread each."""
    net, plain = twins(pairs_of(mlp, 4), **options)
    x = tuple(rows(5, 4) for _ in range(2))
    results = {}
    for network in (net, plain):
        losses = [y.square().sum() for y in network(x)]

        def backward(index, network=network, losses=losses):
            wanted = [*x, *network.parameters()]
            results[network, index] = torch.autograd.grad(losses[index], wanted, retain_graph=True, allow_unused=True)

        for _ in range(5):
            at_once(*(lambda i=i: backward(i) for i in range(2)))
    for index in range(2):
        assert_all_close(results[net, index], results[plain, index])


def test_whether_a_thread_recomputes_is_its_own_affair(backend):
    """`is_recomputing` is true in the thread whose backward it is, and in no other."""
    inside, checked = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            if is_recomputing():
                inside.set()
                assert checked.wait(30)
            return self.inner(x)

    net, _ = twins([(mlp(), Waits())], backend=backend)
    loss = loss_of(net(rows()))
    seen = []

    def look():
        assert inside.wait(30)
        seen.append(is_recomputing())
        checked.set()

    at_once(loss.backward, look)
    assert seen == [False]


class Meets(nn.Module):
    """Batch normalisation; a recompute lets another thread in between its statistics and its end."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4).to(WIDE)
        self.meet = None

    def forward(self, x):
        if self.meet is not None and is_recomputing():
            self.meet()
        return self.norm(x)


def meeting(other, timeout=1.0):
    """Start ``other`` in a thread of its own, and give it time: what waits for us ends after we do."""
    thread = threading.Thread(target=other)

    def meet():
        if not thread.ident:
            thread.start()
            thread.join(timeout)

    return thread, meet


@pytest.mark.parametrize("grad", [True, False])
def test_statistics_of_a_forward_while_another_thread_recomputes(backend, grad):
    """A batch that comes by during a recompute counts, also without gradients."""
    net, _ = twins([(Meets(), mlp())], backend=backend)
    loss, module = loss_of(net(rows(6, 8))), net[0].F

    def count():
        with torch.set_grad_enabled(grad):
            net(rows(6, 8))

    thread, module.meet = meeting(count)
    loss.backward()
    thread.join(30)
    assert module.norm.num_batches_tracked == 2


@pytest.mark.parametrize("grad", [True, False])
def test_an_evaluation_while_another_thread_recomputes(backend, grad):
    """It is in eval mode, though the recompute is in train mode, and uses the running statistics."""
    net, _ = twins([(Meets(), mlp())], backend=backend)
    loss, module, x, got = loss_of(net(rows(6, 8))), net[0].F, rows(6, 8), []
    wanted = net.eval()(x).detach()

    def evaluate():
        with torch.set_grad_enabled(grad):
            got.append(net(x).detach())

    thread, module.meet = meeting(evaluate)
    loss.backward()
    thread.join(30)
    assert_all_close(got, [wanted])


def test_statistics_of_two_recomputes_that_overlap(backend):
    """The module has its own buffers again, whichever ends first."""
    net, _ = twins([(Meets(), mlp())], backend=backend)
    losses, module = [loss_of(net(rows(6, 8))) for _ in range(2)], net[0].F
    own = dict(module.norm.named_buffers())
    both, over = threading.Event(), threading.Event()
    second = threading.Thread(target=losses[1].backward)

    def meet():
        if threading.current_thread() is second:
            both.set()
            over.wait(10)
        else:
            second.start()
            both.wait(1)

    module.meet = meet
    losses[0].backward()
    over.set()
    second.join(30)
    assert {name for name, b in module.norm.named_buffers() if b is not own[name]} == set()


def test_another_mode_while_another_thread_recomputes(monkeypatch):
    """A forward in eval mode, begun while a recompute has the layers in train mode, is run again in eval mode."""
    layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net = rk.nn.ReversibleSequential(rk.nn.ReversibleBlock(layers, nn.Tanh())).to(WIDE)
    loss = loss_of(net(rows(6, 8)))
    net.eval()
    x = rows(6, 8).requires_grad_()
    wanted = torch.autograd.grad(loss_of(net(x)), x)
    inside, restore = threading.Event(), Snapshot.restore
    recompute = threading.Thread(target=loss.backward)

    def slowly(self, *args):
        restore(self, *args)
        if threading.current_thread() is recompute and self.branch is layers:
            inside.set()
            time.sleep(0.5)  # the forward gets as far as to wait for its turn

    monkeypatch.setattr(Snapshot, "restore", slowly)
    recompute.start()
    assert inside.wait(10)
    loss = loss_of(net(x))
    recompute.join(30)
    torch.testing.assert_close(torch.autograd.grad(loss, x), wanted)


class Draws(nn.Module):
    """A mask that it remembers; between the half-steps another thread may draw."""

    def __init__(self):
        super().__init__()
        self.inner, self.masks, self.meet = mlp(), [], None

    def forward(self, x):
        if self.meet is not None and not is_recomputing():
            self.meet()
        self.masks.append((torch.rand(4, dtype=WIDE) < 0.5).to(WIDE))
        return self.inner(x) * self.masks[-1]


def test_masks_while_another_thread_draws(backend):
    """The recompute's mask is the forward's, or the backward says that it cannot be."""
    net, _ = twins([(mlp(), Draws())], backend=backend)
    module = net[0].G
    thread, module.meet = meeting(lambda: torch.rand(7))
    loss = loss_of(net(rows()))
    thread.join(30)
    try:
        loss.backward()
    except rk.ReconstructionError as error:
        assert "generator" in str(error)
    else:
        assert torch.equal(*module.masks)


class DrawsFromPython(nn.Module):
    """Another thread draws one number in its first call and two in its second; it has a dropout, with torch's
    generator."""

    def __init__(self, draws):
        super().__init__()
        self.inner, self.draws, self.calls = dropout_mlp(), draws, 0

    def forward(self, x):
        self.calls += 1
        thread = threading.Thread(target=random.randbytes, args=(4 * (self.calls % 3),))
        thread.start()
        thread.join()
        return self.inner(x) * (1 + 1e-5 * random.random() if self.draws else 1)


@pytest.mark.parametrize("draws", [True, False])
def test_python_s_numbers_while_another_thread_draws(backend, draws):
    """Refused where the branch draws as well, however little it makes; and only there."""
    net, _ = twins([(mlp(), DrawsFromPython(draws))], backend=backend)
    loss = loss_of(net(rows()))
    problem = r"Python's or NumPy's generators, and while .* another thread"
    with pytest.raises(rk.ReconstructionError, match=problem) if draws else contextlib.nullcontext():
        loss.backward()
