# SPDX-License-Identifier: Apache-2.0
"""Strides, views, empty batches, and in-place operations before, inside and after the chain."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import (
    assert_all_close,
    assert_raises,
    check_step,
    conv,
    fresh,
    images,
    loss_of,
    mlp,
    norm_mlp,
    pairs_of,
    rows,
    torch,
    twins,
)

LAYOUTS = {
    "channels last": lambda: images().detach().to(memory_format=torch.channels_last),
    "transposed": lambda: images(2, 8, 5, 6).detach().transpose(2, 3),
    "every second row": lambda: images(2, 8, 10, 6).detach()[:, :, ::2],
    "every second sample": lambda: images(4).detach()[::2],
    "expanded": lambda: images(1).detach().expand(3, -1, -1, -1),
    "offset": lambda: images(3).detach()[1:],
    "batch innermost": lambda: images(8, 6, 5, 4).detach().permute(3, 0, 2, 1),
    "batch of 1": lambda: images(1).detach(),
    "batch of 1, channels last": lambda: images(1).detach().to(memory_format=torch.channels_last),
    "one pixel": lambda: images(4, 8, 1, 1).detach(),
}


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, pair, options):
    """Row 18: any strides, and the caller's input is left alone."""
    x, other = LAYOUTS[layout]().requires_grad_(), LAYOUTS[layout]().requires_grad_()
    net, plain = twins(pairs_of(lambda: conv(8 if pair else 4), 3), **options)
    check_step(net, plain, (x, other) if pair else x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_a_view_of_something_that_learns(layout, options):
    """Row 18: the chain right after the view that made the layout."""
    results = []
    for network in twins(pairs_of(conv, 2), **options):
        torch.manual_seed(0)
        base = LAYOUTS[layout]().detach().requires_grad_()
        y = network(base.mul(2).view_as(base))
        loss_of(y).backward()
        results.append([y.detach(), base.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


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


def test_batch_of_one_row(options):
    """Row 18: a batch of 1 of vectors."""
    check_step(*twins(pairs_of(mlp, 3), **options), rows(1, 8))


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_right_before_the_chain(inplace, options):
    """Row 18: the chain's input is what a ReLU saved for its own backward."""
    results = []
    for network in twins(pairs_of(mlp, 3), **options):
        torch.manual_seed(0)
        leaf = rows()
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
    def __init__(self):
        super().__init__()
        self.relu, self.inner = nn.ReLU(inplace=True), mlp()

    def forward(self, x):
        return self.inner(self.relu(x))


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_in_place_on_the_branch_s_input(place, pair, options):
    """Row 17: relu_ on the stream itself is refused with the branch's name, never silently wrong."""
    pairs = [[mlp(), mlp()], [mlp(), mlp()]]
    pairs[place[0]][place[1]] = ReluFirst()
    net, _ = twins([tuple(p) for p in pairs], **options)
    leaf = rows()
    x = leaf * 1.0
    x = (x[:, :4] * 1.0, x[:, 4:] * 1.0) if pair else x
    needs = ["in place", "ReluFirst", f"block {place[0]}, branch {'FG'[place[1]]}"]
    if options["activations"] == "store":
        needs = needs[:2]
    assert_raises(RuntimeError, needs, lambda: loss_of(net(x)).backward())


@pytest.mark.parametrize(
    "operation", [torch.relu_, lambda y: y.mul_(2), lambda y: y[0].zero_()], ids=["relu", "mul", "item"]
)
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_in_place_on_the_output(operation, pair, options):
    """Row 17: right, or an error that says that the output was changed in place."""
    net, plain = twins(pairs_of(norm_mlp, 2), **options)
    x = (rows(5, 4), rows(5, 4)) if pair else rows(5, 8)

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


def test_a_copy_of_the_output_may_be_changed(options):
    """Row 17: the way out that the error names."""
    results = []
    for network in twins(pairs_of(mlp, 2), **options):
        torch.manual_seed(0)
        leaf = rows()
        loss_of(network(leaf).mul(1.0).relu_()).backward()
        results.append([leaf.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)
