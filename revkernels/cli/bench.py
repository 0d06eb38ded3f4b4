# SPDX-License-Identifier: Apache-2.0
"""``revkernels bench SUBJECT``: measure, show, and with --save append to the stored results."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from revkernels.cli import bench_budget, bench_jax, bench_network
from revkernels.cli.bench_tables import (
    GOAL,
    MIB,
    command_of,
    depth,
    device_problem,
    goal_cells,
    how,
    positive,
    rounds,
    rows_of,
    threads,
    timing,
)
from revkernels.cli.output import Table, add_json_option, folder_to_write, progress, report
from revkernels.cli.stamp import environment
from revkernels.threads import set_num_threads

RESULTS = Path("benchmarks/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subjects and their options."""
    subjects = parser.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    for name, about, measure, times in (
        ("coupling", "the kernels against the torch calls they replace", _coupling, 15),
        ("numpy", "the kernels on NumPy arrays against the expressions they replace; needs no torch", _numpy, 15),
        ("passes", "the fused norm kernels against the torch calls they replace", _passes, 15),
        ("block", "a step of a chain of blocks, stored, checkpointed and reconstructed", _block, 7),
        ("network", "a training step of whole networks in every way there is", bench_network.network, 5),
        ("budget", "a training step of a network under growing memory budgets", bench_budget.budget, 7),
        ("peers", "a stage of reversible blocks run by other libraries", bench_network.peers, 7),
        ("memory", "peak activation bytes against depth", _memory, None),
        ("overhead", "what the driver itself costs a half-step", _overhead, 100),
        ("jax", "a training step under JAX, stored, checkpointed and reconstructed", bench_jax.chain, 7),
    ):
        subject = subjects.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        subject.set_defaults(measure=measure, draw=None)
        if name == "numpy":
            subject.set_defaults(device="cpu")
        else:
            subject.add_argument("--device", default="cpu", help="cpu or cuda[:n] (default: cpu)")
        if name != "jax":  # which uses the processors that the process may run on
            whose = "OpenMP's" if name == "numpy" else "torch's"
            subject.add_argument("--threads", type=threads, metavar="N", help=f"CPU threads (default: {whose})")
        subject.add_argument(
            "--save",
            metavar="FOLDER",
            nargs="?",
            const=str(RESULTS),
            type=folder_to_write,
            help=f"append result lines to FOLDER/<device>.jsonl (default folder: {RESULTS})",
        )
        add_json_option(subject)
        if times is not None:
            subject.add_argument("--rounds", type=rounds, default=times, help=f"timed rounds (default: {times})")
        if name in ("coupling", "numpy", "passes"):
            subject.add_argument(
                "--megabytes", type=positive, default=64, help="size of a stream (default: 64, past most caches)"
            )
        if name in ("numpy", "passes"):
            subject.add_argument(
                "--matching", nargs="+", metavar="WORD", default=[], help="only cases with these in their name"
            )
        if name in ("block", "memory"):
            batch = {"block": 32, "memory": 8}[name]
            subject.add_argument("--batch", type=positive, default=batch, help=f"images (default: {batch})")
            subject.add_argument("--width", type=positive, default=32, help="channels of a stream (default: 32)")
            subject.add_argument("--side", type=positive, default=32, help="rows and columns (default: 32)")
        if name == "overhead":
            subject.add_argument(
                "--branch",
                choices=("scale", "stateless", "conv", "mlp"),
                default="scale",
                help="what a branch is: x * w in a class of its own, the same declared stateless, BN-ReLU-convolution, "
                "or LN-linear-GELU-dropout-linear (default: scale)",
            )
        if name == "block":
            subject.add_argument("--depth", type=depth, default=18, help="branches, two a block (default: 18)")
        if name == "memory":
            subject.add_argument(
                "--depth", type=depth, nargs="+", help="branches, two a block; several (default: 6 18 54)"
            )
        if name in ("network", "peers"):
            bench_network.add_arguments(subject, name)
        if name == "budget":
            bench_budget.add_arguments(subject)
        if name == "jax":
            bench_jax.add_arguments(subject)


def run(args: argparse.Namespace) -> int:
    """Measure one subject."""
    try:
        if wanted := os.environ.get("REVKERNELS_BACKEND"):
            raise bench_network.OptionError(
                f"REVKERNELS_BACKEND={wanted} is set, and would be what every contender of ours runs on: unset it"
            )
        if "side" in args and args.batch * args.side**2 < 2:
            raise bench_network.OptionError("--batch 1 --side 1: one value a channel has no variance for a batch norm")
        if args.subject == "numpy":
            set_num_threads(args.threads)
        elif args.subject != "jax":
            _prepare_torch(args)
        rows, tables = args.measure(args)
    except bench_network.OptionError as error:
        return _refuse(str(error))
    try:
        if args.save is not None:
            from revkernels.bench import results

            path = results.append(rows, environment(args.device), args.save, command_of(args))
            tables[-1].notes.append(f"{len(rows)} lines appended to {path}")
    finally:  # results are not lost if the folder is full
        report(f"bench {args.subject}", tables, args.json, args.device)
    if args.draw is not None:  # set by the subject; runs after all else for the same reason
        args.draw()
    return 0


def _chosen(suite: Any, words: list[str]) -> Any:
    try:
        return suite.matching(words)
    except ValueError as error:
        raise bench_network.OptionError(f"--matching: {error}") from error


def _prepare_torch(args: argparse.Namespace) -> None:
    import torch

    problem = device_problem(args.device)
    if problem is not None:
        raise bench_network.OptionError(problem)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def _refuse(why: str) -> int:
    print(f"revkernels bench: {why}", file=sys.stderr)
    return 2


def _coupling(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    from revkernels.bench.clocks import clock_for
    from revkernels.bench.coupling import SUITE, Setup

    setup = Setup(args.device, args.megabytes)
    with progress("bench coupling", len(SUITE)) as begin:
        measured = list(SUITE.run(setup, clock_for(args.device), args.rounds, begin))
    rows = rows_of(measured)
    calls = [row for row in rows if row["benchmark"] == "call"]
    passes = [row for row in rows if row["benchmark"] != "call"]
    large = timing(f"kernels against torch, {args.megabytes} MiB a stream", passes, "ms", 1e3)
    large.columns |= {"gbps": "GB/s"} | GOAL
    small = timing("cost of a call, 1,000 float32 elements", calls, "us", 1e6)
    small.columns |= GOAL
    for table in (large, small):
        table.notes = [how(args)]
    return rows, [large, small]


def _numpy(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    from revkernels.bench.clocks import clock_for, memory_kept
    from revkernels.bench.numpy import SUITE, Setup
    from revkernels.cli.stamp import threads

    suite, setup = _chosen(SUITE, args.matching), Setup(args.megabytes, args.threads or threads())
    # Freed memory is kept, for NumPy's temporaries: the page faults of new ones would be most of their time.
    with progress("bench numpy", len(suite)) as begin, memory_kept():
        rows = rows_of(list(suite.run(setup, clock_for("cpu"), args.rounds, begin)))
    tables = []
    for title, own, unit, scale in (
        (f"{args.megabytes} MiB a stream", [r for r in rows if r["benchmark"] != "call"], "ms", 1e3),
        ("cost of a call, 1,000 float32 elements", [r for r in rows if r["benchmark"] == "call"], "us", 1e6),
    ):
        if own:
            table = timing(f"kernels against NumPy, {title}", own, unit, scale)
            table.columns |= {"gbps": "GB/s"} | GOAL
            table.notes = [how(args)]
            tables.append(table)
    return rows, tables


def _passes(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    from revkernels.bench.clocks import clock_for, memory_kept
    from revkernels.bench.harness import measure
    from revkernels.bench.passes import SUITE, PassSetup, copying

    setup = PassSetup(args.device, args.megabytes)
    suite = _chosen(SUITE, args.matching)
    clock, size = clock_for(args.device), f"{args.megabytes} MiB"
    with progress("bench passes", 1 + len(suite)) as begin, memory_kept():
        begin("copy")
        (copy,) = rows_of(measure("copy", size, copying(setup), clock, args.rounds))
        rows = rows_of(list(suite.run(setup, clock, args.rounds, begin)))
    for row in rows:
        row["of_copy"] = row["gbps"] / copy["gbps"]
    tables = []
    for place, title in (
        ("past cache", f"{args.megabytes} MiB a tensor"),
        ("in cache", "tensors of a network's stage"),
    ):
        own = [row for row in rows if row["case"].endswith(place)]
        if not own:
            continue
        table = timing(f"fused norms against torch, {title}", own, "ms", 1e3)
        table.columns |= {"gbps": "GB/s", "of_copy": "of a copy's"} | GOAL
        for shown, row in zip(table.rows, own, strict=True):
            shown["of_copy"] = row["of_copy"]
        table.notes = [
            how(args),
            f"GB/s of what must be read and written; a copy of {size} reads and writes {copy['gbps']:,.0f} GB/s",
            "uncouple_norm_act_ reads the statistics that the forward left; torch, and 'computed', compute them again",
        ]
        tables.append(table)
    if not setup.backends():
        tables[-1].notes.append(f"no fused backend with these kernels runs on {args.device}: torch stands alone")
    return [copy, *rows], tables


def _block(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    from revkernels.bench import block
    from revkernels.bench.clocks import clock_for

    shape = _shape(args, args.depth)
    with progress("bench block", args.rounds + block.STEPS) as begin:
        rows = rows_of(list(block.run(shape, clock_for(args.device), args.rounds, begin)))
    table = timing(f"one training step, float32, {shape}", rows, "ms", 1e3)
    del table.columns["benchmark"], table.columns["case"]
    table.columns |= {"peak_mib": "peak activations, MiB"} | GOAL
    table.notes = [f"depth {shape.depth}: {shape.depth} branches, {shape.depth // 2} blocks. {how(args)}"]
    return rows, [table]


def _memory(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    from revkernels.bench import memory

    depths = args.depth or memory.DEPTHS
    shape = _shape(args, depths[0])
    with progress("bench memory", 3 * len(depths)) as begin:
        rows = list(memory.run(shape, depths, begin))
    table = Table(f"peak activation memory of a training step, {args.batch} images", {"variant": "variant"})
    table.columns |= {f"depth_{depth}": f"depth {depth}, MiB" for depth in depths}
    table.columns |= GOAL
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        peaks = {f"depth_{row['depth']}": row["peak_bytes"] / MIB for row in own}
        table.rows.append({"variant": variant, **peaks, **goal_cells(own[-1].get("goal"), "")})
    size = f"{args.batch}x{args.width}x{args.side}x{args.side}"
    table.notes = [f"depth counts branches, two a block; a stream is {size}, float32"]
    return rows, [table]


def _overhead(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    from revkernels.bench import overhead
    from revkernels.bench.clocks import clock_for

    notes: list[str] = []

    def failed(name: str, error: Exception) -> None:
        notes.append(f"{name} failed: {type(error).__name__}: {error}")

    with progress("bench overhead", args.rounds + 2) as begin, bench_network.quiet_peers():
        clock = clock_for(args.device)
        rows = rows_of(list(overhead.run(args.device, clock, args.rounds, begin, args.branch, failed)))
    what = overhead.BRANCHES[args.branch][0]
    table = timing(f"forward and backward of {overhead.HALF_STEPS} branches: {what}", rows, "ms", 1e3)
    del table.columns["benchmark"], table.columns["case"]
    table.columns["us"] = "us a half-step"
    if any(row["goal"] for row in rows):
        table.columns |= GOAL
    for shown, row in zip(table.rows, rows, strict=True):
        shown["us"] = row["us_a_half_step"]
    table.notes = [how(args), *notes]
    return rows, [table]


def _shape(args: argparse.Namespace, depth: int) -> Any:
    from revkernels.bench.chains import Shape

    return Shape(depth, args.batch, args.width, args.side, args.device)
