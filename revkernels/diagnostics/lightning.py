# SPDX-License-Identifier: Apache-2.0
"""A `DriftMonitor` as a callback of PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revkernels.diagnostics.monitor import DriftMonitor


def callback(monitor: DriftMonitor) -> Any:
    """Return the callback; see `DriftMonitor.lightning_callback`."""

    class DriftCallback(_base()):  # type: ignore[misc]
        """Attaches the monitor during a fit, and logs the rms error."""

        def __init__(self) -> None:
            super().__init__()
            self.monitor = monitor
            self._seen = len(monitor.history)

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            monitor.attach()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            new, self._seen = monitor.history[self._seen :], len(monitor.history)
            if new:
                pl_module.log("drift", max(record.rms_error for record in new))

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            monitor.detach()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            monitor.detach()

    return DriftCallback()


def _base() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if (error.name or "") not in ("lightning", "lightning.pytorch", "pytorch_lightning"):
                raise
    raise ImportError("PyTorch Lightning is not installed: pip install 'revkernels[lightning]'")
