# SPDX-License-Identifier: Apache-2.0
"""Thousands of steps of every kind: memory stays where it was, to the tensor."""

import ctypes
import gc
import resource
import sys
import threading
from collections.abc import Sized
from pathlib import Path

import pytest
from torch import nn

from behaviour.common import assert_raises, loss_of, torch
from behaviour.test_exceptions import BrokenError, Trap
from revkernels.autograd import driver_forward
from revkernels.autograd.fused import keywords
from revkernels.autograd.state import rng_and_autocast
from revkernels.nn import ReversibleBlock, ReversibleSequential


class Branch(nn.Module):
    """Statistics, dropout, a buffer of its own, a side input, an auxiliary output, a trap."""

    def __init__(self, trap):
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout(0.2))
        self.register_buffer("average", torch.ones(4))
        self.trap = trap

    def forward(self, x, scale=None):
        with torch.no_grad():
            self.average.mul_(0.5).add_(0.5 * x.detach().mean(0).float())
        f = self.inner(x) * self.average
        self.trap()
        f = f if scale is None else f * scale
        return f, f.square().mean()


class Training:
    """One model in training, and what else is done with it now and then."""

    def __init__(self):
        self.trap = Trap()
        self.renew()

    def renew(self):
        blocks = [ReversibleBlock(Branch(self.trap), Branch(self.trap)) for _ in range(2)]
        self.net = ReversibleSequential(*blocks, backend="cpu")
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)

    def step(self, number):
        if number % 40 == 0:
            self.renew()
        if number % 10 == 0:
            self.net.eval()
            with torch.no_grad() if number % 20 else torch.inference_mode():
                self.net(torch.randn(6, 8))
            self.net.train()
        scale = torch.rand(4, requires_grad=number % 2 == 0)
        x = torch.randn(6, 8, requires_grad=number % 3 == 0)
        if number % 11 == 0:  # in a forward, in a recompute, in turn
            self.trap.error, self.trap.left = BrokenError("from here"), 1 + number % 8
        self.optimizer.zero_grad()
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=number % 4 == 0):
                outputs = self.net(x, scale=scale)
            if number % 13 == 0:
                return  # a graph that nobody runs backwards
            loss = loss_of(outputs)
            if number % 17 == 0:
                torch.autograd.grad(loss, list(self.net.parameters())[5:8])
                return
            if number % 7 == 0:
                loss.backward(retain_graph=True)
            if number % 23 == 0:
                first = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
                loss = loss + sum(g.square().sum() for g in first)
            if number % 19 == 0:
                in_a_thread(loss.backward)
            else:
                loss.backward()
            self.optimizer.step()
        except BrokenError:
            self.optimizer.zero_grad()
        finally:
            self.trap.error = None


def in_a_thread(job):
    problems = []

    def run():
        try:
            job()
        except BrokenError as error:
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if problems:
        raise problems.pop()


def containers_of(package):
    """The sizes of all module-global containers, thread-local ones included, by name."""
    sizes = {}
    for name, module in list(sys.modules.items()):
        if name != package and not name.startswith(f"{package}."):
            continue
        for attribute, value in vars(module).items():
            held = vars(value) if isinstance(value, threading.local) else {"": value}
            for key, thing in held.items():
                if isinstance(thing, Sized) and not isinstance(thing, str | bytes | type | nn.Module):
                    sizes[f"{name}.{attribute} {key}"] = len(thing)
    return sizes


def level(training):
    """What is alive: tensors and the bytes behind them, objects of this package, sizes of its globals."""
    training.optimizer.zero_grad()
    training.renew()
    training.step(1)
    training.optimizer.zero_grad()
    for _ in range(3):
        gc.collect()
    things = gc.get_objects()
    tensors = [
        thing for thing in things if type(thing) in (torch.Tensor, nn.Parameter)
    ]  # torch.compile's have no memory
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    ours = sum(str(type(thing).__module__).startswith("revkernels.") for thing in things)
    return {"tensors": len(tensors), "bytes": sum(storages.values()), "objects": ours, **containers_of("revkernels")}


def resident():
    """Bytes of this process in memory. What is free goes back first: a leak could hide in it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def soak(steps, growth, warm=200):
    """Take ``warm`` steps, then ``steps`` more: the same is alive, and memory has grown by ``growth`` bytes at most."""
    training = Training()
    for number in range(1, warm):
        training.step(number)
    before, resident_before = level(training), resident()
    for number in range(warm, warm + steps):
        training.step(number)
    after, resident_after = level(training), resident()
    differences = {name: (before.get(name), size) for name, size in after.items() if size != before.get(name)}
    assert not differences, f"not as before {steps} steps: {differences}"
    assert resident_after - resident_before <= growth, f"{resident_after - resident_before} bytes in {steps} steps"


def test_memory_is_flat(compiled):
    """1,000 steps. A generator's state kept at each step would be 5 MB."""
    soak(1000, growth=3 * 2**20)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_is_flat_for_long(compiled):
    """20,000 steps: 200 bytes a step would show."""
    soak(20_000, growth=4 * 2**20)


def calls_kept(plant, kept):
    init = driver_forward.Reversal.__init__

    def hoarding(self, *args, **kwargs):
        init(self, *args, **kwargs)
        kept.append(self)

    plant.setattr(driver_forward.Reversal, "__init__", hoarding)


def streams_kept(plant, kept):
    end = driver_forward.Reversal._end

    def hoarding(self, task=None):
        kept.extend(self._rebuilt)
        end(self, task)

    plant.setattr(driver_forward.Reversal, "_end", hoarding)


def branches_kept(plant, kept):
    plant.setattr(keywords, "_accepts", {})


def a_global_grows(plant, kept):
    plant.setattr(driver_forward, "kept", kept, raising=False)
    release = driver_forward.Reversal.release

    def hoarding(self):
        kept.append(0)
        release(self)

    plant.setattr(driver_forward.Reversal, "release", hoarding)


def states_kept(plant, kept):
    states = rng_and_autocast.Surroundings.states

    def hoarding(self):
        kept.append(bytes(5056))
        return states(self)

    plant.setattr(rng_and_autocast.Surroundings, "states", hoarding)


LEAKS = [calls_kept, streams_kept, branches_kept, a_global_grows, states_kept]


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_found(leak, compiled, monkeypatch):
    """Calls, tensors, an entry of a global, plain bytes: 150 steps are enough for each."""
    kept = []
    with monkeypatch.context() as plant:
        leak(plant, kept)
        assert_raises(AssertionError, [], lambda: soak(150, growth=2**19, warm=50))
