# SPDX-License-Identifier: Apache-2.0
"""Two results files side by side, from two versions or two devices: ``compare before.jsonl after.jsonl``.

Lines are matched by benchmark, case and variant; where a file has several, its last counts. Times of two runs differ by
the machine's mood, so each file's own ratio to its baseline is shown beside them: trust a change that both show.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from revkernels.bench.results import read
from revkernels.cli.output import Table, add_json_option, report

KEY = ("benchmark", "case", "variant")
MIB = 1 << 20


def latest(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the last line of each (benchmark, case, variant)."""
    return {tuple(row.get(key) for key in KEY): row for row in read(path)}


def compare(before: Path, after: Path) -> Table:
    """Return one row for each line that both files have; notes count those that only one has."""
    first, second = latest(before), latest(after)
    table = Table(f"{before.name} (A) and {after.name} (B)", dict(zip(KEY, KEY, strict=True)))
    table.columns |= {"a_ms": "A, ms", "b_ms": "B, ms", "time": "B/A time", "a_ratio": "A ratio", "b_ratio": "B ratio"}
    table.columns |= {"a_mib": "A peak, MiB", "b_mib": "B peak, MiB", "memory": "B/A memory"}
    for key in first.keys() & second.keys():
        a, b = first[key], second[key]
        row = dict(zip(KEY, key, strict=True))
        row |= {"a_ms": _scaled(a, "median_s", 1e3), "b_ms": _scaled(b, "median_s", 1e3)}
        row |= {"time": _quotient(b, a, "median_s"), "a_ratio": a.get("ratio"), "b_ratio": b.get("ratio")}
        row |= {"a_mib": _scaled(a, "peak_bytes", 1 / MIB), "b_mib": _scaled(b, "peak_bytes", 1 / MIB)}
        row |= {"memory": _quotient(b, a, "peak_bytes")}
        table.rows.append(row)
    table.rows.sort(key=lambda row: list(first).index(tuple(row[key] for key in KEY)))
    for name, alone in (("A", first.keys() - second.keys()), ("B", second.keys() - first.keys())):
        if alone:
            table.notes.append(f"only in {name}: {len(alone)} lines")
    return table


def _scaled(row: dict[str, Any], key: str, scale: float) -> float | None:
    return None if row.get(key) is None else row[key] * scale


def _quotient(b: dict[str, Any], a: dict[str, Any], key: str) -> float | None:
    return b[key] / a[key] if a.get(key) and b.get(key) else None


def main(argv: list[str] | None = None) -> int:
    """Compare two files. Returns 2 if one cannot be read or they share no line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    add_json_option(parser)
    args = parser.parse_args(argv)
    try:
        table = compare(args.before, args.after)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    report("compare", [table], args.json)
    return 0 if table.rows else 2


if __name__ == "__main__":
    sys.exit(main())
