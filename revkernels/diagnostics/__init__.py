# SPDX-License-Identifier: Apache-2.0
"""Where a training step's memory is: `memory_report` says which module holds which bytes, and why. Needs torch."""

from revkernels.diagnostics.memory import memory_report
from revkernels.diagnostics.report import ChainFrames, MemoryReport, MemoryRow

__all__ = ["ChainFrames", "MemoryReport", "MemoryRow", "memory_report"]
