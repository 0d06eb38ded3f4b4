# SPDX-License-Identifier: Apache-2.0
"""What ``import revkernels as rk`` gives: what NumPy suffices for at once, the rest when it is used."""

import subprocess
import sys

import pytest

import revkernels as rk

CODE = """
import sys
import revkernels as rk
assert "torch" not in sys.modules
assert {"nn", "models", "diagnostics", "adapters", "ops", "Norm"} <= set(dir(rk)), dir(rk)
rk.adapters
assert "torch" not in sys.modules
rk.nn.ReversibleSequential
"""


def test_the_rest_is_imported_when_it_is_used():
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_name_is_none():
    with pytest.raises(AttributeError, match="module 'revkernels' has no attribute 'network'"):
        _ = rk.network


STRICT = """
import torch
from torch import nn
from revkernels.nn import ReversibleBlock, ReversibleSequential

def branch():
    return nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout(0.1))

for options in ({}, {"coupling": "exact"}, {"activations": "store"}):
    net = ReversibleSequential([ReversibleBlock(branch(), branch()) for _ in range(2)], **options)
    for _ in range(2):
        net(torch.randn(6, 8)).square().mean().backward()
"""


@pytest.mark.parametrize("flags", [["-bb", "-X", "dev", "-W", "error"], ["-OO"]])
def test_a_training_step_in_a_strict_interpreter(flags):
    """No warning, from comparing bytes with other things either; and nothing hangs on assertions or docstrings."""
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, *flags, "-c", STRICT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
