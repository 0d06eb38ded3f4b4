# SPDX-License-Identifier: Apache-2.0
"""Strides, views, empty batches, and in-place operations before, inside and after the chain."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_raises,
    check_step,
    conv,
    fresh,
    images,
    loss_of,
    mlp,
    pairs_of,
    rows,
    torch,
    twins,
)
from revkernels.nn import ReversibleBlock

LAYOUTS = {
    "channels last": lambda c=8: images(2, c).detach().to(memory_format=torch.channels_last),
    "transposed": lambda c=8: images(2, c, 5, 6).detach().transpose(2, 3),
    "every second row": lambda c=8: images(2, c, 10, 6).detach()[:, :, ::2],
    "every second sample": lambda c=8: images(4, c).detach()[::2],
    "expanded": lambda c=8: images(1, c).detach().expand(3, -1, -1, -1),
    "offset": lambda c=8: images(3, c).detach()[1:],
    "batch innermost": lambda c=8: images(c, 6, 5, 4).detach().permute(3, 0, 2, 1),
    "batch of 1": lambda c=8: images(1, c).detach(),
    "batch of 1, channels last": lambda c=8: images(1, c).detach().to(memory_format=torch.channels_last),
    "one pixel": lambda c=8: images(4, c, 1, 1).detach(),
}


on_images = pytest.mark.parametrize("kind", ["conv", "basic", "bottleneck"], indirect=True)


@on_images
@pytest.mark.parametrize("form", ["single", "pair", "two views of one tensor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, form, kind, options):
    """Row 18: any strides, dense or with gaps between the samples."""
    make = LAYOUTS[layout]
    x = {
        "single": lambda: make().requires_grad_(),
        "pair": lambda: tuple(make(4).requires_grad_() for _ in range(2)),
        "two views of one tensor": lambda: tuple(half.requires_grad_() for half in make().chunk(2, 1)),
    }[form]()
    check_step(*kind.twins(3, **options), x)


@on_images
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_a_view_of_something_that_learns(layout, kind, options):
    """Row 18: the chain right after the view that made the layout."""
    results = []
    given = LAYOUTS[layout]()
    for network in kind.twins(2, **options):
        torch.manual_seed(0)
        base = given.detach().requires_grad_()
        y = network(base.mul(2).view_as(base))
        loss_of(y).backward()
        results.append([y.detach(), base.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


class LaidOut(nn.Module):
    """tanh(x), laid out in another order: as it is returned, and so its gradient as it comes back."""

    def __init__(self, order):
        super().__init__()
        self.order, self.back = order, [order.index(dim) for dim in range(len(order))]

    def forward(self, x):
        return torch.tanh(x).permute(self.order).contiguous().permute(self.back)


NORMS = {"batch": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(2, c), "rows": lambda c: nn.LayerNorm(3)}
ORDERS = [(0, 2, 3, 1), (0, 1, 3, 2), (3, 1, 0, 2), (2, 0, 3, 1)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_branches_of_any_layout(norm, order, options):
    """Row 18: what a branch returns to the norm that comes next, and what a norm's gradient comes as."""
    for split_dim, shape in ((1, (2, 8, 5, 3)), (-1, (2, 4, 5, 6))):
        pairs = pairs_of(lambda: nn.Sequential(NORMS[norm](4), nn.ReLU(), LaidOut(order)).to(WIDE), 2)
        check_step(*twins(pairs, split_dim, **options), rows(*shape))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_any_layout(norm, order, options):
    """Row 18: what comes back to the streams from behind the chain."""
    pairs = pairs_of(lambda: nn.Sequential(NORMS[norm](4), nn.ReLU(), nn.Dropout(0.1)).to(WIDE), 1)
    given, results = (rows(2, 4, 5, 3), rows(2, 4, 5, 3)), []
    for network in twins(pairs, **options):
        torch.manual_seed(0)
        _, x = fresh(given)
        loss_of([LaidOut(order)(y) for y in network(x)]).backward()
        results.append([t.grad for t in (*x, *network.parameters())])
    assert_all_close(*results)


class Mixing(nn.Module):
    """An instance norm, and a product that has both its result and its gradient in another order."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.InstanceNorm2d(4, affine=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.norm(x) + self.mix(x.permute(2, 3, 0, 1)).permute(2, 3, 0, 1)


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_gradients_are_accumulated_in_the_stream_s_layout(pair, options):
    """Row 18: torch's instance norm has a wrong gradient where its output's is permuted, as one of a branch may be."""
    x = (rows(2, 4, 5, 3), rows(2, 4, 5, 3)) if pair else rows(2, 8, 5, 3)
    check_step(*twins(pairs_of(lambda: Mixing().to(WIDE), 2), **options), x)


def test_halves_of_different_strides(options):
    """Row 18: one stream is channels-last, the other is not, and each keeps its own."""
    seen = {}

    class Spy(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.inner, self.name = conv(8), name

        def forward(self, x):
            seen.setdefault(self.name, []).append(x.stride())
            return self.inner(x)

    net, plain = twins([(Spy("F"), Spy("G")) for _ in range(3)], **options)
    x = images().detach().requires_grad_(), images().detach().to(memory_format=torch.channels_last).requires_grad_()
    check_step(net, plain, x)
    seen.clear()
    loss_of(net(x)).backward()
    if options["activations"] == "reconstruct":
        # 3 blocks forward, 3 in the recompute; plain torch keeps no such promise for sums of mixed strides
        assert seen["F"][:3] == seen["F"][3:][::-1]
        assert seen["G"][:3] == seen["G"][3:][::-1]


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 5), (3, 8, 0)])
def test_zero_size_batch(shape, options):
    """Row 18: no samples, or samples of nothing: gradients are zeros, not None."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return torch.tanh(x * self.weight)

    check_step(*twins(pairs_of(Scale, 3), **options), rows(*shape))


@on_images
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_zero_size_batch_of_images(training, kind, options):
    """Row 18: no images: gradients are zeros, and norms do with it what they do in plain PyTorch."""
    net, plain = kind.twins(2, **options)
    check_step(net.train(training), plain.train(training), rows(0, 8, 5, 6), steps=2)


def test_batch_of_one_row(options):
    """Row 18: a batch of 1 of vectors."""
    check_step(*twins(pairs_of(mlp, 3), **options), rows(1, 8))


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_right_before_the_chain(inplace, kind, options):
    """Row 18: the chain's input is what a ReLU saved for its own backward."""
    results = []
    given = kind.x()
    for network in kind.twins(3, **options):
        torch.manual_seed(0)
        leaf = given.detach().clone().requires_grad_()
        y = network(nn.ReLU(inplace)(leaf * 1.5))
        loss_of(y).backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_in_place_inside_a_branch(options):
    """Row 17: in-place operations on what the branch made itself."""
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.BatchNorm1d(6), nn.ReLU6(inplace=True), nn.Linear(6, 4)
    ).double()
    check_step(*twins(pairs_of(make, 3), **options), rows(6, 8), steps=2)


class ReluFirst(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.relu, self.inner = nn.ReLU(inplace=True), inner

    def forward(self, x):
        return self.inner(self.relu(x))


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_in_place_on_the_branch_s_input(place, pair, kind, options):
    """Row 17: relu_ on the stream itself is refused with the branch's name, never silently wrong."""
    pairs = [list(p) for p in kind.pairs(2)]
    pairs[place[0]][place[1]] = ReluFirst(kind.make())
    net, _ = twins([tuple(p) for p in pairs], **options)
    x = tuple(half * 1.0 for half in kind.pair()) if pair else kind.x() * 1.0
    needs = ["in place", "ReluFirst", f"block {place[0]}, branch {'FG'[place[1]]}"]
    if options["activations"] == "store":
        needs = needs[:2]
    assert_raises(RuntimeError, needs, lambda: loss_of(net(x)).backward())


@pytest.mark.parametrize(
    "operation", [torch.relu_, lambda y: y.mul_(2), lambda y: y[0].zero_()], ids=["relu", "mul", "item"]
)
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("alone", [False, True], ids=["chain", "block"])
def test_in_place_on_the_output(operation, pair, alone, kind, options):
    """Row 17: right, or an error that says that the output was changed in place."""
    pairs = kind.pairs(1 if alone else 2)
    net, plain = twins(pairs, **options)
    if alone:
        net = ReversibleBlock(*pairs[0], **options)
    x = kind.pair() if pair else kind.x()

    def train(network):
        leaves, copied = fresh(x)
        y = network(copied)
        operation(y[1] if pair else y)
        loss_of(y).backward()
        return [leaf.grad for leaf in leaves] + [p.grad for p in network.parameters()]

    expected = train(plain)
    try:
        got = train(net)
    except RuntimeError as error:
        assert "in place" in str(error) or "inplace" in str(error)
        if options["activations"] == "reconstruct":
            assert isinstance(error, rk.ReconstructionError)
        else:
            assert pair, "the joined output is a new tensor: storing, nothing forbids to change it"
    else:
        assert_all_close(got, expected)


def test_a_copy_of_the_output_may_be_changed(kind, options):
    """Row 17: the way out that the error names."""
    results = []
    given = kind.x()
    for network in kind.twins(2, **options):
        leaf = given.detach().clone().requires_grad_()
        loss_of(network(leaf).mul(1.0).relu_()).backward()
        results.append([leaf.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)
