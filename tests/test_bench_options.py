# SPDX-License-Identifier: Apache-2.0
"""The exact coupling and memory budgets in ``bench network``: measured once the plan holds."""

import json

import pytest

torch = pytest.importorskip("torch")
from one_thread import one_thread_here  # noqa: E402, F401

from revkernels import cli  # noqa: E402
from revkernels.bench import network, networks  # noqa: E402
from revkernels.bench.chains import Shape  # noqa: E402
from revkernels.bench.contenders import BASELINE, OPTIONS, WAYS, Contender  # noqa: E402
from revkernels.bench.network import Job  # noqa: E402
from revkernels.bench.networks import Network, Stage  # noqa: E402
from revkernels.models import Plan, RevNet  # noqa: E402
from revkernels.nn import ReversibleSequential  # noqa: E402

BY_NAME = {way.name: way for way in (*WAYS, *OPTIONS)}
AGAIN = "reconstruct, transitions too"
NAMES = (
    *(BASELINE, "store, fused", "store, selective", AGAIN, "reconstruct, fused", "reconstruct, exact"),
    *("budget 25%", "budget 50%"),
)
COMPARED = [BY_NAME[name] for name in NAMES]
STAGE = Stage(Shape(depth=12, width=8, side=16))
TINY = Network("tiny", 4, 16, lambda classes, **o: RevNet(Plan("basic", (5, 3), (16, 32), stem_width=16), classes, **o))


class Clock:
    """Runs everything and says that all took a second."""

    def time(self, function, operands):
        for one in operands:
            function(*one)
        return 1.0


def rows(ways, workload=TINY, **options):
    job = Job("network", "tiny", workload, ways, batch=4, rounds=2, **options)
    return {row["variant"]: row for row in network.run(job, Clock())}


@pytest.mark.parametrize(
    ("workload", "dtype"),
    [
        pytest.param(STAGE, "float32", marks=pytest.mark.slow, id="stage, float32"),
        pytest.param(TINY, "float32", id="network, float32"),
        pytest.param(STAGE, "bfloat16", id="stage, bfloat16"),
        pytest.param(TINY, "bfloat16", marks=pytest.mark.slow, id="network, bfloat16"),
    ],
)
def test_rows(workload, dtype):
    found = rows(COMPARED, workload, dtype=dtype)
    assert list(found) == [way.name for way in COMPARED]
    assert {row["statistics_updates"] for row in found.values()} == {1}
    assert all(row["error"] is None and row["images_per_s"] == 4 for row in found.values())
    # Masks of ReLUs turn, the grid rounds more of them over; of bfloat16 the baseline's gradient is about as far off as
    # any: up to 1.10 of it were seen, by how a machine's products round.
    if dtype == "float32":
        assert all(row["gradient_degrees"] < 4 for row in found.values())
    else:
        assert all(row["float64_degrees"] < 1.25 * found[BASELINE]["float64_degrees"] for row in found.values())
    plain, exact, quarter, half, stored = (
        found[name]["peak_bytes"]
        for name in ("reconstruct, fused", "reconstruct, exact", "budget 25%", "budget 50%", "store, fused")
    )
    assert plain < quarter < half < stored
    assert exact < half
    assert found["store, selective"]["peak_bytes"] < 0.8 * stored
    assert (found[AGAIN]["peak_bytes"] < 0.9 * plain) == (workload is TINY)  # a stage alone has no transition
    assert ["plan" in row for row in found.values()] == [False] * 6 + [True] * 2
    for name, share in (("budget 25%", 0.25), ("budget 50%", 0.5)):
        plan = found[name]["plan"]
        gap = plan["storing_bytes"] - plan["reconstructing_bytes"]
        assert plan["limit_bytes"] == plan["reconstructing_bytes"] + share * gap
        assert plan["reconstructing_bytes"] < plan["predicted_peak_bytes"] <= plan["limit_bytes"]
        assert (
            plan["measured_peak_bytes"] is not None
        )  # no more is said of a network as small as what a process allocates
        assert plan["kept_bytes"] > 0 and 0 < plan["predicted_s"] < plan["reconstructing_s"]
        assert plan["measured_s"] > 0
        json.dumps(plan)


@pytest.mark.slow
def test_the_plan_holds_before_anything_is_measured(monkeypatch):
    kept, real = [], network.peak_bytes

    def peak(step, device):
        (contender,) = step.__defaults__
        result = real(step, device)
        if contender.budget is not None:
            kept.append((contender.way.name, contender.budget.planner._kept))
        return result

    monkeypatch.setattr(network, "peak_bytes", peak)
    rows(COMPARED)
    assert kept == [("budget 25%", True), ("budget 50%", True)]


def test_a_step_that_still_measures_is_told_apart():
    contender = Contender(BY_NAME["budget 50%"], TINY, "float32", "cpu", None)
    data = TINY.data(4)
    contender.step(data)
    assert not contender.budget.planner._kept
    contender.settle(data)
    assert contender.budget.planner._kept


def test_each_contender_has_a_budget_that_its_chains_share():
    first, second = (Contender(BY_NAME["budget 50%"], TINY, "float32", "cpu", None) for _ in range(2))
    assert first.budget is not second.budget
    chains = [part for part in first._module.modules() if isinstance(part, ReversibleSequential)]
    assert len(chains) == 2 and all(chain.activations is first.budget for chain in chains)
    exact = Contender(BY_NAME["reconstruct, exact"], TINY, "float32", "cpu", first.state)
    chains = [part for part in exact._module.modules() if isinstance(part, ReversibleSequential)]
    assert all(chain.coupling == "exact" and chain.activations == "reconstruct" for chain in chains)


def test_a_plan_tells_of_the_steps_behind_its_own():
    contender = Contender(BY_NAME["budget 50%"], TINY, "float32", "cpu", None)
    data = TINY.data(4)
    contender.settle(data)
    assert contender.plan(data).kept > 0
    assert contender.plan().measured_seconds is None
    contender.step(data)
    assert contender.plan().measured_seconds > 0
    assert Contender(BY_NAME[BASELINE], TINY, "float32", "cpu", None).plan(data) is None


def test_only_the_options_take_steps_first(monkeypatch):
    taken = []
    monkeypatch.setattr(Contender, "step", lambda self, data: taken.append(self.way.name))
    for way in (*WAYS, *OPTIONS):
        if way.peer is None:
            Contender(way, TINY, "float32", "cpu", None).settle(TINY.data(4))
    assert taken == [way.name for way in OPTIONS if way.settles for _ in range(2)]


def test_at_equal_memory_a_budget_has_a_plan_for_the_batch():
    found = rows([BY_NAME[BASELINE], BY_NAME["budget 25%"]], most=4)
    assert found["budget 25%"]["equal_memory_batch"] > found[BASELINE]["equal_memory_batch"] == 4


def test_a_graph_that_cannot_be_captured_is_a_row(monkeypatch):
    def captured(self, data):
        if self.way.settles:
            raise RuntimeError("no host inside a graph")
        return lambda: self.step(data)

    monkeypatch.setattr(Contender, "captured", captured)
    found = rows(COMPARED, graphs=True)
    assert [name for name, row in found.items() if row["error"]] == [way.name for way in OPTIONS if way.settles]
    assert found["reconstruct, exact"]["error"] == "RuntimeError: no host inside a graph"
    monkeypatch.setattr(Contender, "settle", lambda self, data: captured(self, data))
    with pytest.raises(RuntimeError, match="no host"):
        rows(COMPARED)


def test_network_compares_them_by_default_and_peers_does_not(monkeypatch):
    seen = []
    monkeypatch.setattr(cli.importlib.import_module("revkernels.cli.bench_network"), "_measured", _note(seen))
    for subject in ("network", "peers"):
        with pytest.raises(StopIteration):
            cli.main(["bench", subject])
    assert seen == [[way.name for way in (*WAYS, *OPTIONS)], [way.name for way in WAYS]]


def _note(seen):
    def measured(args, jobs, notes):
        seen.append([way.name for way in jobs[0].ways])
        raise StopIteration

    return measured


def test_the_command(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(networks.NETWORKS, "tiny", TINY)
    words = ["bench", "network", "--network", "tiny", "--rounds", "2", "--only", "budget 50%", "reconstruct, exact"]
    words += ["--plot", str(tmp_path / "n.png"), "--save", str(tmp_path), "--json", str(tmp_path / "n.json")]
    assert cli.main(words) == 0
    (table,) = json.loads((tmp_path / "n.json").read_text())["tables"]
    assert [row["variant"] for row in table["rows"]] == [BASELINE, "reconstruct, exact", "budget 50%"]
    (saved,) = tmp_path.glob("*.jsonl")
    lines = {line["variant"]: line for line in map(json.loads, saved.read_text().splitlines())}
    assert lines["budget 50%"]["plan"].keys() >= {
        "predicted_s",
        "measured_s",
        "predicted_peak_bytes",
        "measured_peak_bytes",
    }
    assert "plan" not in lines["reconstruct, exact"]
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")


def test_in_the_picture_they_stand_with_the_fused():
    plots = pytest.importorskip("revkernels.cli.plots")
    kinds = {way.name: plots._kind({"variant": way.name, "kind": way.kind}) for way in (*WAYS, *OPTIONS)}
    fused = ["store, fused", "reconstruct, fused", *(way.name for way in OPTIONS)]
    assert [name for name, kind in kinds.items() if kind == "fused"] == fused
    assert kinds["reconstruct, eager"] == "ours"
