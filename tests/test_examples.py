# SPDX-License-Identifier: Apache-2.0
"""Examples that need torch alone are run as a reader would run them, on little data, and give what they promise."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--side", "16", "--channels", "8", "16", "--volumes", "6", "--epochs", "2"]


@pytest.fixture(scope="module")
def unet3d():
    spec = importlib.util.spec_from_file_location("unet3d", EXAMPLES / "unet3d.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_partially_reversible_unet_for_volumes(unet3d, capsys):
    """The same losses in every way; memory that does not grow with depth, and a budget that is kept to."""
    shallow, deep = (unet3d.main([*SMALL, "--blocks", blocks]) for blocks in ("2", "8"))
    losses = {name: found[0] for name, found in deep.items()}
    for name, found in losses.items():
        assert found == pytest.approx(losses["stored"], rel=1e-3), name
    peaks = {name: found[2] for name, found in deep.items()}
    saved = deep["stored"][2] - deep["reconstructed"][2]
    assert saved > 2 * (shallow["stored"][2] - shallow["reconstructed"][2])
    assert peaks["reconstructed"] < 1.1 * shallow["reconstructed"][2]
    assert peaks["and what lies between"] < peaks["reconstructed"]
    quarter = peaks["reconstructed"] + 0.25 * saved
    assert peaks["reconstructed"] < peaks["budget of 25%"] <= 1.02 * quarter
    assert "budget of 25%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--side", "18"], "--side 18 cannot be halved 2 times"), (["--volumes", "2", "--epochs", "1"], "fewer than 5")],
)
def test_what_the_unet_cannot_do_is_said(options, said, unet3d, capsys):
    with pytest.raises(SystemExit):
        unet3d.main(options)
    assert said in capsys.readouterr().err
