# SPDX-License-Identifier: Apache-2.0
"""PyTorch Geometric's reversible networks on this driver: the results of the package's own code, activations stored."""

import copy

import pytest
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_close,
    assert_raises,
    assert_same,
    check_step,
    loss_of,
    relative_error,
    rows,
    step,
    torch,
)
from torch import nn

from integrations.common import check_compiled, check_copies, check_untouched, original, package, peaks_by_depth
from revkernels.integrations import pyg, restore
from revkernels.measure import branch_calls

pytestmark = pytest.mark.slow
package("torch_geometric")
from torch_geometric.nn import GATConv, GroupAddRev, SAGEConv  # noqa: E402
from torch_geometric.nn.models.rev_gnn import InvertibleModule  # noqa: E402

NODES = 12
EDGES = torch.randint(0, NODES, (2, 40), generator=torch.Generator().manual_seed(0))


class GNNBlock(nn.Module):
    """A block as in the package's example rev_gnn.py: norm, activation, the mask that all blocks share, convolution."""

    def __init__(self, width, norm=nn.LayerNorm, conv=SAGEConv, p=0.0):
        super().__init__()
        self.norm, self.conv, self.drop = norm(width), conv(width, width), nn.Dropout(p)

    def reset_parameters(self):
        self.norm.reset_parameters()
        self.conv.reset_parameters()

    def forward(self, x, edge_index, mask=None, edge_attr=None):
        x = torch.relu(self.norm(x))
        if mask is not None:
            x = x * mask
        x = self.drop(x)
        return self.conv(x, edge_index) if edge_attr is None else self.conv(x, edge_index, edge_attr)


class RevGNN(nn.Module):
    """The network of the same example."""

    def __init__(self, depth=3, width=8, groups=2, dropout=0.0, **options):
        super().__init__()
        self.dropout = dropout
        self.lin1, self.lin2 = nn.Linear(5, width), nn.Linear(width, 3)
        self.norm = nn.LayerNorm(width)
        self.convs = nn.ModuleList(
            GroupAddRev(GNNBlock(width // groups, **options), num_groups=groups) for _ in range(depth)
        )
        self.to(WIDE)

    def forward(self, x, edge_index=EDGES, edge_attr=None):
        mask = None
        if self.training and self.dropout > 0:
            mask = torch.zeros_like(x[:, :1].expand(-1, self.lin1.out_features)).bernoulli_(1 - self.dropout)
            mask = mask / (1 - self.dropout)
        x = self.lin1(x)
        for conv in self.convs:
            x = conv(x, edge_index, mask) if edge_attr is None else conv(x, edge_index, mask, edge_attr)
        return self.lin2(torch.relu(self.norm(x)))


def stored(network):
    """The package's own layers, which store their activations."""
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if isinstance(module, InvertibleModule):
            module.disable = True
    return twin


def x_of(width=5):
    return rows(NODES, width)


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("activations", ["reconstruct", "store"])
def test_steps_as_with_stored_activations(groups, backend, activations, available):
    """Dropout masks shared and own, and batch norms that count a batch once: two steps, float64, to 1e-10."""
    options = {"norm": nn.BatchNorm1d, "p": 0.2, "dropout": 0.3}
    net = RevGNN(3, 12, groups, **options)
    plain = stored(net)
    pyg.replace(net, activations=activations, backend=available(backend))
    check_step(net, plain, x_of(), steps=2)
    assert {m.num_batches_tracked.item() for m in net.modules() if isinstance(m, nn.BatchNorm1d)} == {2}


def test_edge_attributes_get_their_gradients():
    """From every layer, through attention that has dropout as well."""
    net = RevGNN(2, 8, 2, conv=lambda i, o: GATConv(i, o, edge_dim=3, dropout=0.2, add_self_loops=False))
    plain = stored(net)
    pyg.replace(net)
    attributes = rows(EDGES.shape[1], 3)
    got = check_step(net, plain, x_of(), edge_attr=attributes, sides=[attributes])
    assert got.sides[0].norm() > 0


def test_masks_as_wide_as_x_are_cut_into_groups_with_gradients():
    layer = GroupAddRev(GNNBlock(4), num_groups=3).to(WIDE)
    plain = stored(layer)
    pyg.replace(layer)
    for width in (12, 1):
        mask = rows(NODES, width)
        check_step(layer, plain, x_of(12), EDGES, mask, sides=[mask])


def test_memory_is_flat_in_depth():
    """In the loop of the example, layer by layer: as in the package, whose layers empty what they are given."""
    depths = (2, 12)
    n = 3000
    edges = torch.randint(0, n, (2, 4 * n))
    x = rows(n, 5)

    def step_of(change):
        return peaks_by_depth(lambda depth: RevGNN(depth, 16), change, x, depths, edge_index=edges)

    theirs_and_ours, stores = (
        step_of(pyg.replace),
        step_of(lambda net: [setattr(c, "disable", True) for c in net.convs]),
    )
    features = n * 16 * 8
    for place, name in ((0, "theirs"), (1, "ours")):
        assert theirs_and_ours[12][place] - theirs_and_ours[2][place] < 0.1 * features, name
    assert stores[12][1] - stores[2][1] > 10 * 2 * features
    assert theirs_and_ours[12][1] < 1.05 * theirs_and_ours[12][0]


def test_each_conv_runs_once_more():
    """In the package twice more."""
    net = RevGNN(3)
    convs = [conv for layer in net.convs for conv in layer.convs]
    x = x_of()
    theirs = branch_calls(convs, lambda: net(x).sum().backward())
    pyg.replace(net)
    assert (theirs, branch_calls(convs, lambda: net(x).sum().backward())) == (18, 12)


def test_compiled():
    net = RevGNN(2)
    plain = stored(net)
    pyg.replace(net)
    check_compiled(net, plain, x_of())


def test_the_inverse_and_its_gradients():
    net = RevGNN(1, 9, 3)
    layer, plain = net.convs[0], stored(net).convs[0]
    pyg.replace(net)
    x = x_of(9)
    y = layer(x, EDGES)
    assert_close(layer.inverse(y, EDGES), x, 1e-12)
    y = y.detach().requires_grad_()
    got, expected = (torch.autograd.grad(loss_of(n.inverse(y, EDGES)), [y, *n.parameters()]) for n in (layer, plain))
    assert_all_close(got, expected)


def test_parameters_names_and_copies():
    """By reference; deep copies and pickles are changed as well; restored, it is the package's own again."""
    net = RevGNN(2, norm=nn.BatchNorm1d)
    replaced = check_untouched(pyg.replace, net)
    assert list(replaced.modules) == ["convs.0", "convs.1"] and not replaced.left
    pyg.replace(net)
    check_copies(net, x_of())
    other = RevGNN(2, norm=nn.BatchNorm1d)
    other.load_state_dict(net.state_dict())
    pyg.replace(other)
    x = x_of()
    assert_same(step(other, x), step(net, x), 1e-13)
    assert type(original(net).convs[0]) is GroupAddRev
    assert restore(net) == ["convs.0", "convs.1"]


def test_batch_norms_count_a_batch_once():
    """In the package three times."""
    for change, count in ((lambda net: None, 3), (pyg.replace, 1)):
        net = RevGNN(2, norm=nn.BatchNorm1d)
        change(net)
        net(x_of()).sum().backward()
        assert {m.num_batches_tracked.item() for m in net.modules() if isinstance(m, nn.BatchNorm1d)} == {count}


def test_what_the_package_gets_wrong_and_this_does_not():
    """Dropout in a conv: theirs draws other masks in the backward. The caller's x: theirs is emptied."""
    net = RevGNN(2, p=0.5)
    plain, x = stored(net), x_of()
    theirs = step(net, x)
    expected = step(plain, x)
    assert_all_close(theirs.outputs, expected.outputs)
    name = "convs.0.convs.0.conv.lin_l.weight"
    assert relative_error(theirs.parameters[name], expected.parameters[name]) > 0.1
    layer, features = net.convs[0], rows(NODES, 8, requires_grad=False)
    layer(features, EDGES)
    assert features.untyped_storage().nbytes() == 0  # to read it now would crash the process
    pyg.replace(net)
    assert_same(step(net, x), expected)
    features = rows(NODES, 8, requires_grad=False)
    before = features.clone()
    layer(features, EDGES)
    assert torch.equal(features, before)


class Half(InvertibleModule):
    """Invertible, but not additive."""

    def _forward(self, x):
        return (x * 2,)

    def _inverse(self, y):
        return (y / 2,)


class Own(GroupAddRev):
    def _forward(self, x, edge_index, *args):
        return super()._forward(x, edge_index, *args)


class Renamed(GroupAddRev):
    """A subclass that changes nothing of it."""


def test_what_is_left_and_why():
    block = GNNBlock(4)
    net = nn.ModuleDict(
        {
            "other": Half(),
            "own": Own(block, num_groups=2),
            "stores": GroupAddRev(block, num_groups=2, disable=True),
            "renamed": Renamed(block, num_groups=2),
        }
    )
    replaced = pyg.replace(net)
    assert list(replaced.modules) == ["renamed"]
    assert replaced.left == {
        "other": "an InvertibleModule of its own kind: only GroupAddRev is known to be additive",
        "own": "Own has a _forward of its own",
        "stores": "disable=True: it stores its activations",
    }
    assert "torch_geometric 2." in str(replaced) and "1 modules changed, 3 left" in str(replaced)
    assert_raises(ValueError, ["a torch_geometric.nn.GroupAddRev is looked for"], lambda: pyg.replace(nn.Linear(2, 2)))
    assert_raises(ValueError, ["changed before", "Own has a _forward"], lambda: pyg.replace(net))
    restore(net)
    assert type(net["renamed"]) is Renamed


def test_wrong_input_is_named():
    layer = GroupAddRev(GNNBlock(4), num_groups=3).to(WIDE)
    pyg.replace(layer)
    assert_raises(ValueError, ["(12, 7)", "divisible into 3 streams"], lambda: layer(x_of(7), EDGES))
    assert_raises(TypeError, ["x is a list"], lambda: layer([1.0], EDGES))
    assert_raises(TypeError, ["y is a NoneType"], lambda: layer.inverse(None, EDGES))
    narrow = GroupAddRev(nn.ModuleList([GNNBlock(4), SAGEConv(4, 3)]))
    pyg.replace(narrow)
    x = rows(NODES, 8, dtype=torch.float32)
    assert_raises(ValueError, ["convs[1] (SAGEConv)", "must keep the shape"], lambda: narrow(x, EDGES))
