# SPDX-License-Identifier: Apache-2.0
"""Where a training step's memory is, and how far reconstructed activations drift from the true ones.

`memory_report` reports which module holds which bytes between forward and backward. `drift` measures reconstruction
errors and gradient angles by depth, `DriftMonitor` while a network trains, `plot_training` draws the paper's figure.
Needs torch; the plots need matplotlib (the extra ``demo``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from revkernels.diagnostics.by_depth import PRECISIONS, Drift, DriftRow, drift
from revkernels.diagnostics.errors import relative_errors
from revkernels.diagnostics.memory import memory_report
from revkernels.diagnostics.monitor import AngleRecord, DriftMonitor, DriftRecord
from revkernels.diagnostics.report import ChainFrames, MemoryReport, MemoryRow

if TYPE_CHECKING:
    from revkernels.diagnostics.plots import plot_training

__all__ = [
    "PRECISIONS",
    "AngleRecord",
    "ChainFrames",
    "Drift",
    "DriftMonitor",
    "DriftRecord",
    "DriftRow",
    "MemoryReport",
    "MemoryRow",
    "drift",
    "memory_report",
    "plot_training",
    "relative_errors",
]


def __getattr__(name: str) -> Any:
    if name == "plot_training":  # imported on demand: matplotlib may be missing
        from revkernels.diagnostics.plots import plot_training

        return plot_training
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
