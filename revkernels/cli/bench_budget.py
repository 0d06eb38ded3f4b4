# SPDX-License-Identifier: Apache-2.0
"""``revkernels bench budget``: how much time each share of the memory saves, in a table and in a picture."""

from __future__ import annotations

import argparse
from typing import Any

from revkernels.cli.bench_network import DTYPES, OptionError
from revkernels.cli.bench_tables import how, picture, positive, timing, where
from revkernels.cli.output import Table, progress

__all__ = ["add_arguments", "budget"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subject's options."""
    parser.add_argument("--network", default="revnet110", help="as in bench network (default: revnet110)")
    parser.add_argument("--batch", type=positive, help="images (default: the network's; 100 of CIFAR's size)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 is autocast (default: float32)")
    parser.add_argument(
        "--percent", nargs="+", type=_percent, metavar="P", help="budgets, of the gap (default: 0 10 25 50 75 90 100)"
    )
    parser.add_argument("--keep-memory", action="store_true", help="freed memory stays in the process: no page faults")
    parser.add_argument(
        "--plot", "--png", metavar="FILE", type=picture, help="also draw time against peak memory, a PNG"
    )


def budget(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    """Measure one network under growing budgets."""
    from contextlib import nullcontext

    from revkernels.bench.budget import SHARES, Sweep, run, steps
    from revkernels.bench.clocks import clock_for, memory_kept
    from revkernels.bench.networks import find

    try:
        workload = find(args.network, args.device)
    except ValueError as error:
        raise OptionError(f"--{error}") from error
    shares = SHARES if args.percent is None else [percent / 100 for percent in args.percent]
    batch = args.batch or workload.batch
    sweep = Sweep(args.network, workload, batch, args.dtype, args.device, args.rounds, shares)
    if args.plot is not None:
        from revkernels.cli import plots  # before the work: without matplotlib there is no picture
    with progress("bench budget", steps(sweep)) as begin, memory_kept() if args.keep_memory else nullcontext():
        rows = list(run(sweep, clock_for(args.device), begin))
    title = f"{workload.title}, batch {batch}, {args.dtype}{' autocast' if args.dtype != 'float32' else ''}"
    table = _table(args, title, rows)
    if args.plot is not None:
        args.draw = lambda: plots.budgets(title, rows, where(args.device)).savefig(args.plot)
        table.notes.append(f"picture: {args.plot}")
    return rows, [table]


def _table(args: argparse.Namespace, title: str, rows: list[dict[str, Any]]) -> Table:
    table = timing(f"memory budgets, {title}", rows, "ms", 1e3)
    del table.columns["benchmark"], table.columns["case"], table.columns["ratio"]
    table.columns = {
        "variant": "activations",
        "peak_mib": "peak, MiB",
        "memory_percent": "of the memory gap, %",
        "median_ms": "median, ms",
        "quartiles": "quartiles",
        "ratio": "ratio to reconstruct",
        "time_percent": "of the time gap won back, %",
        "predicted_ms": "chains predicted, ms",
        "measured_ms": "chains measured, ms",
        "predicted_of_measured": "predicted / measured",
    }
    for shown, row in zip(table.rows, rows, strict=True):
        for key in ("memory", "time"):
            share = row[f"{key}_share"]
            shown[f"{key}_percent"] = None if share is None else 100 * share
        plan = row["plan"]
        if plan is not None:
            measured = plan["measured_s"]
            shown["predicted_ms"] = 1e3 * plan["predicted_s"]
            if measured:
                shown["measured_ms"] = 1e3 * measured
                shown["predicted_of_measured"] = plan["predicted_s"] / measured
    table.notes = [
        how(args),
        "gaps: between reconstruct and store, each contender on the fused kernels; peak: of the whole step",
        "chains: from the entry of the first to the end of the backward, which is what a plan predicts, from one step",
    ]
    if args.keep_memory:
        table.notes.append("freed memory stayed in the process (--keep-memory)")
    return table


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a number from 0 to 100")
    return value
