# SPDX-License-Identifier: Apache-2.0
"""``revkernels info``: what this installation is and supports."""

from __future__ import annotations

import argparse
import os
from typing import Any

from revkernels.cli.output import Table, add_json_option, report
from revkernels.information import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Show `revkernels.info()` as two tables."""
    facts = info()
    report("info", [_installation(facts), _backends(facts)], args.json)
    return 0


def _installation(facts: dict[str, Any]) -> Table:
    rows = [
        ("revkernels", facts["version"]),
        ("python", facts["python"]),
        ("platform", facts["platform"]),
        *((name, version or "not installed") for name, version in facts["libraries"].items()),
        ("CPU kernels use", facts["cpu_isa"]),
        ("CUDA compiled for", facts["cuda_architectures"] or "none"),
    ]
    table = Table("revkernels", {"what": "", "value": ""})
    table.rows = [{"what": what, "value": value} for what, value in rows]
    return table


def _backends(facts: dict[str, Any]) -> Table:
    columns = {"name": "backend", "available": "available", "about": "what it is", "reason": "why it is missing"}
    table = Table("backends", columns)
    table.rows = [{"name": name, **entry} for name, entry in facts["backends"].items()]
    for device, names in facts["defaults"].items():
        table.notes.append(f"default on {device}: {', then '.join(names)}")
    wanted = os.environ.get("REVKERNELS_BACKEND")
    if wanted:
        known = "" if wanted in facts["backends"] else ", which does not exist: every call will be refused"
        table.notes.append(f"REVKERNELS_BACKEND={wanted} takes the place of these{known}")
    return table
