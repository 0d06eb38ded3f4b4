# SPDX-License-Identifier: Apache-2.0
"""More than two streams: a block adds branch i to stream i, one after the other, and the branches read in a ring.

Stream 0 is added to first, from the sum of all others; every other stream reads the one before it, already updated
(Li et al. 2021, Training Graph Neural Networks with 1000 Layers, grouped reversible connections).
"""

import contextlib
import copy

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_close,
    assert_raises,
    check_step,
    dropout_mlp,
    fresh,
    loss_of,
    mlp,
    norm_mlp,
    rows,
    step,
    torch,
)
from behaviour.test_arguments import Auxiliary
from behaviour.test_costs import BATCH, WIDTH, Counting, activation_bytes, slim_branch
from behaviour.test_failures import Uses, change
from behaviour.test_precision import Logged, bf16, train_under
from revkernels.measure import peak_bytes
from revkernels.nn import ReversibleBlock, ReversibleSequential, is_recomputing


class PlainGroups(nn.Module):
    """The same in plain torch: y_0 = x_0 + B_0(x_1 + ... + x_{C-1}); y_i = x_i + B_i(y_{i-1})."""

    def __init__(self, blocks, split_dim):
        super().__init__()
        for index, branches in enumerate(blocks):
            names = ["F", "G", *(f"branch{i}" for i in range(2, len(branches)))]
            self.add_module(str(index), nn.ModuleDict(dict(zip(names, branches, strict=True))))
        self.split_dim, self.groups = split_dim, len(blocks[0])

    def forward(self, x, **kwargs):
        streams = list(x if isinstance(x, tuple) else x.chunk(self.groups, self.split_dim))
        aux = []
        for block in self.children():
            h = sum(streams[1:])
            for index, branch in enumerate(block.children()):
                f = branch(h, **kwargs)
                if isinstance(f, tuple):
                    f, extra = f
                    aux.append(extra)
                h = streams[index] = streams[index] + f
        y = tuple(streams) if isinstance(x, tuple) else torch.cat(streams, self.split_dim)
        return (y, aux) if aux else y


def blocks_of(make, depth, groups):
    return [[make() for _ in range(groups)] for _ in range(depth)]


def group_twins(blocks, split_dim=1, **options):
    """The reversible network, and a plain one on copies of the branches."""
    plain = PlainGroups(copy.deepcopy(blocks), split_dim)
    return ReversibleSequential([ReversibleBlock(*b) for b in blocks], split_dim=split_dim, **options), plain


def branches_of(network):
    """In the order of the calls, in either network."""
    if isinstance(network, ReversibleSequential):
        return [branch for block in network for branch in block.branches]
    return [branch for block in network.children() for branch in block.values()]


def wide(groups, n=6, width=4, **options):
    return rows(n, groups * width, **options)


def streams(groups, n=5, width=4, **options):
    return tuple(rows(n, width, **options) for _ in range(groups))


# ---- right


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [2, 3, 4, 8, 16])
def test_depths(groups, depth, options):
    """Odd and even numbers of streams and blocks; a tensor that learns, and a tuple of data."""
    net, plain = group_twins(blocks_of(mlp, depth, groups), **options)
    check_step(net, plain, wide(groups))
    check_step(net, plain, streams(groups, requires_grad=False))


def test_a_block_alone(options):
    """A block that is called by itself is a chain of one."""
    branches = blocks_of(mlp, 1, 5)
    _, plain = group_twins(branches)
    block = ReversibleBlock(*branches[0], **options)
    x = wide(5)
    got, expected = step(block, x), step(plain, x)
    assert_all_close(got.outputs + got.inputs, expected.outputs + expected.inputs)
    assert_all_close(list(got.parameters.values()), list(expected.parameters.values()))


@pytest.mark.parametrize("split_dim", [0, 2, -1, -3])
def test_split_dim(split_dim, options):
    """Any dimension may be the one that is cut."""
    x = rows(*(12 if d == split_dim % 3 else 4 for d in range(3)))
    check_step(*group_twins(blocks_of(mlp, 2, 3), split_dim, **options), x)


@pytest.mark.parametrize("groups", [3, 4])
def test_random_numbers_and_running_statistics(groups, options):
    """Dropout masks are the forward's, and BatchNorm counts a batch once, over three steps."""
    net, plain = group_twins(blocks_of(lambda: norm_mlp(p=0.3), 3, groups), **options)
    check_step(net, plain, wide(groups, 8), steps=3)
    assert [branch[0].num_batches_tracked for branch in branches_of(net)] == [3] * 3 * groups


def test_two_forwards_before_one_backward(options):
    """Each forward has masks of its own."""
    results = []
    for network in group_twins(blocks_of(lambda: dropout_mlp(p=0.5), 2, 3), **options):
        torch.manual_seed(7)
        a, b = wide(3), wide(3)
        (network(a) * network(b)).sum().backward()
        results.append([a.grad, b.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_autocast(options):
    """The recompute casts where the forward did; gradients are as good as stored ones."""
    net, plain = group_twins(blocks_of(lambda: Logged(mlp()), 2, 3), **options)
    x = wide(3, dtype=torch.float32)
    got, expected = (train_under(network, x, bf16) for network in (net, plain))
    for mine, theirs in zip(branches_of(net), branches_of(plain), strict=True):
        assert mine.log == theirs.log * (2 if options["activations"] == "reconstruct" else 1)
    truth = train_under(plain, x, contextlib.nullcontext)
    for name, right in truth.parameters.items():
        allowed = 1.5 * (expected.parameters[name] - right).norm() + 1e-3 * right.norm()
        assert (got.parameters[name] - right).norm() <= allowed, name


FROZEN = {
    "every second branch": lambda number: number % 2 == 0,
    "the middle block": lambda number: 4 <= number < 8,
    "the first block": lambda number: number < 4,
    "all but one": lambda number: number != 6,
    "everything": lambda number: True,
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen(frozen, options):
    """Frozen branches and blocks, with an input that learns and one that is data, or in one stream only."""
    net, plain = group_twins(blocks_of(mlp, 3, 4), **options)
    for network in (net, plain):
        for number, branch in enumerate(branches_of(network)):
            branch.requires_grad_(not FROZEN[frozen](number))
    for learns in ((True,) * 4, (False,) * 4, (False, False, True, False)):
        check_step(net, plain, tuple(rows(5, 4, requires_grad=one) for one in learns))


@pytest.mark.parametrize("wanted", ["parameters", "inputs", "one in the middle"])
def test_autograd_grad(wanted, options):
    """torch.autograd.grad, with .grad untouched."""
    results = []
    for network in group_twins(blocks_of(mlp, 3, 3), **options):
        torch.manual_seed(1)
        x, parameters = streams(3), list(network.parameters())
        inputs = {"parameters": parameters, "inputs": x, "one in the middle": [parameters[17]]}[wanted]
        results.append(torch.autograd.grad(loss_of(network(x)), inputs))
        assert all(leaf.grad is None for leaf in (*x, *parameters))
    assert_all_close(*results)


def test_second_order(options):
    """create_graph=True: a gradient penalty."""
    results = []
    for network in group_twins(blocks_of(mlp, 2, 3), **options):
        torch.manual_seed(0)
        x = wide(3)
        (dx,) = torch.autograd.grad(loss_of(network(x)), x, create_graph=True)
        dx.square().sum().backward()
        results.append([dx.detach(), x.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_backward_twice_and_one_stream_at_a_time(options):
    """retain_graph=True, and losses on single streams whose graphs overlap."""
    results = []
    for network in group_twins(blocks_of(mlp, 2, 4), **options):
        torch.manual_seed(0)
        leaves, x = fresh(streams(4))
        y = network(x)
        for index in (3, 0, 0, 2):
            y[index].square().sum().backward(retain_graph=True)
        results.append([leaf.grad for leaf in leaves] + [p.grad for p in network.parameters()])
    assert_all_close(*results)


@pytest.mark.parametrize("groups", [3, 4])
def test_inverse(groups, options):
    """The inverse gives the input back, and leaves statistics alone."""
    net, _ = group_twins(blocks_of(mlp, 3, groups), **options)
    x = wide(groups)
    assert_close(net.inverse(net(x)), x)
    assert_all_close(net[1].inverse(net[1](streams_in := streams(groups))), streams_in)


@torch.no_grad()
def test_a_tuple_is_not_copied(options):
    """Memory is taken for the streams that come out alone: the sum that the first branch reads is gone by then."""
    net, _ = group_twins(blocks_of(nn.Identity, 1, 4), **options)
    x = streams(4, 64, 64)
    kept = [t.clone() for t in x]
    assert peak_bytes(lambda: net(x)) <= 4.5 * x[0].numel() * 8
    assert all(torch.equal(a, b) for a, b in zip(x, kept, strict=True))


# ---- arguments and hooks


def test_side_inputs(options):
    """A side input that every branch reads: its gradient is the sum over all of them."""
    side = torch.rand(4, dtype=WIDE, requires_grad=True)
    check_step(*group_twins(blocks_of(Uses, 2, 4), **options), wide(4), sides=[side], side=side)


def test_auxiliary_outputs(options):
    """(f, aux) from some branches, in the order of the calls, also where they alone are the loss."""
    blocks = [[Auxiliary(mlp()), mlp(), Auxiliary(mlp())], [mlp(), Auxiliary(mlp()), mlp()]]
    net, plain = group_twins(blocks, **options)
    check_step(net, plain, wide(3))
    results = []
    for network in (net, plain):
        torch.manual_seed(0)
        x = streams(3)
        network.zero_grad()
        _, aux = network(x)
        assert len(aux) == 3
        (aux[0] + 2 * aux[2]).backward()
        results.append([leaf.grad for leaf in x] + [p.grad for p in network.parameters()])
    assert_all_close(*results)


def test_hooks_on_branches(options):
    """Forward hooks fire again in the recompute, full-backward hooks once, with plain torch's gradients."""
    logs = []
    for network in group_twins(blocks_of(mlp, 2, 3), **options):
        torch.manual_seed(0)
        calls, gradients = [], {}
        for number, branch in enumerate(branches_of(network)):
            branch.register_forward_hook(lambda m, i, o, n=number, to=calls: to.append((n, is_recomputing())))
            branch.register_full_backward_hook(
                lambda m, gi, go, n=number, to=gradients: to.setdefault(n, []).extend((*gi, *go))
            )
        loss_of(network(wide(3))).backward()
        logs.append([g for n in range(6) for g in gradients[n]])
        again = [(n, True) for n in reversed(range(6))]
        rebuilt = isinstance(network, ReversibleSequential) and options["activations"] == "reconstruct"
        assert calls == [(n, False) for n in range(6)] + (again if rebuilt else [])
    assert_all_close(*logs)


def test_hooks_on_blocks(options):
    """A block's hooks see all its streams, in and out, and their gradients; a tensor among them may be used."""
    net, plain = group_twins(blocks_of(lambda: dropout_mlp(p=0.5), 3, 4), **options)
    seen = []
    net[1].register_forward_pre_hook(lambda m, i: seen.append(("in", len(i))))
    net[1].register_forward_hook(lambda m, i, o: seen.append(("out", len(o))))
    net[1].register_full_backward_hook(lambda m, gi, go: seen.append((len(gi), len(go))))
    check_step(net, plain, wide(4))
    assert seen == [("in", 4), ("out", 4), (4, 4)]


def test_a_hook_that_replaces_a_stream(backend):
    """It cannot be undone, and is refused."""
    net, _ = group_twins(blocks_of(mlp, 2, 3), backend=backend)
    net[1].register_forward_hook(lambda m, i, o: (*o[:2], o[2] * 2))
    assert_raises(rk.ReconstructionError, ["hook", "block 1", "replaced the streams"], lambda: net(wide(3)))


def test_streams_that_somebody_keeps_do_not_change(options):
    """In-place writes happen only in memory that nobody else can see."""
    net, _ = group_twins(blocks_of(mlp, 3, 3), **options)
    kept = []

    def stash(module, inputs, output):
        for value in (*inputs, *(output if isinstance(output, tuple) else (output,))):
            kept.append((value.detach(), value.detach().clone()))

    for module in (net[1], *branches_of(net)):
        module.register_forward_hook(stash)
    y = net(streams(3))
    kept.extend((t.detach(), t.detach().clone()) for t in y)
    loss_of(y).backward()
    assert len(kept) > 2 * 9
    assert all(torch.equal(tensor, copied) for tensor, copied in kept)


# ---- costs


@pytest.mark.parametrize("groups", [3, 4])
def test_memory_is_flat(groups, backend):
    """Peak activation bytes at depth 3, 8 and 20 are equal within one block, and stored ones are not."""
    x = rows(BATCH, groups * WIDTH, requires_grad=False)
    block = x.numel() * 8

    def peak(depth, activations):
        net, _ = group_twins(blocks_of(slim_branch, depth, groups), backend=backend, activations=activations)
        return activation_bytes(net, x)

    shallow = peak(3, "reconstruct")
    assert all(abs(peak(depth, "reconstruct") - shallow) <= block for depth in (8, 20))
    assert peak(8, "store") - peak(3, "store") >= 5 * block


def test_one_extra_forward(options):
    """Under "reconstruct" each branch runs exactly once more."""
    net, _ = group_twins(blocks_of(lambda: Counting(mlp()), 3, 5), **options)
    again = [True] if options["activations"] == "reconstruct" else []
    net(wide(5)).sum().backward()
    assert [branch.calls for branch in branches_of(net)] == [[False, *again]] * 15


# ---- wrong


def test_bad_input(options):
    """The error names the argument, what it got and what it needs; no branch runs."""
    net, _ = group_twins(blocks_of(lambda: Counting(mlp()), 2, 4), **options)
    cases = [
        (ValueError, ["has shape (5, 10)", "dimension 1 is 10", "divisible into 4 streams"], rows(5, 10)),
        (TypeError, ["a tuple of 3 (Tensor, Tensor, Tensor)", "a tuple of 4 tensors"], streams(3)),
        (TypeError, ["a tuple of 5", "a tuple of 4 tensors"], streams(5)),
        (ValueError, ["1 has shape (5, 4)", "3 has (4, 4)"], (*streams(2), rows(4, 4), rows(5, 4))),
        (ValueError, ["1 has dtype", "4 has torch.float32"], (*streams(3), rows(5, 4, dtype=torch.float32))),
    ]
    for error, parts, x in cases:
        for module in (net, net[0]):
            assert_raises(error, parts, lambda m=module, x=x: m(x))
            assert_raises(error, parts, lambda m=module, x=x: m.inverse(x))
    assert all(branch.calls == [] for branch in branches_of(net))


def test_blocks_of_different_numbers_of_streams():
    """One chain has one number of streams."""
    blocks = [ReversibleBlock(*[mlp() for _ in range(groups)]) for groups in (3, 3, 4)]
    assert_raises(ValueError, ["blocks[2]", "4", "3"], lambda: ReversibleSequential(blocks))
    assert_raises(TypeError, ["branch2 is a str", "callable"], lambda: ReversibleBlock(mlp(), mlp(), "tanh"))


@pytest.mark.parametrize("which", ["parameter weight", "buffer scale", "side input side"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_changed_between_forward_and_backward(which, place, backend):
    """The error names what was changed, in whichever branch it is."""
    net, _ = group_twins(blocks_of(Uses, 2, 3), backend=backend)
    side = torch.rand(4, dtype=WIDE)
    loss = loss_of(net(wide(3), side=side))
    branch = net[1].branches[place]
    change({"parameter weight": branch.weight, "buffer scale": branch.scale, "side input side": side}[which])
    branch_name = ["branch F", "branch G", "branch 2"][place] if which != "side input side" else "block 1"
    assert_raises(rk.ReconstructionError, ["changed in place", which, "block 1", branch_name], loss.backward)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_branch_that_writes_to_its_input(place, backend):
    """Refused, and the branch is named: the input of all but the first is a stream that is needed later."""
    blocks = blocks_of(mlp, 2, 4)
    blocks[1][place] = nn.Sequential(nn.ReLU(inplace=True), mlp())
    net, _ = group_twins(blocks, backend=backend)
    assert_raises(rk.ReconstructionError, ["in place", "Sequential", "block 1", "FG23"[place]], lambda: net(wide(4)))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_branch_that_changes_the_shape(place, options):
    """Refused in the call and in the inverse."""
    blocks = blocks_of(mlp, 1, 3)
    blocks[0][place] = nn.Linear(4, 5).to(WIDE)
    net, _ = group_twins(blocks, **options)
    for call in (net, net.inverse):
        assert_raises(ValueError, ["Linear", "(6, 5)", "(6, 4)", "keep the shape"], lambda call=call: call(wide(3)))
