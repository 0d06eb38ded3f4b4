# SPDX-License-Identifier: Apache-2.0
"""``revkernels bench network`` and ``bench peers``: contenders compared in tables and in a picture."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from revkernels.cli.bench_tables import depth, how, picture, positive, timing, where
from revkernels.cli.output import Table, progress

__all__ = ["OptionError", "add_arguments", "network", "peers"]

DTYPES = ("float32", "bfloat16")
_MOST = 16  # times the batch: the largest tried at equal memory


class OptionError(ValueError):
    """An option that can be found invalid only after torch is imported."""


def add_arguments(parser: argparse.ArgumentParser, subject: str) -> None:
    """Add the options of one of the two subjects."""
    if subject == "network":
        parser.add_argument(
            "--network",
            nargs="+",
            default=["revnet38"],
            help="revnet38, revnet110, bottleneck, revnet104, revvit_small, revvit_base (default: revnet38)",
        )
        parser.add_argument("--batch", type=positive, help="images (default: the network's; 100 of CIFAR's size)")
        parser.add_argument("--compile", action="store_true", help="contenders of torch.compile too; takes minutes")
        parser.add_argument(
            "--equal-memory", action="store_true", help="also images a second in the memory of the stored step"
        )
    else:
        parser.add_argument("--batch", type=positive, default=32, help="images (default: 32)")
        parser.add_argument("--depth", type=depth, default=18, help="branches, two a block (default: 18)")
        parser.add_argument("--width", type=positive, default=32, help="channels of a stream (default: 32)")
        parser.add_argument("--side", type=positive, default=32, help="rows and columns (default: 32)")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float32"], help="bfloat16 is autocast (default: float32)"
    )
    parser.add_argument("--graphs", action="store_true", help="time replays of CUDA graphs of the steps (cuda only)")
    parser.add_argument("--profile", action="store_true", help="also say where the time of a step goes")
    parser.add_argument("--keep-memory", action="store_true", help="freed memory stays in the process: no page faults")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="only these and the baseline (default: all)")
    parser.add_argument("--plot", metavar="FILE", type=picture, help="also draw time against peak memory, a PNG")


def network(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    """Measure whole networks."""
    from revkernels.bench.contenders import CASTING, COMPILED, OPTIONS, WAYS
    from revkernels.bench.network import Job
    from revkernels.bench.networks import find

    known = (*WAYS, *CASTING, *OPTIONS, *(COMPILED if args.compile else ()))
    ways = _chosen(known, args.only, "" if args.compile else " --compile")
    jobs = []
    for name in dict.fromkeys(args.network):
        try:
            found = find(name, args.device)
        except ValueError as error:
            raise OptionError(f"--{error}") from error
        most = _MOST if args.equal_memory else 0
        fitting = [way for way in ways if way.transitions is None or found.stages]
        for dtype in dict.fromkeys(args.dtype):
            batch, narrow = args.batch or found.batch, dtype == "bfloat16"
            jobs.append(
                Job(
                    "network",
                    name,
                    found,
                    [way for way in fitting if narrow or not way.casting],
                    batch,
                    dtype,
                    args.device,
                    args.rounds,
                    most,
                    args.graphs,
                    args.profile,
                )
            )
    return _measured(args, jobs, [])


def peers(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    """Measure one stage, in this package and in the other libraries."""
    from revkernels.bench.chains import Shape
    from revkernels.bench.contenders import WAYS
    from revkernels.bench.network import Job
    from revkernels.bench.networks import Stage

    stage = Stage(Shape(args.depth, args.batch, args.width, args.side, args.device))
    ways = _chosen(WAYS, args.only)
    jobs = [
        Job(
            "peers",
            stage.name,
            stage,
            ways,
            args.batch,
            dtype,
            args.device,
            args.rounds,
            graphs=args.graphs,
            profile=args.profile,
        )
        for dtype in dict.fromkeys(args.dtype)
    ]
    return _measured(args, jobs, [way.peer.note() for way in ways if way.peer is not None])


def _chosen(ways: Sequence[Any], only: list[str] | None, flag: str = "") -> list[Any]:
    """Return the requested ways and the baseline.

    Raises:
        OptionError: a name that no way has.
    """
    from revkernels.bench.contenders import BASELINE

    names = [way.name for way in ways]
    if only is None:
        return list(ways)
    for name in only:
        if name not in names:
            more = f"; those of torch.compile need{flag}" if flag else ""
            raise OptionError(
                f"--only {name!r}: there is no such contender; there are {', '.join(map(repr, names))}{more}"
            )
    return [way for way in ways if way.name in (BASELINE, *only)]


def _measured(
    args: argparse.Namespace, jobs: Sequence[Any], notes: list[str]
) -> tuple[list[dict[str, Any]], list[Table]]:
    import torch

    from revkernels.bench.clocks import clock_for, memory_kept
    from revkernels.bench.network import run, steps

    if args.graphs and args.device.partition(":")[0] == "cpu":
        raise OptionError("--graphs needs --device cuda: what it times are replays of CUDA graphs")

    if args.plot is not None:
        from revkernels.cli import plots  # before the work: without matplotlib there is no picture
    clock = clock_for(args.device)
    done: list[tuple[Any, list[dict[str, Any]]]] = []
    kept = memory_kept() if args.keep_memory else nullcontext()
    with progress(f"bench {args.subject}", sum(map(steps, jobs))) as begin, quiet_peers(), kept:
        for job in jobs:
            torch.manual_seed(0)
            done.append((job, list(run(job, clock, begin))))
    tables = [table for job, rows in done for table in _tables(args, job, rows, notes)]
    if args.plot is not None:
        panels = [(_title(job), rows) for job, rows in done]
        args.draw = lambda: plots.trade_off(panels, where(args.device)).savefig(args.plot)
        tables[-1].notes.append(f"picture: {args.plot}")
    return [row for _, rows in done for row in rows], tables


def _tables(args: argparse.Namespace, job: Any, rows: list[dict[str, Any]], notes: list[str]) -> list[Table]:
    table = timing(f"training step, {_title(job)}", rows, "ms", 1e3)
    del table.columns["benchmark"], table.columns["case"]
    table.columns |= {
        "peak_mib": "peak activations, MiB",
        "images_per_s": "images/s",
        "gradient": "gradient, degrees off",
        "float64": "off float64",
        "updates": "BN updates",
        "version": "version",
    }
    if job.most:
        table.columns |= {"equal_batch": "batch at equal memory", "equal_images_per_s": "images/s at equal memory"}
    if any(row["error"] for row in rows):
        table.columns |= {"error": "error"}
    for shown, row in zip(table.rows, rows, strict=True):
        shown |= {key: row.get(key) for key in ("images_per_s", "version", "error")}
        shown["gradient"] = row["gradient_degrees"] if row.get("gradient_error") is None else row["gradient_error"]
        shown["float64"] = row["float64_degrees"]
        shown["updates"] = row["statistics_updates"]
        shown["equal_batch"] = row.get("equal_memory_batch")
        shown["equal_images_per_s"] = row.get("equal_memory_images_per_s")
    table.notes = [
        f"ratio to '{rows[0]['baseline']}'; {how(args)}",
        "gradient: angle to the baseline's in the same dtype, then in float64; an input of a ReLU that is rounded to "
        "the other side of zero turns either by up to a degree, and bfloat16 loses more",
        "BN updates: of the running statistics in a step; 1 is right",
        *notes,
    ]
    if args.graphs:
        table.notes.append("timed: replays of a CUDA graph of the step (--graphs)")
    if args.keep_memory:
        table.notes.append("freed memory stayed in the process (--keep-memory)")
    if job.most:
        table.notes.append(f"equal memory: the baseline's peak; batches up to {job.most} times {job.batch} were tried")
    goals = Table(f"goals, {_title(job)}", {"variant": "variant", "goal": "goal", "reached": "reached", "met": "met"})
    for row in rows:
        for goal in row["goals"]:
            limit = {"goal": f"<= {goal['at_most']:g} of {goal['of']}", "reached": goal["value"], "met": goal["met"]}
            goals.rows.append({"variant": row["variant"], **limit})
    return [table, *([goals] if goals.rows else []), *([_profile(job, rows)] if job.profile else [])]


def _profile(job: Any, rows: Sequence[dict[str, Any]]) -> Table:
    columns = {"variant": "variant", "products": "products, ms", "fusible": "norms, couplings, sums, ms"}
    columns |= {"rest": "rest, ms", "total": "total, ms", "floor": "floor of the ratio"}
    table = Table(f"where the time goes, {_title(job)}", columns)
    totals = {row["variant"]: row["profile"]["total"] for row in rows if "profile" in row}
    for row in rows:
        if "profile" in row:
            shown = {kind: 1e3 * seconds for kind, seconds in row["profile"].items()}
            floor = row["profile"]["products"] / totals[row["baseline"]]
            table.rows.append({"variant": row["variant"], "floor": floor} | shown)
    table.notes = [
        "by torch.profiler, which costs every operator some time; products: convolutions, matrix products, attention",
        f"floor: its products alone, everything else being free, over all of '{rows[0]['baseline']}'",
    ]
    return table


def _title(job: Any) -> str:
    return f"{job.workload.title}, batch {job.batch}, {job.dtype}{' autocast' if job.dtype != 'float32' else ''}"


@contextmanager
def quiet_peers() -> Iterator[None]:
    """Hide the other libraries' warnings about deprecated torch functions, which come at every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(memcnn|revlib|revtorch|reformer_pytorch)\b")
        yield
