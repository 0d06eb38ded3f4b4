# SPDX-License-Identifier: Apache-2.0
"""Branches and chains that the diagnostics are tried on."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from revkernels.models import BasicBranch  # noqa: E402
from revkernels.nn import ReversibleBlock, ReversibleSequential  # noqa: E402


def mlp(size, hidden=None):
    return nn.Sequential(
        nn.LayerNorm(size), nn.Linear(size, hidden or size), nn.ReLU(), nn.Linear(hidden or size, size)
    )


def images(blocks, **options):
    made = (ReversibleBlock(BasicBranch(8, 8), BasicBranch(8, 8)) for _ in range(blocks))
    return ReversibleSequential(*made, **options)
