# SPDX-License-Identifier: Apache-2.0
"""``revkernels bench SUBJECT``: measure, show, and with --save append to the results kept."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from revkernels.cli.output import Table, add_json_option, display, progress, report
from revkernels.cli.stamp import environment

RESULTS = Path("benchmarks/results")
_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subjects and their options."""
    subjects = parser.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    for name, about, measure in (
        ("coupling", "the kernels against the torch calls they replace", _coupling),
        ("block", "a step of a chain of blocks, stored, checkpointed and rebuilt", _block),
        ("memory", "peak activation bytes against depth", _memory),
        ("overhead", "what the driver itself costs a half-step", _overhead),
    ):
        subject = subjects.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        subject.set_defaults(measure=measure)
        subject.add_argument("--device", default="cpu", help="cpu or cuda[:n] (default: cpu)")
        subject.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
        subject.add_argument(
            "--save",
            metavar="FOLDER",
            nargs="?",
            const=RESULTS,
            type=Path,
            help=f"append result lines to FOLDER/<device>.jsonl (default folder: {RESULTS})",
        )
        add_json_option(subject)
        if name != "memory":
            rounds = {"coupling": 15, "block": 7, "overhead": 100}[name]
            subject.add_argument("--rounds", type=_rounds, default=rounds, help=f"timed rounds (default: {rounds})")
        if name == "coupling":
            subject.add_argument(
                "--megabytes", type=_positive, default=64, help="size of a stream (default: 64, past most caches)"
            )
        elif name != "overhead":
            batch = {"block": 32, "memory": 8}[name]
            subject.add_argument("--batch", type=_positive, default=batch, help=f"images (default: {batch})")
            subject.add_argument("--width", type=_positive, default=32, help="channels of a stream (default: 32)")
            subject.add_argument("--side", type=_positive, default=32, help="rows and columns (default: 32)")
        if name == "block":
            subject.add_argument("--depth", type=_depth, default=18, help="branches, two a block (default: 18)")
        if name == "memory":
            subject.add_argument(
                "--depth", type=_depth, nargs="+", help="branches, two a block; several (default: 6 18 54)"
            )


def run(args: argparse.Namespace) -> int:
    """Measure one subject."""
    import torch

    kind = args.device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        why = "this torch sees no CUDA device" if kind == "cuda" else "it must be cpu or cuda[:n]"
        print(f"revkernels bench: --device {args.device}: {why}", file=sys.stderr)
        return 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows, tables = args.measure(args)
    if args.save is not None:
        from revkernels.bench.results import append

        path = append(rows, environment(args.device), args.save, _command(args))
        tables[-1].notes.append(f"{len(rows)} lines appended to {path}")
    report(f"bench {args.subject}", tables, args.json, args.device)
    return 0


def _coupling(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    from revkernels.bench.clocks import clock_for
    from revkernels.bench.coupling import SUITE, Setup

    setup = Setup(args.device, args.megabytes)
    with progress("bench coupling", len(SUITE)) as begin:
        measured = list(SUITE.run(setup, clock_for(args.device), args.rounds, begin))
    rows = _rows(measured)
    calls = [row for row in rows if row["benchmark"] == "call"]
    passes = [row for row in rows if row["benchmark"] != "call"]
    large = _timing(f"kernels against torch, {args.megabytes} MiB a stream", passes, "ms", 1e3)
    large.columns |= {"gbps": "GB/s"} | _GOAL
    small = _timing("cost of a call, 1,000 float32 elements", calls, "us", 1e6)
    small.columns |= _GOAL
    for table in (large, small):
        table.notes = [_how(args)]
    return rows, [large, small]


def _block(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    from revkernels.bench import block
    from revkernels.bench.clocks import clock_for

    shape = _shape(args, args.depth)
    with progress("bench block", args.rounds + block.STEPS) as begin:
        rows = _rows(list(block.run(shape, clock_for(args.device), args.rounds, begin)))
    table = _timing(f"one training step, float32, {shape}", rows, "ms", 1e3)
    del table.columns["benchmark"], table.columns["case"]
    table.columns |= {"peak_mib": "peak activations, MiB"} | _GOAL
    table.notes = [f"depth {shape.depth}: {shape.depth} branches, {shape.depth // 2} blocks. {_how(args)}"]
    return rows, [table]


def _memory(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    from revkernels.bench import memory

    depths = args.depth or memory.DEPTHS
    shape = _shape(args, depths[0])
    with progress("bench memory", 3 * len(depths)) as begin:
        rows = list(memory.run(shape, depths, begin))
    table = Table(f"peak activation memory of a training step, {args.batch} images", {"variant": "variant"})
    table.columns |= {f"depth_{depth}": f"depth {depth}, MiB" for depth in depths}
    table.columns |= _GOAL
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        peaks = {f"depth_{row['depth']}": row["peak_bytes"] / _MIB for row in own}
        table.rows.append({"variant": variant, **peaks, **_goal(own[-1].get("goal"), "")})
    size = f"{args.batch}x{args.width}x{args.side}x{args.side}"
    table.notes = [f"depth counts branches, two a block; a stream is {size}, float32"]
    return rows, [table]


def _overhead(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    from revkernels.bench import overhead
    from revkernels.bench.clocks import clock_for

    with progress("bench overhead", args.rounds + 2) as begin:
        rows = _rows(list(overhead.run(args.device, clock_for(args.device), args.rounds, begin)))
    table = _timing(f"forward and backward of {overhead.HALF_STEPS} branches of x * w, 8 elements", rows, "ms", 1e3)
    del table.columns["benchmark"], table.columns["case"]
    table.columns |= {"us": "us a half-step"} | _GOAL
    for shown, row in zip(table.rows, rows, strict=True):
        shown["us"] = row["us_a_half_step"]
    table.notes = [_how(args)]
    return rows, [table]


_GOAL = {"goal": "goal", "reached": "reached", "met": "met"}


def _rows(measured: list[Any]) -> list[dict[str, Any]]:
    from revkernels.bench.results import as_row

    return [as_row(measurement) for measurement in measured]


def _timing(title: str, rows: list[dict[str, Any]], unit: str, scale: float) -> Table:
    columns = {"benchmark": "benchmark", "case": "case", "variant": "variant", f"median_{unit}": f"median, {unit}"}
    table = Table(title, columns | {"quartiles": "quartiles", "ratio": "ratio"})
    for row in rows:
        shown = {key: row[key] for key in ("benchmark", "case", "variant", "ratio", "gbps")}
        shown[f"median_{unit}"] = row["median_s"] * scale
        shown["quartiles"] = f"{display(row['q1_s'] * scale)} to {display(row['q3_s'] * scale)}"
        if "peak_bytes" in row:
            shown["peak_mib"] = row["peak_bytes"] / _MIB
        table.rows.append(shown | _goal(row["goal"], row["baseline"]))
    return table


def _goal(goal: dict[str, Any] | None, baseline: str) -> dict[str, Any]:
    if goal is None:
        return {}
    unit, link = {"extra_us": (" us above", "of"), "growth_bytes": (" bytes above", "")}.get(
        goal["quantity"], ("", "of")
    )
    of = "" if goal["of"] == baseline else f" {link} {goal['of']}".replace("  ", " ")
    return {"goal": f"<= {goal['at_most']:g}{unit}{of}", "reached": goal["value"], "met": goal["met"]}


def _shape(args: argparse.Namespace, depth: int) -> Any:
    from revkernels.bench.chains import Shape

    return Shape(depth, args.batch, args.width, args.side, args.device)


def _how(args: argparse.Namespace) -> str:
    stamp = environment(args.device)
    where = f"{stamp['device']}, {stamp['threads']} threads, torch {stamp['torch']}"
    return f"medians of {args.rounds} interleaved rounds; ratios round by round; {where}"


def _command(args: argparse.Namespace) -> str:
    left_out = ("command", "subject", "run", "measure", "save", "json")
    options = " ".join(
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in vars(args).items()
        if name not in left_out and value is not None
    )
    return f"revkernels bench {args.subject} {options}"


def _positive(text: str) -> int:
    return _whole(text, at_least=1)


def _rounds(text: str) -> int:
    return _whole(text, at_least=2)


def _depth(text: str) -> int:
    depth = _whole(text, at_least=2)
    if depth % 2:
        raise argparse.ArgumentTypeError(f"{depth} is odd; a block has two branches")
    return depth


def _whole(text: str, at_least: int) -> int:
    if not text.isdigit() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a whole number, at least {at_least}")
    return int(text)
