# SPDX-License-Identifier: Apache-2.0
"""``revkernels drift``: the table, the picture and the JSON file; and the paper's figure on real digits."""

import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
from one_thread import one_thread_here  # noqa: E402, F401

from revkernels.cli import main  # noqa: E402


def table(path):
    (found,) = json.loads(path.read_text())["tables"]
    return found


def test_the_built_in_chain(tmp_path, capsys):
    picture, content = tmp_path / "drift.png", tmp_path / "drift.json"
    words = ["drift", "--blocks", "4", "--batch", "2", "--precision", "float32", "--precision", "float64"]
    assert main([*words, "--out", str(picture), "--json", str(content)]) == 0
    shown = capsys.readouterr()
    assert f"picture: {picture}" in shown.out
    assert "4 basic blocks" in shown.out
    assert "float, float32, 4 blocks" in shown.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [row for row in table(content)["rows"] if row["coupling"] == "float"]
    assert [(row["precision"], row["depth"]) for row in rows] == [
        (precision, depth) for precision in ("float32", "float64") for depth in (1, 2, 4)
    ]
    assert all(0 < row["rms_error"] < (1e-5 if row["precision"] == "float32" else 1e-14) for row in rows)


def test_a_network(tmp_path, capsys):
    words = ["drift", "--network", "revnet38", "--batch", "1", "--precision", "float32", "--cut", "first"]
    assert main([*words, "--out", str(tmp_path / "drift.svg"), "--json", str(tmp_path / "drift.json")]) == 0
    assert "the chain's first blocks" in capsys.readouterr().out
    assert {row["chain"] for row in table(tmp_path / "drift.json")["rows"]} == {f"stages.{k}.1" for k in range(3)}


def test_the_figure_of_the_paper_on_digits(tmp_path, capsys):
    pytest.importorskip("sklearn")
    words = ["drift", "--digits", "--epochs", "2", "--out", str(tmp_path / "drift.png")]
    assert main([*words, "--json", str(tmp_path / "drift.json")]) == 0
    rows = table(tmp_path / "drift.json")["rows"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(0 < row["angle_degrees"] < 1 for row in rows)
    assert all(0 < row["rms_error"] < 1e-4 for row in rows)
    assert rows[1]["loss, reconstructed"] < rows[0]["loss, reconstructed"]
    assert rows[0]["loss, reconstructed"] == pytest.approx(rows[0]["loss, stored"], rel=0.2)
    assert (tmp_path / "drift.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--out", "no/such/folder/drift.png"], "the folder no/such/folder does not exist"),
        (["--out", "drift.txt"], "ends in .txt; .png, .svg or .pdf is needed"),
        (["--network", "resnet32"], "invalid choice: 'resnet32'"),
        (["--digits", "--network", "revnet38"], "not allowed with argument"),
        (["--blocks", "0"], "0"),
        (["--network", "revnet38", "--blocks", "3"], "--blocks: not allowed with --network"),
        (["--digits", "--blocks", "3"], "--blocks: not allowed with --digits"),
        (["--digits", "--batch", "3"], "--batch: not allowed with --digits"),
        (["--digits", "--precision", "float32"], "--precision: not allowed with --digits"),
        (["--digits", "--cut", "first"], "--cut: not allowed with --digits"),
        (["--epochs", "3"], "--epochs: it is of --digits alone"),
        (["--digits", "--device", "cuda"], "--device cuda: not allowed with --digits"),
    ],
)
def test_what_it_cannot_serve(words, why, capsys):
    with pytest.raises(SystemExit) as left:
        raise SystemExit(main(["drift", *words]))
    assert left.value.code == 2
    assert why in capsys.readouterr().err


def test_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; from revkernels.cli import main; sys.exit(main(['drift']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "matplotlib, which is not installed: pip install 'revkernels[demo]'" in done.stderr
