# SPDX-License-Identifier: Apache-2.0
"""The GPU report where there is no GPU: what it plans, and what it makes of commands that end well, badly or not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from benchmarks import gpu_report  # noqa: E402
from revkernels.cli.cases import KERNELS  # noqa: E402
from revkernels.cli.output import Table, plain  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def test_plans_flat_and_few_files(tmp_path):
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run"]) == 0
    plan = gpu_report.stages(tmp_path, tmp_path / "site")
    names = {stage.log for stage in plan} | {"report.txt", "report.json", "device.jsonl"}
    assert len(names) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert len({stage.name for stage in plan}) == len(plan)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["result"] for row in report["tables"][0]["rows"]] == ["planned"] * len(plan)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--out", __file__], "is a file; a folder is needed"),
        (["--out", "/proc/x"], "no file can be made there"),
        (["--out", "new", "--budget", "nan"], "'nan'; it must be a number of seconds, more than 0"),
        (["--out", "new", "--budget", "-1"], "'-1'; it must be a number of seconds, more than 0"),
        (
            ["--out", "new", "--only", "passes", "pases"],
            "--only 'pases': no stage has it in its name; there are 'build', ",
        ),
    ],
    ids=lambda value: " ".join(value[-2:])[-20:] if isinstance(value, list) else "",
)
def test_a_bad_call_is_refused_before_anything_is_made(words, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        gpu_report.main([*words, "--dry-run"])
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plan_leaves_the_logs_of_the_last_report(tmp_path):
    logs = [tmp_path / stage.log for stage in gpu_report.stages(tmp_path, None)]
    for log in logs:
        log.write_text("of the last report")
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run"]) == 0
    assert {log.read_text() for log in logs} == {"of the last report"}


def test_runs_checks_and_tests_side_by_side_and_times_alone(tmp_path):
    first, *plan = gpu_report.stages(tmp_path, tmp_path / "site")
    assert (first.name, first.group) == ("build", "")
    groups = [
        "" if stage.name.startswith("bench ") else gpu_report.TRITON if "triton" in stage.name else gpu_report.TESTS
        for stage in plan
    ]
    assert [stage.group for stage in plan] == groups
    assert list(dict.fromkeys(filter(None, groups))) == [gpu_report.TESTS, gpu_report.TRITON]
    # Whichever of those side by side takes longest, the passes and the networks by graphs fit.
    together = max(stage.limit for stage in plan if stage.group == gpu_report.TESTS)
    timed = [stage for stage in plan if not stage.group][:3]
    assert [stage.name for stage in timed[1:]] == ["bench network, cifar, graphs", "bench network, imagenet, graphs"]
    assert first.limit + together + sum(stage.limit for stage in timed) <= gpu_report.BUDGET


def test_takes_stages_by_name(tmp_path):
    assert gpu_report.main(["--out", str(tmp_path), "--dry-run", "--only", "memcheck", "passes"]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["tables"][0]["rows"]
    names = [row["stage"] for row in rows]
    assert names[0] == "build" and len(names) == 5
    assert all("memcheck" in name or "passes" in name for name in names[1:])


def test_tests_each_backend_by_itself(tmp_path):
    plan = {stage.name: stage for stage in gpu_report.stages(tmp_path, tmp_path / "site")}
    assert plan["build"].env == {"REVK_CUDA": "ON"}
    for backend, norms in (("cuda", "test_cuda_gpu_norm_act.py"), ("triton", "test_triton_norm_gpu.py")):
        stage = plan[f"gpu tests, {backend}"]
        assert stage.env["REVKERNELS_BACKEND"] == backend
        files = {Path(word) for word in stage.command if word.endswith(".py")}
        own, chains, exact = f"test_{backend}_gpu.py", "behaviour/test_gpu.py", "behaviour/test_exact_gpu.py"
        meters = ("test_measure.py", "test_diagnostics_memory.py")
        assert files == {ROOT / "tests" / name for name in (own, norms, chains, exact, *meters)}
        assert all(file.exists() for file in files)
    assert "REVKERNELS_BACKEND" not in plan["gpu tests, libraries"].env  # which CuPy's arrays, or NumPy's, cannot obey


def test_runs_every_gpu_test(tmp_path):
    """A file of tests that need a GPU is in one of the stages."""
    plan = gpu_report.stages(tmp_path, tmp_path / "site")
    tested = {Path(word).name for stage in plan for word in stage.command if word.endswith(".py")}
    marked = {path.name for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    assert marked - {Path(__file__).name} == tested


def test_has_few_tests_sanitized(tmp_path):
    sanitized = [stage for stage in gpu_report.stages(tmp_path, None) if stage.tool]
    couplings, norms = ([stage for stage in sanitized if stage.name.endswith(of)] for of in ("couplings", "norms"))
    lists, types = "test_accumulate_lists", "test_reverse_step_with_four_dtypes"
    for stages, most, expected in (
        (couplings, 40, {"test_every_layout", "test_coupling_options", lists, types}),
        (norms, 72, {"test_forward", "test_backward"}),
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
def test_takes_no_check_that_checked_nothing(backend, tmp_path):
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


def test_tells_ok_from_failed_timed_out_and_unproven(tmp_path):
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


def test_runs_a_group_at_the_same_time(tmp_path):
    """Each of the two waits for the other; they end in the order of the plan, and so do their logs."""
    code = "import pathlib, time\npathlib.Path('{0}').touch()\nwhile not pathlib.Path('{1}').exists(): time.sleep(0.01)"
    pair = [stage(a, code.format(a, b), group="both") for a, b in ("ab", "ba")]
    outcomes = run_plan(tmp_path, *pair, stage("after", "print('last')"))
    assert [(o.stage, o.result) for o in outcomes] == [("a", "ok"), ("b", "ok"), ("after", "ok")]
    assert (tmp_path / "a.log").read_text().count("====") == 3


def test_takes_the_build_and_not_the_source_folder(tmp_path, monkeypatch):
    """Nor does the repository come before an installed package."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it is handed on, and may name the repository
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


def test_leaves_out_what_cannot_follow(tmp_path, monkeypatch):
    build, after = run_plan(tmp_path, stage("build", "raise SystemExit(1)"), stage("after", ""))
    assert (build.result, after.result, after.detail) == ("FAILED", "left out", "the build failed")
    (late,) = run_plan(tmp_path, stage("late", ""), budget=1)
    assert (late.result, late.detail) == ("left out", "the 1 s are used up")
    monkeypatch.setattr(gpu_report, "why_no_gpu", lambda: "no GPU: a test")
    needs = gpu_report.Stage("needs", "a.log", ["-c", ""], 30)
    assert run_plan(tmp_path, needs)[0].detail == "no GPU: a test"


def test_signs_the_lines_of_its_build(tmp_path):
    lines = [{"ratio": 1.0, "environment": {"commit": made, "device": "GPU"}} for made in (None, "abc")]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gpu_report.sign(tmp_path, "123+changes")
    signed = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["environment"]["commit"] for line in signed] == ["123+changes", "abc"]
    assert [line["environment"]["device"] for line in signed] == ["GPU"] * 2


def test_exits_1_when_a_stage_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "stages", lambda out, site: [stage("bad", "raise SystemExit(1)")])
    assert gpu_report.main(["--out", str(tmp_path), "--no-build"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert "FAILED" in (tmp_path / "report.txt").read_text()
