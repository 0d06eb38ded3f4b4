# SPDX-License-Identifier: Apache-2.0
"""Bad input to the modules: an error that names the argument, what it got and what it needs, before anything runs."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import WIDE, assert_raises, images, mlp, pairs_of, rows, torch, twins
from revkernels.nn import ReversibleBlock, ReversibleSequential

INPUTS = {
    "an odd number of channels": (ValueError, ["x has shape (5, 7)", "is 7", "even"], lambda: rows(5, 7)),
    "no such dimension": (ValueError, ["x has shape (8,)", "split_dim=1"], lambda: rows(8)),
    "integers": (TypeError, ["x is torch.int64", "floating point"], lambda: torch.ones(5, 8, dtype=torch.int64)),
    "complex": (TypeError, ["x is torch.complex64", "float32"], lambda: torch.ones(5, 8, dtype=torch.complex64)),
    "an array": (TypeError, ["x is a ndarray", "tensor"], lambda: rows().detach().numpy()),
    "None": (TypeError, ["x is a NoneType", "(x1, x2)"], lambda: None),
    "one half": (TypeError, ["x is a tuple of 1"], lambda: (rows(5, 4),)),
    "three tensors": (TypeError, ["x is a tuple of 3"], lambda: (rows(5, 4),) * 3),
    "half a pair": (TypeError, ["x is a tuple of 2 (Tensor, NoneType)"], lambda: (rows(5, 4), None)),
    "unequal halves": (ValueError, ["x1 has shape (5, 4)", "x2 has (4, 4)"], lambda: (rows(5, 4), rows(4, 4))),
    "halves of two dtypes": (
        *(ValueError, ["x1 has dtype torch.float64", "x2 has torch.float32"]),
        lambda: (rows(5, 4), rows(5, 4, dtype=torch.float32)),
    ),
    "halves on two devices": (
        *(ValueError, ["x1 has device cpu", "x2 has meta"]),
        lambda: (rows(5, 4), torch.ones(5, 4, dtype=WIDE, device="meta")),
    ),
}


class Never(nn.Module):
    def forward(self, x):
        raise AssertionError("the branch was run")


@pytest.mark.parametrize("case", INPUTS)
def test_input(case, options):
    """A chain, a block, and their inverses, which say y; no branch runs."""
    error, parts, make = INPUTS[case]
    net, _ = twins([(Never(), Never())], **options)
    block = ReversibleBlock(Never(), Never(), **options)
    for module in (net, block):
        assert_raises(error, parts, lambda m=module: m(make()))
        of_y = [f"y{part[1:]}" if part.startswith("x") else part.replace("x2 has", "y2 has") for part in parts]
        of_y = [part.replace("(x1, x2)", "(y1, y2)") for part in of_y]
        assert_raises(error, of_y, lambda m=module: m.inverse(make()))


class Returns(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result(x)


BRANCHES = {
    "another shape": (ValueError, ["Returns", "shape (5, 1)", "(5, 4)", "keep the shape"], lambda x: x[:, :1]),
    "a shape that would broadcast": (ValueError, ["shape (4,)", "(5, 4)"], lambda x: x[0]),
    "integers": (TypeError, ["Returns", "torch.int64", "floating-point"], lambda x: x.long()),
    "None": (TypeError, ["Returns", "NoneType", "must return a tensor"], lambda x: None),
    "a list": (TypeError, ["Returns", "list"], lambda x: [x]),
    "a tuple of 3": (TypeError, ["tuple of 3", "(f, aux)"], lambda x: (x, x, x)),
    "a tuple of 1": (TypeError, ["tuple of 1", "(f, aux)"], lambda x: (x,)),
    "another device": (ValueError, ["Returns", "on meta", "on cpu"], lambda x: x.to("meta")),
}


@pytest.mark.parametrize("case", BRANCHES)
@pytest.mark.parametrize("place", [0, 1])
def test_what_a_branch_returns(case, place, options):
    """Found in the call, in F and in G, forwards and backwards, with gradients and without."""
    error, parts, result = BRANCHES[case]
    pair = [mlp(), mlp()]
    pair[place] = Returns(result)
    net, _ = twins([tuple(pair)], **options)
    assert_raises(error, parts, lambda: net(rows()))
    assert_raises(error, parts, lambda: net.inverse(rows()))
    with torch.no_grad():
        assert_raises(error, parts, lambda: net(rows()))


def test_a_strided_convolution(options):
    """The usual way to change the shape: the message says what a reversible block needs."""
    net, _ = twins([(nn.Conv2d(4, 4, 3, stride=2, padding=1).to(WIDE), nn.Identity())], **options)
    assert_raises(ValueError, ["Conv2d", "(2, 4, 3, 3)", "(2, 4, 5, 6)", "stride 1"], lambda: net(images()))


CONSTRUCTIONS = {
    "activations": (ValueError, ["activations is 'drop'", "'reconstruct' or 'store'"], {"activations": "drop"}),
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
