# SPDX-License-Identifier: Apache-2.0
"""Tensors that a branch keeps on itself while it runs: those of the forward stay, and nothing else is held."""

import collections
import copy
import gc
import sys
import threading
import warnings

import pytest
from torch import nn

from behaviour.common import WIDE, assert_all_close, loss_of, rows, torch, twins
from revkernels.errors import ReconstructionError
from revkernels.measure import peak_bytes
from revkernels.nn import ReversibleBlock, ReversibleSequential, checkpoint, is_recomputing


class Keeps(nn.Module):
    """A layer with an auxiliary loss, as of a mixture of experts."""

    def __init__(self, how="attribute", width=4):
        super().__init__()
        self.linear, self.how = nn.Linear(width, width), how
        self.aux, self.all, self.named, self.queue = None, [], collections.OrderedDict(), collections.deque(maxlen=9)
        self.counted, self.linear.all = 0, []

    def forward(self, h):
        aux = (h.softmax(-1).mean(0) ** 2).sum()
        self.counted += 1
        if self.how == "attribute":
            self.aux = aux
        elif self.how == "tuple":
            self.aux = (aux, 1.0)
        elif self.how == "list":
            self.all.append(aux)
        elif self.how == "long":
            self.all.extend([None] * (1500 if not self.all else 0))
            self.all.append(aux)
        elif self.how == "dictionary":
            self.named["aux"] = aux
        elif self.how == "nested":
            self.named.setdefault("losses", [[]])[0].append(aux)
        elif self.how == "deque":
            self.queue.append((aux, 1))
        elif self.how == "layer's list":
            self.linear.all.append(aux)
        else:
            self.linear.seen = aux
        return self.linear(h).tanh()

    def kept(self):
        found = {
            "list": lambda: self.all[0],
            "long": lambda: self.all[-1],
            "dictionary": lambda: self.named["aux"],
            "nested": lambda: self.named["losses"][0][-1],
            "deque": lambda: self.queue[-1][0],
            "tuple": lambda: self.aux[0],
            "layer": lambda: self.linear.seen,
            "layer's list": lambda: self.linear.all[0],
            "attribute": lambda: self.aux,
        }
        return found[self.how]()

    def count(self):
        lists = (self.all, self.linear.all, self.named, self.queue, self.named.get("losses", [[]])[0])
        return (*map(len, lists),)


WAYS = ["attribute", "tuple", "list", "long", "dictionary", "nested", "deque", "layer", "layer's list"]


@pytest.mark.parametrize("how", WAYS)
def test_auxiliary_losses(how, backend):
    """Added to the loss, or differentiated after it: as with stored activations."""
    branches = [Keeps(how).to(WIDE) for _ in range(4)]
    for together in (True, False):
        found, counts = [], set()
        for activations in ("store", "reconstruct"):
            mine = copy.deepcopy(branches)
            blocks = [ReversibleBlock(F, G) for F, G in zip(mine[::2], mine[1::2], strict=True)]
            x = torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8).requires_grad_()
            y = ReversibleSequential(blocks, activations=activations, backend=backend)(x).sin().sum()
            if together:
                (y + sum(m.kept() for m in mine)).backward()
            else:
                y.backward(retain_graph=True)
                sum(m.kept() for m in mine).backward()
            counts.add(mine[0].count())
            found.append([x.grad, *(m.linear.weight.grad for m in mine), *(m.kept().detach() for m in mine)])
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)
        assert len(counts) == 1


def test_they_hold_no_streams(compiled):
    """After a step only the chain's output is, from which a backward through them would start; and the peak is flat in
    depth."""

    def net_of(depth, activations="reconstruct"):
        return ReversibleSequential(
            [ReversibleBlock(Keeps(width=64), Keeps(width=64)) for _ in range(depth)], activations=activations
        )

    def alive():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) and thing.numel() >= 64 * 64 for thing in gc.get_objects())

    counts, peaks = [], {}
    for activations in ("store", "reconstruct"):
        net, x = net_of(4, activations), torch.randn(256, 128)
        before = alive()
        net(x).sum().backward()
        counts.append(alive() - before)
    assert counts[1] <= counts[0] + 1
    for depth in (2, 8):
        net, x = net_of(depth), torch.randn(4096, 128)

        def taken(net=net, x=x):
            y = net(x).sum() + sum(m.aux for m in net.modules() if isinstance(m, Keeps))
            y.backward()

        taken()
        for parameter in net.parameters():
            parameter.grad = None
        peaks[depth] = peak_bytes(taken)
    stream = 4096 * 64 * 4
    assert peaks[8] < peaks[2] + stream + 12 * 64 * 65 * 4  # parameters' gradients aside


def test_counts_are_left_alone():
    """What is no tensor is the branch's own affair: `is_recomputing` is there for it."""
    branch = Keeps().to(WIDE)
    ReversibleSequential(ReversibleBlock(branch, nn.Tanh()))(rows()).sum().backward()
    assert branch.counted == 2


def test_through_checkpoint():
    branch = Keeps(width=8).to(WIDE)
    plain, x = copy.deepcopy(branch), rows()
    checkpoint(branch, x).sin().sum().backward(retain_graph=True)
    branch.aux.backward()
    again = x.detach().clone().requires_grad_()
    plain(again).sin().sum().backward(retain_graph=True)
    plain.aux.backward()
    torch.testing.assert_close(x.grad, again.grad)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h):
        return self.linear(h * self.mask if hasattr(self, "mask") else h).tanh()


def test_another_mask_for_each_part_of_a_batch():
    """Set before each forward, with one backward behind them all; gone by then, or another."""
    torch.manual_seed(0)
    branch, found = Masked().to(WIDE), []
    masks = [(torch.rand(5, 4) < 0.5).to(WIDE) for _ in range(3)]
    for activations in ("store", "reconstruct"):
        for last in ("another", "none"):
            mine = copy.deepcopy(branch)
            net = ReversibleSequential(ReversibleBlock(mine, nn.Tanh()), activations=activations)
            x = torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8).requires_grad_()
            total = 0
            for mask in masks:
                mine.mask = mask.clone()
                total = total + net(x).sin().sum()
            if last == "none":
                del mine.mask
            total.backward()
            assert hasattr(mine, "mask") == (last == "another")
            found.append([x.grad, mine.linear.weight.grad])
    for got in found[1:]:
        for a, b in zip(found[0], got, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("container", [dict, list])
def test_what_is_kept_for_the_second_run(container, backend):
    """In a container that stays; an attribute that is replaced is rewound, as the state of the tests above."""

    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.kept = nn.Linear(4, 4).to(WIDE), container([(0, None)])

        def forward(self, h):
            if not is_recomputing():
                self.kept[0] = (torch.rand(len(h), 1) > 0.5).to(h)
            return self.linear(h) * self.kept[0]

    net, twin = twins([(Chooses(), Chooses()) for _ in range(2)])
    for seed in range(2):
        results = []
        for network in (net, twin):
            torch.manual_seed(seed)
            network.zero_grad()
            loss_of(network(torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8))).backward()
            results.append([p.grad.clone() for p in network.parameters()])
        assert_all_close(*results)


class Replaces(nn.Module):
    """Draws a mask in its first run, for both."""

    def __init__(self, comes_back):
        super().__init__()
        self.linear, self.kept = nn.Linear(4, 4).to(WIDE), torch.ones(5, 1, dtype=WIDE)
        self.revkernels_comes_back = comes_back

    def forward(self, h):
        if not is_recomputing():
            self.kept = (torch.rand(len(h), 1) > 0.5).to(h)
        return self.linear(h) * self.kept


def test_an_attribute_that_is_replaced_for_the_second_run(backend):
    """It may be a recurrent state as well, which comes back as the forward found it: a warning tells, once a module,
    and that the branch does not do the same twice then an error."""
    x = torch.linspace(-1, 1, 40, dtype=WIDE).reshape(5, 8)
    net, twin = twins([(Replaces(True), Replaces(True)) for _ in range(2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2):
            results = []
            for network in (net, twin):
                torch.manual_seed(seed)
                network.zero_grad()
                loss_of(network(x)).backward()
                results.append([p.grad.clone() for p in network.parameters()])
            assert_all_close(*results)
    net = ReversibleSequential(ReversibleBlock(Replaces(False), Replaces(True)))
    with pytest.warns(UserWarning, match="Replaces has got another kept.*revkernels_comes_back = True") as told:
        for _ in range(2):
            with pytest.raises(ReconstructionError, match="returned other values"):
                net(x).sum().backward()
    assert len(told) == 1


def test_what_is_collected_in_the_recompute_stays():
    """Inputs of layers, one branch's at a time: of use to who looks at curvature. They have no graph."""
    branches, seen = [nn.Linear(4, 4).to(WIDE) for _ in range(4)], []

    def before(module, inputs):
        if is_recomputing():
            module.input = inputs[0].detach()
            module.norms.append(inputs[0].detach().norm())

    for branch in branches:
        branch.norms = []
        branch.register_forward_pre_hook(before)
        branch.register_full_backward_hook(lambda module, *_: seen.append(module.input.t() @ module.input))
    blocks = [ReversibleBlock(F, G) for F, G in zip(branches[::2], branches[1::2], strict=True)]
    ReversibleSequential(blocks)(rows()).sum().backward()
    assert len(seen) == 4 and all(len(branch.norms) == 1 for branch in branches)


def test_what_another_thread_puts_in_stays():
    """A dictionary with an entry for each thread."""

    class ByThread(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.all = nn.Linear(4, 4), {}

        def forward(self, h):
            self.all[threading.get_ident()] = h.detach().mean()
            return self.linear(h).tanh()

    branches = [ByThread().to(WIDE) for _ in range(4)]
    net = ReversibleSequential([ReversibleBlock(F, G) for F, G in zip(branches[::2], branches[1::2], strict=True)])
    problems = []

    def work():
        try:
            for _ in range(20):
                y = net(rows()).sum()
                y.backward()
                for branch in branches:
                    branch.all.pop(threading.get_ident())
        except BaseException as problem:
            problems.append(problem)

    threads, before = [threading.Thread(target=work) for _ in range(3)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that they meet
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not problems
