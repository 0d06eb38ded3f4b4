# SPDX-License-Identifier: Apache-2.0
"""Chains inside other things, other things inside chains, and several at once."""

import copy
import gc

import pytest
from torch import nn
from torch.utils.checkpoint import checkpoint

from behaviour.common import (
    WIDE,
    Plain,
    assert_all_close,
    assert_raises,
    assert_same,
    check_step,
    dropout_mlp,
    fresh,
    gathered,
    images,
    loss_of,
    mlp,
    norm_mlp,
    pairs_of,
    rows,
    torch,
    twins,
)
from revkernels.errors import ReconstructionError
from revkernels.measure import peak_bytes
from revkernels.nn import ReversibleBlock, ReversibleSequential


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_chain_inside_checkpoint(use_reentrant, pair, options):
    """Row 27: torch.utils.checkpoint around the whole chain, dropout included."""
    net, plain = twins(pairs_of(dropout_mlp, 3), **options)
    x = (rows(5, 4), rows(5, 4)) if pair else rows()
    results = []
    for network in (net, plain):
        torch.manual_seed(1)
        leaves, copied = fresh(x)
        if pair:
            y = checkpoint(lambda a, b, n=network: n((a, b)), *copied, use_reentrant=use_reentrant)
        else:
            y = checkpoint(network, copied, use_reentrant=use_reentrant)
        loss_of(y).backward()
        results.append(gathered(network, y, leaves))
    assert_same(*results)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.inner, self.use_reentrant = dropout_mlp(), use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_inside_a_branch(use_reentrant, options):
    """Row 27: a checkpointed module inside F and G."""
    net, plain = twins(pairs_of(lambda: Checkpointed(use_reentrant), 3), **options)
    # A reentrant checkpoint gives its parameters no gradient unless its input has one.
    check_step(net, plain, rows(requires_grad=True), steps=2)


def test_chain_inside_a_branch(options):
    """Row 27: a chain as a branch of another chain."""

    class Inner(nn.Module):
        def __init__(self, reversible):
            super().__init__()
            net, plain = twins([(dropout_mlp(2), norm_mlp(2)), (norm_mlp(2), dropout_mlp(2))], **options)
            self.chain = net if reversible else plain

        def forward(self, x):
            return self.chain(x)

    torch.manual_seed(0)
    pairs, plain_pairs = ([(Inner(reversible), mlp()) for _ in range(2)] for reversible in (True, False))
    net, _ = twins(pairs, **options)
    _, plain = twins(plain_pairs)
    plain.load_state_dict(net.state_dict())
    check_step(net, plain, rows(6, 8), steps=2)


class Stages(nn.Module):
    """Runs of reversible blocks with down-sampling between them, as in a RevNet."""

    def __init__(self, runs, downs):
        super().__init__()
        self.runs, self.downs = nn.ModuleList(runs), nn.ModuleList(downs)

    def forward(self, x):
        for run, down in zip(self.runs, self.downs, strict=True):
            x = down(run(x))
        return x


def conv_branch(channels):
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    ).to(WIDE)


def stages(depth, options):
    runs = [twins(pairs_of(lambda c=c: conv_branch(c), depth), **options) for c in (4, 8)]
    downs = [nn.Conv2d(8, 16, 3, stride=2, padding=1).to(WIDE), nn.AvgPool2d(2)]
    return [Stages([run[which] for run in runs], downs) for which in (0, 1)]


def test_stages_with_down_sampling(options):
    """Row 29: gradients and statistics across the boundaries."""
    check_step(*stages(2, options), images(3, 8, 8, 8), steps=2)


def test_only_the_boundary_of_a_stage_is_stored(backend):
    """Row 29: memory does not grow with the depth of the stages."""
    x = images(4, 8, 16, 16).detach()
    peaks = []
    for depth in (2, 8):
        net, _ = stages(depth, {"backend": backend, "activations": "reconstruct"})

        def train(net=net):
            net(x).sum().backward()

        train()
        gc.collect()
        peaks.append(peak_bytes(train))
    assert abs(peaks[1] - peaks[0]) <= x.numel() * 8


def test_two_models_interleaved(options):
    """Row 32: two forwards of two models, then their backwards, each in either order."""
    first, second = twins(pairs_of(dropout_mlp, 2), **options), twins(pairs_of(norm_mlp, 3), **options)
    for reverse in (False, True):
        results = []
        for which in (0, 1):
            torch.manual_seed(4)
            nets = [first[which], second[which]]
            inputs = [fresh(rows(6, 8)) for _ in nets]
            outputs = [net(x) for net, (_, x) in zip(nets, inputs, strict=True)]
            for y in reversed(outputs) if reverse else outputs:
                loss_of(y).backward()
            results.append([leaf.grad for leaves, _ in inputs for leaf in leaves])
            results[-1] += [p.grad.clone() for net in nets for p in net.parameters()]
            for net in nets:
                net.zero_grad()
        assert_all_close(*results)


def test_two_chains_in_one_graph(options):
    """Row 32: two towers that share an input, and a chain that reads another's output."""
    a, b, c = (twins(pairs_of(mlp, 2), **options) for _ in range(3))
    results = []
    for which in (0, 1):
        torch.manual_seed(4)
        x = rows()
        loss_of(c[which](a[which](x) * b[which](x))).backward()
        results.append([x.grad, *(p.grad for net in (a, b, c) for p in net[which].parameters())])
    assert_all_close(*results)


def test_a_chain_between_other_layers(options):
    """Row 29: a stem before, a head after, a loss that reads both."""
    results = []
    stem, head = nn.Linear(3, 8).to(WIDE), nn.Linear(8, 2).to(WIDE)
    for network in twins(pairs_of(norm_mlp, 2), **options):
        torch.manual_seed(0)
        model = nn.Sequential(stem, nn.ReLU(), network, nn.ReLU(), head)
        model.zero_grad()
        x = rows(6, 3)
        (loss_of(model(x)) + stem.weight.square().sum()).backward()
        results.append([x.grad, *(p.grad.clone() for p in model.parameters())])
    assert_all_close(*results)


def test_a_chain_built_from_a_generator_of_blocks(options):
    """Row 29: blocks may come as one iterable, and are counted, indexed and iterated."""
    net = ReversibleSequential((ReversibleBlock(mlp(), mlp()) for _ in range(3)), **options)
    assert len(net) == 3 and list(net)[2] is net[2] is net[-1]
    assert net(rows()).shape == (5, 8)


class EnergyGradient(nn.Module):
    """A branch that differentiates while it runs: the gradient of a potential, as in Hamiltonian networks."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(torch.tanh(self.linear(x)).pow(2).sum(), x, create_graph=True)[0]


def test_a_branch_that_differentiates_while_it_runs(backend, activations):
    """Row 27, and beyond: autograd.grad inside F, whose own saved tensors exist while it runs."""
    net, plain = twins(
        [(EnergyGradient(), EnergyGradient()) for _ in range(3)], activations=activations, backend=backend
    )
    check_step(net, plain, rows())


def test_lazy_modules(backend, activations):
    """Parameters that take shape in the first forward."""
    blocks = [ReversibleBlock(nn.LazyLinear(4), nn.LazyLinear(4)) for _ in range(2)]
    net = ReversibleSequential(*blocks, activations=activations, backend=backend).double()
    x, steps = rows(), []
    for _ in range(2):
        net.zero_grad()
        loss_of(net(x)).backward()
        steps.append([parameter.grad.clone() for parameter in net.parameters()])
    for first, second in zip(*steps, strict=True):
        assert torch.equal(first, second)


def test_a_hook_on_a_lazy_module_that_is_taken_off(backend, activations):
    """Between its first forward and the backward, beside the one that makes its parameters."""
    outcomes = []
    for network in twins([(nn.LazyLinear(4), nn.LazyLinear(4))], activations=activations, backend=backend):
        torch.manual_seed(0)
        handles = [m.register_forward_hook(_doubled) for m in network.modules() if isinstance(m, nn.LazyLinear)]
        leaves, x = fresh(rows())
        y = network.to(WIDE)(x)
        for handle in handles:
            handle.remove()
        outcomes.append([y, *torch.autograd.grad(loss_of(y), [*leaves, *network.parameters()])])
    assert_all_close(*outcomes)


def _doubled(module, inputs, output):
    return output * 2


def test_lazy_modules_and_other_random_numbers(backend):
    """In the first step the numbers behind those of the parameters cannot be drawn again, which is told."""
    net = twins([(nn.Sequential(nn.LazyLinear(4), nn.Dropout(0.5)), nn.LazyLinear(4))], backend=backend)[0].to(WIDE)
    loss = loss_of(net(rows()))
    assert_raises(ReconstructionError, ["block 0, branch F", "lazy", "torch.no_grad()"], loss.backward)
    check_step(net, Plain(copy.deepcopy([(block.F, block.G) for block in net])), rows())


def test_a_block_with_a_forward_of_its_own_is_refused():
    """A chain runs F and G itself, and would silently pass it by."""

    class Doubled(ReversibleBlock):
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(TypeError, match=r"blocks\[0\] is a Doubled with a forward of its own"):
        ReversibleSequential(Doubled(nn.Linear(4, 4), nn.Linear(4, 4)))


class OnlyAux(nn.Module):
    """A branch whose gradient goes through its auxiliary output alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x):
        f = self.linear(x)
        return f.detach(), f.pow(2).sum()


def test_gradient_through_auxiliary_outputs_alone(backend):
    """Row 21: no output of the chain requires grad, its auxiliary outputs do."""
    gradients = []
    for activations in ("store", "reconstruct"):
        torch.manual_seed(0)
        blocks = [ReversibleBlock(OnlyAux(), OnlyAux()) for _ in range(2)]
        net = ReversibleSequential(*blocks, activations=activations, backend=backend)
        y, aux = net(rows(requires_grad=False))
        assert not y.requires_grad and len(aux) == 4
        sum(aux).backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for stored, rebuilt in zip(*gradients, strict=True):
        assert stored.abs().sum() > 0 and torch.allclose(stored, rebuilt, rtol=1e-10)
