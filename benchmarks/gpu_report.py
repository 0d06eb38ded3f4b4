# SPDX-License-Identifier: Apache-2.0
"""Everything a GPU host can tell in ten minutes and without a network: ``python -m benchmarks.gpu_report --out DIR``.

Builds the package with CUDA into a throw-away folder, compares the backends with the oracle, tests the kernels of CUDA
and of Triton and whole chains on each, runs compute-sanitizer on the CUDA kernels, then the benchmarks. Each stage has
a time limit and the whole has a budget: what does not fit is left out with a note. DIR keeps the logs, the result lines
and the report (eight flat files); a table comes last. The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from revkernels.cli.cases import KERNELS
from revkernels.cli.output import Table, plain, report
from revkernels.cli.stamp import environment

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 600  # seconds

#: What the sanitizers run: both signs, lists, tails and halves, one pair of types, and the options all at once. They
#: slow a kernel down ten to fifty times; timings, graphs and the large arrays are for the plain run.
SANITIZED = "(every_layout and float32+bfloat16) or (coupling_options and grid and amax) or four_dtypes or lists"


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name, log: what the table says, and the file in DIR that its output is added to.
        command: the words after the Python interpreter, or after ``tool``.
        limit: seconds.
        tool: a program that runs the interpreter, as compute-sanitizer does.
        env: added to the environment.
        proof: a pattern that the output must have besides an exit status of 0; its last match, or the group in it, is
            the table's detail.
        gpu: whether it needs one.
    """

    name: str
    log: str
    command: Sequence[str]
    limit: int
    tool: Sequence[str] = ()
    env: dict[str, str] = field(default_factory=dict)
    proof: str | None = None
    gpu: bool = True


@dataclass
class Outcome:
    """How a stage ended: "ok", "FAILED", "timed out" or "left out"."""

    stage: str
    result: str
    seconds: float = 0.0
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.result in ("FAILED", "timed out")


def stages(out: Path, site: Path | None) -> list[Stage]:
    """Return the plan; without ``site`` the installed package is used instead of a build."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    passed = r"\b[1-9]\d* passed.*"
    plan = []
    if site is not None:
        pip = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(site), str(ROOT)]
        plan.append(Stage("build", "build.log", pip, 200, env={"REVK_CUDA": "ON"}, gpu=False))
    for backend, limit in (("cpu", 15), ("cuda", 20), ("triton", 45)):
        # A backend that is named and cannot run ends with 2, and the row must say ok for every kernel.
        check = ["-m", "revkernels", "check", "--backend", backend]
        ok = rf"\b{backend}\W+(ok \(\d+ calls\))" + r"\W+ok \(\d+ calls\)" * (len(KERNELS) - 1)
        env = {"COLUMNS": "200"}  # so that no cell of the table is broken
        plan.append(Stage(f"check, {backend}", "check.log", check, limit, env=env, proof=ok, gpu=backend != "cpu"))
    for backend, limit in (("cuda", 75), ("triton", 105)):  # Triton compiles as it goes
        # The kernels' own tests name their backend; the chains take the one of the environment.
        names = (f"test_{backend}_gpu.py", "behaviour/test_gpu.py", "test_measure.py")
        command = [*pytest, "-m", "gpu", "-rs", *(str(ROOT / "tests" / name) for name in names)]
        env = {"REVKERNELS_BACKEND": backend}
        plan.append(Stage(f"gpu tests, {backend}", "tests.log", command, limit, env=env, proof=passed))
    # The caching allocator would hide an access beyond a tensor.
    cuda_tests = [*pytest, "-k", SANITIZED, str(ROOT / "tests" / "test_cuda_gpu.py")]
    for tool in ("memcheck", "racecheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        plan.append(Stage(tool, "sanitizer.log", cuda_tests, 75, sanitizer, env, passed))
    large = ["--batch", "128"]  # a smaller chain would measure launches
    networks = ["--network", "revnet110", "--batch", "128", "--dtype", "float32", "bfloat16"]
    for subject, limit, more in (
        ("coupling", 30, []),
        ("passes", 25, ["--matching", "past cache", "bfloat16"]),  # Triton compiles as it goes
        ("block", 20, large),
        ("network", 35, networks),
        ("memory", 15, large),
        ("overhead", 10, ["--rounds", "20"]),
    ):
        bench = ["-m", "revkernels", "bench", subject, "--device", "cuda", "--save", str(out), *more]
        plan.append(Stage(f"bench {subject}", "bench.log", bench, limit, proof=r"\d+ lines appended"))
    return plan


def why_no_gpu() -> str | None:
    """Return why stages that need a GPU cannot run, or None."""
    try:
        import torch
    except ImportError:
        return "no GPU: torch is not installed"
    return None if torch.cuda.is_available() else "no GPU: torch sees no CUDA device"


def run_stages(plan: Sequence[Stage], out: Path, work: Path, site: Path | None, budget: float) -> list[Outcome]:
    """Run the plan in order. A failed build leaves out what follows; so does an exhausted budget."""
    deadline = time.monotonic() + budget
    no_gpu = why_no_gpu()
    outcomes: list[Outcome] = []
    for stage in plan:
        left = deadline - time.monotonic()
        reason = None
        if outcomes and outcomes[0].stage == "build" and outcomes[0].bad:
            reason = "the build failed"
        elif stage.gpu and no_gpu:
            reason = no_gpu
        elif stage.tool and shutil.which(stage.tool[0]) is None:
            reason = f"{stage.tool[0]} is not on PATH"
        elif left < 5:
            reason = f"the {budget:.0f} s are used up"
        if reason is None:
            print(f"{stage.name} ...", flush=True)
            outcomes.append(run_stage(stage, out, work, site, min(stage.limit, left)))
        else:
            outcomes.append(Outcome(stage.name, "left out", detail=reason))
    return outcomes


def run_stage(stage: Stage, out: Path, work: Path, site: Path | None, limit: float) -> Outcome:
    """Run one command in ``work``, where the source folder does not hide the package that was built."""
    # The repository comes after the build: the tests import `benchmarks` from it.
    paths = [str(path) for path in (site, ROOT) if path is not None]
    env = os.environ | stage.env | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    words = [*stage.tool, sys.executable, *stage.command]
    start = time.monotonic()
    with (out / stage.log).open("a+") as log:
        begin = log.seek(0, os.SEEK_END)
        log.write(f"==== {stage.name}\n")
        log.flush()
        # A session of its own, so that a time-out ends the children (compilers, test workers) too.
        with subprocess.Popen(words, cwd=work, env=env, stdout=log, stderr=log, start_new_session=True) as process:
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                status = None
        log.seek(begin)
        text = log.read()
    seconds = time.monotonic() - start
    if status is None:
        return Outcome(stage.name, "timed out", seconds, f"stopped after {limit:.0f} s, see {stage.log}")
    proofs = re.findall(stage.proof, text) if stage.proof else [""]
    if status != 0 or not proofs:
        why = f"exit status {status}" if status else f"nothing like {stage.proof!r} in the output"
        return Outcome(stage.name, "FAILED", seconds, f"{why}, see {stage.log}")
    return Outcome(stage.name, "ok", seconds, proofs[-1])


def table_of(outcomes: Sequence[Outcome], device: str) -> Table:
    """Return the table that comes last."""
    table = Table(f"GPU report, {device}", {key: key for key in ("stage", "result", "seconds", "detail")})
    table.rows = [vars(outcome) for outcome in outcomes]
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report. Returns 1 if a stage failed or timed out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where logs and results go")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"in all (default: {BUDGET})")
    parser.add_argument("--no-build", action="store_true", help="use the installed package")
    parser.add_argument("--dry-run", action="store_true", help="show and write the plan, run nothing")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="revkernels-") as folder:
        work = Path(folder)
        site = None if args.no_build else work / "site"
        plan = stages(out, site)
        for log in {stage.log for stage in plan}:
            (out / log).unlink(missing_ok=True)
        if args.dry_run:
            outcomes = [Outcome(s.name, "planned", detail=f"at most {s.limit} s, {s.log}") for s in plan]
        else:
            outcomes = run_stages(plan, out, work, site, args.budget)
    no_gpu = why_no_gpu()
    device = "cpu" if no_gpu else "cuda"
    table = table_of(outcomes, no_gpu or environment(device)["device"])
    (out / "report.txt").write_text(plain(table) + "\n")
    report("gpu_report", [table], out / "report.json", device)
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
