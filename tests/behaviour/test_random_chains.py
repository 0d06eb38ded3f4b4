# SPDX-License-Identifier: Apache-2.0
"""Random chains against plain PyTorch: whatever was not thought of."""

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from behaviour.common import WIDE, assert_same, check_step, step, torch, twins

HALF = 4
KINDS = ["conv", "batch norm", "group norm", "dropout", "in place", "gate", "masked", "auxiliary", "none"]


class Branch(nn.Module):
    """A small residual function of the given kind on [N, 4, H, W]."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(HALF, HALF, 3, padding=1, bias=kind not in ("batch norm", "group norm"))
        norms = {"batch norm": nn.BatchNorm2d(HALF), "group norm": nn.GroupNorm(2, HALF)}
        self.norm = norms.get(kind, nn.Identity())
        self.drop = nn.Dropout(0.3 if kind == "dropout" else 0.0)
        self.to(WIDE)

    def forward(self, x, mask=None):
        f = self.drop(torch.tanh(self.norm(self.conv(x))))
        if self.kind == "in place":
            f = f.mul(2).relu_()
        if self.kind == "gate":
            f = f * torch.sigmoid(x)
        if self.kind == "masked" and mask is not None:
            f = f * mask
        return (f, f.square().mean()) if self.kind == "auxiliary" else f


@dataclass
class Chain:
    kinds: list
    shared: bool
    frozen: list
    batch: int
    size: tuple
    channels_last: bool
    strided: bool
    pair: bool
    requires_grad: bool
    masked: bool
    mask_requires_grad: bool
    training: bool
    dtype: torch.dtype
    backend: str
    activations: str
    number: int


chains = st.builds(
    Chain,
    kinds=st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)), min_size=1, max_size=5),
    shared=st.booleans(),
    frozen=st.lists(st.integers(0, 9), max_size=4),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    channels_last=st.booleans(),
    strided=st.booleans(),
    pair=st.booleans(),
    requires_grad=st.booleans(),
    masked=st.booleans(),
    mask_requires_grad=st.booleans(),
    training=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    backend=st.sampled_from(["cpu", "cpu", "eager"]),
    activations=st.sampled_from(["reconstruct", "reconstruct", "store"]),
    number=st.integers(0, 10**6),
)


def stream(chain, channels):
    h, w = chain.size
    x = torch.randn(chain.batch, channels, h, w * (2 if chain.strided else 1))
    x = (x[..., ::2] if chain.strided else x).to(chain.dtype)
    if chain.channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x.requires_grad_(chain.requires_grad)


def check(chain):
    torch.manual_seed(chain.number)
    pairs = [(Branch(f), Branch(g)) for f, g in chain.kinds]
    if chain.shared:
        pairs[-1] = pairs[0]
    for index in chain.frozen:
        pairs[index // 2 % len(pairs)][index % 2].requires_grad_(False)
    net, plain = twins(pairs, backend=chain.backend, activations=chain.activations)
    for network in (net, plain):
        network.train(chain.training).to(chain.dtype)
    x = (stream(chain, HALF), stream(chain, HALF)) if chain.pair else stream(chain, 2 * HALF)
    kwargs, sides = {}, []
    if chain.masked:
        kwargs["mask"] = torch.rand(HALF, 1, 1).to(chain.dtype).requires_grad_(chain.mask_requires_grad)
        sides.append(kwargs["mask"])
    if chain.dtype == WIDE:
        # A norm over few values amplifies roundings; what a wrong gradient is off by is larger by many orders.
        check_step(net, plain, x, steps=2, sides=sides, tolerance=1e-8, **kwargs)
    else:
        # Single precision drifts: what is compared to the bit is the part that does not depend on it.
        got, expected = (step(network, x, sides=sides, **kwargs) for network in (net, plain))
        assert_same(got, expected, tolerance=2e-2)


QUIET = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.usefixtures("compiled")
@seed(20261)
@settings(max_examples=60, **QUIET)
@given(chains)
def test_random_chains(chain):
    """60 chains, always the same ones."""
    check(chain)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@settings(max_examples=1500, **QUIET)
@given(chains)
def test_many_random_chains(chain):
    """Others every time."""
    check(chain)
