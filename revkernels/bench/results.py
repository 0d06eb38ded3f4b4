# SPDX-License-Identifier: Apache-2.0
"""Result lines: JSON objects appended to ``<device>.jsonl``, each with the environment of its measurement."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from revkernels.bench.harness import Measurement

__all__ = ["append", "as_row", "file_for", "read"]


def as_row(measurement: Measurement) -> dict[str, Any]:
    """Return a measurement as one flat dict; the benchmark's additions come last."""
    row = asdict(measurement)
    return row | row.pop("more")


def file_for(folder: Path, device: str) -> Path:
    """Return the results file of a device model: "NVIDIA H100 80GB HBM3" to ``nvidia-h100-80gb-hbm3.jsonl``."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".jsonl")


def append(rows: Iterable[Mapping[str, Any]], stamp: Mapping[str, Any], folder: Path, command: str) -> Path:
    """Append rows to the device's file, creating it if necessary; older lines stay. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = file_for(folder, stamp["device"])
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, "command": command, "environment": dict(stamp)}) + "\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file.

    Raises:
        ValueError: a line is not a JSON object; the message gives its number.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path.name}, line {number} is a {type(row).__name__}; it must be a JSON object")
        rows.append(row)
    return rows
