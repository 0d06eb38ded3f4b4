# SPDX-License-Identifier: Apache-2.0
"""The harness on a clock that the test winds: medians, ratios, rotation, goals; results, comparison."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from benchmarks import compare  # noqa: E402
from revkernels.bench import memory, overhead, results  # noqa: E402
from revkernels.bench.chains import Shape  # noqa: E402
from revkernels.bench.clocks import HostClock, last_level_cache  # noqa: E402
from revkernels.bench.coupling import SUITE, Setup  # noqa: E402
from revkernels.bench.harness import Goal, Suite, Trial, measure, rotation  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


class FakeClock:
    """Calls the function, and says that it took what the test wrote down for it."""

    def __init__(self, **seconds):
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.order = []

    def time(self, function, operands):
        names = {function(*one) for one in operands}
        (name,) = names
        self.order.append(name)
        return next(self.seconds[name])


def contenders(*names):
    return {name: (lambda *operands, name=name: name) for name in names}


def test_contenders_take_turns_and_warm_up_is_not_counted():
    clock = FakeClock(a=[99.0, 1.0, 2.0, 3.0], b=[99.0, 2.0, 2.0, 3.0])
    a, b = measure("add", "case", Trial("a", contenders("a", "b")), clock, rounds=3, warmup=1)
    rounds = [tuple(clock.order[i : i + 2]) for i in range(0, 8, 2)]
    assert all(sorted(order) == ["a", "b"] for order in rounds) and len(set(rounds)) == 2  # no fixed neighbour
    assert (a.median_s, a.q1_s, a.q3_s, a.rounds) == (2.0, 1.5, 2.5, 3)
    assert (a.ratio, b.ratio, b.median_s) == (1.0, 1.0, 2.0)  # b/a by round: 2, 1, 1


def test_ratio_is_taken_round_by_round_so_drift_cancels():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    clock = FakeClock(a=drift, b=[1.5 * d for d in drift])
    _, b = measure("add", "case", Trial("a", contenders("a", "b")), clock, rounds=5, warmup=0)
    assert b.ratio == 1.5


def test_seconds_are_per_call_and_bytes_give_bandwidth():
    trial = Trial("a", contenders("a"), bytes_moved=6_000_000_000, calls=4)
    (a,) = measure("add", "case", trial, FakeClock(a=[8.0, 8.0]), rounds=2, warmup=0)
    assert (a.median_s, a.gbps) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal("ratio", 0.7), 0.5, True),
        (Goal("ratio", 0.4), 0.5, False),
        (Goal("ratio", 2.0, of="c"), 2.0, True),
        (Goal("extra_us", -1e6), -1e6, True),
        (Goal("extra_us", 0.2e6, of="c"), 0.5e6, False),
    ],
)
def test_goals(goal, value, met):
    clock = FakeClock(a=[2.0] * 3, b=[1.0] * 3, c=[0.5] * 3)
    trial = Trial("a", contenders("a", "b", "c"), goals={"b": goal})
    found = {m.variant: m.goal for m in measure("add", "case", trial, clock, rounds=3, warmup=0)}
    assert found["a"] is None
    assert found["b"] == {
        "quantity": goal.quantity,
        "at_most": goal.at_most,
        "of": goal.of or "a",
        "value": pytest.approx(value),
        "met": met,
    }


def test_operands_rotate_over_calls_and_contenders():
    seen = []

    def note(number):
        seen.append(number)
        return "a"

    trial = Trial("a", {"a": note}, operands=[(0,), (1,), (2,)], calls=2)
    measure("add", "case", trial, FakeClock(a=[1.0, 1.0]), rounds=2, warmup=0)
    assert seen == [0, 1, 2, 0]
    assert rotation(bytes_of_a_set=10, cache_bytes=32) == 7  # 70 bytes: at least twice the cache
    assert rotation(bytes_of_a_set=100, cache_bytes=32) == 1


def test_ratios_to_others_come_round_by_round():
    clock = FakeClock(a=[1.0, 2.0, 4.0], b=[2.0, 4.0, 8.0], c=[3.0, 6.0, 12.0])
    found = measure("add", "case", Trial("a", contenders("a", "b", "c"), beside=["b"]), clock, rounds=3, warmup=0)
    assert [one.more["ratio_to"] for one in found] == [{"b": 0.5}, {"b": 1.0}, {"b": 1.5}]
    with pytest.raises(ValueError, match="no contender z"):
        measure("add", "case", Trial("a", contenders("a"), beside=["z"]), FakeClock(), rounds=2)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        measure("add", "case", Trial("a", contenders("a")), FakeClock(), rounds=1)
    with pytest.raises(ValueError, match="no contender b; there are a"):
        measure("add", "case", Trial("b", contenders("a")), FakeClock(), rounds=2)
    with pytest.raises(ValueError, match="no contender z"):
        measure("add", "case", Trial("a", contenders("a"), goals={"a": Goal("ratio", 1, of="z")}), FakeClock(), 2)
    with pytest.raises(ValueError, match="quantity is 'speed'"):
        trial = Trial("a", contenders("a"), goals={"a": Goal("speed", 1)})
        measure("add", "case", trial, FakeClock(a=[1.0] * 9), rounds=2)


def test_suite_runs_every_case_in_order():
    suite = Suite("toy")

    @suite.benchmark(cases=["x", "y"])
    def first(setup, case):
        return Trial("a", contenders("a"))

    steps = []
    found = list(suite.run(None, FakeClock(a=[1.0] * 8), rounds=2, begin=steps.append))
    assert len(suite) == 2
    assert steps == ["first x", "first y"]
    assert [(m.benchmark, m.case) for m in found] == [("first", "x"), ("first", "y")]


def test_clock_and_cache_are_those_of_this_machine():
    calls = []
    assert HostClock().time(calls.append, [(1,), (2,)]) > 0
    assert calls == [1, 2]
    assert 1 << 18 <= last_level_cache() <= 1 << 32


def test_memory_is_kept_inside_alone():
    """A large block comes from the heap there: page faults once, not at every allocation."""
    code = """
import resource
from revkernels.bench.clocks import memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        bytearray(64 << 20)[::4096] = bytes(16384)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with memory_kept():
    faults()
    inside = faults()
print(outside, inside, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    outside, inside, after = map(int, done.stdout.split())
    assert 4 * inside < outside and 4 * inside < after


@pytest.mark.parametrize(
    ("name", "case", "traffic"),  # bytes an element of the stream: every operand is read, the first and third written
    [
        ("couple_", "float32", 3 * 4),
        ("accumulate_", "bfloat16", 3 * 2),
        ("reverse_step_", "float64", 6 * 8),
        ("mixed", "float32 += bfloat16", 4 + 2 + 4),
    ],
)
def test_bytes_moved_are_counted(name, case, traffic):
    setup = Setup(megabytes=1)
    (make,) = (b.make for b in SUITE.benchmarks if b.name == name)
    trial = make(setup, case)
    assert trial.bytes_moved == trial.operands[0][0].numel() * traffic
    held = len(trial.operands) * sum(t.nbytes for t in trial.operands[0])
    assert held >= 2 * last_level_cache()


def test_every_contender_computes_the_same():
    setup = Setup(megabytes=1)
    for benchmark in SUITE.benchmarks:
        trial = benchmark.make(setup, benchmark.cases[0])
        assert len(trial.contenders) >= 2, "no fused backend runs here"
        expected = None
        for function in trial.contenders.values():
            operands = [tensor.clone() for tensor in trial.operands[0]]
            function(*operands)
            expected = expected or operands
            assert all(torch.equal(a, b) for a, b in zip(operands, expected, strict=True))
        assert not torch.equal(expected[0], trial.operands[0][0])


@pytest.mark.parametrize(
    ("us", "plain", "quantity", "value", "met"),
    [
        (70, 18, "extra_us", 52, True),
        (91, 30, "extra_us", 61, False),
        (80, 40, "ratio", 2, True),
        (120, 40, "ratio", 3, False),
    ],
)
def test_overhead_is_judged_by_the_clock_where_plain_torch_is_fast(us, plain, quantity, value, met):
    judged = overhead.goal(us, plain, us / plain)
    assert (judged["quantity"], judged["value"], judged["met"]) == (quantity, value, met)


def memory_goals(monkeypatch, growth):
    """{(variant, depth): goal}, by a meter that shows ``growth`` bytes more at the second depth."""
    monkeypatch.setattr(memory, "peak_bytes", lambda step, device: next(shown))
    shown = iter([1000] * 3 + [1000 + growth] * 3)
    rows = list(memory.run(Shape(batch=2, width=4, side=8), depths=(4, 8)))
    return {(row["variant"], row["depth"]): row["goal"] for row in rows}


def test_memory_is_judged_where_it_is_rebuilt(monkeypatch):
    goals = memory_goals(monkeypatch, growth=0)
    judged = {key for key, goal in goals.items() if goal is not None}
    assert judged == {("reconstruct, eager", 8), ("reconstruct, fused", 8)}
    limit = {"quantity": "growth_bytes", "at_most": 0, "of": "depth 4", "value": 0, "met": True}
    assert goals["reconstruct, eager", 8] == limit
    statistics = 4 * 2 * 2 * 4 * 4  # of the branches between, two norms each: mean and rstd, four float32
    assert goals["reconstruct, fused", 8] == {**limit, "at_most": statistics}


def test_memory_that_grows_misses_its_goal(monkeypatch):
    goals = memory_goals(monkeypatch, growth=257)
    for way in ("eager", "fused"):
        goal = goals[f"reconstruct, {way}", 8]
        assert (goal["value"], goal["met"]) == (257, False)


def lines(path, **rows):
    stamp = {"device": "A (R) Device 9"}
    made = [{"benchmark": "b", "case": "c", "variant": v, "median_s": s, "ratio": 1.0} for v, s in rows.items()]
    return results.append(made, stamp, path, "the command")


def test_results_are_appended_under_the_devices_name(tmp_path):
    path = lines(tmp_path / "new", a=1.0)
    assert path.name == "a-r-device-9.jsonl"
    first = path.read_text()
    assert lines(tmp_path / "new", a=2.0) == path
    assert path.read_text().startswith(first)
    rows = results.read(path)
    assert [row["median_s"] for row in rows] == [1.0, 2.0]
    assert rows[0]["command"] == "the command"
    assert rows[0]["environment"] == {"device": "A (R) Device 9"}


def test_damaged_results_name_the_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\nnot json\n')
    with pytest.raises(ValueError, match=r"r\.jsonl, line 2 is not JSON"):
        results.read(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is a list"):
        results.read(path)


def test_compare_matches_the_last_lines(tmp_path, capsys):
    before = lines(tmp_path / "a", x=1.0, gone=1.0)
    after = lines(tmp_path / "b", x=9.0, new=1.0)
    lines(tmp_path / "b", x=2.0)
    table = compare.compare(before, after)
    (row,) = table.rows
    assert (row["variant"], row["a_ms"], row["b_ms"], row["time"]) == ("x", 1000.0, 2000.0, 2.0)
    assert table.notes == ["only in A: 1 lines", "only in B: 1 lines"]
    assert compare.main([str(before), str(after)]) == 0
    assert compare.main([str(before), str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


def test_a_picture_of_kept_lines(tmp_path, monkeypatch, capsys):
    """Each contender's last line, in the file's order; titles for the panels; a case that is not there is named."""
    pytest.importorskip("matplotlib")
    from benchmarks import picture

    drawn = []
    monkeypatch.setattr(picture.plots, "trade_off", lambda *args: drawn.append(args) or Drawing())

    class Drawing:
        def savefig(self, path):
            path.write_text("drawn")

    kept, out = ROOT / "benchmarks/results/nvidia-h200.jsonl", tmp_path / "picture.png"
    case = "revnet104 batch 64 bfloat16 CUDA graph"
    options = ["--case", case, "--title", "RevNet-104", "--without", "memcnn", "--out", str(out)]
    assert picture.main([str(kept), *options]) == 0 and out.read_text() == "drawn"
    (((title, rows),), where) = drawn.pop()
    assert title == "RevNet-104" and where.startswith("NVIDIA H200, torch")
    last = {row["variant"]: row for row in results.read(kept) if row["case"] == case}
    assert rows == [row for name, row in last.items() if name != "memcnn"]
    assert picture.main([str(kept), "--out", str(out)]) == 0 and len(drawn.pop()[0]) == 4
    for path, options in ((kept, ["--case", "revnet1"]), (tmp_path / "absent.jsonl", [])):
        assert picture.main([str(path), *options, "--out", str(out)]) == 2
    words = capsys.readouterr().err
    assert "no network 'revnet1'" in words and case in words and "absent.jsonl" in words


@pytest.mark.parametrize(
    "script",
    [
        *(f"bench_{subject}" for subject in ("coupling", "passes", "block", "network", "peers", "memory", "overhead")),
        "compare",
        "picture",
        "gpu_report",
    ],
)
def test_scripts_start(script):
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{script}", "--help"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"usage" in done.stdout
