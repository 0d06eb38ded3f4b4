# SPDX-License-Identifier: Apache-2.0
"""Modules called one by one that are one chain: the results of plain torch, and the memory of a chain."""

import pytest
from torch import nn

from behaviour.common import (
    assert_raises,
    check_step,
    dropout_mlp,
    loss_of,
    mlp,
    norm_mlp,
    rows,
    torch,
)
from behaviour.linked_cases import Layer, Permute, Shift, chains, flow, twins
from revkernels.errors import ReconstructionError
from revkernels.measure import branch_calls, peak_bytes
from revkernels.nn import linked
from revkernels.nn.chain import HalfStep


@pytest.mark.parametrize("make", [mlp, dropout_mlp, norm_mlp])
def test_layers_in_a_loop(make, backend):
    """Gradients, masks, running statistics and the generator are those of plain torch; it is one chain."""
    net, plain = twins([Layer(make, backend) for _ in range(4)])
    for x in (rows(), (rows(5, 4), rows(5, 4))):
        check_step(net, plain, x, steps=2)
        assert chains(net, x) == 1


def test_couplings_and_permutations(backend):
    """One stream under masks, and its elements rearranged in between."""
    net, plain = twins(flow(4, backend))
    check_step(net, plain, rows(), steps=2)
    assert chains(net, rows()) == 1
    first, _ = twins([Permute(8), *flow(2, backend)])
    assert chains(first, rows()) == 1


def test_rearranged_to_another_shape(backend):
    """A reshape in the middle of the chain, and strides that are those of the forward."""

    def there(x):
        return x.reshape(4, 8, 2).transpose(1, 2).flatten(0, 1)

    def back(y):
        return y.reshape(4, 2, 8).transpose(1, 2).reshape(4, 16)

    layers = [Shift(backend, 13), Shift(backend, 13), Shift(backend), Shift(backend)]
    net, plain = twins(layers, lambda index, x: linked.rearrange(x, there, back) if index == 1 else x)
    plain.between = lambda index, x: there(x) if index == 1 else x
    check_step(net, plain, rows(4, 16))
    assert chains(net, rows(4, 16)) == 1


@pytest.mark.parametrize("kind", ["tensor", "flow", pytest.param("pair", marks=pytest.mark.slow)])
def test_memory_is_flat(kind):
    """The peak of a step does not grow with the number of calls; in plain torch it does."""
    few, many, n = 3, 12, 1024
    peaks = {}
    for depth in (few, many):
        layers = flow(depth) if kind == "flow" else [Layer() for _ in range(depth)]
        for name, net in zip(("linked", "plain"), twins(layers), strict=True):
            x = (rows(n, 4), rows(n, 4)) if kind == "pair" else rows(n, 8)

            def train(net=net, x=x):
                loss_of(net(x)).backward()

            train()  # the parameters have their gradients now
            peaks[name, depth] = peak_bytes(train)
    stream = n * 4 * 8
    assert peaks["linked", many] - peaks["linked", few] < 0.1 * stream
    assert peaks["plain", many] - peaks["plain", few] > 3 * stream * (many - few)


def test_every_branch_runs_once_more(compiled):
    net, _ = twins([Layer(backend=compiled) for _ in range(3)])
    branches = [branch for layer in net.layers for branch in (layer.F, layer.G)]
    assert branch_calls(branches, lambda: net(rows()).sum().backward()) == 12


def times_two(index, x):
    return x * 2 if index == 1 else x


def viewed(index, x):
    return x.view_as(x) if index == 1 else x


def in_place(index, x):
    return x.mul_(2) if index == 1 else x


def without_gradient(index, x):
    if index == 1:
        with torch.no_grad():
            x.mul_(1)  # a new version, of the same node
    return x


@pytest.mark.parametrize("between", [times_two, viewed])
def test_something_in_between_begins_another_chain(between, backend):
    net, plain = twins([Layer(backend=backend) for _ in range(4)], between)
    check_step(net, plain, rows())
    assert chains(net, rows()) == 2


@pytest.mark.parametrize("between", [in_place, without_gradient])
def test_a_change_in_place_is_refused_as_ever(between):
    net, _ = twins([Layer() for _ in range(3)], between)
    assert_raises(ReconstructionError, ["changed in place"], lambda: net(rows()).sum().backward())


@pytest.mark.parametrize("other", [{"groups": 4}, {"split_dim": 0}, {"backend": "eager"}])
def test_other_options_begin_another_chain(other, compiled):
    def plainly(x):
        streams = list(x.chunk(other.get("groups", 2), other.get("split_dim", 1)))
        for target, source in ((0, 1), (1, 0)):
            streams[target] = streams[target] + torch.tanh(streams[source])
        return torch.cat(streams, other.get("split_dim", 1))

    def apart(x):
        half_steps = [HalfStep(torch.tanh, 0, (1,)), HalfStep(torch.tanh, 1, (0,))]
        return linked.run(half_steps, x, **{"groups": 2, "name": "FG".__getitem__, "backend": compiled, **other})

    net, plain = twins([Layer(backend=compiled)], lambda index, x: apart(x))
    plain.between = lambda index, x: plainly(x)
    check_step(net, plain, rows(6, 8))
    assert chains(net, rows(6, 8)) == 2


class Score(nn.Module):
    """The gradient of a network, which differentiates while it runs."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).square().sum(), x, create_graph=True)[0]


def test_branches_that_differentiate(backend):
    """Inside a call what it computed itself; what an earlier call computed not, as in one chain."""
    check_step(*twins([Layer(Score, backend) for _ in range(3)]), rows())
    first, second = Layer(backend=backend), Layer(backend=backend)
    y = first(rows())
    second.F.register_forward_hook(
        lambda module, args, f: f + torch.autograd.grad(y.sum(), [*first.parameters()])[0].sum()
    )
    assert_raises(ReconstructionError, ["can only differentiate what it computed itself"], lambda: second(y))
