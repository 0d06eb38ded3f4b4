# SPDX-License-Identifier: Apache-2.0
"""reformer-pytorch's ReversibleSequence here: as plain torch in each option, as the original where that is right."""

import copy
import pickle

import pytest
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_raises,
    assert_same,
    check_step,
    dropout_mlp,
    fresh,
    mlp,
    rows,
    step,
    torch,
)
from torch import nn

from compat.common import (
    InAutocast,
    check_copies,
    check_gradients,
    check_signatures,
    couple,
    plain,
)
from revkernels.compat import reformer
from revkernels.compat.reformer import ReversibleBlock, ReversibleSequence
from revkernels.errors import ReconstructionError
from revkernels.measure import peak_bytes

SIGNATURES = {
    "ReversibleBlock": "(f, g, depth=None, send_signal=False)",
    "ReversibleSequence": "(blocks, layer_dropout=0.0, reverse_thres=0, send_signal=False)",
}
LENGTH = 3


class Scaled(nn.Module):
    """Dropout, and a scale that it may be given; writes down what else it is told."""

    def __init__(self, p=0.3):
        super().__init__()
        self.inner, self.told = dropout_mlp(p=p), []

    def forward(self, x, scale=1.0, **told):
        self.told.append(told)
        return self.inner(x) * scale


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(4).to(WIDE), mlp()

    def forward(self, x):
        return self.inner(self.norm(x.mT).mT)


def pairs(make, depth=3):
    return [(make(), make()) for _ in range(depth)]


def in_plain_torch(net, x, arg_route=(True, False), **kwargs):
    blocks = list(net.blocks)
    if net.training and net.layer_dropout > 0:
        drop = torch.empty(len(blocks)).uniform_(0, 1) < net.layer_dropout
        blocks = [block for block, dropped in zip(blocks, drop, strict=True) if not dropped] or blocks[:1]
    calls = [((), kwargs if route else {}) for route in arg_route]
    for block in blocks:
        x = couple((block.f.net, block.g.net), x, 2, calls)
    return x


def sequence(make=Scaled, depth=3, **options):
    net = ReversibleSequence(pairs(make, depth), **options)
    return net, plain(net, in_plain_torch)


def tokens(n=2, length=LENGTH, width=8, **options):
    return rows(n, length, width, **options)


def test_signatures():
    check_signatures(reformer, SIGNATURES)


@pytest.mark.parametrize("reverse_thres", [0, LENGTH], ids=["rebuilt", "stored"])
@pytest.mark.parametrize("make", [mlp, Norm, Scaled], ids=["mlp", "norm", "dropout"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_steps_as_plain_torch(make, depth, reverse_thres, backend):
    """Gradients, statistics counted once, the same masks, and the generator afterwards."""
    check_step(*sequence(make, depth, reverse_thres=reverse_thres), tokens(), steps=2)


@pytest.mark.parametrize("route", [(True, False), (False, True), (True, True), (False, False)])
def test_arg_route(route, backend):
    """Keywords go to every f, to every g, to both or to none; what gets there has its gradient."""
    net, twin = sequence()
    scale = torch.rand(4, dtype=WIDE, requires_grad=True)
    got = check_step(net, twin, tokens(), arg_route=route, scale=scale, sides=[scale])
    assert (got.sides[0] is not None) is any(route)
    if route == (True, False):
        check_step(net, twin, tokens(), scale=scale, sides=[scale])


@pytest.mark.parametrize("length", [LENGTH, LENGTH + 1])
def test_reverse_thres(length):
    """Sequences that are not longer run each branch once, longer ones twice."""
    net, _ = sequence(depth=2, reverse_thres=LENGTH)
    net(tokens(length=length)).sum().backward()
    runs = {len(branch.net.told) for block in net.blocks for branch in (block.f, block.g)}
    assert runs == {1 if length == LENGTH else 2}


@pytest.mark.parametrize("reverse_thres", [0, LENGTH], ids=["rebuilt", "stored"])
@pytest.mark.parametrize("layer_dropout", [0.4, 1.0])
def test_layer_dropout(layer_dropout, reverse_thres, backend):
    """The blocks of a call are drawn from torch's generator, one block runs at least, and in eval mode all do."""
    net, twin = sequence(depth=4, layer_dropout=layer_dropout, reverse_thres=reverse_thres)
    check_step(net, twin, tokens(), steps=6)
    runs = [len(block.f.net.told) for block in twin.blocks]
    assert sum(runs) == (6 if layer_dropout == 1 else sum(runs)) < 24
    net.eval(), twin.eval()
    check_step(net, twin, tokens())


def test_signal(backend):
    """_reverse is True in the second run alone, _depth the block's number; neither is there without send_signal."""
    net, twin = sequence(depth=2, send_signal=True)
    check_step(net, twin, tokens())
    for depth, block in enumerate(net.blocks):
        for branch in (block.f, block.g):
            assert branch.net.told == [{"_reverse": again, "_depth": depth} for again in (False, True)]
    numberless = ReversibleBlock(Scaled(), Scaled(), send_signal=True)
    numberless(tokens()).sum().backward()
    assert numberless.f.net.told == [{"_reverse": again, "_depth": None} for again in (False, True)]
    silent, _ = sequence(depth=1)
    silent(tokens()).sum().backward()
    assert silent.blocks[0].f.net.told == [{}, {}]


class ComesBack(nn.Module):
    """Keeps a choice of its forward, and comes back to it when it is told to, as LSH attention does to its buckets."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how, self.kept = mlp(), how, {} if how == "dictionary" else None

    def forward(self, x, _reverse=False, _depth=0):
        if _reverse:
            mask = self.kept[_depth] if self.how == "dictionary" else self.kept
        else:
            mask = (torch.rand((*x.shape[:2], 1)) > 0.5).to(x)
            self.kept = {**self.kept, _depth: mask} if self.how == "dictionary" else mask
        return self.inner(x) * mask


@pytest.mark.parametrize("how", ["dictionary", "attribute"])
def test_what_a_branch_kept_is_there_in_the_second_run(how, backend):
    """In the first step, where there was nothing before, and in later ones, where there was the last step's."""
    net, twin = sequence(lambda: ComesBack(how), 2, send_signal=True)
    for seed in range(3):
        assert_same(step(net, tokens_once(), seed=seed), step(twin, tokens_once(), seed=seed))


@pytest.mark.parametrize("length", [LENGTH, LENGTH + 1])
def test_no_signal_where_activations_are_stored(length, backend):
    """On short sequences, and in eval mode: nothing is run a second time."""
    net, twin = sequence(depth=2, send_signal=True, reverse_thres=LENGTH)
    for network in (net, twin):
        network.train(length == LENGTH)
    check_step(net, twin, tokens(length=length))
    assert net.blocks[1].g.net.told == [{}]


def test_eval_mode_rebuilds_without_a_signal(backend):
    net, twin = sequence(depth=2)
    net.eval(), twin.eval()
    check_step(net, twin, tokens())
    assert len(net.blocks[0].f.net.told) == 2


def test_input_without_gradient_still_gives_parameters_theirs():
    check_step(*sequence(), tokens(requires_grad=False))


def test_two_forwards_before_one_backward(backend):
    """The original keeps the generator's state on the module, where the second forward overwrites the first's."""
    results = []
    for network in sequence(lambda: Scaled(0.5)):
        torch.manual_seed(1)
        (a, b), (xa, xb) = fresh((tokens(), tokens()))
        (network(xa) * network(xb)).sum().backward()
        results.append([a.grad, b.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_derivatives():
    net, _ = sequence(lambda: mlp(1), 2)
    check_gradients(net, tokens(1, 2, 2))


def test_autocast_in_the_backward(backend):
    net, twin = sequence(lambda: mlp().float(), 2)
    check_step(InAutocast(net), InAutocast(twin), tokens(dtype=torch.float32), tolerance=1e-6)


def test_hooks(backend):
    """Of a block, which is called by itself then, and of branches."""
    net, twin = sequence(mlp)
    seen = []
    net.blocks[1].register_forward_hook(lambda block, given, made: seen.append(made.shape))
    net.blocks[1].register_full_backward_hook(lambda block, dx, dy: seen.append(dy[0].shape))
    check_step(net, twin, tokens())
    assert seen == [(2, 3, 8), (2, 3, 8)]
    net.blocks[2].f.net.register_forward_hook(lambda branch, given, made: made * 2)
    twin.blocks[2].f.net.register_forward_hook(lambda branch, given, made: made * 2)
    check_step(net, twin, tokens())


def test_a_block_alone(backend):
    net, twin = sequence(Scaled, 1, send_signal=True)
    scale = torch.rand(4, dtype=WIDE)
    got = step(net.blocks[0], tokens_once(), f_args={"scale": scale}, g_args={})
    expected = step(twin, tokens_once(), scale=scale)
    assert_all_close(got.outputs + got.inputs, expected.outputs + expected.inputs)


def tokens_once():
    return torch.linspace(-1, 1, 48, dtype=WIDE).sin().reshape(2, 3, 8).requires_grad_()


def test_memory_is_that_of_one_block_at_any_depth():
    def branch():
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh()).to(WIDE)

    x = rows(8, 8, 128, requires_grad=False)

    def peak(depth, **options):
        net, _ = sequence(branch, depth, **options)
        net(x).sum().backward()
        net.zero_grad(set_to_none=False)
        return peak_bytes(lambda: net(x).sum().backward())

    assert abs(peak(16) - peak(4)) <= x.nbytes
    assert peak(16, reverse_thres=8) - peak(4, reverse_thres=8) >= 11 * x.nbytes


def test_changes_after_the_forward_are_refused():
    net, _ = sequence(mlp)
    loss = net(tokens()).sum()
    with torch.no_grad():
        net.blocks[2].g.net[0].weight.add_(1)
    assert_raises(ReconstructionError, ["blocks[2].g (Sequential)", "0.weight"], loss.backward)


def doubled(state_dict, prefix=""):
    """As the original saves it: every weight once more under irrev_blocks."""
    again = {key.replace("blocks.", "irrev_blocks.", 1).replace(".net.", ".", 1): w for key, w in state_dict.items()}
    return {f"{prefix}{key}": weight for key, weight in {**state_dict, **again}.items()}


def test_state_dict():
    """Every weight once; the original's, which has them twice, loads: in another module too, and into copies."""
    net, _ = sequence(mlp, 2)
    assert list(net.state_dict())[:2] == ["blocks.0.f.net.0.weight", "blocks.0.f.net.0.bias"]
    assert len(net.state_dict()) == len(list(net.parameters()))
    other, _ = sequence(mlp, 2)
    for network in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        network.load_state_dict(doubled(other.state_dict()))
        assert_same(step(network, tokens_once()), step(other, tokens_once()))
    nn.ModuleDict({"layers": net}).load_state_dict(doubled(other.state_dict(), "layers."))
    wrong = {**other.state_dict(), "more.weight": torch.ones(1)}
    assert_raises(RuntimeError, ["Unexpected", "more.weight"], lambda: net.load_state_dict(wrong))


def test_copies_and_casts():
    net, _ = sequence(mlp, 2)
    check_copies(net, tokens())


def test_bad_arguments():
    net, _ = sequence(mlp, 2)
    assert_raises(ValueError, ["layer_dropout is 1.5", "between 0 and 1"], lambda: ReversibleSequence([], 1.5))
    lonely = [(mlp(), mlp()), [nn.Linear(4, 4)]]
    assert_raises(TypeError, ["blocks[1]", "(Linear)", "(f, g)"], lambda: ReversibleSequence(lonely))
    functions = [(torch.tanh, torch.tanh)]
    assert_raises(TypeError, ["blocks[0]", "pair (f, g) of nn.Modules"], lambda: ReversibleSequence(functions))
    assert_raises(ValueError, ["x has shape (2, 3, 7)", "even"], lambda: net(tokens(width=7)))
    assert_raises(ValueError, ["x has shape (5, 8)", "3 dimensions"], lambda: net(rows(5, 8)))
    assert_raises(TypeError, ["x is a tuple", "tensor"], lambda: net((tokens(), tokens())))
    assert_raises(ValueError, ["arg_route has 1", "two"], lambda: net(tokens(), arg_route=(True,)))
