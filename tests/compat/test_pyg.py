# SPDX-License-Identifier: Apache-2.0
"""PyTorch Geometric's GroupAddRev here: as plain torch in each option, and as the original where that is right."""

import copy

import pytest
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_close,
    assert_raises,
    check_step,
    loss_of,
    relative_error,
    rows,
    step,
    torch,
    unwritten,
)
from torch import nn

from compat.common import InAutocast, check_copies, check_gradients, check_signatures, installed, plain, spelled
from revkernels.compat import pyg
from revkernels.compat.pyg import GroupAddRev, GroupAddRevs
from revkernels.errors import ReconstructionError
from revkernels.measure import peak_bytes

SIGNATURES = {"GroupAddRev": "(conv, split_dim=-1, num_groups=None, disable=False, num_bwd_passes=1)"}

#: From node, to node. Node 4 hears nothing, node 0 hears itself.
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 0, 3, 2, 3, 0]])


class Conv(nn.Module):
    """Message passing by hand: every node gets the mean of its neighbours' weighted messages."""

    def __init__(self, width=4, norm=False, p=0.0):
        super().__init__()
        self.neighbour, self.root = nn.Linear(width, width).to(WIDE), nn.Linear(width, width).to(WIDE)
        self.norm = nn.BatchNorm1d(width).to(WIDE) if norm else nn.Identity()
        self.drop = nn.Dropout(p)

    def reset_parameters(self):
        for layer in (self.neighbour, self.root):
            layer.reset_parameters()

    def forward(self, x, edge_index, edge_weight=None, mask=None):
        x = self.drop(torch.tanh(self.norm(x)))
        messages = self.neighbour(x)[edge_index[0]]
        if edge_weight is not None:
            messages = messages * edge_weight[:, None]
        counts = torch.ones(len(x), dtype=x.dtype).index_add(0, edge_index[1], torch.ones(len(messages), dtype=x.dtype))
        out = torch.zeros_like(x).index_add(0, edge_index[1], messages.to(x.dtype)) / counts[:, None] + self.root(x)
        return out if mask is None else out * mask


class Mixing(nn.Module):
    """Has no reset_parameters, and hears nobody."""

    def __init__(self, width=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, dtype=WIDE))

    def forward(self, x, edge_index, mask=1.0):
        return torch.tanh(x @ self.weight) * mask


def parts(value, groups, dim, like):
    cut = torch.is_tensor(value) and value.dim() == like.dim() and value.shape[dim] == like.shape[dim]
    return value.chunk(groups, dim) if cut else [value] * groups


def in_plain_torch(layer, x, edge_index, *args):
    groups, dim = layer.num_groups, layer.split_dim
    xs, own = x.chunk(groups, dim), [parts(arg, groups, dim, x) for arg in args]
    h, ys = sum(xs[1:]), []
    for i, conv in enumerate(layer.convs):
        h = xs[i] + conv(h, edge_index, *(arg[i] for arg in own))
        ys.append(h)
    return torch.cat(ys, dim)


def stack_in_plain_torch(layers, x, *args):
    for layer in layers:
        x = in_plain_torch(layer, x, *args)
    return x


def stack(depth, groups, disable=False, **options):
    layers = [GroupAddRev(Conv(**options), num_groups=groups, disable=disable) for _ in range(depth)]
    net = GroupAddRevs(layers)
    return net, plain(net, stack_in_plain_torch)


def test_signatures():
    check_signatures(pyg, SIGNATURES)


@pytest.mark.parametrize("disable", [False, True])
@pytest.mark.parametrize("groups", [2, 3, 4, 8, 16])
def test_steps_as_plain_torch(groups, disable, backend):
    """One layer and a chain of three: gradients, statistics counted once, the same masks, the generator afterwards."""
    x = rows(5, 4 * groups)
    layer = GroupAddRev(Conv(norm=True, p=0.3), num_groups=groups, disable=disable)
    check_step(layer, plain(layer, in_plain_torch), x, EDGES, steps=2)
    check_step(*stack(3, groups, disable, norm=True, p=0.3), x, EDGES, steps=2)
    assert {conv.norm.num_batches_tracked.item() for conv in layer.convs} == {2}


def test_arguments_are_cut_into_groups_or_shared(backend):
    """A mask as wide as x is cut as x is; edge weights are everybody's; both get their gradients."""
    net, twin = stack(2, 4)
    weight = torch.rand(6, dtype=WIDE, requires_grad=True)
    wide, narrow = (torch.rand(5, width, dtype=WIDE, requires_grad=True) for width in (16, 1))
    for sides in ([weight], [weight, wide], [weight, narrow]):
        check_step(net, twin, rows(5, 16), EDGES, *sides, sides=sides)
    check_step(net, twin, rows(5, 16), EDGES, None, wide, sides=[wide])
    check_step(net[0], plain(net[0], in_plain_torch), rows(5, 16), EDGES, None, wide, sides=[wide])


@pytest.mark.parametrize("split_dim", [0, 1, -2])
def test_split_dim(split_dim, backend):
    """Another dimension is cut, and a mask with it."""
    x = rows(6, 6, 4)
    layer = GroupAddRev(Mixing(), split_dim, num_groups=3)
    check_step(layer, plain(layer, in_plain_torch), x, EDGES, torch.rand_like(x))


@pytest.mark.parametrize("disable", [False, True])
def test_one_extra_run_of_each_conv_or_none(disable):
    net, _ = stack(2, 3, disable)
    calls = []
    for layer in net:
        for conv in layer.convs:
            conv.register_forward_hook(lambda m, i, o: calls.append(m))
    net(rows(5, 12), EDGES).sum().backward()
    assert len(calls) == 6 * (1 if disable else 2)


def test_module_list_is_kept():
    """Convs of several kinds, in the order given; the list itself, not a copy."""
    convs = nn.ModuleList([Conv(), Mixing(), Conv(p=0.5)])
    layer = GroupAddRev(convs)
    assert layer.convs is convs
    assert layer.num_groups == 3
    check_step(layer, plain(layer, in_plain_torch), rows(5, 12), EDGES)


def test_copies_get_parameters_of_their_own():
    """Where the conv has a reset_parameters; else they start as copies. The first is the conv itself."""
    conv = Conv()
    layer = GroupAddRev(conv, num_groups=4)
    assert layer.convs[0] is conv
    weights = [c.root.weight for c in layer.convs]
    assert all(not torch.equal(a, b) for a in weights for b in weights if a is not b)
    before = [w.clone() for w in weights]
    layer.reset_parameters()
    assert all(not torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    same = GroupAddRev(Mixing(), num_groups=2)
    assert torch.equal(same.convs[0].weight, same.convs[1].weight)
    assert same.convs[0].weight is not same.convs[1].weight


def test_inverse(backend):
    """Of a layer and of a chain, with the arguments of the forward; differentiable."""
    net, _ = stack(3, 4)
    x, weight, mask = rows(5, 16), torch.rand(6, dtype=WIDE), torch.rand(5, 16, dtype=WIDE)
    for network in (net, net[0]):
        y = network(x, EDGES, weight, mask)
        assert_close(network.inverse(y.detach(), EDGES, weight, mask), x)
    small = GroupAddRev(Conv(1), num_groups=3)
    check_gradients(lambda y: small.inverse(y, EDGES), rows(5, 3))


def test_derivatives():
    small = GroupAddRev(Conv(1), num_groups=3)
    check_gradients(lambda x: small(x, EDGES), rows(5, 3))


@pytest.mark.parametrize("num_bwd_passes", [1, 4])
def test_backward_any_number_of_times(num_bwd_passes, backend):
    """As retain_graph says, and the gradient is the sum: num_bwd_passes has nothing to say."""
    layer = GroupAddRev(Conv(), num_groups=4, num_bwd_passes=num_bwd_passes)
    x = rows(5, 16)
    loss = loss_of(layer(x, EDGES))
    once = torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    assert_all_close([x.grad, *(p.grad for p in layer.parameters())], [3 * g for g in once])


def test_input_is_left_alone(backend):
    """The original empties it, also where no gradient is asked for."""
    layer = GroupAddRev(Conv(), num_groups=4)
    x = rows(5, 16) * 1
    with unwritten(layer, x):
        y = layer(x, EDGES)
        with torch.no_grad():
            assert not layer(x, EDGES).requires_grad
    with unwritten(nn.Identity(), x, y):
        y.sum().backward()


def test_input_without_gradient_still_gives_parameters_theirs(backend):
    net, twin = stack(2, 3)
    check_step(net, twin, rows(5, 12, requires_grad=False), EDGES)


def test_autocast_in_the_backward(backend):
    layer = GroupAddRev(Conv().float(), num_groups=2)
    twin = plain(layer, in_plain_torch)
    ours, theirs = (InAutocast(Bound(network)) for network in (layer, twin))
    check_step(ours, theirs, rows(5, 8, dtype=torch.float32), tolerance=1e-6)


class Bound(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x, EDGES)


def test_chain_of_layers_that_differ(backend):
    """Groups, disable and hooks may change along the chain; hooks on layers fire, those on convs too."""
    layers = [GroupAddRev(Conv(12 // groups), num_groups=groups) for groups in (2, 2, 3, 3, 3)]
    layers[3].disable = True
    net = GroupAddRevs(layers)
    twin = plain(net, stack_in_plain_torch)
    seen = []
    net[1].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    net[0].convs[1].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    check_step(net, twin, rows(5, 12), EDGES)
    assert seen == [(5, 6), (5, 12), (5, 6)]
    assert [len(part) for _, part in net._parts()] == [1, 1, 1, 1, 1]
    x = rows(5, 12)
    assert_close(net.inverse(net(x, EDGES), EDGES), x)


def test_a_layer_with_a_forward_of_its_own_is_called():
    class Twice(GroupAddRev):
        def forward(self, x, edge_index):
            return 2 * super().forward(x, edge_index)

    net = GroupAddRevs([GroupAddRev(Conv(), num_groups=2), Twice(Conv(), num_groups=2)])
    x = rows(5, 8)
    assert_close(net(x, EDGES), 2 * stack_in_plain_torch(net, x, EDGES))


def test_memory_is_that_of_one_layer_at_any_depth():
    """Of a chain; layers that are called one by one keep one output each."""

    def branch():
        return nn.Sequential(nn.Linear(32, 32), nn.Tanh()).to(WIDE)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = branch()

        def forward(self, x, edge_index):
            return self.inner(x)

    x = rows(128, 128, requires_grad=False)

    def peak(depth, one_by_one=False):
        net = GroupAddRevs([GroupAddRev(Plain(), num_groups=4) for _ in range(depth)])

        def train():
            y = x
            for layer in net if one_by_one else [net]:
                y = layer(y, EDGES)
            y.sum().backward()

        train()
        net.zero_grad(set_to_none=False)
        return peak_bytes(train)

    assert abs(peak(12) - peak(4)) <= x.nbytes
    assert peak(12, True) - peak(4, True) >= 7 * x.nbytes


def test_changes_after_the_forward_are_refused():
    net, _ = stack(2, 3)
    loss = net(rows(5, 12), EDGES).sum()
    with torch.no_grad():
        net[1].convs[2].root.weight.add_(1)
    assert_raises(ReconstructionError, ["layer 1, convs[2] (Conv)", "root.weight"], loss.backward)


def test_names_copies_and_casts():
    net, _ = stack(2, 2)
    assert list(net.state_dict())[:2] == ["0.convs.0.neighbour.weight", "0.convs.0.neighbour.bias"]
    assert str(net[0]) == f"GroupAddRev({net[0].convs[0]}, num_groups=2)"
    bound = Bound(net)
    check_copies(bound, rows(5, 8))


def test_bad_arguments():
    assert_raises(TypeError, ["conv is a function", "nn.Module"], lambda: GroupAddRev(lambda x, e: x, num_groups=2))
    assert_raises(TypeError, ["num_groups is a NoneType", "int"], lambda: GroupAddRev(Conv()))
    assert_raises(ValueError, ["num_groups is 1", "2 or more"], lambda: GroupAddRev(Conv(), num_groups=1))
    assert_raises(ValueError, ["ModuleList of 1", "2 or more"], lambda: GroupAddRev(nn.ModuleList([Conv()])))
    layer = GroupAddRev(Conv(), num_groups=4)
    mask = torch.ones(5, 9)
    for call in (layer, layer.inverse):
        parts = ["has shape (5, 9)", "is 9", "4 streams"]
        assert_raises(ValueError, parts, lambda call=call: call(rows(5, 9), EDGES, None, mask))
        assert_raises(TypeError, ["is a tuple", "tensor"], lambda call=call: call((rows(5, 4),) * 4, EDGES))


# ---- PyTorch Geometric itself


def original():
    installed("torch_geometric")
    from torch_geometric.nn import GroupAddRev as Original

    return Original


def convs(kind, width):
    from torch_geometric import nn as geometric

    return {"sage": geometric.SAGEConv, "graph": geometric.GraphConv, "gcn": geometric.GCNConv}[kind](width, width)


@pytest.mark.slow
def test_signatures_are_the_peers():
    for name, expected in SIGNATURES.items():
        assert spelled(original()) == expected, name


@pytest.mark.slow
@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("kind", ["sage", "graph", "gcn", "by hand"])
def test_steps_as_the_peer(kind, groups, backend):
    """Its own convs, as one layer and its inverse, from its state_dict; the original on what may be emptied."""
    Original = original()
    conv = Conv() if kind == "by hand" else convs(kind, 4).to(WIDE)
    theirs = Original(copy.deepcopy(conv), num_groups=groups)
    ours = GroupAddRev(conv, num_groups=groups)
    ours.load_state_dict(theirs.state_dict())
    args = (torch.rand(6, dtype=WIDE),) if kind in ("graph", "gcn") else ()
    for forward in ("forward", "inverse"):
        results = [step(Emptied(network, forward), rows_once(groups), EDGES, *args) for network in (ours, theirs)]
        assert_all_close(results[0].outputs + results[0].inputs, results[1].outputs + results[1].inputs)
        assert_all_close(list(results[0].parameters.values()), list(results[1].parameters.values()))
        assert list(results[0].parameters) == list(results[1].parameters)


def rows_once(groups):
    return torch.linspace(-1, 1, 20 * groups, dtype=WIDE).reshape(5, -1).sin().requires_grad_()


class Emptied(nn.Module):
    """Calls the network on a tensor that nobody else needs, and keeps its output, which the backward empties too."""

    def __init__(self, network, forward="forward"):
        super().__init__()
        self.network, self.call = network, getattr(network, forward)

    def forward(self, x, *args):
        return self.call(x * 1, *args) * 1


# What docs/migration.md says of GroupAddRev: the day that one of these fails, its row goes.


@pytest.mark.slow
def test_the_peer_empties_its_input_and_in_the_backward_its_output():
    layer, x = original()(Conv(), num_groups=2), rows(5, 8) * 1
    y = layer(x, EDGES)
    assert x.untyped_storage().size() == 0
    y.sum().backward()
    assert y.untyped_storage().size() == 0
    x = rows(5, 8, requires_grad=False)
    with torch.no_grad():
        layer(x, EDGES)
    assert x.untyped_storage().size() == 0


@pytest.mark.slow
def test_the_peer_counts_statistics_three_times_and_loses_dropout_masks():
    layer = original()(Conv(norm=True, p=0.3), num_groups=2)
    twin = plain(layer, in_plain_torch)
    got, expected = (step(Emptied(network), rows_once(2), EDGES) for network in (layer, twin))
    assert layer.convs[0].norm.num_batches_tracked == 3
    assert relative_error(got.inputs[0], expected.inputs[0]) > 0.1


@pytest.mark.slow
def test_the_peer_runs_each_conv_twice_more():
    layer = original()(Conv(), num_groups=2)
    calls = []
    layer.convs[0].register_forward_hook(lambda m, i, o: calls.append(1))
    layer(rows(5, 8) * 1, EDGES).sum().backward()
    assert len(calls) == 3
