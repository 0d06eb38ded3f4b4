# SPDX-License-Identifier: Apache-2.0
"""Masks, memories, flags, and branches that return more than f."""

import pytest
from torch import nn

from behaviour.common import (
    WIDE,
    Plain,
    assert_all_close,
    assert_close,
    assert_raises,
    assert_same,
    check_step,
    dropout_mlp,
    fresh,
    loss_of,
    mlp,
    pairs_of,
    rows,
    step,
    torch,
    twins,
    unwritten,
)
from revkernels.nn import PerBlock


class Masked(nn.Module):
    """Takes a mask and a flag; knows no memory."""

    keywords = ("mask", "flip")

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner or mlp()

    def forward(self, x, mask=None, *, flip=False):
        f = self.inner(x.flip(0) if flip else x)
        return f if mask is None else f * mask


class Attending(nn.Module):
    """Cross-attention on a memory; knows no mask."""

    keywords = ("memory",)

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(4, 3), nn.Linear(3, 4)
        self.to(WIDE)

    def forward(self, x, memory):
        weights = torch.softmax(self.query(x) @ memory.mT, -1)
        return self.value(weights @ memory)


def attention_pairs(depth=3):
    return [(Attending(), Masked()) for _ in range(depth)]


def test_keywords_go_to_the_branches_that_take_them(options):
    """Row 19: memory to F, mask and flag to G, by name."""
    net, plain = twins(attention_pairs(), **options)
    memory, mask = torch.randn(7, 3, dtype=WIDE), (torch.rand(5, 4, dtype=WIDE) > 0.5).to(WIDE)
    for flip in (False, True):
        check_step(net, plain, rows(), memory=memory, mask=mask, flip=flip)
    check_step(net, plain, rows(), memory=memory)


class Conditioned(nn.Module):
    """Any residual function, scaled by what it makes of a memory."""

    keywords = ("memory",)

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, memory):
        return self.inner(x) * torch.tanh(memory).mean() + memory.square().mean()


def deaf(branch):
    """Say so to the plain network: this branch takes no keywords."""
    branch.keywords = ()
    return branch


def check_arguments(kind, **options):
    """Rows 19 and 20, as a function: a memory and a mask, for all blocks and for each its own, with gradients."""
    make = kind.make
    pairs = [(Conditioned(make()), deaf(make())), (deaf(make()), Masked(make())), (Masked(make()), Conditioned(make()))]
    net, plain = twins(pairs, **options)
    memory, mask = torch.randn(7, 3, dtype=WIDE, requires_grad=True), torch.rand(kind.stream, dtype=WIDE)
    check_step(net, plain, kind.x(), memory=memory, mask=mask, sides=[memory])
    mask.requires_grad_()
    each = [torch.randn(2, dtype=WIDE, requires_grad=True) for _ in range(3)]
    masks = PerBlock([None, mask, mask])
    check_step(net, plain, kind.x(), memory=PerBlock(each), mask=masks, flip=True, sides=[*(each[::2]), mask])


def test_arguments_beside_branches_that_take_none(kind, options):
    """Rows 19 and 20: the library's own branches, which take their stream alone, next to others and inside them."""
    check_arguments(kind, **options)


class Positional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x, scale, mode, bias=None):
        f = self.inner(x) * scale
        f = f + bias["value"][0] if bias is not None else f
        return f.relu() if mode == "relu" else f


@pytest.mark.parametrize("mode", ["relu", None])
def test_positional_and_other_objects(mode, options):
    """Row 19: tensors, strings, None, and tensors inside containers."""
    net, plain = twins(pairs_of(Positional, 3), **options)
    scale, bias = torch.rand(4, dtype=WIDE, requires_grad=True), torch.rand(4, dtype=WIDE, requires_grad=True)
    check_step(net, plain, rows(), scale, mode, sides=[scale])
    check_step(net, plain, rows(), scale, mode, sides=[scale, bias], bias={"value": [bias]})
    check_step(net, plain, rows(), 0.5, mode)


def test_an_argument_for_each_block(options):
    """Row 19: PerBlock hands every block its own, tensors and others, positional or not."""
    net, plain = twins(pairs_of(Positional, 3), **options)
    scales = [torch.rand(4, dtype=WIDE, requires_grad=True) for _ in range(3)]
    check_step(net, plain, rows(), PerBlock(scales), PerBlock(["relu", None, "relu"]), sides=scales)
    net, plain = twins(pairs_of(Masked, 3), **options)
    masks = PerBlock([torch.rand(5, 4, dtype=WIDE), None, torch.rand(5, 4, dtype=WIDE)])
    check_step(net, plain, rows(), mask=masks, flip=PerBlock([True, False, True]))


def test_gradients_of_a_side_input(options):
    """Row 20: a memory that every block reads: a leaf, and the output of an encoder."""
    net, plain = twins(attention_pairs(4), **options)
    memory = torch.randn(7, 3, dtype=WIDE, requires_grad=True)
    check_step(net, plain, rows(), memory=memory, sides=[memory])
    results = []
    for network in (net, plain):
        torch.manual_seed(0)
        encoder = nn.Linear(3, 3).to(WIDE)
        x, words = rows(), torch.randn(7, 3, dtype=WIDE, requires_grad=True)
        loss_of(network(x, memory=torch.tanh(encoder(words)))).backward()
        results.append([x.grad, words.grad, *(p.grad for p in encoder.parameters())])
    assert_all_close(*results)


def test_side_input_only(options):
    """Row 20: neither input nor parameters learn, only the memory does."""
    net, plain = twins(attention_pairs(2), **options)
    memory = torch.randn(7, 3, dtype=WIDE, requires_grad=True)
    net.requires_grad_(False)
    plain.requires_grad_(False)
    check_step(net, plain, rows(requires_grad=False), memory=memory, sides=[memory])


def test_autograd_grad_of_a_side_input(options):
    """Rows 10 and 20: torch.autograd.grad for the memory."""
    memory = torch.randn(7, 3, dtype=WIDE, requires_grad=True)
    x = rows()
    grads = [torch.autograd.grad(loss_of(n(x, memory=memory)), memory)[0] for n in twins(attention_pairs(), **options)]
    assert_close(*grads)


class Auxiliary(nn.Module):
    """Returns a loss of its own beside f."""

    def __init__(self, inner, as_dict=False):
        super().__init__()
        self.inner, self.as_dict = inner, as_dict

    def forward(self, x):
        f = self.inner(x)
        aux = f.square().mean() + x.abs().mean()
        return f, {"loss": aux, "name": "text"} if self.as_dict else aux


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_auxiliary_outputs(as_dict, pair, kind, options):
    """Row 21: (f, aux) makes the call return (y, [aux, ...]) in call order, gradients included."""
    check_auxiliary_outputs(kind, as_dict, pair, **options)


def check_auxiliary_outputs(kind, as_dict, pair, **options):
    """Row 21, as a function."""
    make = kind.make
    mixed = [(Auxiliary(make(), as_dict), make()), (Auxiliary(make()), Auxiliary(make(), as_dict)), *kind.pairs(1)]
    net, plain = twins(mixed, **options)
    x = kind.pair() if pair else kind.x()
    check_step(net, plain, x)
    y, aux = net(x)
    assert isinstance(y, tuple) is pair
    assert len(aux) == 3
    assert not as_dict or aux[0]["name"] == "text"


def test_auxiliary_outputs_alone(kind, options):
    """Row 21: a loss of auxiliary outputs only; the output of the chain is not used."""
    results = []
    given = kind.x()
    for network in kind.within(Auxiliary).twins(3, **options):
        leaves, x = fresh(given)
        _, aux = network(x)
        (aux[1] * 2 + aux[4]).backward()
        results.append([leaves[0].grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_inverse_with_arguments(options):
    """Rows 19 and 28: the inverse takes the arguments that the forward took; auxiliary outputs are dropped."""
    net, _ = twins(attention_pairs(), **options)
    x, memory, mask = rows(), torch.randn(7, 3, dtype=WIDE), torch.rand(5, 4, dtype=WIDE)
    assert_close(net.inverse(net(x, memory=memory, mask=mask), memory=memory, mask=mask), x)
    net, _ = twins(pairs_of(lambda: Auxiliary(mlp()), 2), **options)
    assert_close(net.inverse(net(x)[0]), x)


def test_plain_callables_as_branches(options):
    """Row 19: functions and bound methods."""
    inner = mlp()
    pairs = [(torch.tanh, inner), (lambda x: inner(x) * 0.5, torch.sigmoid)]
    functions, _ = twins(pairs, **options)
    x = rows()
    results = []
    for network in (functions, Functions(pairs)):
        inner.zero_grad()
        leaves, copied = fresh(x)
        loss_of(network(copied)).backward()
        results.append([leaves[0].grad, *(p.grad.clone() for p in inner.parameters())])
    assert_all_close(*results)


class Functions(Plain):
    """Plain PyTorch on callables that are no modules."""

    def __init__(self, pairs):
        nn.Module.__init__(self)
        self.pairs = pairs

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        for F, G in self.pairs:
            x1 = x1 + F(x2)
            x2 = x2 + G(x1)
        return torch.cat((x1, x2), 1)


def test_bad_arguments(options):
    """A keyword that no branch takes; a PerBlock of the wrong length; a branch that returns three things."""
    net, _ = twins(pairs_of(lambda: Masked(dropout_mlp()), 3), **options)
    x = rows()
    two = PerBlock([None, None])

    def refused(call):
        assert_raises(TypeError, ["no branch takes", "'maks'"], lambda: call(x, maks=1))
        assert_raises(ValueError, ["mask", "2 values", "one for each of the 3 blocks"], lambda: call(x, mask=two))
        assert_raises(ValueError, ["argument 0", "4 values"], lambda: call(x, PerBlock([None] * 4)))

    with unwritten(net, x):
        refused(net)
        refused(net.inverse)

    class Three(nn.Module):
        def forward(self, x):
            return x, 1, 2

    bad, _ = twins([(Three(), mlp())], **options)
    assert_raises(TypeError, ["tuple of 3", "(f, aux)"], lambda: bad(x))
    before = step(net, x)
    assert_same(step(net, x), before)
