# SPDX-License-Identifier: Apache-2.0
"""What a branch reads besides its input, wherever it is: run again as it was, counted once, or refused by name."""

import copy
import functools

import pytest
from torch import nn
from torch.nn.utils import parametrizations

import revkernels as rk
from behaviour.common import torch
from revkernels.autograd import output_check
from revkernels.autograd.state import snapshot
from revkernels.nn import ReversibleBlock, ReversibleSequential, checkpoint

WIDE = torch.float64
NORM = nn.BatchNorm1d(6).double()
TENSOR = torch.ones(6, dtype=WIDE)


def norm_of_this_file(x):
    return NORM(x)


# ---- state that the forward writes


class Subclass(nn.BatchNorm1d):
    """A batch norm with a forward of its own, as timm's."""

    def forward(self, x):
        return super().forward(x) * 1.0


class Functional(nn.Module):
    """Running statistics that torch's function writes, without counting it as a write."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("scale", torch.full((width,), 2.0))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.center, self.spread, training=self.training) * self.scale


class Moving(nn.Module):
    """A buffer that the output depends on, written in training alone."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("size", torch.ones(width))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.size.lerp_(x.abs().mean(0), 0.1)
        return x / self.size.clone()


STATEFUL = {
    "a batch norm's subclass": Subclass,
    "the function": Functional,
    "a moving average": Moving,
    "spectral norm": lambda width: parametrizations.spectral_norm(nn.Linear(width, width)),
    "old spectral norm": lambda width: nn.utils.spectral_norm(nn.Linear(width, width)),
}


@pytest.mark.parametrize("first", ["train", "eval"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_buffers_are_written_once(kind, first):
    """In the first step of a module, and in the first in training behind one in evaluation: gradients and buffers."""
    torch.manual_seed(0)

    def branch():
        return nn.Sequential(STATEFUL[kind](3), nn.Linear(3, 3), nn.Tanh())

    net = ReversibleSequential(*[ReversibleBlock(branch(), branch()) for _ in range(2)], activations="store").double()
    twin = ReversibleSequential(*copy.deepcopy(net))
    x = torch.randn(5, 6, dtype=WIDE)
    for training in (first == "train", True, False, True):
        found = []
        for each in (net, twin):
            each.train(training).zero_grad()
            z = x.clone().requires_grad_()
            each(z).square().sum().backward()
            found.append([z.grad, *(p.grad for p in each.parameters()), *(b.clone() for b in each.buffers())])
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_values_are_compared_in_the_first_step_alone(monkeypatch):
    """That waits for a device: it belongs in no step but the first."""
    asked = []
    monkeypatch.setattr(snapshot, "differs", lambda before, now: asked.append(now) or not torch.equal(before, now))
    net = ReversibleSequential(ReversibleBlock(Functional(3), Subclass(3)))
    x = torch.randn(5, 6, requires_grad=True)
    net(x).sum().backward()
    assert asked
    asked.clear()
    for _ in range(2):
        net(x).sum().backward()
    assert not asked


def test_a_buffer_first_written_later_fails_once_and_says_so():
    """What it held is not known then; from the next step on it is rewound."""

    class Late(Moving):
        def __init__(self, width):
            super().__init__(width)
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) if self.calls > 2 else x / self.size.clone()

    net = ReversibleSequential(ReversibleBlock(Late(3), Late(3)))
    x = torch.randn(5, 6, requires_grad=True)
    for _ in range(2):
        net(x).sum().backward()
    with pytest.raises(rk.ReconstructionError, match=r"buffer size was written by the branch's own forward.*rewound"):
        net(x).sum().backward()
    net(x).sum().backward()


# ---- what a function holds


class Trainer:
    """No module."""

    def __init__(self, norm):
        self.net = nn.Sequential(norm)

    def step(self, x):
        return self.net(x)


def held():
    """A function that runs a batch norm, and the norm, by the way that it gets hold of it."""
    norm = nn.BatchNorm1d(6).double()
    trainer = Trainer(norm)
    return {
        "an argument": (lambda m, x: m(x), norm, (norm,)),
        "a dictionary": (lambda x, d={"norm": [norm]}: d["norm"][0](x), norm, ()),
        "a closure's dictionary": ((lambda d: lambda x: d["norm"](x))({"norm": norm}), norm, ()),
        "a closure's object": (lambda x: trainer.net(x), norm, ()),
        "a method of no module": (trainer.step, norm, ()),
        "a keyword": ((lambda *, m=norm: lambda x: m(x))(), norm, ()),
        "a partial": (functools.partial(lambda m, x: m(x), norm), norm, ()),
        "a global": (lambda x: NORM(x), NORM, ()),
        "a function's global": (lambda x: norm_of_this_file(x), NORM, ()),
    }


@pytest.mark.parametrize("way", held())
def test_a_checkpointed_functions_modules_are_found(way):
    """Their statistics are counted once, their mode is that of the forward, and a weight that changed is refused."""
    function, norm, given = held()[way]
    norm.reset_running_stats()
    norm.train()
    x = torch.randn(5, 6, dtype=WIDE, requires_grad=True)
    twin = copy.deepcopy(norm)
    y = checkpoint(function, *given, x)
    norm.eval()
    y.square().sum().backward()
    z = x.detach().clone().requires_grad_()
    twin(z).square().sum().backward()
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close((x.grad, norm.running_mean), (z.grad, twin.running_mean))
    norm.train()
    y = checkpoint(function, *given, x)
    with torch.no_grad():
        norm.weight.mul_(2)
    with pytest.raises(rk.ReconstructionError, match="weight was changed in place"):
        y.sum().backward()
    with torch.no_grad():
        norm.weight.fill_(1)


def test_containers_that_hold_themselves_or_are_long():
    """Looked into no further than that makes sense."""
    norm = nn.BatchNorm1d(6).double()
    ring = {"norm": norm}
    ring["ring"] = [ring]
    data = [object()] * 2**20
    x = torch.randn(5, 6, dtype=WIDE, requires_grad=True)
    checkpoint(lambda x: ring["norm"](x) + len(data), x).sum().backward()
    assert norm.num_batches_tracked == 1


def test_modules_among_the_arguments_of_a_branch():
    class Calls(nn.Module):
        def forward(self, x, norm):
            return norm(x).tanh()

    norm = nn.BatchNorm1d(3).double()
    net = ReversibleSequential(ReversibleBlock(Calls(), Calls()))
    net(torch.randn(5, 6, dtype=WIDE, requires_grad=True), norm=norm).sum().backward()
    assert norm.num_batches_tracked == 2  # two branches


class Attribute(nn.Module):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(3, dtype=WIDE)

    def forward(self, x):
        return (x * self.scale).tanh()


def test_other_tensors_that_change_are_refused():
    """Those of a closure, a global and an attribute, which torch's version check would find with stored activations."""
    scale = torch.ones(3, dtype=WIDE)
    attribute = Attribute()
    for branch, tensor, name in (
        (lambda x: (x * scale).tanh(), scale, "scale"),
        (lambda x: (x * TENSOR[:3]).tanh(), TENSOR, "TENSOR"),
        (attribute, attribute.scale, "scale"),
    ):
        for run in (
            lambda x, branch=branch: ReversibleSequential(ReversibleBlock(branch, branch))(x),
            lambda x, branch=branch: checkpoint(branch, x[:, :3]),
        ):
            x = torch.randn(5, 6, dtype=WIDE, requires_grad=True)
            y = run(x)
            tensor.mul_(2)
            with pytest.raises(rk.ReconstructionError, match=f"the tensor {name}, which is no parameter or buffer"):
                y.sum().backward()
            run(x).sum().backward()


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()
        self.mask, self.masks, self.all = TENSOR, {"a": TENSOR, "deeper": [TENSOR], "pair": (TENSOR,)}, [TENSOR]
        self.masks["learnt"] = nn.Parameter(TENSOR)

    def forward(self, x):
        held = self.masks["a"] * self.masks["deeper"][0] * self.masks["pair"][0] * self.masks["learnt"]
        return self.layer(x) * self.mask * held * self.all[0]


def _replaced(module, other):
    module.mask = module.masks["a"] = module.masks["deeper"][0] = module.all[0] = other
    module.masks["pair"] = (other,)
    module.masks["learnt"] = nn.Parameter(other)


def _replaced_lists(module, other):
    module.masks["deeper"], module.all[:] = [other], [other]


def _removed(module, other):
    del module.masks["a"]
    module.all.append(other)


def _cleared(module, other):
    module.masks.clear()
    module.all.clear()


@pytest.mark.parametrize("change", [_replaced, _replaced_lists, _removed, _cleared])
def test_what_hangs_elsewhere_now_is_put_back(change, monkeypatch):
    """Row 33: attributes and items of containers that are others in the backward; and afterwards they are again."""
    monkeypatch.setattr(output_check, "TIMES", 0)  # which would tell if it were not so
    torch.manual_seed(0)
    net = ReversibleSequential(*(ReversibleBlock(Holds(), Holds()) for _ in range(2)))
    x = torch.randn(3, 12, dtype=WIDE)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    y = net(x)
    other = torch.full((6,), 3.0, dtype=WIDE)
    for module in net.modules():
        if isinstance(module, Holds):
            change(module, other)
    y.square().sum().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10)
    for module in net.modules():
        if isinstance(module, Holds):
            if change is _replaced:
                assert module.mask is module.masks["a"] is module.masks["deeper"][0] is module.all[0] is other
                assert module.masks["pair"][0] is other and module.masks["learnt"].data_ptr() == other.data_ptr()
            elif change is _replaced_lists:
                assert module.masks["deeper"][0] is module.all[0] is other and len(module.all) == 1
            elif change is _cleared:
                assert module.masks == {} and module.all == []
            else:
                assert "a" not in module.masks and module.all[1] is other


class Takes(nn.Module):
    """Takes its numbers out of a list and a dictionary, one after another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()
        self.list = [torch.full((6,), 1.0 + i, dtype=WIDE) for i in range(4)]
        self.table = {i: torch.full((6,), 2.0 + i, dtype=WIDE) for i in range(4)}

    def forward(self, x):
        return torch.sin(self.layer(x) * self.list.pop()) * self.table.pop(len(self.table) - 1)


@pytest.mark.parametrize("forwards", [1, 2])
def test_what_a_forward_takes_out_is_there_again(forwards, monkeypatch):
    """Row 34: for the recompute, also of an earlier forward; and afterwards it is gone again."""
    monkeypatch.setattr(output_check, "TIMES", 0)  # which would tell if it were not so
    x = torch.randn(3, 12, dtype=WIDE)
    grads = []
    for activations in ("reconstruct", "store"):
        torch.manual_seed(0)
        branches = [Takes() for _ in range(4)]
        net = ReversibleSequential(*map(ReversibleBlock, branches[::2], branches[1::2]), activations=activations)
        for loss in [net(x).square().sum() for _ in range(forwards)]:
            loss.backward()
        grads.append([p.grad for p in net.parameters()])
        for branch in branches:
            assert len(branch.list) == 4 - forwards and list(branch.table) == list(range(4 - forwards))
    for got, expected in zip(*grads, strict=True):
        assert torch.allclose(got, expected, rtol=1e-10)


def test_what_a_forward_counts_for_itself_is_let_be():
    """A tensor that no output depends on, written by every call, in two forwards before two backwards."""

    class Counts(Attribute):
        def __init__(self):
            super().__init__()
            self.calls = torch.zeros(1)

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    net = ReversibleSequential(ReversibleBlock(Counts(), Counts()))
    losses = [net(torch.randn(5, 6, dtype=WIDE, requires_grad=True)).sum() for _ in range(2)]
    for loss in losses:
        loss.backward()


@pytest.mark.parametrize("wanted", [True, False])
def test_requires_grad_that_changes_is_refused(wanted):
    """The recompute's graph would have other gradients than the forward's."""
    layer = nn.Sequential(nn.Linear(3, 3))
    net = ReversibleSequential(ReversibleBlock(layer, nn.Linear(3, 3)))
    for run in (net, lambda x: checkpoint(layer, x[:, :3])):
        layer.requires_grad_(wanted)
        y = run(torch.randn(5, 6, requires_grad=True))
        layer.requires_grad_(not wanted)
        words = "required grad" if wanted else "did not require grad"
        with pytest.raises(rk.ReconstructionError, match=f"parameter 0.weight {words} in the forward"):
            y.sum().backward()


def test_an_argument_given_twice_is_one_again():
    """Attention asks whether query and key are one tensor, and takes another way if so."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8, requires_grad=True)
    checkpoint(attention, x, x, x)[0].square().sum().backward()
    found, x.grad = x.grad, None
    attention(x, x, x)[0].square().sum().backward()
    torch.testing.assert_close(found, x.grad)


# ---- blocks called alone


@pytest.mark.parametrize("activations", ["reconstruct", "store"])
def test_hooks_of_a_block_called_alone_fire_once(activations):
    block = ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3), activations=activations).double()
    x = torch.randn(5, 6, dtype=WIDE, requires_grad=True)
    block(x).square().sum().backward()
    plain, x.grad, seen = x.grad, None, []
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    block.register_forward_hook(lambda *_: seen.append("after"))
    block.register_full_backward_hook(lambda _, given, __: (seen.append("backward"), (given[0] * 2, *given[1:]))[1])
    block(x).square().sum().backward()
    assert seen == ["before", "after", "backward"]
    torch.testing.assert_close(x.grad, 2 * plain)
    twice = block.register_forward_pre_hook(lambda _, given: (given[0] * 2, *given[1:]))
    with torch.no_grad():
        doubled = block(x)
        twice.remove()
        torch.testing.assert_close(doubled, block(2 * x))


def test_vmap_over_parameters_of_stored_chains():
    """The input plain: an ensemble."""
    chains = [
        ReversibleSequential(ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3)), activations="store") for _ in range(3)
    ]
    parameters, _ = torch.func.stack_module_state(chains)
    x = torch.randn(5, 6)
    got = torch.func.vmap(lambda p: torch.func.functional_call(chains[0], p, (x,)))(parameters)
    torch.testing.assert_close(got, torch.stack([chain(x) for chain in chains]))
