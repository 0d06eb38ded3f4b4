# SPDX-License-Identifier: Apache-2.0
"""The demo: its data, its loop, its meters, and the whole command."""

import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from revkernels.cli import demo, digits, main, plots, training  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def data():
    return digits.load()


def test_digits_are_split_in_proportion_and_share_no_image(data):
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    whole = torch.cat((data.train_classes, data.test_classes)).bincount()
    assert ((data.test_classes.bincount() - whole * 360 / 1797).abs() < 1).all()
    together = torch.cat((data.train_images, data.test_images)).flatten(1)
    assert len(together.unique(dim=0)) == 1797
    assert data.train_images.mean(0).abs().max() < 1e-6


def test_digits_are_the_same_every_time(data):
    again = digits.load()
    assert torch.equal(again.test_images, data.test_images)
    assert torch.equal(again.train_classes, data.train_classes)


def test_shifted_moves_each_image_by_at_most_one_pixel():
    images = torch.arange(1.0, 2 * 5 * 4 + 1).view(2, 1, 5, 4).repeat(20, 1, 1, 1)
    moved = training.shifted(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.is_contiguous()
    seen = set()
    for image, result in zip(images[:, 0], moved[:, 0], strict=True):
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        shifts = {(r, c) for r in range(3) for c in range(3) if torch.equal(padded[r : r + 5, c : c + 4], result)}
        assert len(shifts) == 1
        seen |= shifts
    assert len(seen) == 9


def test_learning_rate_rises_then_falls_to_zero():
    rates = [training.rate(i / 100) for i in range(101)]
    top = rates.index(max(rates))
    assert (rates[0], rates[top]) == (0, 1) and rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_three_modes_take_the_same_steps_in_float64(data):
    """One epoch on 200 digits: equal losses, to rounding."""
    part = digits.Digits(
        data.train_images[:200].double(),
        data.train_classes[:200],
        data.test_images[:50].double(),
        data.test_classes[:50],
    )
    losses = []
    for mode in demo.MODES:
        torch.manual_seed(3)
        losses.append(training.train(demo.build(mode).double(), part, 1, seed=3)[0].loss)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-11)


def test_step_costs_are_the_theorys(data):
    torch.manual_seed(0)
    costs = demo._step_costs(demo.build("store").state_dict(), data, timed_steps=1)
    store, eager, fused = costs.values()
    assert (store["chain_multiply_adds_n"], eager["chain_multiply_adds_n"], fused["chain_multiply_adds_n"]) == (3, 4, 4)
    # RevNet-38 has six reversible blocks, of two branches each.
    assert (store["branch_calls"], eager["branch_calls"], fused["branch_calls"]) == (12, 24, 24)
    assert store["multiply_adds"] < eager["multiply_adds"] == fused["multiply_adds"]
    assert fused["peak_bytes"] < 0.7 * store["peak_bytes"]
    assert store["angle_degrees"] == 0 and eager["angle_degrees"] < 0.01 and fused["angle_degrees"] < 0.01


def test_chain_memory_is_flat_and_bfloat16_angles_grow():
    shallow, deep = (demo._chain_costs(depth, seed=0, draws=1) for depth in (4, 16))
    growth = {mode: deep["bytes"][mode] - shallow["bytes"][mode] for mode in demo.MODES}
    assert growth["reconstruct, eager"] == 0
    # 24 branches more of two norms, each with 16 means and rstds in float32
    assert 0 <= growth["reconstruct, fused"] <= 24 * 2 * 2 * 16 * 4
    assert deep["bytes"]["store"] > 3.5 * shallow["bytes"]["store"]
    for row in (shallow, deep):
        assert 0 < row["degrees"]["float32"] < 0.1 < row["degrees"]["bfloat16"]


def test_picture(tmp_path):
    curves = {mode: [training.Epoch(1.0, 0.5), training.Epoch(0.1, 0.98)] for mode in demo.MODES}
    rows = [
        {"blocks": n, "bytes": dict.fromkeys(demo.MODES, n << 20), "degrees": dict.fromkeys(demo.DTYPES, n / 10)}
        for n in (6, 12)
    ]
    plots.demo(tmp_path / "picture.png", curves, rows)
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "'0'; it must be a whole number, at least 1"),
        (["--epochs", "many"], "'many'; it must be a whole number, at least 1"),
        (["--out", __file__], "is a file; a folder is needed"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
    ],
)
def test_bad_arguments(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def run_demo(folder, *words):
    command = [sys.executable, "-m", "revkernels", "demo", "--out", "pictures", "--json", "demo.json", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "pictures" / "demo.png").read_bytes().startswith(PNG)
    content = json.loads((folder / "demo.json").read_text())
    assert content["environment"]["torch"]
    summary, by_depth = content["tables"]
    assert summary["title"] in done.stdout and by_depth["title"] in done.stdout
    return summary["rows"], by_depth["rows"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quick_demo(tmp_path):
    rows, by_depth = run_demo(tmp_path, "--quick")
    assert [row["mode"] for row in rows] == list(demo.MODES)
    assert all(row["accuracy_percent"] >= 85 for row in rows)
    assert [row["blocks"] for row in by_depth] == list(demo.DEPTHS)
    flat = [row["mib, reconstruct, fused"] for row in by_depth]
    assert max(flat) < 1.1 * min(flat)
    assert by_depth[-1]["mib, store"] > 30 * flat[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_reaches_97_percent(tmp_path):
    rows, _ = run_demo(tmp_path)
    assert all(row["accuracy_percent"] >= 97 for row in rows)
