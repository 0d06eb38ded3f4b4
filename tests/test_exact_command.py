# SPDX-License-Identifier: Apache-2.0
"""``revkernels exact``: its tables, its picture, what it compares, and what it refuses."""

import json
import math
import statistics

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from one_thread import one_thread_here  # noqa: E402, F401

from revkernels.cli import demo, digits, exact, main, plots, training  # noqa: E402
from revkernels.cli.exact import MODES, Trained  # noqa: E402
from revkernels.diagnostics import DriftRow  # noqa: E402
from revkernels.nn import ReversibleSequential  # noqa: E402


@pytest.fixture(scope="module")
def data():
    """A few digits."""
    whole = digits.load()
    return digits.Digits(
        whole.train_images[:200], whole.train_classes[:200], whole.test_images[:100], whole.test_classes[:100]
    )


@pytest.fixture
def few(data, monkeypatch):
    monkeypatch.setattr(digits, "load", lambda: data)


def test_the_command(tmp_path, few, capsys):
    words = ["exact", "--epochs", "2", "--seeds", "2", "--blocks", "3", "--threads", "1", "--int16"]
    assert main([*words, "--out", str(tmp_path / "x.png"), "--json", str(tmp_path / "x.json")]) == 0
    shown = capsys.readouterr()
    assert f"picture: {tmp_path / 'x.png'}" in shown.out
    # 2 couplings, 2 precisions, 3 depths; 4 modes, 2 seeds, 2 epochs
    begun = [line for line in shown.err.splitlines() if line.startswith("exact ")]
    assert len(begun) == 12 + 16 and all(f"/{12 + 16}: " in line for line in begun)
    assert "exact, seed 1, epoch 2 of 2" in begun[-5] + begun[-3]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    drift, summary, by_seed = json.loads((tmp_path / "x.json").read_text())["tables"]
    assert "3 basic blocks" in drift["title"]
    for row in drift["rows"]:
        assert (row["rms_error"] == 0) == (row["coupling"] == "exact")
        assert row["problem"] is None
    assert [row["coupling"] for row in summary["rows"]] == [*MODES, "exact, int16"]
    for row in summary["rows"]:
        name = row["coupling"]
        own = [one[f"accuracy_percent, {name}"] for one in by_seed["rows"]]
        plain = [one["accuracy_percent, float"] for one in by_seed["rows"]]
        assert row["accuracy_percent"] == pytest.approx(statistics.mean(own))
        assert row["accuracy_spread"] == pytest.approx(statistics.stdev(own))
        if name != "float":
            assert row["difference_points"] == pytest.approx(statistics.mean(own) - statistics.mean(plain))
        assert all(len(one[f"losses, {name}"]) == 2 for one in by_seed["rows"])
        assert (row["k"] is None) == (not name.startswith("exact"))
    angles = [row["angle_degrees"] for row in summary["rows"]]
    assert angles[0] == 0 and 0 < angles[1] < angles[2] < angles[3]  # float, a grid of 24 bits, one of 15


def test_one_seed_has_no_spread(tmp_path, few):
    words = ["exact", "--epochs", "1", "--seeds", "1", "--blocks", "1"]
    assert main([*words, "--out", str(tmp_path / "x.png"), "--json", str(tmp_path / "x.json")]) == 0
    _, summary, by_seed = json.loads((tmp_path / "x.json").read_text())["tables"]
    assert all(row["accuracy_spread"] is row["loss_spread"] is None for row in summary["rows"])
    assert summary["title"].endswith("1 epochs, 1 seed") and len(by_seed["rows"]) == 1


def test_all_start_alike_and_only_the_exact_one_has_a_grid(data, monkeypatch):
    starts = {}

    def train(model, data, epochs, seed, on_epoch):
        starts[name] = [p.detach().clone() for p in model.parameters()], model
        model.train()
        model(data.train_images[: training.BATCH])
        return [training.Epoch(1.0, 0.5)]

    monkeypatch.setattr(training, "train", train)
    for name, options in MODES.items():
        exact._trained(name, options, data, 1, 5, lambda word: None)
    first, *others = (weights for weights, _ in starts.values())
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    chains = {
        name: [part for part in model.modules() if isinstance(part, ReversibleSequential)]
        for name, (_, model) in starts.items()
    }
    kinds = {name: {(chain.activations, chain.coupling) for chain in own} for name, own in chains.items()}
    assert kinds == {
        "float, stored": {("store", "float")},
        "float": {("reconstruct", "float")},
        "exact": {("reconstruct", "exact")},
    }


def test_the_angle_is_to_the_stored_gradient_of_the_same_weights(data, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *given: [training.Epoch(1.0, 0.5)])
    stored = exact._trained("float, stored", MODES["float, stored"], data, 1, 0, lambda word: None)
    assert stored.degrees == 0 and list(stored.k) == []
    model = demo.build("reconstruct, fused", coupling="exact")
    exact._gradients(model, data)  # chooses the grid
    monkeypatch.setattr(demo, "trained", lambda *given: (model, [training.Epoch(1.0, 0.5)]))
    found = exact._trained("exact", {"coupling": "exact"}, data, 1, 0, lambda word: None)
    assert 0 < found.degrees < 20
    assert len(found.k) == 3 and all(isinstance(k, int) for k in found.k)
    gradients = exact._gradients(model, data)
    reference = demo.build("reconstruct, fused", activations="store")
    reference.load_state_dict(model.state_dict())
    assert exact.angle(gradients, exact._gradients(reference, data)) == pytest.approx(found.degrees, rel=0.5)


def test_the_picture_shows_zeros_and_both_trainings(tmp_path, monkeypatch):
    rows = [
        DriftRow("", coupling, precision, depth, error, error, 0.0)
        for coupling, size in (("float", 1e-7), ("exact", 0.0))
        for precision in exact.PRECISIONS
        for depth, error in ((1, size), (2, 3 * size))
    ]
    curve = [training.Epoch(2.0, 0.2), training.Epoch(0.5, 0.9)]
    trained = {name: [Trained(seed, curve, 0.0, []) for seed in range(2)] for name in MODES}
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, path: drawn.append(figure))
    plots.exact(tmp_path / "x.png", rows, trained)
    errors, losses = drawn[0].axes
    assert [list(line.get_ydata()) for line in errors.get_lines()] == [[1e-7, 3e-7]] * 2 + [[0, 0]] * 2
    bottom, top = errors.get_ylim()
    assert bottom < 0 and top > 3e-7 and errors.get_yscale() == "symlog"
    assert [line.get_label() for line in losses.get_lines()] == [
        f"{name}: 90.0 ± 0.0 % test accuracy" for name in MODES
    ]
    assert all(list(line.get_ydata()) == [2.0, 0.5] for line in losses.get_lines())


def test_the_picture_of_one_seed_and_of_no_drift_at_all(tmp_path):
    rows = [DriftRow("", "exact", "float32", depth, 0.0, 0.0, 0.0) for depth in (1, 2)]
    trained = {"exact": [Trained(0, [training.Epoch(1.0, 0.5)], math.nan, [13])]}
    plots.exact(tmp_path / "x.png", rows, trained)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "at least 1"),
        (["--seeds", "none"], "at least 1"),
        (["--out", "x.svg"], "the name must end in .png"),
        (["--out", "no/such/folder/x.png"], "does not exist"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
    ],
)
def test_bad_arguments(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["exact", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
