# SPDX-License-Identifier: Apache-2.0
"""Draws inside the capture of a CUDA graph, refused: the guard itself, which needs no GPU."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from revkernels import ReconstructionError  # noqa: E402
from revkernels.autograd.state import rng_and_autocast  # noqa: E402
from revkernels.nn import ReversibleBlock, ReversibleSequential  # noqa: E402

DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "channel dropout": lambda x: F.dropout2d(x, 0.5),
    "attention dropout": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    "noise": torch.rand_like,
    "in place": lambda x: torch.empty_like(x).bernoulli_(),
    "permutation": lambda x: torch.randperm(4),
    "rrelu": lambda x: F.rrelu(x, training=True),
}
QUIET = {
    "no dropout": lambda x: F.dropout(x, 0.0),
    "dropout in eval mode": lambda x: F.dropout(x, 0.5, training=False),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "rrelu in eval mode": lambda x: F.rrelu(x, training=False),
    "norm": lambda x: F.batch_norm(x, None, None, training=True),
}


@pytest.fixture
def x():
    return torch.randn(2, 2, 4, 8, requires_grad=True)


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_refused(name, x):
    with pytest.raises(ReconstructionError, match="draws random numbers"), rng_and_autocast.RefusesToDraw("so on"):
        DRAWS[name](x)


@pytest.mark.parametrize("name", QUIET)
def test_what_does_not_draw_is_left_alone(name, x):
    with rng_and_autocast.RefusesToDraw("so on"):
        got = QUIET[name](x)
    assert torch.equal(got, QUIET[name](x))


def test_a_chain_refuses_the_branch_that_draws(monkeypatch):
    """As in a capture: the guard is there, and the exception comes from the forward, out of the branch."""
    init = rng_and_autocast.Surroundings.__init__

    def capturing(self, *args):
        init(self, *args)
        self.guard = rng_and_autocast.RefusesToDraw("so on")

    monkeypatch.setattr(rng_and_autocast.Surroundings, "__init__", capturing)
    net = ReversibleSequential(ReversibleBlock(torch.nn.Tanh(), torch.nn.Dropout(0.5)))
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(ReconstructionError, match="draws random numbers"):
        net(x)
    net.eval()(x).sum().backward()
    assert x.grad is not None
