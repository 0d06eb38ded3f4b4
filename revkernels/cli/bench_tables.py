# SPDX-License-Identifier: Apache-2.0
"""Shared by the subjects of ``revkernels bench``: types of options, and tables of measurements."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from revkernels.cli.output import Table, display, file_to_write
from revkernels.cli.stamp import environment

__all__ = [
    "GOAL",
    "MIB",
    "command_of",
    "depth",
    "goal_cells",
    "how",
    "picture",
    "positive",
    "rounds",
    "rows_of",
    "threads",
    "timing",
    "where",
]

MIB = 1 << 20
GOAL = {"goal": "goal", "reached": "reached", "met": "met"}

#: Parsed arguments that do not change what is measured.
_LEFT_OUT = ("command", "subject", "run", "measure", "draw", "save", "json", "plot")


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _whole(text, at_least=1)


def rounds(text: str) -> int:
    """An integer of at least 2."""
    return _whole(text, at_least=2)


def threads(text: str) -> int:
    """A number that `revkernels.set_num_threads` accepts; torch does not report its own limit before it fails."""
    if not text.isdecimal() or not 1 <= int(text[:5]) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a whole number, 1 to 4096")
    return int(text)


def depth(text: str) -> int:
    """An even number of branches."""
    number = _whole(text, at_least=2)
    if number % 2:
        raise argparse.ArgumentTypeError(f"{number} is odd; a block has two branches")
    return number


def picture(name: str) -> Path:
    """A PNG to write, rejected at once if that is impossible, not after the work."""
    if Path(name).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{name}: the name must end in .png")
    return file_to_write(name)


def seed(text: str) -> int:
    """A seed that torch's generators accept."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a whole number from 0 to 2^63 - 1")
    return number


def device_problem(device: str) -> str | None:
    """Why torch cannot run on the device; None if it can."""
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        return f"--device {device}: it must be cpu or cuda[:n]"
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if found.type == "cpu" or 0 <= (found.index or 0) < count:
        return None
    return f"--device {device}: this torch sees {count or 'no'} CUDA device{'s' * (count > 1)}"


def _whole(text: str, at_least: int) -> int:
    """An integer for sizes and counts: larger ones overflow somewhere, or exceed Python's limit of digits."""
    if not text.isdecimal() or len(text) > 10 or not at_least <= int(text) < 2**31:
        above = " and below 2^31" if text.isdecimal() and len(text) > 9 else ""
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a whole number, at least {at_least}{above}")
    return int(text)


def rows_of(measured: list[Any]) -> list[dict[str, Any]]:
    """Return measurements as result lines."""
    from revkernels.bench.results import as_row

    return [as_row(measurement) for measurement in measured]


def timing(title: str, rows: list[dict[str, Any]], unit: str, scale: float) -> Table:
    """Return a table of medians, quartiles and ratios; a failed row has none."""
    columns = {"benchmark": "benchmark", "case": "case", "variant": "variant", f"median_{unit}": f"median, {unit}"}
    table = Table(title, columns | {"quartiles": "quartiles", "ratio": "ratio"})
    for row in rows:
        shown = {key: row[key] for key in ("benchmark", "case", "variant", "ratio", "gbps")}
        if row["median_s"] is not None:
            shown[f"median_{unit}"] = row["median_s"] * scale
            shown["quartiles"] = f"{display(row['q1_s'] * scale)} to {display(row['q3_s'] * scale)}"
        if row.get("peak_bytes") is not None:
            shown["peak_mib"] = row["peak_bytes"] / MIB
        table.rows.append(shown | goal_cells(row["goal"], row["baseline"]))
    return table


def goal_cells(goal: dict[str, Any] | None, baseline: str) -> dict[str, Any]:
    """Return the cells of the `GOAL` columns."""
    if goal is None:
        return {}
    unit, link = {"extra_us": (" us above", "of"), "growth_bytes": (" bytes above", "")}.get(
        goal["quantity"], ("", "of")
    )
    of = "" if goal["of"] == baseline else f" {link} {goal['of']}".replace("  ", " ")
    return {"goal": f"<= {goal['at_most']:g}{unit}{of}", "reached": goal["value"], "met": goal["met"]}


def how(args: argparse.Namespace) -> str:
    """Return the note on how and where the measurement was made."""
    return f"medians of {args.rounds} interleaved rounds; ratios round by round; {where(args.device)}"


def where(device: str) -> str:
    """Return the device, its threads, and torch if it is in use."""
    stamp = environment(device)
    threads = f", {stamp['threads']} thread{'s' * (stamp['threads'] != 1)}" if device == "cpu" else ""
    library = "torch" if "torch" in sys.modules else "numpy"
    return f"{stamp['device']}{threads}, {library} {stamp[library]}"


def command_of(args: argparse.Namespace) -> str:
    """Return the command line that repeats the measurement."""
    words = ["revkernels", "bench", args.subject]
    for name, value in vars(args).items():
        not_given = value is None or value is False or value == []
        if name in _LEFT_OUT or not_given or (args.subject, name) == ("numpy", "device"):  # which numpy does not have
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return shlex.join(words)
