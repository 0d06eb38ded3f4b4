# SPDX-License-Identifier: Apache-2.0
"""The harness on a clock that the test winds: medians, ratios, rotation, goals; results, comparison, GPU report."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from benchmarks import compare, gpu_report  # noqa: E402
from revkernels.bench import memory, overhead, results  # noqa: E402
from revkernels.bench.chains import Shape  # noqa: E402
from revkernels.bench.clocks import HostClock, last_level_cache  # noqa: E402
from revkernels.bench.coupling import SUITE, Setup  # noqa: E402
from revkernels.bench.harness import Goal, Suite, Trial, measure, rotation  # noqa: E402
from revkernels.cli.cases import KERNELS  # noqa: E402
from revkernels.cli.output import Table, plain  # noqa: E402

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


def test_gpu_report_plans_flat_and_few_files(tmp_path):
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run"]) == 0
    plan = gpu_report.stages(tmp_path, tmp_path / "site")
    names = {stage.log for stage in plan} | {"report.txt", "report.json", "device.jsonl"}
    assert len(names) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert len({stage.name for stage in plan}) == len(plan)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["result"] for row in report["tables"][0]["rows"]] == ["planned"] * len(plan)


def test_gpu_report_runs_checks_and_tests_side_by_side_and_times_alone(tmp_path):
    first, *plan = gpu_report.stages(tmp_path, tmp_path / "site")
    assert (first.name, first.group) == ("build", "")
    assert [stage.group for stage in plan] == [
        "" if stage.name.startswith("bench ") else gpu_report.TESTS for stage in plan
    ]
    # Whichever of those side by side takes longest, the first benchmarks fit.
    together = max(stage.limit for stage in plan if stage.group)
    assert first.limit + together + sum(stage.limit for stage in plan if not stage.group) >= gpu_report.BUDGET
    assert first.limit + together < 0.7 * gpu_report.BUDGET


def test_gpu_report_takes_stages_by_name(tmp_path):
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run", "--only", "memcheck", "passes"]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["tables"][0]["rows"]
    names = [row["stage"] for row in rows]
    assert names[0] == "build" and len(names) == 5
    assert all("memcheck" in name or "passes" in name for name in names[1:])


def test_gpu_report_tests_each_backend_by_itself(tmp_path):
    plan = {stage.name: stage for stage in gpu_report.stages(tmp_path, tmp_path / "site")}
    assert plan["build"].env == {"REVK_CUDA": "ON"}
    for backend, norms in (("cuda", "test_cuda_gpu_norm_act.py"), ("triton", "test_triton_norm_gpu.py")):
        stage = plan[f"gpu tests, {backend}"]
        assert stage.env["REVKERNELS_BACKEND"] == backend
        files = {Path(word) for word in stage.command if word.endswith(".py")}
        own, chains, meter = f"test_{backend}_gpu.py", "behaviour/test_gpu.py", "test_measure.py"
        assert files == {ROOT / "tests" / name for name in (own, norms, chains, meter)}
        assert all(file.exists() for file in files)


def test_gpu_report_runs_every_gpu_test(tmp_path):
    """A file of tests that need a GPU is in one of the stages."""
    plan = gpu_report.stages(tmp_path, tmp_path / "site")
    tested = {Path(word).name for stage in plan for word in stage.command if word.endswith(".py")}
    marked = {path.name for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    assert marked - {Path(__file__).name} == tested


def test_gpu_report_has_few_tests_sanitized(tmp_path):
    sanitized = [stage for stage in gpu_report.stages(tmp_path, None) if stage.tool]
    couplings, norms = ([stage for stage in sanitized if stage.name.endswith(of)] for of in ("couplings", "norms"))
    lists, types = "test_accumulate_lists", "test_reverse_step_with_four_dtypes"
    for stages, most, expected in (
        (couplings, 40, {"test_every_layout", "test_coupling_options", lists, types}),
        (norms, 60, {"test_forward", "test_backward"}),
    ):
        first, second = stages
        assert first.command == second.command
        command = [sys.executable, *first.command, "--collect-only"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        tests = re.findall(r"::(\w+)", done.stdout)
        assert 20 <= len(tests) <= most
        assert set(tests) == expected


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_gpu_report_takes_no_check_that_checked_nothing(backend, tmp_path):
    proof = next(s.proof for s in gpu_report.stages(tmp_path, None) if s.name == f"check, {backend}")
    table = Table("check", {"backend": "backend", **{kernel: kernel for kernel in KERNELS}, "reason": "reason"})
    good = ["ok (7 calls)"] * len(KERNELS)
    for cells in (good, [*good[1:], "1 of 7 calls FAILED"], ["left out"] * len(KERNELS)):
        table.rows = [
            {"backend": "other", **dict.fromkeys(KERNELS, "ok (1 calls)")},
            {"backend": backend, **dict(zip(KERNELS, cells, strict=True))},
        ]
        assert re.findall(proof, plain(table)) == (["ok (7 calls)"] if set(cells) == {"ok (7 calls)"} else [])


def run_plan(tmp_path, *plan, budget=60):
    return gpu_report.run_stages(plan, tmp_path, tmp_path, None, budget)


def stage(name, code, limit=30, **options):
    return gpu_report.Stage(name, "a.log", ["-c", code], limit, gpu=False, **options)


def test_gpu_report_tells_ok_from_failed_timed_out_and_unproven(tmp_path):
    outcomes = run_plan(
        tmp_path,
        stage("good", "print('3 passed in 1 s')", proof=r"[1-9]\d* passed.*"),
        stage("bad", "raise SystemExit(3)"),
        stage("empty", "print('4 skipped')", proof=r"[1-9]\d* passed"),
        stage("slow", "import time; time.sleep(60)", limit=1),
        stage("absent", "", tool=["no-such-tool"]),
    )
    assert [o.result for o in outcomes] == ["ok", "FAILED", "FAILED", "timed out", "left out"]
    assert outcomes[0].detail == "3 passed in 1 s"
    assert outcomes[1].detail == "exit status 3, see a.log"
    assert outcomes[4].detail == "no-such-tool is not on PATH"
    assert [o.bad for o in outcomes] == [False, True, True, True, False]
    assert "3 passed" in (tmp_path / "a.log").read_text()


def test_gpu_report_runs_a_group_at_the_same_time(tmp_path):
    """Each of the two waits for the other; they end in the order of the plan, and so do their logs."""
    code = "import pathlib, time\npathlib.Path('{0}').touch()\nwhile not pathlib.Path('{1}').exists(): time.sleep(0.01)"
    pair = [stage(a, code.format(a, b), group="both") for a, b in ("ab", "ba")]
    outcomes = run_plan(tmp_path, *pair, stage("after", "print('last')"))
    assert [(o.stage, o.result) for o in outcomes] == [("a", "ok"), ("b", "ok"), ("after", "ok")]
    assert (tmp_path / "a.log").read_text().count("====") == 3


def test_gpu_report_takes_the_build_and_not_the_source_folder(tmp_path):
    """Nor does the repository come before an installed package."""
    site = tmp_path / "site"
    (site / "revkernels").mkdir(parents=True)
    (site / "revkernels" / "__init__.py").write_text("print('the build')")
    importing = stage("import", "import revkernels; print(revkernels.__file__)")
    gpu_report.run_stages([importing], tmp_path, tmp_path, site, 60)
    assert "the build" in (tmp_path / "a.log").read_text()
    gpu_report.run_stages(
        [stage("path", "import os; print(os.environ['PYTHONPATH'].split(os.pathsep))")], tmp_path, tmp_path, None, 60
    )
    assert f"'{ROOT}'" not in (tmp_path / "a.log").read_text().partition("==== path")[2]


def test_gpu_report_leaves_out_what_cannot_follow(tmp_path, monkeypatch):
    build, after = run_plan(tmp_path, stage("build", "raise SystemExit(1)"), stage("after", ""))
    assert (build.result, after.result, after.detail) == ("FAILED", "left out", "the build failed")
    (late,) = run_plan(tmp_path, stage("late", ""), budget=1)
    assert (late.result, late.detail) == ("left out", "the 1 s are used up")
    monkeypatch.setattr(gpu_report, "why_no_gpu", lambda: "no GPU: a test")
    needs = gpu_report.Stage("needs", "a.log", ["-c", ""], 30)
    assert run_plan(tmp_path, needs)[0].detail == "no GPU: a test"


def test_gpu_report_signs_the_lines_of_its_build(tmp_path):
    lines = [{"ratio": 1.0, "environment": {"commit": made, "device": "GPU"}} for made in (None, "abc")]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gpu_report.sign(tmp_path, "123+changes")
    signed = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["environment"]["commit"] for line in signed] == ["123+changes", "abc"]
    assert [line["environment"]["device"] for line in signed] == ["GPU"] * 2


def test_gpu_report_exits_1_when_a_stage_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "stages", lambda out, site: [stage("bad", "raise SystemExit(1)")])
    assert gpu_report.main(["--out", str(tmp_path), "--no-build"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert "FAILED" in (tmp_path / "report.txt").read_text()


@pytest.mark.parametrize(
    "script",
    [
        *(f"bench_{subject}" for subject in ("coupling", "passes", "block", "network", "peers", "memory", "overhead")),
        "compare",
        "gpu_report",
    ],
)
def test_scripts_start(script):
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{script}", "--help"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"usage" in done.stdout
