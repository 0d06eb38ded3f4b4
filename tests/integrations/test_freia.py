# SPDX-License-Identifier: Apache-2.0
"""Additive couplings of FrEIA on this driver: the results of the package's own code, in both directions."""

import pytest
from behaviour.common import WIDE, assert_all_close, assert_close, assert_raises, check_step, rows, torch
from torch import nn

from integrations.common import check_compiled, check_copies, check_untouched, original, package, peaks_by_depth
from revkernels.errors import ReconstructionError
from revkernels.integrations import freia, restore
from revkernels.measure import branch_calls

pytestmark = pytest.mark.slow
package("FrEIA")
from FrEIA import framework, modules  # noqa: E402

FEATURES, CONDITION = 7, 3


def subnet(i, o, p=0.1):
    return nn.Sequential(nn.Linear(i, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(p), nn.Linear(6, o))


def without_dropout(i, o):
    return subnet(i, o, 0.0)


def conv(i, o):
    return nn.Sequential(nn.Conv2d(i, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, o, 3, padding=1))


def sequence(depth, make=subnet, other=None):
    """A SequenceINN of couplings with a condition, cut anywhere, each with a permutation behind it."""
    inn = framework.SequenceINN(FEATURES)
    for index in range(depth):
        inn.append(
            modules.NICECouplingBlock,
            cond=0,
            cond_shape=(CONDITION,),
            subnet_constructor=make,
            split_len=(0.5, 2, 6)[index % 3],
        )
        inn.append(modules.PermuteRandom, seed=index)
        if other is not None:
            inn.append(other)
    return inn


def graph(depth, make=subnet, other=None):
    """The same as a GraphINN."""
    nodes, condition = [framework.InputNode(FEATURES)], framework.ConditionNode(CONDITION)
    for index in range(depth):
        options = {"subnet_constructor": make, "split_len": (0.5, 2, 6)[index % 3]}
        nodes.append(framework.Node(nodes[-1], modules.NICECouplingBlock, options, conditions=condition))
        nodes.append(framework.Node(nodes[-1], modules.PermuteRandom, {"seed": index}))
        if other is not None:
            nodes.append(framework.Node(nodes[-1], other, {}))
    return framework.GraphINN([*nodes, framework.OutputNode(nodes[-1]), condition])


class Net(nn.Module):
    """An invertible network, as a network that returns what it has to compare."""

    def __init__(self, inn, **options):
        super().__init__()
        self.inn, self.options = inn.to(WIDE), options

    def forward(self, x, *conditions):
        z, jacobian = self.inn(x, c=list(conditions) or None, **self.options)
        return [z, torch.as_tensor(jacobian, dtype=WIDE)]


def twins(inn, backend=None, activations="reconstruct", **options):
    net = Net(inn, **options)
    freia.replace(net, activations=activations, backend=backend)
    return net, original(net)


def x_of(n=9):
    return rows(n, FEATURES)


@pytest.mark.parametrize("make", [sequence, graph])
@pytest.mark.parametrize("rev", [False, True])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("activations", ["reconstruct", "store"])
def test_steps_as_in_the_package(make, rev, backend, activations, available):
    """Outputs, log-determinant and gradients, the condition's too; dropout; batch norms count a batch once."""
    condition = rows(9, CONDITION)
    net, plain = twins(make(4), available(backend), activations, rev=rev)
    check_step(net, plain, x_of(), condition, sides=[condition], steps=2)


@pytest.mark.parametrize("make", [sequence, graph])
@pytest.mark.parametrize("rev", [False, True])
def test_other_modules_in_between(make, rev):
    condition = rows(9, CONDITION)
    net, plain = twins(make(3, without_dropout, modules.ActNorm), rev=rev)
    for network in (net, plain):
        for module in network.modules():
            if isinstance(module, modules.ActNorm):
                module.init_on_next_batch = False
    check_step(net, plain, x_of(), condition, sides=[condition])
    left = freia.replace(original(net)).left
    assert len(left) == 3 and set(left.values()) == {"not additive: stores its activations, and ends a chain"}


def images():
    inn = framework.SequenceINN(4, 4, 6)
    inn.append(modules.NICECouplingBlock, subnet_constructor=conv)
    inn.append(modules.PermuteRandom)
    inn.append(modules.Reshape, output_dims=(8, 4, 3))
    inn.append(modules.NICECouplingBlock, subnet_constructor=conv, split_len=3)
    inn.append(modules.Flatten)
    inn.append(modules.NICECouplingBlock, subnet_constructor=lambda i, o: nn.Linear(i, o))
    return inn


@pytest.mark.parametrize("rev", [False, True])
def test_images_reshaped_and_flattened(rev):
    """Inside the chain; channels-last images as well."""
    net, plain = twins(images(), rev=rev)
    x = rows(2, 96) if rev else rows(2, 4, 4, 6)
    check_step(net, plain, x, steps=2)
    if not rev:
        check_step(net, plain, x.detach().to(memory_format=torch.channels_last).requires_grad_())


def forked():
    """A graph that splits, couples one part, and joins: an output that waits for its reader."""
    start = framework.InputNode(FEATURES + 1)
    split = framework.Node(start, modules.Split, {"section_sizes": (4, 4)})
    left = framework.Node(split.out0, modules.NICECouplingBlock, {"subnet_constructor": without_dropout})
    permuted = framework.Node(left, modules.PermuteRandom, {"seed": 1})
    again = framework.Node(permuted, modules.NICECouplingBlock, {"subnet_constructor": without_dropout})
    joined = framework.Node([again.out0, split.out1], modules.Concat, {})
    last = framework.Node(joined, modules.NICECouplingBlock, {"subnet_constructor": without_dropout})
    return framework.GraphINN([start, split, left, permuted, again, joined, last, framework.OutputNode(last)])


@pytest.mark.parametrize("rev", [False, True])
def test_a_graph_that_forks(rev):
    check_step(*twins(forked(), rev=rev), rows(9, FEATURES + 1), steps=2)


def test_what_else_a_graph_can_be_asked():
    net, plain = twins(forked())
    x = rows(9, FEATURES + 1)
    for options in ({"jac": False}, {"intermediate_outputs": True}, {"rev": True, "jac": False}):
        ours, theirs = (network.inn(x, **options) for network in (net, plain))
        for a, b in zip(ours, theirs, strict=True):
            values = [[v for v in it.values() if v is not None] if isinstance(it, dict) else [it] for it in (a, b)]
            assert_all_close(*values, 1e-13)
    assert_raises(ValueError, ["Got 2 inputs, but expected 1"], lambda: net.inn((x, x)))
    assert_raises(ValueError, ["Got 1 conditions, but expected 0"], lambda: net.inn(x, c=[x]))
    error = assert_raises(RuntimeError, ["encountered an error"], lambda: net.inn(rows(9, 3)))
    assert error.__cause__ is not None
    net.inn.force_tuple_output = True
    assert type(net.inn(x)[0]) is tuple


@pytest.mark.parametrize("make", [sequence, graph])
def test_the_inverse_undoes_it(make):
    net = Net(make(5, without_dropout)).eval()
    freia.replace(net)
    x, condition = x_of(), rows(9, CONDITION)
    z, _ = net(x, condition)
    assert_close(net.inn(z, c=[condition], rev=True)[0], x, 1e-13)


@pytest.mark.parametrize("make", [sequence, graph])
@pytest.mark.parametrize("rev", [False, True])
def test_memory_is_flat_in_depth(make, rev):
    """Permutations included; and a GraphINN does not hold the outputs of all its nodes."""
    few, many, n = 4, 12, 2000  # three of different widths, and again
    condition = rows(n, CONDITION, requires_grad=False)

    class Given(Net):
        def forward(self, x):
            return super().forward(x, condition)

    peaks = peaks_by_depth(lambda d: Given(make(d, without_dropout), rev=rev), freia.replace, x_of(n), (few, many))
    features = n * FEATURES * 8
    assert peaks[many][1] - peaks[few][1] < 0.1 * features
    assert peaks[many][0] - peaks[few][0] > 5 * features * (many - few)


def test_each_subnetwork_runs_once_more():
    net = Net(sequence(3))
    freia.replace(net)
    subnets = [module for module in net.modules() if isinstance(module, nn.Sequential)]
    assert branch_calls(subnets, lambda: net(x_of(), rows(9, CONDITION))[0].sum().backward()) == 12


@pytest.mark.parametrize("make", [sequence, graph])
def test_compiled(make):
    check_compiled(*twins(make(2, without_dropout)), x_of(), rows(9, CONDITION))


@pytest.mark.parametrize("make", [sequence, graph])
def test_parameters_names_and_copies(make):
    """FrEIA's blocks cannot be pickled, with or without the change: they hold lambdas."""
    net = Net(make(2))
    replaced = check_untouched(freia.replace, net)
    assert len(replaced.modules) == (4 if make is sequence else 5) and "FrEIA 0.2" in str(replaced)
    freia.replace(net)
    check_copies(net, x_of(), rows(9, CONDITION), can_pickle=False)
    assert len(restore(net)) == len(replaced.modules)


class Own(modules.NICECouplingBlock):
    def _coupling2(self, x2, u1, rev=False):
        return x2, 0.0


def test_what_is_left_and_why():
    inn = framework.SequenceINN(4)
    inn.append(modules.NICECouplingBlock, subnet_constructor=without_dropout)
    inn.append(Own, subnet_constructor=without_dropout)
    inn.append(modules.GINCouplingBlock, subnet_constructor=without_dropout)
    replaced = freia.replace(inn)
    assert list(replaced.modules) == ["module_list.0"]
    assert replaced.left == {
        "module_list.1": "Own has a _coupling2 of its own",
        "module_list.2": "not additive: stores its activations, and ends a chain",
    }
    wanted = ["a FrEIA.modules.NICECouplingBlock is looked for", "changed before"]
    assert_raises(ValueError, wanted, lambda: freia.replace(inn))


def test_a_subnetwork_that_is_changed_is_named():
    net = Net(sequence(2, without_dropout))
    freia.replace(net)
    z, _ = net(x_of(), rows(9, CONDITION))
    with torch.no_grad():
        net.inn[2].G[0].weight.mul_(2)
    assert_raises(ReconstructionError, ["G: parameter 0.weight was changed"], lambda: z.sum().backward())
    narrow = Net(sequence(1, lambda i, o: nn.Linear(i, o + 1)))
    freia.replace(narrow)
    assert_raises(
        ValueError, ["F returned shape (9, 8) for a stream of shape (9, 7)"], lambda: narrow(x_of(), rows(9, CONDITION))
    )
