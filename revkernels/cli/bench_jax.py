# SPDX-License-Identifier: Apache-2.0
"""``revkernels bench jax``: a training step under JAX: time, memory and compile time."""

from __future__ import annotations

import argparse
import importlib
from contextlib import nullcontext
from typing import Any

from revkernels.cli.bench_network import OptionError
from revkernels.cli.bench_tables import MIB, depth, positive, timing
from revkernels.cli.output import Table, progress
from revkernels.cli.stamp import cpu_model

__all__ = ["add_arguments", "chain"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subject's options."""
    parser.add_argument("--branch", choices=("conv", "mlp"), default="conv", help="what a branch is (default: conv)")
    parser.add_argument("--depth", type=depth, default=32, help="branches, two a block (default: 32)")
    parser.add_argument("--batch", type=positive, default=32, help="images (default: 32)")
    parser.add_argument("--side", type=positive, default=16, help="rows and columns (default: 16)")
    parser.add_argument("--width", type=positive, default=32, help="channels of a stream (default: 32)")
    parser.add_argument("--keep-memory", action="store_true", help="freed memory stays in the process: no page faults")
    parser.add_argument("--scan", action="store_true", help="blocks in a jax.lax.scan instead of one after the other")


def chain(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table]]:
    """Measure one chain."""
    try:
        importlib.import_module("revkernels.adapters.jax")  # first: its error tells what it needs
    except ImportError as error:
        raise OptionError(str(error)) from error
    import jax

    from revkernels.bench import jax_chain
    from revkernels.bench.clocks import memory_kept
    from revkernels.bench.results import as_row

    try:
        (device, *_) = jax.devices(args.device.partition(":")[0])
    except RuntimeError as error:
        raise OptionError(f"--device {args.device}: {error}") from error
    case = jax_chain.Case(args.branch, args.depth, args.batch, args.side, args.width, args.scan, device.platform)
    kept = memory_kept() if args.keep_memory else nullcontext()
    with progress("bench jax", args.rounds + 1 + len(jax_chain.WAYS)) as begin, kept:
        rows = [as_row(found) for found in jax_chain.run(case, args.rounds, begin)]
    table = timing(f"one training step under JAX, float32, {case}", rows, "ms", 1e3)
    del table.columns["benchmark"], table.columns["case"]
    table.columns |= {"temp_mib": "temporary memory, MiB", "temp_ratio": "ratio", "compile_s": "to compile, s"}
    for shown, row in zip(table.rows, rows, strict=True):
        shown |= {"temp_mib": row["temp_bytes"] / MIB, "temp_ratio": row["temp_ratio"], "compile_s": row["compile_s"]}
    where = cpu_model() if device.platform == "cpu" else device.device_kind
    table.notes = [
        f"depth {case.depth}: {case.depth} branches, {case.depth // 2} blocks. Medians of {args.rounds} interleaved "
        f"rounds; ratios round by round; {where}, jax {jax.__version__}",
        "temporary memory: what XLA plans for a step beside arguments and results",
    ]
    if args.keep_memory:
        table.notes.append("freed memory stayed in the process (--keep-memory)")
    return rows, [table]
