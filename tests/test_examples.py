# SPDX-License-Identifier: Apache-2.0
"""Examples that need torch alone are run as a reader would run them, on little data, and give what they promise."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--side", "16", "--channels", "8", "16", "--volumes", "6", "--epochs", "2"]
SHORT = ["--steps", "8", "--width", "32", "--heads", "2", "--context", "64", "--batch", "4"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def unet3d():
    return load("unet3d")


@pytest.fixture(scope="module")
def language_model():
    return load("language_model")


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


@pytest.mark.parametrize("precision", [[], ["--autocast"]], ids=["float32", "autocast"])
def test_a_language_model_on_real_text(precision, language_model, capsys):
    """It learns, the same in every way though dropout is on, in memory that does not grow with depth."""
    shallow, deep = (language_model.main([*SHORT, *precision, "--blocks", blocks]) for blocks in ("2", "6"))
    stored, reconstructed = deep["stored"], deep["reconstructed"]
    assert stored.losses[-1] < stored.losses[0] - 0.5
    for name, found in deep.items():
        assert found.losses == pytest.approx(stored.losses, rel=2e-2 if precision else 2e-3), name
        assert found.unseen == pytest.approx(stored.unseen, rel=2e-2 if precision else 2e-3), name
    assert stored.peak > 2 * shallow["stored"].peak
    assert reconstructed.peak < 1.1 * shallow["reconstructed"].peak
    assert "reconstructed, exact" in capsys.readouterr().out


def test_a_language_model_on_files_of_ones_own(language_model, tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_bytes(b"the cat sat on the mat. " * 200)
    options = [*SHORT, "--blocks", "1", "--ways", "reconstructed", "--sample", "12"]
    language_model.main([*options, "--text", str(book)])
    assert "def " in capsys.readouterr().out
    book.write_bytes(b"too short")
    with pytest.raises(SystemExit):
        language_model.main([*options, "--text", str(book)])
    assert "give more" in capsys.readouterr().err
