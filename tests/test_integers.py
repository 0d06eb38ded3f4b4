# SPDX-License-Identifier: Apache-2.0
"""Integers of NumPy and torch where an int is asked for; no bools, floats or arrays of several."""

import numpy as np
import pytest

import revkernels as rk
from revkernels import native
from revkernels.integers import as_int

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from revkernels.diagnostics import DriftMonitor, drift  # noqa: E402
from revkernels.models import resnet32, revnet38  # noqa: E402
from revkernels.models.revvit import RevViT  # noqa: E402
from revkernels.nn import ReversibleBlock, ReversibleSequential  # noqa: E402

NUMBERS = [np.int64(4), np.uint8(4), np.array(4), torch.tensor(4)]
OTHERS = [True, np.bool_(True), torch.tensor(True), np.float64(4), torch.tensor(4.0), np.array([4, 4]), "4", None]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_integers_are_ints(number):
    assert type(as_int(number)) is int and as_int(number) == 4


@pytest.mark.parametrize("other", OTHERS, ids=repr)
def test_all_else_is_left_to_the_checks(other):
    assert as_int(other) is other


def chain():
    return ReversibleSequential(*[ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(4)])


CALLS = {
    "Exact": lambda n: rk.Exact(k=n).k,
    "MemoryBudget": lambda n: rk.MemoryBudget(n).bytes,
    "drift": lambda n: drift(chain(), torch.randn(2, 8), depths=[n], precisions=["float32"]).rows[0].depth,
    "DriftMonitor": lambda n: DriftMonitor(chain(), every=n, angle_every=n).every,
    "revnet38": lambda n: revnet38(num_classes=n, in_channels=n).head[-1].out_features,
    "resnet32": lambda n: resnet32(num_classes=n, in_channels=n).head[-1].out_features,
    "RevViT": lambda n: RevViT(n * 2, n, n, n, image_size=n, patch_size=n, mlp_ratio=n).head.out_features,
}


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
@pytest.mark.parametrize("call", CALLS)
def test_they_are_taken(call, number):
    found = CALLS[call](number)
    assert type(found) is int and found == 4


@pytest.mark.parametrize("call", [name for name in CALLS if name != "RevViT"])
def test_a_bool_is_refused(call):
    with pytest.raises((TypeError, ValueError), match=r"bool|whole number"):
        CALLS[call](np.bool_(True))


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_threads(number):
    if native.missing() is not None:
        pytest.skip(str(native.missing()))
    before = rk.get_num_threads()
    try:
        rk.set_num_threads(number)
        assert rk.get_num_threads() == 4
    finally:
        rk.set_num_threads(before)


def test_depths_are_any_iterable():
    """An array has no truth value, and a generator is there once."""
    for depths in (np.array([1, 2]), (n for n in (1, 2))):
        found = drift(chain(), torch.randn(2, 8), depths=depths, precisions=["float32"], couplings=["float"])
        assert [row.depth for row in found.rows] == [1, 2]
