# SPDX-License-Identifier: Apache-2.0
"""``revkernels check``: every backend that runs on this machine against the NumPy oracle.

Bit for bit, and within rounding where the order of a sum or an approximation is a backend's own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from revkernels.backends import BACKENDS, require
from revkernels.cli.cases import KERNELS, Call, calls, differences, left_out
from revkernels.cli.output import Table, add_json_option, progress, report

_ORACLE = "reference"
_SHOWN = 12  # failed calls; they usually have one cause


@dataclass
class Verdict:
    """The result of the calls of one kernel on one backend."""

    calls: int = 0
    failed: int = 0
    mismatches: int = 0
    reason: str | None = None  # why there were no calls

    def __str__(self) -> str:
        if self.reason is not None:
            return "left out"
        if self.failed:
            elements = f" ({self.mismatches:,} elements differ)" if self.mismatches else ""
            return f"{self.failed} of {self.calls} calls FAILED{elements}"
        return f"ok ({self.calls} calls)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--backend", choices=[n for n in BACKENDS if n != _ORACLE], help="check this backend alone")
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Check, show the table, and return 1 if anything differs.

    Raises:
        BackendError: the named backend cannot run here; without a name such backends are skipped.
    """
    if args.backend:
        require(args.backend, "--backend")
    names = [args.backend] if args.backend else [name for name in BACKENDS if name != _ORACLE]
    with progress("check", len(names) + 1) as begin:
        verdicts, failures = examine(names, list(calls()), begin)
    table = Table("every backend against the NumPy oracle", {"backend": "backend"})
    table.columns |= {kernel: kernel for kernel in KERNELS} | {"reason": "why it is left out"}
    for name in names:
        cells = {kernel: str(verdicts[name, kernel]) for kernel in KERNELS}
        reasons = {reason for kernel in KERNELS if (reason := verdicts[name, kernel].reason) is not None}
        table.rows.append({"backend": name, **cells, "reason": "; ".join(sorted(reasons)) or None})
    table.notes = [f"left out: {reason}" for reason in [*left_out(), *_left_out_of(names)]]
    tables = [table]
    if failures:
        columns = {key: key for key in ("backend", "kernel", "case", "differ", "error")}
        tables.append(Table("calls that failed", columns, failures[:_SHOWN]))
        if len(failures) > _SHOWN:
            tables[-1].notes.append(f"and {len(failures) - _SHOWN} more")
    report("check", tables, args.json)
    return 1 if failures else 0


def examine(
    names: Sequence[str], every_call: Sequence[Call], begin: Callable[[str], None] = lambda step: None
) -> tuple[dict[tuple[str, str], Verdict], list[dict[str, Any]]]:
    """Run the calls on the oracle and on each backend.

    Returns a verdict for each (backend, kernel), and one row for every call that differed or raised.
    """
    begin(f"{_ORACLE}, {len(every_call)} calls")
    expected = {call: call.run(_ORACLE) for call in every_call}
    verdicts = {(name, kernel): Verdict() for name in names for kernel in KERNELS}
    failures: list[dict[str, Any]] = []
    for name in names:
        begin(name)
        missing = BACKENDS[name].missing()
        for call in every_call:
            verdict = verdicts[name, call.kernel]
            device = None if missing else _device_for(name, call)
            if device is not None and not _beyond_interpreter(name, call):
                verdict.calls += 1
                failure = _try(name, call, device, expected[call])
                if failure is not None:
                    verdict.failed += 1
                    verdict.mismatches += failure["differ"] or 0
                    failures.append(failure)
        for kernel in KERNELS:
            if verdicts[name, kernel].calls == 0:
                verdicts[name, kernel].reason = missing or "it takes none of the arrays that can be made here"
    return verdicts, failures


def _try(name: str, call: Call, device: str, expected: list[np.ndarray]) -> dict[str, Any] | None:
    row: dict[str, Any] = {"backend": name, "kernel": call.kernel, "case": str(call), "differ": None, "error": None}
    try:
        row["differ"] = differences(call, call.run(name, device), expected)
    except Exception as error:  # any failure of a backend is a finding for the table
        return row | {"error": f"{type(error).__name__}: {error}"}
    return row if row["differ"] else None


def _device_for(name: str, call: Call) -> str | None:
    """Return the device whose arrays the backend supports, the processor first, or None."""
    backend = BACKENDS[name]
    return next((device for device in ("cpu", "cuda") if backend.refuses(call.library, device) is None), None)


def _beyond_interpreter(name: str, call: Call) -> bool:
    of_branch = call.kernel == "norm_act" or (call.kernel == "reverse_step_" and call.stream == "int16")
    results = (call.stream, call.branch) if of_branch else (call.stream,)
    return name == "triton" and _interpreting() and "bfloat16" in results


def _left_out_of(names: Sequence[str]) -> list[str]:
    if "triton" in names and _interpreting():
        return ["bfloat16 results of triton: its interpreter (TRITON_INTERPRET=1) cuts off where a GPU rounds"]
    return []


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
