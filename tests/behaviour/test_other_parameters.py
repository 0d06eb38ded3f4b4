# SPDX-License-Identifier: Apache-2.0
"""Parameters and buffers that come and go between forward and backward: the recompute has those of the forward."""

import pytest
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import revkernels as rk
from behaviour.common import WIDE, assert_all_close, assert_raises, fresh, loss_of, norm_mlp, rows, torch, twins
from revkernels.nn import ReversibleBlock, ReversibleSequential


class Holds(nn.Module):
    """A module of somebody's, with layers of torch's in it."""

    def __init__(self):
        super().__init__()
        self.body = norm_mlp()

    def forward(self, x):
        return self.body(x)


def convolution():
    """Saves the same tensors with a bias and without one."""
    return nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 3, padding=1), nn.Flatten()).to(WIDE)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def normed(layer):
    parametrizations.weight_norm(layer)


def normed_by_a_hook(layer):
    nn.utils.weight_norm(layer)


def a_plain_attribute(layer):
    weight = layer.weight
    del layer.weight
    layer.weight = torch.ones_like(weight)


def without_bias(layer):
    layer.bias = None


def one_in_front(layer):
    """What comes back must come back in this order, by which optimizers count."""
    own = dict(layer._parameters)
    layer._parameters.clear()
    layer._parameters.update({"scale": nn.Parameter(torch.ones(4, dtype=WIDE)), **own})


def another_class(layer):
    class Thrice(type(layer)):
        def forward(self, x):
            return 3 * super().forward(x)

    layer.__class__ = Thrice


CHANGES = [pruned, normed, normed_by_a_hook, a_plain_attribute, without_bias, one_in_front, another_class]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [norm_mlp, Holds, convolution])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_run_again_on_the_parameters_of_the_forward(make, change, options):
    """Parameters that have been taken away since, with something else in their place; and what is there then stays."""
    outcomes = []
    for network in twins([(make(), make()) for _ in range(2)], **options):
        torch.manual_seed(0)
        leaves, x = fresh(rows(5, 8))
        y, learnt = network(x), list(network.parameters())
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv1d)]
        for layer in layers:
            change(layer)
        before = [(type(m), dict(m.__dict__), list(m._parameters.items())) for m in network.modules()]
        outcomes.append([y, *torch.autograd.grad(loss_of(y), [*leaves, *learnt]), *network.buffers()])
        assert [(type(m), dict(m.__dict__), list(m._parameters.items())) for m in network.modules()] == before
    assert_all_close(*outcomes)


@pytest.mark.parametrize("change", [pruned, without_bias])
def test_parameters_with_marks_on_them(change, backend):
    """Somebody's own, say for an optimizer's groups: they do not make of a parameter one that is sharded."""
    net, _ = twins([(convolution(), convolution()) for _ in range(2)], backend=backend)
    leaves, x = fresh(rows(5, 8))
    for parameter in net.parameters():
        parameter.decays = False
    y, learnt = net(x), list(net.parameters())
    expected = torch.autograd.grad(loss_of(y), [*leaves, *learnt], retain_graph=True)
    for layer in [layer for layer in net.modules() if isinstance(layer, nn.Conv1d)]:
        change(layer)
    before = [(dict(m.__dict__), list(m._parameters.items())) for m in net.modules()]
    assert_all_close(torch.autograd.grad(loss_of(y), [*leaves, *learnt]), expected)
    assert [(dict(m.__dict__), list(m._parameters.items())) for m in net.modules()] == before


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_run_again_under_a_norm_that_was_taken_off(options):
    """The weight, which its hook makes, is a parameter since."""
    outcomes = []
    for network in twins([(convolution(), convolution()) for _ in range(2)], **options):
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv1d)]
        for layer in layers:
            nn.utils.weight_norm(layer)
        torch.manual_seed(0)
        leaves, x = fresh(rows(5, 8))
        y, learnt = network(x), list(network.parameters())
        for layer in layers:
            nn.utils.remove_weight_norm(layer)
        outcomes.append([y, *torch.autograd.grad(loss_of(y), [*leaves, *learnt])])
        assert all(type(layer.weight) is nn.Parameter and "weight" not in vars(layer) for layer in layers)
    assert_all_close(*outcomes)


def test_a_parametrization_that_was_taken_off(backend):
    """Its class has lost the property that made the weight."""

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    net = ReversibleSequential(ReversibleBlock(convolution(), nn.Tanh()).to(WIDE), backend=backend)
    layer = net[0].F[1]
    parametrize.register_parametrization(layer, "weight", Half())
    y = net(rows(5, 8))
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    with pytest.raises(rk.ReconstructionError, match="the parametrization of weight in a ParametrizedConv1d was remov"):
        y.sum().backward()
    assert type(layer) is nn.Conv1d
    assert type(layer.weight) is nn.Parameter
    net(rows(5, 8)).sum().backward()


@pytest.mark.parametrize("within", [False, True], ids=["a backward outside", "a backward inside"])
@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weights_that_are_computed_once_for_many_uses(make, within, options):
    """Row 26: inside ``parametrize.cached()``, with blocks that are used twice and such that are not."""

    def branch():
        return nn.Sequential(nn.Tanh(), make(nn.Linear(4, 4))).to(WIDE)

    a, b, c = ((branch(), branch()) for _ in range(3))
    nets = twins([a, b, a, (b[1], b[0]), c], **options)
    x, found = rows(5, 8), []
    for net in nets:
        x.grad = None
        for _ in range(2):
            with parametrize.cached():
                y = net(x)
                if within:
                    loss_of(y).backward()
                    assert parametrize._cache_enabled == 1 and parametrize._cache
            if not within:
                loss_of(y).backward()
            assert not parametrize._cache_enabled and not parametrize._cache
        found.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    assert_all_close(*found)


def test_the_inverse_of_weights_that_are_computed_already(backend):
    """Row 28: inside ``parametrize.cached()`` too, its gradient reaches the parameters behind them."""

    def branch():
        return nn.Sequential(nn.Tanh(), parametrizations.weight_norm(nn.Linear(4, 4))).to(WIDE)

    net, y, found = ReversibleSequential(ReversibleBlock(branch(), branch()), backend=backend), rows(5, 8), []
    for computed in (False, True):
        net.zero_grad()
        with parametrize.cached():
            if computed:
                net(y)
            loss_of(net.inverse(y)).backward()
        found.append([p.grad for p in net.parameters()])
    assert_all_close(*found)


@pytest.mark.parametrize("where", ["bias", "shift"])
def test_run_again_without_what_there_was_none_of(where, options):
    """A parameter, or a buffer, that was None in the forward and is something now: the sum saves nothing more."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("bias", None)
            self.register_buffer("shift", None)

        def forward(self, x):
            y = x.tanh()
            for term in (self.bias, self.shift):
                y = y if term is None else y + term
            return y

    for network in twins([(Shifted(), Shifted()) for _ in range(2)], **options):
        leaves, x = fresh(rows(5, 8))
        y = network(x)
        (expected,) = torch.autograd.grad(loss_of(y), leaves, retain_graph=True)
        term = torch.ones(4, dtype=WIDE)
        for module in network.modules():
            if isinstance(module, Shifted):
                setattr(module, where, nn.Parameter(term) if where == "bias" else term)
        (got,) = torch.autograd.grad(loss_of(y), leaves)
        assert_all_close([got], [expected])
        assert all(getattr(m, where) is not None for m in network.modules() if isinstance(m, Shifted))


@pytest.mark.parametrize("run_before", [False, True])
def test_other_memory_for_a_buffer(run_before, backend):
    """As for a parameter: torch keeps the old one with stored activations, and no version tells that it is gone."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(4, dtype=WIDE))

        def forward(self, x):
            return x.tanh() * self.mask

    net, _ = twins([(Masked(), Masked()) for _ in range(2)], backend=backend)
    if run_before:  # it is known by then that the forward does not write to it
        net(rows(5, 8))
    mask = net[1].G.mask
    y, old = net(rows(5, 8)), mask.data
    mask.data = 3 * old
    assert_raises(rk.ReconstructionError, ["block 1, branch G", "buffer mask was given other memory"], y.sum().backward)
    y = net(rows(5, 8))
    mask.data, new = old, mask.data
    mask.data = new
    y.sum().backward()


def test_other_memory_from_the_forward_itself(backend):
    """A table of a layer's that the branch lets grow is lost for the step in which it grows first, as one written in
    place is; that it was given other memory behind the forward would not be true."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("rows", torch.ones(4, 1, dtype=WIDE))

        def forward(self, x):
            return x * self.rows[: len(x)]

    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = Table()

        def forward(self, x):
            if len(x) > len(self.table.rows):
                self.table.rows.data = torch.arange(len(x), dtype=WIDE)[:, None].cos()
            return self.table(x.tanh())

    net, _ = twins([(Growing(), Growing()) for _ in range(2)], backend=backend)
    net(rows(4, 8)).sum().backward()  # it is known by then that the forward does not write to it
    words = ["block 1, branch G", "buffer table.rows was written by the branch's own forward", "from the next one on"]
    assert_raises(rk.ReconstructionError, words, net(rows(5, 8)).sum().backward)
    net(rows(6, 8)).sum().backward()


def test_other_memory_for_a_side_input(backend):
    class Gated(nn.Module):
        def forward(self, x, gate):
            return x.tanh() * gate

    net, _ = twins([(Gated(), Gated()) for _ in range(2)], backend=backend)
    gate = torch.ones(4, dtype=WIDE)
    y = net(rows(5, 8), gate=gate)
    gate.data = 3 * gate.data
    assert_raises(rk.ReconstructionError, ["block 1, branch G", "side input gate was given other"], y.sum().backward)
    net(rows(5, 8), gate=gate).sum().backward()
