# SPDX-License-Identifier: Apache-2.0
"""Bad input to the modules: an error that names the argument, what it got and what it needs, before anything runs."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import (
    WIDE,
    assert_raises,
    images,
    loss_of,
    mlp,
    pairs_of,
    rows,
    torch,
    twins,
    unwritten,
)
from revkernels.models.layers import BasicBranch, BottleneckBranch
from revkernels.nn import ReversibleBlock, ReversibleSequential

INPUTS = {
    "an odd number of channels": (ValueError, ["x has shape (5, 7)", "is 7", "even"], lambda: rows(5, 7)),
    "no such dimension": (ValueError, ["x has shape (8,)", "split_dim=1", "one of its dimensions"], lambda: rows(8)),
    "a number": (ValueError, ["x has shape ()", "split_dim=1", "one of its dimensions"], lambda: torch.ones(())),
    "a half of integers": (
        *(TypeError, ["x is torch.int32", "floating point"]),
        lambda: (rows(5, 4), torch.ones(5, 4, dtype=torch.int32)),
    ),
    "integers": (TypeError, ["x is torch.int64", "floating point"], lambda: torch.ones(5, 8, dtype=torch.int64)),
    "float8": (TypeError, ["float8_e4m3fn", "bfloat16"], lambda: torch.ones(5, 8, dtype=torch.float8_e4m3fn)),
    "complex": (TypeError, ["x is torch.complex64", "float32"], lambda: torch.ones(5, 8, dtype=torch.complex64)),
    "an array": (TypeError, ["x is a ndarray", "tensor"], lambda: rows().detach().numpy()),
    "None": (TypeError, ["x is a NoneType", "(x1, x2)"], lambda: None),
    "one half": (TypeError, ["x is a tuple of 1", "a pair of tensors (x1, x2)"], lambda: (rows(5, 4),)),
    "three tensors": (TypeError, ["x is a tuple of 3", "a pair of tensors (x1, x2)"], lambda: (rows(5, 4),) * 3),
    "half a pair": (
        *(TypeError, ["x is a tuple of 2 (Tensor, NoneType)", "a pair of tensors (x1, x2)"]),
        lambda: (rows(5, 4), None),
    ),
    "unequal halves": (
        *(ValueError, ["x1 has shape (5, 4)", "x2 has (4, 4)", "must be equal"]),
        lambda: (rows(5, 4), rows(4, 4)),
    ),
    "halves of two dtypes": (
        *(ValueError, ["x1 has dtype torch.float64", "x2 has torch.float32", "must be equal"]),
        lambda: (rows(5, 4), rows(5, 4, dtype=torch.float32)),
    ),
    "halves on two devices": (
        *(ValueError, ["x1 has device cpu", "x2 has meta", "must be equal"]),
        lambda: (rows(5, 4), torch.ones(5, 4, dtype=WIDE, device="meta")),
    ),
}


def assert_refused(network, error, parts, call, given):
    """``call(given)`` raises, and its message says what it has to, before anything is written."""
    with unwritten(network, given):
        assert_raises(error, parts, lambda: call(given))


def trained(network, x):
    """Give the parameters gradients, which a refused call must not touch either."""
    loss_of(network(x)).backward()
    return network


class Never(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.armed = inner, False

    def forward(self, x):
        assert not self.armed, "the branch was run"
        return self.inner(x)


@pytest.mark.parametrize("case", INPUTS)
def test_input(case, kind, options):
    """A chain, a block, and their inverses, which say y; no branch runs and nothing is written."""
    error, parts, make = INPUTS[case]
    kind = kind.with_dropout(0.5).within(Never)
    net = trained(kind.twins(2, **options)[0], kind.x())
    block = trained(ReversibleBlock(kind.make(), kind.make(), **options), kind.x())
    for module in (net, block):
        for branch in module.modules():
            branch.armed = True
        assert_refused(module, error, parts, module, make())
        of_y = [f"y{part[1:]}" if part.startswith("x") else part.replace("x2 has", "y2 has") for part in parts]
        of_y = [part.replace("(x1, x2)", "(y1, y2)") for part in of_y]
        assert_refused(module, error, of_y, module.inverse, make())


class Returns(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result(x)


BRANCHES = {
    "another shape": (ValueError, ["Returns", "shape (5, 1)", "(5, 4)", "keep the shape"], lambda x: x[:, :1]),
    "a shape that would broadcast": (ValueError, ["shape (4,)", "(5, 4)", "keep the shape"], lambda x: x[0]),
    "integers": (TypeError, ["Returns", "torch.int64", "floating-point"], lambda x: x.long()),
    "None": (TypeError, ["Returns", "NoneType", "must return a tensor"], lambda x: None),
    "a list": (TypeError, ["Returns", "list", "must return a tensor"], lambda x: [x]),
    "complex numbers": (TypeError, ["Returns", "torch.complex128", "floating-point"], lambda x: x + 0j),
    "a tuple of 3": (TypeError, ["tuple of 3", "(f, aux)"], lambda x: (x, x, x)),
    "a tuple of 1": (TypeError, ["tuple of 1", "(f, aux)"], lambda x: (x,)),
    "another device": (ValueError, ["Returns", "on meta", "on cpu"], lambda x: x.to("meta")),
}


@pytest.mark.parametrize("case", BRANCHES)
@pytest.mark.parametrize("place", [0, 1])
def test_what_a_branch_returns(case, place, options):
    """Found in the call, in F and in G, forwards and backwards, with gradients and without; inputs are left alone."""
    error, parts, result = BRANCHES[case]
    pair = [mlp(), mlp()]
    pair[place] = Returns(result)
    net, _ = twins([tuple(pair)], **options)
    parts = [*parts, f"branch {'FG'[place]}"]
    for x in (rows(), (rows(5, 4), rows(5, 4))):
        assert_refused(net, error, parts, net, x)
        assert_refused(net, error, parts, net.inverse, x)
        with torch.no_grad():
            assert_refused(net, error, parts, net, x)


STRIDED = {
    "a convolution": lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1),
    "a basic residual function": lambda: BasicBranch(4, 4, stride=2),
    "a bottleneck residual function": lambda: BottleneckBranch(4, 4, stride=2),
}


@pytest.mark.parametrize("case", STRIDED)
def test_a_strided_branch(case, options):
    """The usual way to change the shape: the message says what a reversible block needs."""
    strided = STRIDED[case]().to(WIDE).eval()
    net, _ = twins([(strided, nn.Identity())], **options)
    parts = [type(strided).__name__, "(2, 4, 3, 3)", "(2, 4, 5, 6)", "must keep the shape", "stride 1"]
    assert_refused(net, ValueError, parts, net, images())


def test_a_branch_of_more_channels(options):
    """The other usual way."""
    net, _ = twins([(nn.Identity(), BasicBranch(4, 6).to(WIDE).eval())], **options)
    parts = ["BasicBranch", "(2, 6, 5, 6)", "(2, 4, 5, 6)", "as many channels out as in"]
    assert_refused(net, ValueError, parts, net, images())


CONSTRUCTIONS = {
    "activations": (ValueError, ["activations is 'drop'", "'reconstruct', 'store' or"], {"activations": "drop"}),
    "coupling": (ValueError, ["coupling is 'fuzzy'", "'float'"], {"coupling": "fuzzy"}),
    "split_dim": (TypeError, ["split_dim is a str", "int"], {"split_dim": "1"}),
    "split_dim of bool": (TypeError, ["split_dim is a bool", "int"], {"split_dim": True}),
    "backend": (rk.BackendError, ["backend is 'gpu'", "must be one of", "eager"], {"backend": "gpu"}),
}


@pytest.mark.parametrize("option", CONSTRUCTIONS)
def test_options(option):
    """An option that does not exist is refused when the module is made, not at its first call."""
    error, parts, options = CONSTRUCTIONS[option]
    assert_raises(error, parts, lambda: ReversibleSequential(**options))
    assert_raises(error, parts, lambda: ReversibleBlock(mlp(), mlp(), **options))


@pytest.mark.parametrize("option", CONSTRUCTIONS)
def test_options_changed_later(option, kind):
    """Options are attributes: a bad one is refused where it is set, and the old one stays."""
    net = trained(kind.twins(2)[0], kind.x())
    error, parts, options = CONSTRUCTIONS[option]
    for module in (net, net[0]):
        before = repr(module)
        for name, value in options.items():
            assert_raises(error, parts, lambda module=module, name=name, value=value: setattr(module, name, value))
        assert repr(module) == before


def test_what_a_chain_is_made_of():
    """Blocks, made of callables."""
    block = ReversibleBlock(mlp(), mlp())
    assert_raises(
        TypeError, ["blocks[1] is a Sequential", "ReversibleBlock"], lambda: ReversibleSequential(block, mlp())
    )
    assert_raises(TypeError, ["blocks[0] is a str"], lambda: ReversibleSequential(["F"]))
    assert_raises(TypeError, ["F is a NoneType", "callable"], lambda: ReversibleBlock(None, mlp()))
    assert_raises(TypeError, ["G is a str", "callable"], lambda: ReversibleBlock(mlp(), "tanh"))


def test_nothing_is_left_of_a_refused_call(options):
    """After any of them the network works."""
    net, _ = twins(pairs_of(mlp, 2), **options)
    y = net(rows())
    for bad in (rows(5, 7), None, torch.ones(5, 8, dtype=torch.int64)):
        with pytest.raises((TypeError, ValueError)):
            net(bad)
    assert net(rows()).shape == y.shape


def test_layouts(options):
    """What has no strides is refused by name."""
    net, _ = twins(pairs_of(mlp, 2), **options)
    x = rows().detach()
    for bad, word in (
        (x.to_sparse(), "tensor of layout torch.sparse_coo"),
        (x.to_sparse_csr(), "tensor of layout torch.sparse_csr"),
        (torch.nested.nested_tensor([x, x[:2]]), "nested tensor"),
    ):
        for given in (bad, (bad, bad)):
            assert_raises(TypeError, [f"x is a {word}; it must be dense (strided)"], lambda given=given: net(given))
