# SPDX-License-Identifier: Apache-2.0
"""Chains with an exact coupling, twice: one that rebuilds, one that stores; and what it means that they are alike."""

import copy

from torch import nn

import revkernels as rk
from behaviour.common import torch
from revkernels.nn import AttentionBranch, MLPBranch, ReversibleBlock, ReversibleSequential
from revkernels.nn.conv_branches import BasicBranch


class Cast(nn.Module):
    """A branch that computes in a half type, whatever autocast says."""

    def __init__(self, dtype, width=8):
        super().__init__()
        self.layer, self.dtype = nn.Linear(width, width), dtype

    def forward(self, x):
        return torch.tanh(nn.functional.linear(x.to(self.dtype), self.layer.weight.to(self.dtype)))


class Unfused(nn.Module):
    """Batch norm with its own forward, which the chain cannot take apart: its statistics are computed twice."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.conv, self.drop = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(self.conv(torch.relu(self.norm(x))))


def conv():
    return nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.1))


KINDS = {
    "conv, batch norm, dropout": (conv, (2, 16, 5, 6), 1),
    "basic": (lambda: BasicBranch(8, 8), (2, 16, 5, 6), 1),
    "unfused batch norm": (Unfused, (2, 16, 5, 6), 1),
    "layer norm, GELU, dropout": (lambda: MLPBranch(8, 16, 0.1), (2, 5, 16), -1),
    "attention, dropout": (lambda: AttentionBranch(8, 2, 0.1), (2, 5, 16), -1),
    "bfloat16 inside": (lambda: Cast(torch.bfloat16), (5, 16), 1),
    "float16 inside": (lambda: Cast(torch.float16), (5, 16), 1),
}


def linear():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


NARROW = (torch.float32, torch.float32, torch.bfloat16)  # torch refuses float16 norms behind bfloat16 layers

#: Streams of both kinds.
STORED = {"float32": "exact", "int16": rk.Exact(storage="int16")}


def pair_of(make, depth, split_dim=1, coupling="exact", backend=None):
    """The same network rebuilding and storing."""
    torch.manual_seed(depth)
    blocks = [ReversibleBlock(make(), make()) for _ in range(depth)]
    net = ReversibleSequential(blocks, split_dim=split_dim, coupling=coupling, backend=backend)
    stored = copy.deepcopy(net)
    stored.activations = "store"
    return net, stored


def assert_same_bits(got, expected):
    """The same values everywhere, and NaN at the same places."""
    got, expected = flat(vars(got)), flat(vars(expected))
    assert got.keys() == expected.keys()
    for name, a in got.items():
        b = expected[name]
        if a is None or b is None:
            assert a is b, name
        else:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            same = (a == b) | ((a != a) & (b != b))
            assert same.all(), f"{name}: {(~same).sum()} of {a.numel()} elements differ"


def flat(value, name=""):
    """The tensors (and Nones) in nested dicts and lists, by their paths."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}.{key}").items()}
    return {name: value}
