# SPDX-License-Identifier: Apache-2.0
"""Everything a GPU host can tell in ten minutes and without a network: ``python -m benchmarks.gpu_report --out DIR``.

Builds the package with CUDA into a throw-away folder, compares the backends with the oracle, tests the kernels of CUDA
and whole chains on them, runs compute-sanitizer on them, all these side by side, then the benchmarks one after another,
with the same tests of Triton's kernels behind the first few. Each stage has a time limit and the whole has a budget:
what does not fit is left out with a note. DIR keeps the logs, the result lines and the report (eight flat files); a
table comes last. The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from revkernels.bench import results
from revkernels.cli.cases import KERNELS
from revkernels.cli.output import Table, folder_to_write, plain, report
from revkernels.cli.stamp import commit, environment

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 540  # seconds, to leave room for what begins and ends a session of ten minutes

#: What the sanitizers run: both signs, lists, tails and halves, one pair of types, the options all at once, and every
#: norm in half of the layouts. They slow a kernel down ten to fifty times; timings, graphs and the large arrays are for
#: the plain run.
SANITIZED = (
    "(every_layout and float32+bfloat16) or (coupling_options and grid and amax) or four_dtypes or lists"
    " or ((forward or backward) and float32+bfloat16 and (odd or wide or tokens or last))"
)
#: Stages that may run side by side: none of them takes a time. Triton compiles a kernel for every case, which takes all
#: processors there are for minutes, so that its tests come behind the benchmarks that matter most.
TESTS, TRITON = "tests", "Triton's tests"
_LOGS = threading.Lock()


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
        group: stages of one group that follow each other run at the same time; "" runs alone.
    """

    name: str
    log: str
    command: Sequence[str]
    limit: int
    tool: Sequence[str] = ()
    env: dict[str, str] = field(default_factory=dict)
    proof: str | None = None
    gpu: bool = True
    group: str = ""


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
    plan = []
    if site is not None:
        pip = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(site), str(ROOT)]
        plan.append(Stage("build", "build.log", pip, 160, env={"REVK_CUDA": "ON"}, gpu=False))
    tests = _checks() + _tests()
    benchmarks = _benchmarks(out)
    first = [stage for stage in tests if stage.group == TESTS]
    return plan + first + benchmarks[:_FIRST] + [stage for stage in tests if stage not in first] + benchmarks[_FIRST:]


def _checks() -> list[Stage]:
    plan = []
    for backend in ("cpu", "cuda", "triton"):
        # A backend that is named and cannot run ends with 2, and the row must say ok for every kernel.
        check = ["-m", "revkernels", "check", "--backend", backend]
        ok = rf"\b{backend}\W+(ok \(\d+ calls\))" + r"\W+ok \(\d+ calls\)" * (len(KERNELS) - 1)
        env = {"COLUMNS": "200"}  # so that no cell of the table is broken
        gpu = backend != "cpu"
        group = _group(backend)
        limit = 200 if backend == "triton" else 100
        plan.append(Stage(f"check, {backend}", "check.log", check, limit, env=env, proof=ok, gpu=gpu, group=group))
    return plan


def _group(backend: str) -> str:
    return TRITON if backend == "triton" else TESTS


#: Tests of what is above the kernels, on the backend that the environment names.
_ANY_BACKEND = ("behaviour/test_gpu.py", "behaviour/test_exact_gpu.py", "test_measure.py", "test_diagnostics_memory.py")
#: Of other libraries' arrays, for which it must name none; skipped where CuPy, or a JAX for CUDA, is missing.
_LIBRARIES = ("test_cupy.py", "test_jax_kernels.py")


def _tests() -> list[Stage]:
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    cores = os.cpu_count() or 1
    passed = r"\b[1-9]\d* passed.*"
    plan = []
    for backend, norms in (("cuda", "test_cuda_gpu_norm_act.py"), ("triton", "test_triton_norm_gpu.py")):
        # The kernels' own tests name their backend; the chains take the one of the environment.
        names = (f"test_{backend}_gpu.py", norms, *_ANY_BACKEND)
        workers = cores - 2 if backend == "triton" else cores // 2
        spread = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
        command = [*pytest, *spread, "-m", "gpu", "-rs", *(str(ROOT / "tests" / name) for name in names)]
        env = {"REVKERNELS_BACKEND": backend}
        limit, group = 200 if backend == "triton" else 150, _group(backend)
        plan.append(Stage(f"gpu tests, {backend}", "tests.log", command, limit, env=env, proof=passed, group=group))
    command = [*pytest, "-m", "gpu", "-rs", *(str(ROOT / "tests" / name) for name in _LIBRARIES)]
    ran = r"\b[1-9]\d* (?:passed|skipped).*"
    plan.append(Stage("gpu tests, libraries", "tests.log", command, 150, proof=ran, group=TESTS))
    # The caching allocator would hide an access beyond a tensor.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kernels in ("test_cuda_gpu.py", "test_cuda_gpu_norm_act.py"):
        command = [*pytest, "-k", SANITIZED, str(ROOT / "tests" / kernels)]
        for tool in ("memcheck", "racecheck"):
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
            name = f"{tool}, {'norms' if 'norm' in kernels else 'couplings'}"
            plan.append(Stage(name, "sanitizer.log", command, 150, sanitizer, env, passed, group=TESTS))
    return plan


#: Of the benchmarks, how many come before Triton's tests.
_FIRST = 3


#: torch.compile takes minutes, and comes last.
_COMPILED = ("store, compiled", "checkpoint, compiled", "memory budget 0.5, compiled", "store, fused")


def _benchmarks(out: Path) -> list[Stage]:
    plan = []
    large = ["--batch", "128"]  # a smaller chain would measure launches
    tensors = ["--megabytes", "192"]  # and a smaller tensor calls from Python
    cifar = ["--network", "revnet110", "--batch", "128", "--dtype", "bfloat16", "float32"]
    imagenet = ["--network", "revnet104", "revvit_base", "--batch", "64", "--dtype", "bfloat16"]
    for subject, what, limit, more in (
        ("passes", "bfloat16", 30, [*tensors, "--matching", "past cache", "bfloat16"]),  # Triton compiles as it goes
        ("network", "cifar, graphs", 70, [*cifar, "--graphs"]),
        ("network", "imagenet, graphs", 110, [*imagenet, "--graphs"]),
        ("network", "cifar", 70, cifar),
        ("network", "imagenet", 80, imagenet),
        ("coupling", "", 45, []),
        ("passes", "float32", 45, [*tensors, "--matching", "past cache", "float32"]),
        ("block", "", 20, large),
        ("memory", "", 20, large),
        ("overhead", "", 20, ["--rounds", "20"]),
        ("overhead", "convolutions", 20, ["--rounds", "20", "--branch", "conv"]),
        ("network", "compiled", 200, [*cifar[:-1], "--compile", "--only", *_COMPILED]),
    ):
        bench = ["-m", "revkernels", "bench", subject, "--device", "cuda", "--save", str(out), *more]
        name = f"bench {subject}" + (f", {what}" if what else "")
        plan.append(Stage(name, "bench.log", bench, limit, proof=r"\d+ lines appended"))
    return plan


def why_no_gpu() -> str | None:
    """Return why stages that need a GPU cannot run, or None."""
    try:
        import torch
    except ImportError:
        return "no GPU: torch is not installed"
    return None if torch.cuda.is_available() else "no GPU: torch sees no CUDA device"


def run_stages(
    plan: Sequence[Stage],
    out: Path,
    work: Path,
    site: Path | None,
    budget: float,
    tell: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the plan in order, groups side by side. A failed build leaves out what follows; so does a spent budget.

    ``tell`` is given what there is after each group: whoever runs this may be stopped before the end.
    """
    deadline = time.monotonic() + budget
    no_gpu = why_no_gpu()
    outcomes: list[Outcome] = []
    for _, group in itertools.groupby(enumerate(plan), lambda item: item[1].group or item[0]):
        together = [stage for _, stage in group]
        left = deadline - time.monotonic()
        reasons = {
            stage.name: _why_not(stage, no_gpu, bool(outcomes) and outcomes[0].stage == "build" and outcomes[0].bad)
            or (f"the {budget:.0f} s are used up" if left < 5 else None)
            for stage in together
        }

        def one(stage: Stage, reasons: dict[str, str | None] = reasons, left: float = left) -> Outcome:
            reason = reasons[stage.name]
            if reason is not None:
                return Outcome(stage.name, "left out", detail=reason)
            print(f"{stage.name} ...", flush=True)
            return run_stage(stage, out, work, site, min(stage.limit, left))

        with ThreadPoolExecutor(len(together)) as pool:
            outcomes += pool.map(one, together)
        tell(outcomes)
    return outcomes


def _why_not(stage: Stage, no_gpu: str | None, unbuilt: bool) -> str | None:
    if unbuilt:
        return "the build failed"
    if stage.gpu and no_gpu:
        return no_gpu
    if stage.tool and shutil.which(stage.tool[0]) is None:
        return f"{stage.tool[0]} is not on PATH"
    return None


def run_stage(stage: Stage, out: Path, work: Path, site: Path | None, limit: float) -> Outcome:
    """Run one command in ``work``, where the source folder does not hide the package that was built."""
    # Not the repository, whose source folder would hide an installed build: the tests find it by themselves.
    paths = [str(site)] if site is not None else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    env = os.environ | stage.env | {"PYTHONPATH": os.pathsep.join(paths)}
    words = [*stage.tool, sys.executable, *stage.command]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", dir=work) as output:  # its own, for others may run beside it
        # A session of its own, so that a time-out ends the children (compilers, test workers) too.
        with subprocess.Popen(
            words, cwd=work, env=env, stdout=output, stderr=output, start_new_session=True
        ) as process:
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                status = None
        output.seek(0)
        text = output.read()
    seconds = time.monotonic() - start
    with _LOGS, (out / stage.log).open("a") as log:
        log.write(f"==== {stage.name}\n{text}\n")
    if status is None:
        return Outcome(stage.name, "timed out", seconds, f"stopped after {limit:.0f} s, see {stage.log}")
    proofs = re.findall(stage.proof, text) if stage.proof else [""]
    if status != 0 or not proofs:
        why = f"exit status {status}" if status else f"nothing like {stage.proof!r} in the output"
        last = next(iter(re.findall(r"\b\d+ failed.*", text)[-1:]), "")
        return Outcome(stage.name, "FAILED", seconds, f"{why}, see {stage.log} {last}".strip())
    return Outcome(stage.name, "ok", seconds, proofs[-1])


def sign(out: Path, revision: str | None) -> None:
    """Add to the result lines the commit, which the installed build that made them does not know."""
    for path in out.glob("*.jsonl"):
        rows = results.read(path)
        for row in rows:
            row["environment"]["commit"] = row["environment"]["commit"] or revision
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table_of(outcomes: Sequence[Outcome], device: str) -> Table:
    """Return the table that comes last."""
    table = Table(f"GPU report, {device}", {key: key for key in ("stage", "result", "seconds", "detail")})
    table.rows = [vars(outcome) for outcome in outcomes]
    return table


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:  # nor NaN
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a number of seconds, more than 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Make the report. Returns 1 if a stage failed or timed out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=folder_to_write, required=True, metavar="DIR", help="where logs and results go")
    parser.add_argument(
        "--budget", type=_seconds, default=BUDGET, metavar="SECONDS", help=f"in all (default: {BUDGET})"
    )
    parser.add_argument("--no-build", action="store_true", help="use the installed package")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="the build and stages that have one of these in the name"
    )
    parser.add_argument("--dry-run", action="store_true", help="show and write the plan, run nothing")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    names = [stage.name for stage in stages(out, None if args.no_build else out)]
    for word in args.only or ():
        if not any(word in name for name in names):
            parser.error(f"--only {word!r}: no stage has it in its name; there are {', '.join(map(repr, names))}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="revkernels-") as folder:
        work = Path(folder)
        site = None if args.no_build else work / "site"
        plan = [
            s for s in stages(out, site) if not args.only or s.name == "build" or any(w in s.name for w in args.only)
        ]
        if not args.dry_run:
            for log in {stage.log for stage in plan}:
                (out / log).unlink(missing_ok=True)
        no_gpu = why_no_gpu()
        device = "cpu" if no_gpu else "cuda"
        name = no_gpu or environment(device)["device"]

        def tell(outcomes: Sequence[Outcome]) -> None:
            sign(out, commit())
            (out / "report.txt").write_text(plain(table_of(outcomes, name)) + "\n")

        if args.dry_run:
            outcomes = [Outcome(s.name, "planned", detail=f"at most {s.limit} s, {s.log}") for s in plan]
            tell(outcomes)
        else:
            outcomes = run_stages(plan, out, work, site, args.budget, tell)
    report("gpu_report", [table_of(outcomes, name)], out / "report.json", device)
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
