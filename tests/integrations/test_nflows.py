# SPDX-License-Identifier: Apache-2.0
"""Additive couplings of nflows on this driver: the results of the package's own code, in both directions."""

import pytest
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_close,
    assert_raises,
    check_step,
    rows,
    step,
    torch,
)
from torch import nn

from integrations.common import check_compiled, check_copies, check_untouched, original, package, peaks_by_depth
from revkernels.integrations import nflows, restore
from revkernels.measure import branch_calls

pytestmark = pytest.mark.slow
package("nflows")
from nflows import transforms  # noqa: E402
from nflows.distributions import StandardNormal  # noqa: E402
from nflows.flows import Flow, SimpleRealNVP  # noqa: E402
from nflows.nn.nets import ResidualNet  # noqa: E402

FEATURES = 7
MASKS = ([0, 1, 0, 1, 0, 1, 0], [1, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1])


class Normed(nn.Module):
    """Of a context as nobody asks for one here."""

    def __init__(self, i, o):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(i, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, o))

    def forward(self, x, context=None):
        return self.layers(x)


def net(features, out, context=None, norm=False):
    if norm:
        return Normed(features, out)
    return ResidualNet(features, out, 6, num_blocks=1, context_features=context, activation=torch.tanh)


def couplings(depth, between=lambda index: [], **options):
    """Additive couplings with uneven masks, permutations behind them, and ``between`` behind each."""
    found = []
    for index in range(depth):
        found.append(
            transforms.AdditiveCouplingTransform(MASKS[index % 3], lambda i, o: net(i, o, **options)),
        )
        found.append(transforms.RandomPermutation(FEATURES) if index % 2 else transforms.ReversePermutation(FEATURES))
        found += between(index)
    return transforms.CompositeTransform(found)


class LogProb(nn.Module):
    """The log-density of a flow, or its transform's inverse, as a network."""

    def __init__(self, transform, inverse=False, shape=(FEATURES,)):
        super().__init__()
        self.flow, self.inverse = Flow(transform, StandardNormal(list(shape))).to(WIDE), inverse

    def forward(self, x, context=None):
        if self.inverse:
            return list(self.flow._transform.inverse(x, context))
        return [self.flow.log_prob(x, context)]


def twins(transform, inverse=False, backend=None, activations="reconstruct", **options):
    network = LogProb(transform, inverse, **options)
    nflows.replace(network, activations=activations, backend=backend)
    return network, original(network)


def x_of(n=9, **options):
    return rows(n, FEATURES, **options)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("activations", ["reconstruct", "store"])
def test_steps_as_in_the_package(inverse, backend, activations, available):
    """Log-density or inverse, log-determinant, and all gradients; dropout; batch norms count a batch once."""
    net, plain = twins(couplings(5, norm=True), inverse, available(backend), activations)
    check_step(net, plain, x_of(), steps=2)


@pytest.mark.parametrize("inverse", [False, True])
def test_contexts_get_their_gradients(inverse):
    context = rows(9, 4)
    net, plain = twins(couplings(3, context=4), inverse)
    check_step(net, plain, x_of(), context, sides=[context])


@pytest.mark.parametrize("inverse", [False, True])
def test_other_transforms_in_between(inverse):
    """Are left, are said to be, and the couplings between them are chains of their own."""
    others = [
        lambda: transforms.AffineCouplingTransform(MASKS[1], net),
        lambda: transforms.LULinear(FEATURES, identity_init=False),
        lambda: transforms.PointwiseAffineTransform(0.5, 2.0),
        lambda: transforms.InverseTransform(transforms.AdditiveCouplingTransform(MASKS[0], net)),
    ]
    net_, plain = twins(couplings(4, lambda index: [others[index]()]), inverse)
    check_step(net_, plain, x_of(), steps=2)
    left = nflows.replace(original(net_)).left
    assert list(left) == [f"flow._transform._transforms.{place}" for place in (2, 5, 8)]
    assert set(left.values()) == {"not additive: stores its activations, and ends a chain"}


def test_images():
    """Channels are permuted and shifted, and pixels traded for channels inside the chain."""

    def conv(i, o):
        class Conv(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(nn.Conv2d(i, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, o, 3, padding=1))

            def forward(self, x, context=None):
                return self.layers(x)

        return Conv()

    def chain():
        return transforms.CompositeTransform(
            [
                transforms.AdditiveCouplingTransform([1, 0], conv),
                transforms.SqueezeTransform(),
                transforms.AdditiveCouplingTransform([1, 0, 1, 0, 0, 0, 0, 0], conv),
                transforms.RandomPermutation(8),
                transforms.AdditiveCouplingTransform([0, 0, 0, 0, 1, 1, 1, 1], conv),
            ]
        )

    for inverse in (False, True):
        net, plain = twins(chain(), inverse, shape=(8, 2, 3))
        check_step(net, plain, rows(2, 8, 2, 3) if inverse else rows(2, 2, 4, 6), steps=2)


def test_flows_of_the_package():
    """SimpleRealNVP in its volume-preserving form; and samples with their densities."""
    flow = SimpleRealNVP(FEATURES, 6, 4, 2, use_volume_preserving=True, dropout_probability=0.1)
    nflows.replace(flow)
    twin = original(flow)
    draws = []
    for network in (flow, twin):
        torch.manual_seed(0)
        draws.append(network.sample_and_log_prob(5))
    assert_all_close(*draws, 1e-6)  # the draws of a normal are float32
    for network in (flow.to(WIDE), twin.to(WIDE)):
        network.forward = network.log_prob
    check_step(flow, twin, x_of())


def test_the_inverse_undoes_it():
    transform = couplings(6).to(WIDE)
    nflows.replace(transform)
    x = x_of()
    y, logabsdet = transform(x)
    back, inverse_logabsdet = transform.inverse(y)
    assert_close(back, x, 1e-13)
    assert torch.equal(logabsdet, torch.zeros(9, dtype=WIDE)) and torch.equal(inverse_logabsdet, logabsdet)


@pytest.mark.parametrize("inverse", [False, True])
def test_memory_is_flat_in_depth(inverse):
    """Permutations are part of the rebuilt chain: nothing of them is kept."""
    few, many, n = 3, 18, 2000
    peaks = peaks_by_depth(lambda depth: LogProb(couplings(depth), inverse), nflows.replace, x_of(n), (few, many))
    features = n * FEATURES * 8
    assert peaks[many][1] - peaks[few][1] < 0.1 * features
    assert peaks[many][0] - peaks[few][0] > 3 * features * (many - few)


def test_what_a_transform_in_between_costs():
    """It stores what it has stored before, and one output more is kept: nothing else grows."""
    n = 2000
    features = n * FEATURES * 8

    def with_affine(number):
        affine = transforms.AffineCouplingTransform
        return LogProb(couplings(6, lambda index: [affine(MASKS[0], net)] if index < number else []))

    peaks = peaks_by_depth(with_affine, nflows.replace, x_of(n), (1, 4))
    theirs, ours = ((peaks[4][which] - peaks[1][which]) / 3 for which in (0, 1))
    assert theirs > 4 * features
    assert ours < theirs + 1.1 * features


def test_each_net_runs_once_more():
    network = LogProb(couplings(4))
    nflows.replace(network)
    nets = [module for module in network.modules() if isinstance(module, ResidualNet)]
    assert branch_calls(nets, lambda: network.flow.log_prob(x_of()).sum().backward()) == 8


def test_compiled():
    check_compiled(*twins(couplings(2)), x_of())


def test_parameters_names_and_copies():
    network = LogProb(couplings(3, norm=True))
    replaced = check_untouched(nflows.replace, network)
    assert len(replaced.modules) == 6 and not replaced.left and "nflows 0.14" in str(replaced)
    nflows.replace(network)
    check_copies(network, x_of())
    assert len(restore(network)) == 6


class Own(transforms.AdditiveCouplingTransform):
    def _scale_and_shift(self, transform_params):
        return torch.full_like(transform_params, 2.0), transform_params


class Shuffle(transforms.RandomPermutation):
    def forward(self, inputs, context=None):
        return super().forward(inputs, context)


def test_what_is_left_and_why():
    coupling = transforms.AdditiveCouplingTransform
    network = transforms.CompositeTransform(
        [
            coupling(MASKS[0], net),
            Own(MASKS[0], net),
            coupling(MASKS[0], net, unconditional_transform=lambda features: transforms.LULinear(features)),
            Shuffle(FEATURES),
        ]
    )
    replaced = nflows.replace(network)
    assert list(replaced.modules) == ["_transforms.0"]
    assert replaced.left["_transforms.1"] == "Own has a _scale_and_shift of its own"
    assert replaced.left["_transforms.2"] == "its unconditional transform is not additive"
    assert replaced.left["_transforms.3"] == "Shuffle has a forward of its own"
    lonely = transforms.CompositeTransform([transforms.RandomPermutation(4), transforms.LULinear(4)])
    wanted = ["an nflows.transforms.AdditiveCouplingTransform is looked for", "_transforms.1: not additive"]
    assert_raises(ValueError, wanted, lambda: nflows.replace(lonely))
    assert type(lonely._transforms[0]) is transforms.RandomPermutation


def test_wrong_input_is_named():
    transform = couplings(1).to(WIDE)
    nflows.replace(transform)
    assert_raises(ValueError, ["has 6 features; it must have 7"], lambda: transform(rows(3, 6)))
    assert_raises(ValueError, ["must be (N, features)"], lambda: transform(rows(3, 7, 2)))
    assert_raises(TypeError, ["floating point"], lambda: transform(torch.ones(3, 7, dtype=torch.int64)))


def test_a_step_without_a_change_is_the_packages_own():
    network, x = LogProb(couplings(3)), x_of()
    expected = step(network, x)
    nflows.replace(network).restore()
    got = step(network, x)
    assert all(
        torch.equal(a, b) for a, b in zip(got.outputs + got.inputs, expected.outputs + expected.inputs, strict=True)
    )
