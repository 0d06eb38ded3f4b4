# SPDX-License-Identifier: Apache-2.0
"""Couplings in MemCNN's wrappers, one round each and one round all; and what they compute, in plain torch."""

from behaviour.common import WIDE, torch
from torch import nn

from compat.common import couple, uncouple
from revkernels.compat import memcnn


def couplings(make, depth, **options):
    return [memcnn.AdditiveCoupling(make(), make(), **options) for _ in range(depth)]


def stack(make, depth, **options):
    """A wrapper for each coupling: what MemCNN's users write."""
    return nn.Sequential(*[memcnn.InvertibleModuleWrapper(coupling, **options) for coupling in couplings(make, depth)])


def one(make, depth, **options):
    """A wrapper for all."""
    return memcnn.InvertibleModuleWrapper(nn.Sequential(*couplings(make, depth)), **options)


def nested(make, depth):
    inner = memcnn.InvertibleModuleWrapper(nn.Sequential(*couplings(make, depth - 1)))
    return memcnn.InvertibleModuleWrapper(nn.Sequential(inner, *couplings(make, 1)))


def couplings_in(network, kind=memcnn.AdditiveCoupling):
    return [module for module in network.modules() if isinstance(module, kind)]


def in_plain_torch(network, x, kind=memcnn.AdditiveCoupling):
    for coupling in couplings_in(network, kind):
        x = couple((coupling.Fm, coupling.Gm), x, coupling.split_dim)
    return x


def inverse_in_plain_torch(network, y):
    for coupling in reversed(couplings_in(network)):
        y = uncouple((coupling.Fm, coupling.Gm), y, coupling.split_dim)
    return y


class Inverted(nn.Module):
    """Runs the other way round."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, y):
        return self.network.inverse(y)


class Scaling(nn.Module):
    """Invertible, and no coupling."""

    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), factor, dtype=WIDE))

    def forward(self, x):
        return (x * self.factor,)

    def inverse(self, y):
        return (y / self.factor,)
