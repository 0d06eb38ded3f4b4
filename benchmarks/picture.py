# SPDX-License-Identifier: Apache-2.0
"""The picture of `bench network`, from result lines that were kept: ``picture results.jsonl --out picture.png``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.compare import latest
from revkernels.cli import plots


def panels(path: Path, cases: list[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return a panel for each case, the file's last line of every contender in it: (title, rows).

    Raises:
        ValueError: the file has no lines of such a case.
    """
    rows = [row for (benchmark, _, _), row in latest(path).items() if benchmark == "network"]
    known = list(dict.fromkeys(row["case"] for row in rows))
    found = []
    for case in cases or known:
        own = [row for row in rows if row["case"] == case]
        if not own:
            raise ValueError(f"{path} has no network {case!r}; it has {', '.join(map(repr, known)) or 'none'}")
        found.append((case, own))
    if not found:
        raise ValueError(f"{path} has no lines of bench network")
    return found


def main(argv: list[str] | None = None) -> int:
    """Draw it. Returns 2 if there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--case", action="append", default=[], help="a panel's case; all of the file's by default")
    parser.add_argument("--title", action="append", default=[], help="what to write above the panels, in their order")
    parser.add_argument("--without", nargs="*", default=[], metavar="VARIANT", help="contenders that are left out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        drawn = panels(args.results, args.case)
    except (OSError, ValueError) as error:
        print(f"picture: {error}", file=sys.stderr)
        return 2
    titles = args.title + [case for case, _ in drawn[len(args.title) :]]
    kept = [
        (title, [row for row in rows if row["variant"] not in args.without])
        for title, (_, rows) in zip(titles, drawn, strict=False)
    ]
    environment = drawn[0][1][-1]["environment"]
    plots.trade_off(kept, f"{environment['device']}, torch {environment['torch']}").savefig(args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
