# SPDX-License-Identifier: Apache-2.0
"""``bench budget`` on a tiny network: shares of the gaps, plans beside them, the command and its picture."""

import json

import pytest

torch = pytest.importorskip("torch")
from one_thread import one_thread_here  # noqa: E402, F401

from revkernels import cli  # noqa: E402
from revkernels.bench import budget, networks  # noqa: E402
from revkernels.bench.budget import RECONSTRUCT, STORE, Sweep  # noqa: E402
from revkernels.bench.contenders import Contender  # noqa: E402
from revkernels.bench.networks import Network  # noqa: E402
from revkernels.models import Plan, RevNet  # noqa: E402

TINY = Network("tiny", 4, 16, lambda classes, **o: RevNet(Plan("basic", (5, 3), (16, 32), stem_width=16), classes, **o))


SECONDS = {RECONSTRUCT: 4.0, "budget 0%": 4.0, "budget 50%": 2.5, "budget 100%": 2.0, STORE: 2.0}


class Clock:
    """Runs everything; who is called decides what it is said to have taken."""

    def __init__(self, seconds=None):
        self.seconds = SECONDS if seconds is None else seconds

    def time(self, function, operands):
        (contender,) = function.__defaults__
        for one in operands:
            function(*one)
        return self.seconds[contender.way.name]


def sweep(**options):
    return Sweep("tiny", TINY, 4, **{"rounds": 3, "shares": (0.0, 0.5, 1.0)} | options)


def test_rows():
    rows = list(budget.run(sweep(), Clock()))
    assert [row["variant"] for row in rows] == [RECONSTRUCT, "budget 0%", "budget 50%", "budget 100%", STORE]
    assert [row["share"] for row in rows] == [None, 0.0, 0.5, 1.0, None]
    assert [row["time_share"] for row in rows] == [0, 0, 0.75, 1, 1]
    assert [row["ratio_to"][STORE] for row in rows] == [2, 2, 1.25, 1, 1]
    memory = [row["memory_share"] for row in rows]
    assert (memory[0], memory[-1]) == (0, 1)
    assert memory[1] < 0.1 < memory[2] < 0.8 < memory[3] < 1.1
    peaks = [row["peak_bytes"] for row in rows]
    assert memory == pytest.approx([(peak - peaks[0]) / (peaks[-1] - peaks[0]) for peak in peaks])
    assert [row["plan"] is None for row in rows] == [True, False, False, False, True]
    for row in rows[1:-1]:
        plan = row["plan"]
        assert plan["predicted_peak_bytes"] <= plan["limit_bytes"]
        assert plan["predicted_s"] > 0 and plan["measured_s"] > 0
        json.dumps(row)
    kept = [row["plan"]["kept_bytes"] for row in rows[1:-1]]
    assert kept == sorted(kept) and kept[0] < kept[1] < kept[2]


def test_a_gap_that_is_none_has_no_shares(monkeypatch):
    monkeypatch.setattr(budget, "peak_bytes", lambda step, device: 1)
    rows = list(budget.run(sweep(), Clock(dict.fromkeys(SECONDS, 1.0))))
    assert {(row["memory_share"], row["time_share"]) for row in rows} == {(None, None)}


@pytest.mark.slow
def test_the_process_is_warm_and_the_plan_made_before_anything_counts(monkeypatch):
    stepped, kept, real = [], [], budget.peak_bytes
    step = Contender.step
    monkeypatch.setattr(Contender, "step", lambda self, data: (stepped.append(self.way.name), step(self, data))[1])

    def peak(function, device):
        (contender,) = function.__defaults__
        result = real(function, device)
        if contender.budget is not None:
            kept.append(contender.budget.planner._kept)
        return result

    monkeypatch.setattr(budget, "peak_bytes", peak)
    rows = list(budget.run(sweep(), Clock()))
    assert stepped[0] == STORE and stepped[1] == RECONSTRUCT
    assert kept == [True] * 3
    assert stepped.count("budget 50%") == 2 + 1 + 1 + (1 + 3)  # settles, gradients, peak, warm-up and rounds
    assert len({row["variant"] for row in rows}) == len(rows)


@pytest.mark.slow
def test_all_start_from_the_same_weights(monkeypatch):
    made = []
    real = Contender.settle
    monkeypatch.setattr(
        Contender,
        "settle",
        lambda self, data: (made.append([p.detach().clone() for p in self.parameters]), real(self, data)),
    )
    list(budget.run(sweep(), Clock()))
    assert len(made) == 5
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


@pytest.mark.slow
def test_progress_is_as_long_as_announced():
    begun = []
    list(budget.run(sweep(), Clock(), begun.append))
    assert len(begun) == budget.steps(sweep())


def test_budgets_grow_whatever_the_order_asked_for():
    assert [way.share for way in sweep(shares=(0.5, 0.125, 0.5)).ways] == [None, 0.125, 0.5, None]
    assert [way.name for way in Sweep("n", TINY, 1).ways] == [
        RECONSTRUCT,
        *(f"budget {share}%" for share in (0, 10, 25, 50, 75, 90, 100)),
        STORE,
    ]


@pytest.mark.parametrize("option", ["--plot", pytest.param("--png", marks=pytest.mark.slow)])
def test_the_command(tmp_path, monkeypatch, option, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(networks.NETWORKS, "tiny", TINY)
    words = ["bench", "budget", "--network", "tiny", "--rounds", "2", "--percent", "0", "60", "--dtype", "bfloat16"]
    words += [option, str(tmp_path / "b.png"), "--save", str(tmp_path), "--json", str(tmp_path / "b.json")]
    assert cli.main(words) == 0
    (table,) = json.loads((tmp_path / "b.json").read_text())["tables"]
    assert table["title"] == "memory budgets, tiny, batch 4, bfloat16 autocast"
    assert [row["variant"] for row in table["rows"]] == [RECONSTRUCT, "budget 0%", "budget 60%", STORE]
    row = table["rows"][2]
    assert row.keys() >= set(table["columns"])
    assert row["predicted_of_measured"] == pytest.approx(row["predicted_ms"] / row["measured_ms"])
    assert f"picture: {tmp_path / 'b.png'}" in table["notes"]
    (saved,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert {(line["benchmark"], line["case"]) for line in lines} == {("budget", "tiny batch 4 bfloat16")}
    assert lines[2]["share"] == 0.6 and lines[2]["plan"]["limit_bytes"] > 0
    assert "--percent 0.0 60.0" in lines[0]["command"]
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert "bench budget 1/8: a stored step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--network", "resnet"], "--network is 'resnet'; it must be one of revnet38, revnet110"),
        (["--percent", "101"], "'101'; it must be a number from 0 to 100"),
        (["--percent", "much"], "'much'; it must be a number"),
        (["--png", "b.jpg"], "b.jpg: the name must end in .png"),
        (["--rounds", "1"], "at least 2"),
    ],
)
def test_bad_options_are_named(words, complaint, capsys):
    try:
        status = cli.main(["bench", "budget", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert complaint in capsys.readouterr().err


def test_the_curve_goes_from_end_to_end():
    plots = pytest.importorskip("revkernels.cli.plots")
    names = [RECONSTRUCT, "budget 0%", "budget 50%", STORE]
    drawn = [
        {
            "variant": name,
            "share": share,
            "peak_bytes": mib * 2**20,
            "ratio": time / 1.3,
            "ratio_to": {STORE: time},
        }
        for name, share, mib, time in zip(
            names, (None, 0.0, 0.5, None), (100, 102, 160, 220), (1.3, 1.29, 1.1, 1.0), strict=True
        )
    ]
    figure = plots.budgets("a title", drawn, "a device")
    (axes,) = figure.axes
    chord, curve = axes.get_lines()[:2]
    assert list(chord.get_xdata()) == [100, 220] and list(chord.get_ydata()) == [1.3, 1.0]
    assert list(curve.get_xdata()) == [102, 160] and list(curve.get_ydata()) == [1.29, 1.1]
    assert {RECONSTRUCT, "0%", "50%", STORE} <= {text.get_text() for text in axes.texts}
