# SPDX-License-Identifier: Apache-2.0
"""What goes wrong is named and propagates: a branch's exception, and what changed between forward and backward."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_raises,
    check_step,
    dropout_mlp,
    loss_of,
    mlp,
    norm_mlp,
    pairs_of,
    rows,
    torch,
    twins,
)
from revkernels.nn import PerBlock, ReversibleBlock, ReversibleSequential, is_recomputing


class Fails(nn.Module):
    """Raises in the forward or in the recompute, while it is told to."""

    def __init__(self, when):
        super().__init__()
        self.inner, self.when = dropout_mlp(), when

    def forward(self, x):
        f = self.inner(x)
        if self.when == ("recompute" if is_recomputing() else "forward"):
            raise KeyError("from the branch")
        return f


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (2, 1)])
def test_exception_in_a_forward(place, options):
    """Row 31: it propagates as it is, and the next step works."""
    pairs = [list(pair) for pair in pairs_of(norm_mlp, 3)]
    pairs[place[0]][place[1]] = failing = Fails("forward")
    net, plain = twins([tuple(pair) for pair in pairs], **options)
    x = rows(6, 8)
    for network in (net, plain):
        with pytest.raises(KeyError, match="from the branch"):
            network(x)
    failing.when = None
    for block in plain.children():
        for branch in (block.F, block.G):
            branch.when = None
    check_step(net, plain, rows(6, 8), steps=2)


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (2, 1)])
def test_exception_in_a_recompute(place, backend):
    """Row 31: it propagates out of backward(); generator, statistics, flags and autocast are the caller's again."""
    pairs = [list(pair) for pair in pairs_of(norm_mlp, 3)]
    pairs[place[0]][place[1]] = failing = Fails("recompute")
    net, plain = twins([tuple(pair) for pair in pairs], backend=backend)
    loss = loss_of(net(rows(6, 8)))
    state, buffers = torch.get_rng_state(), [(b, b.clone()) for b in net.buffers()]
    with pytest.raises(KeyError, match="from the branch"):
        loss.backward()
    assert not is_recomputing()
    assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    for now, (then, value) in zip(net.buffers(), buffers, strict=True):
        assert now is then
        assert torch.equal(now, value)
    failing.when = None
    plain.load_state_dict(net.state_dict())
    check_step(net, plain, rows(6, 8), steps=2)


def test_backward_again_after_a_failed_one(backend):
    """Row 31: under retain_graph the same graph runs once the cause is gone."""
    failing = Fails("recompute")
    net, plain = twins([(mlp(), mlp()), (failing, mlp()), (mlp(), mlp())], backend=backend)
    x = rows()
    torch.manual_seed(1)
    loss = loss_of(net(x))
    with pytest.raises(KeyError):
        loss.backward(retain_graph=True)
    failing.when = None
    net.zero_grad()
    x.grad = None
    loss.backward()
    torch.manual_seed(1)
    copy = x.detach().requires_grad_()
    loss_of(plain(copy)).backward()
    pairs = zip([x, *net.parameters()], [copy, *plain.parameters()], strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12) for a, b in pairs)


def change(tensor):
    with torch.no_grad():
        tensor.mul_(2)


class Uses(nn.Module):
    """Reads a parameter, a buffer and a side input, all of which its gradient needs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=WIDE))
        self.register_buffer("scale", torch.rand(4, dtype=WIDE))

    def forward(self, x, side):
        return torch.tanh(x @ self.weight) * self.scale * side


def check_change_is_found(which, backend, activations):
    """Row 33, as a function: every kind of tensor, in each of the blocks."""
    for block in range(3):
        net, _ = twins(pairs_of(Uses, 3), backend=backend, activations=activations)
        side, sides = torch.rand(4, dtype=WIDE), [torch.rand(4, dtype=WIDE) for _ in range(3)]
        given = PerBlock(sides) if which == "one block's side input" else side
        loss = loss_of(net(rows(), side=given))
        branch = net[block].F
        tensor, name = {
            "parameter": (branch.weight, "parameter weight"),
            "buffer": (branch.scale, "buffer scale"),
            "side input": (side, "side input side"),
            "one block's side input": (sides[block], "side"),
        }[which]
        change(tensor)
        if activations == "store":
            # Stored, the tensor itself is saved: torch finds it, and names its type and shape.
            assert_raises(RuntimeError, ["modified by an inplace operation"], loss.backward)
        else:
            parts = ["changed in place between the forward and the backward", name]
            assert_raises(rk.ReconstructionError, parts, loss.backward)


KINDS = ["parameter", "buffer", "side input", "one block's side input"]


@pytest.mark.parametrize("which", KINDS)
def test_changed_in_place_between_forward_and_backward(which, options):
    """Row 33: an error that names it, also where torch's own check is switched off."""
    check_change_is_found(which, **options)


def test_an_optimizer_step_between_forward_and_backward(backend):
    """Row 33: the usual mistake, with the branch's place in the message, bias and weight alike."""
    for kind in ("weight", "bias"):
        net, _ = twins(pairs_of(mlp, 2), backend=backend)
        loss = loss_of(net(rows()))
        optimizer = torch.optim.SGD([getattr(net[1].G[2], kind)], lr=0.1)
        net[1].G[2].weight.grad = torch.ones(4, 6, dtype=WIDE)
        net[1].G[2].bias.grad = torch.ones(4, dtype=WIDE)
        optimizer.step()
        assert_raises(rk.ReconstructionError, ["block 1, branch G", f"parameter 2.{kind}"], loss.backward)


class Assigned:
    """Ways to give a parameter's object other memory, of which its version does not tell."""

    @staticmethod
    def data(net):
        for p in net.parameters():
            p.data = 2 * p.data

    @staticmethod
    def to_another_dtype(net):
        net.float()

    @staticmethod
    def vector_to_parameters(net):
        vector = nn.utils.parameters_to_vector(net.parameters()).detach()
        nn.utils.vector_to_parameters(2 * vector, net.parameters())


@pytest.mark.parametrize("way", [Assigned.data, Assigned.to_another_dtype, Assigned.vector_to_parameters])
def test_other_memory_for_a_parameter(way, backend):
    """Row 33: with stored activations torch keeps the old one; here it is gone, and so are the values."""
    net, _ = twins(pairs_of(mlp, 2), backend=backend)
    loss = loss_of(net(rows()))
    way(net)
    parts = ["block 1, branch G", "parameter 0.weight was given other memory", ".data"]
    assert_raises(rk.ReconstructionError, parts, loss.backward)
    net.double()
    loss_of(net(rows())).backward()


def test_a_parameter_that_has_its_memory_back(backend):
    """Row 33: averaged weights hang in there for an evaluation, and the trained ones again for the backward."""
    net, plain = twins(pairs_of(mlp, 2), backend=backend)
    x, gradients = rows(), []
    for network in (net, plain):
        loss = loss_of(network(x))
        trained = [p.data for p in network.parameters()]
        for p in network.parameters():
            p.data = 0.9 * p.data
        with torch.no_grad():
            network(x)
        for p, value in zip(network.parameters(), trained, strict=True):
            p.data = value
        gradients.append(torch.autograd.grad(loss, [x, *network.parameters()]))
    assert_all_close(*gradients)


def test_what_a_function_reaches_is_watched(backend):
    """Row 33: a branch that is a function, a bound method or a partial of modules."""
    modules = [mlp() for _ in range(4)]
    F, G = (lambda x: modules[0](x)), modules[1].forward
    net = ReversibleSequential(ReversibleBlock(F, G), ReversibleBlock(modules[2], modules[3]), backend=backend)
    for module in modules[:2]:
        loss = loss_of(net(rows()))
        change(module[0].weight)
        assert_raises(rk.ReconstructionError, ["0.weight", "changed in place"], loss.backward)


def test_mode_switched_between_forward_and_backward(backend):
    """Row 5: the recompute runs in the forward's mode, and leaves the module in its present one."""

    def gradients(switch):
        torch.manual_seed(0)
        net, _ = twins(pairs_of(norm_mlp, 2), backend=backend)
        loss = loss_of(net(rows(6, 8)))
        if switch:
            net.eval()
        loss.backward()
        assert net.training is not switch and all(m.training is not switch for m in net.modules())
        return [parameter.grad for parameter in net.parameters()]

    for switched, left in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(switched, left)


def test_a_branch_that_does_not_do_the_same_twice(backend):
    """Row 31: another number of saved tensors is found, and the branch is named."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = mlp(), 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x) if self.calls == 1 else self.inner(x).exp()

    net, _ = twins([(mlp(), mlp()), (mlp(), Counting())], backend=backend)
    loss = loss_of(net(rows()))
    assert_raises(rk.ReconstructionError, ["block 1, branch G", "the same twice"], loss.backward)
