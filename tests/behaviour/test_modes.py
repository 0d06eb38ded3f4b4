# SPDX-License-Identifier: Apache-2.0
"""Evaluation, the inverse, and what people do to modules as objects."""

import copy
import io
import pickle

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_close,
    assert_same,
    check_step,
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
from revkernels.nn import ReversibleBlock, ReversibleSequential


def check_without_gradients(kind, context, training, pair, **options):
    """Row 16, as a function: the plain values, buffers and generator; the caller's input untouched."""
    net, plain = kind.with_dropout(0.5).twins(3, **options)
    given = kind.pair() if pair else kind.x()
    results = []
    for network in (net, plain):
        network.train(training)
        torch.manual_seed(0)
        leaves, x = fresh(given)
        versions = [leaf._version for leaf in leaves]
        with context():
            y = network(x)
        assert type(y) is type(given)
        for out, leaf, before in zip(tensors_in(y), leaves, tensors_in(given), strict=True):
            assert out.requires_grad is (context is torch.enable_grad)
            assert out.is_inference() is (context is torch.inference_mode)
            assert torch.equal(leaf, before)
        assert [leaf._version for leaf in leaves] == versions
        results.append(gathered(network, [t.clone() for t in tensors_in(y)], leaves))
    assert_same(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_gradients(context, training, pair, kind, options):
    """Row 16: outputs, buffers, generator and input under no_grad, inference_mode and eval."""
    check_without_gradients(kind, context, training, pair, **options)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_training_steps(context, kind, options):
    """Row 16: evaluating in between changes nothing, and trains on afterwards."""
    net, plain = kind.twins(2, **options)
    check_step(net, plain, kind.x())
    x = kind.x()
    for network in (net, plain):
        network.eval()
        with context():
            network(x)
        network.train()
    check_step(net, plain, kind.x())


def test_evaluation_between_forward_and_backward(kind, options):
    """Row 16: a no_grad call between a forward and its backward, without switching modes."""
    net, plain = kind.twins(3, **options)
    given = kind.x()
    results = []
    for network in (net, plain):
        torch.manual_seed(0)
        leaves, x = fresh(given)
        loss = loss_of(network(x))
        with torch.no_grad():
            network(x)
        loss.backward()
        results.append(gathered(network, [], leaves))
    assert_same(*results)


def test_gradients_in_eval_mode(kind, options):
    """Row 16: eval mode with gradients: norms use their running statistics, and pass gradients on."""
    net, plain = kind.twins(3, **options)
    check_step(net, plain, kind.x())
    net.eval()
    plain.eval()
    check_step(net, plain, kind.x(), steps=2)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inverse(context, training, kind, options):
    """Row 28: net.inverse(net(x)) is x, and the inverse leaves running statistics alone."""
    check_inverse(kind, context, training, **options)


def check_inverse(kind, context, training, **options):
    """Row 28, as a function."""
    net, plain = kind.twins(3, **options)
    net.train(training)
    x, pair = kind.x(), kind.pair()
    with context():
        y, pair_out = net(x), net(pair)
        buffers = [b.clone() for b in net.buffers()]
        back, pair_back = net.inverse(y), net.inverse(pair_out)
    assert type(pair_back) is tuple
    assert_all_close([back, *pair_back], [x, *pair])
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
    if not training:
        assert_close(y, plain.eval()(x))


def test_inverse_is_differentiable(kind, options):
    """Row 28: gradients through the inverse are those of x2 = y2 - G(y1); x1 = y1 - F(x2) in plain PyTorch."""

    class PlainInverse(nn.Module):
        def __init__(self, plain):
            super().__init__()
            self.blocks = plain

        def forward(self, y):
            y1, y2 = y.chunk(2, 1)
            for block in reversed(list(self.blocks.children())):
                y2 = y2 - block.G(y1)
                y1 = y1 - block.F(y2)
            return torch.cat((y1, y2), 1)

    net, plain = kind.twins(3, **options)
    net.eval()  # its statistics stay, plain PyTorch's would be updated
    plain.eval()
    y = kind.x()
    results = []
    for network, inverse in ((net, net.inverse), (plain, PlainInverse(plain))):
        leaves, copied = fresh(y)
        loss_of(inverse(copied)).backward()
        results.append([leaves[0].grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_inverse_of_a_block(kind, options):
    """Rows 28 and 36: a block alone is inverted as well."""
    block = ReversibleBlock(kind.make(), kind.make(), **options).eval()
    x = kind.x()
    assert_close(block.inverse(block(x)), x)


def check_functional_call(kind, **options):
    """Row 26, as a function: the backward, outside the call, differentiates the parameters that it had."""
    net, plain = kind.twins(2, **options)
    results = []
    for network in (net, plain):
        torch.manual_seed(0)
        own = {name: p.detach().clone() for name, p in network.named_parameters()}
        others = {name: torch.randn_like(p).requires_grad_() for name, p in network.named_parameters()}
        buffers = {name: b.clone() for name, b in network.named_buffers()}
        x = kind.x()
        y = torch.func.functional_call(network, {**others, **buffers}, (x,))
        loss_of(y).backward()
        assert all(torch.equal(p, own[name]) and p.grad is None for name, p in network.named_parameters())
        results.append([x.grad, *(p.grad for p in others.values()), *buffers.values(), *network.buffers()])
    assert_all_close(*results)


def test_functional_call(kind, options):
    """Row 26: other parameters and buffers for one call."""
    check_functional_call(kind, **options)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x[0]),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0]),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_transforms(transform, options):
    """Row 26: storing they work as in plain PyTorch; a reversible backward inside them is refused, and named."""
    net, plain = twins(pairs_of(mlp, 2), **options)
    x = rows(3, 5, 8, requires_grad=False)
    through = TRANSFORMS[transform]
    both = lambda y: net.inverse(net(y)).square().sum()  # noqa: E731
    if options["activations"] == "store":
        assert_close(through(lambda y: loss_of(net(y)), x), through(lambda y: loss_of(plain(y)), x))
        assert_close(through(both, x), through(lambda y: y.square().sum(), x))
    else:
        for function in (lambda y: loss_of(net(y)), both):
            with pytest.raises(rk.ReconstructionError, match=r"torch\.func .*activations='store'"):
                through(function, x)


@pytest.mark.parametrize("randomness", ["error", "different"])
def test_vmap_without_gradients(randomness, options):
    """Row 26: an ensemble's predictions, and each sample's on its own, need no backward."""
    nets = [twins(pairs_of(norm_mlp, 2), **options)[0].eval() for _ in range(3)]
    values = torch.func.stack_module_state(nets)
    x = rows(3, 5, 8, requires_grad=False)
    with torch.no_grad():
        got = torch.func.vmap(
            lambda *state: torch.func.functional_call(nets[0], state, (x[0],)), randomness=randomness
        )(*values)
        assert_close(got, torch.stack([net(x[0]) for net in nets]))
        assert_close(torch.func.vmap(nets[0], randomness=randomness)(x), torch.stack([nets[0](y) for y in x]))
        # A gradient that no recompute has to give: inside, the chain is a constant.
        found = torch.func.grad(lambda y: (y * constant(nets[0], y)).sum())(x[0])
    assert_close(found, nets[0](x[0]).detach())


def constant(net, x):
    with torch.no_grad():
        return net(x)


def test_vmap_over_parameters_of_stored_chains():
    """The input plain: an ensemble."""
    chains = [
        ReversibleSequential(ReversibleBlock(nn.Linear(3, 3), nn.Linear(3, 3)), activations="store") for _ in range(3)
    ]
    parameters, _ = torch.func.stack_module_state(chains)
    x = torch.randn(5, 6)
    got = torch.func.vmap(lambda p: torch.func.functional_call(chains[0], p, (x,)))(parameters)
    torch.testing.assert_close(got, torch.stack([chain(x) for chain in chains]))


def test_state_dict(kind, options):
    """Row 26: plain PyTorch's keys, no key twice, and a round trip through a file."""
    net, plain = kind.twins(3, **options)
    state = net.state_dict()
    assert list(state) == list(plain.state_dict())
    addresses = [t.data_ptr() for t in state.values()]
    assert len(set(addresses)) == len(addresses)
    other, _ = kind.twins(3, **options)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    check_step(other, plain, kind.x())


def test_parameters_are_listed_once_and_are_the_caller_s(kind, options):
    """Row 26: branches are kept by reference."""
    F, G = kind.make(), kind.make()
    net = ReversibleSequential(ReversibleBlock(F, G), ReversibleBlock(F, G), **options)
    assert [id(p) for p in net.parameters()] == [id(p) for branch in (F, G) for p in branch.parameters()]
    step(net, kind.x())
    assert all(p.grad is not None for branch in (F, G) for p in branch.parameters())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_copies(how, kind, options):
    """Row 26: a copy made after training steps trains on by itself, and the original is left alone."""
    net, plain = kind.twins(2, **options)
    check_step(net, plain, kind.x(), steps=2)
    other = how(net)
    kept = copy.deepcopy(plain)
    check_step(other, plain, kind.x(), steps=2)
    assert type(other) is ReversibleSequential and other.backend == net.backend
    check_step(net, kept, kind.x())


def test_to_dtype_and_back(kind, options):
    """Row 26: to(dtype) converts in place; a step before it does not matter after it."""
    net, plain = kind.twins(2, **options)
    check_step(net, plain, kind.x())
    net.to(torch.float32)
    plain.to(torch.float32)
    check_step(net, plain, kind.x(dtype=torch.float32), tolerance=1e-4)
    net.to(WIDE)
    plain.to(WIDE).load_state_dict(net.state_dict())  # running statistics have differed by a rounding in float32
    check_step(net, plain, kind.x())


@pytest.mark.parametrize("kind", ["conv", "basic", "bottleneck"], indirect=True)
def test_to_memory_format(kind, options):
    """Row 26: to(memory_format=channels_last)."""
    net, plain = kind.twins(2, **options)
    check_step(net, plain, images())
    net.to(memory_format=torch.channels_last)
    plain.to(memory_format=torch.channels_last)
    x = images().detach().to(memory_format=torch.channels_last).requires_grad_()
    check_step(net, plain, x, steps=2)
    assert net(x).is_contiguous(memory_format=torch.channels_last)


def test_reset_of_parameters_between_steps(options):
    """Row 26: parameters replaced by new ones between steps are the ones used."""
    net, plain = twins(pairs_of(mlp, 2), **options)
    check_step(net, plain, rows())
    weight = torch.randn(6, 4, dtype=WIDE)
    for network in (net, plain):
        next(network.children()).F[0].weight = nn.Parameter(weight.clone())
    check_step(net, plain, rows())


def test_parametrized_weights(options):
    """Row 26: torch.nn.utils.parametrizations.weight_norm on a branch's layer."""
    net, plain = twins(pairs_of(mlp, 2), **options)
    for network in (net, plain):
        for block in network.children():
            nn.utils.parametrizations.weight_norm(block.F[0])
    check_step(net, plain, rows(), steps=2)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(4, 4, batch_first=True)

    def forward(self, h):
        return self.layer(h)[0]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN, None], ids=["LSTM", "GRU", "RNN", "MLP"])
def test_parameters_assigned_between_forward_and_backward(layer, options):
    """Row 26: the recompute computes with the forward's parameters, of which recurrent layers keep a list besides."""
    make = mlp if layer is None else lambda: Recurrent(layer).to(WIDE)
    nets = twins(pairs_of(make, 2), split_dim=-1, **options)
    x, results = rows(3, 5, 8), []
    for network in nets:
        found = []
        for _ in range(2):
            leaves, given = fresh(x)
            before = list(network.parameters())
            y = network(given)
            network.load_state_dict({name: 0.5 * p for name, p in network.state_dict().items()}, assign=True)
            loss_of(y).backward()
            found += [y, *(leaf.grad for leaf in leaves), *(p.grad for p in before)]
        results.append(found)
    assert_all_close(*results)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN], ids=["LSTM", "GRU", "RNN"])
def test_other_parameters_for_a_call(layer, frozen, options):
    """Row 26: a recurrent layer is run again with the parameters of a functional call, and the next call notices its
    own again; of frozen ones that list is no state."""
    nets = twins(pairs_of(lambda: Recurrent(layer).to(WIDE), 2), split_dim=-1, **options)
    x, results = rows(3, 5, 8), []
    for network in nets:
        network.requires_grad_(not frozen)
        values = {name: (1.5 * p).detach().requires_grad_(not frozen) for name, p in network.named_parameters()}
        leaves, given = fresh(x)
        found = []
        for _ in range(2):
            y = torch.func.functional_call(network, values, (given,))
            found += [y, network(given)]
            loss_of(y).backward()
        results.append([*found, *(t.grad for t in (*leaves, *values.values()) if t.requires_grad)])
    assert_all_close(*results)
