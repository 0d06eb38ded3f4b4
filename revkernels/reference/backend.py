# SPDX-License-Identifier: Apache-2.0
"""Backend "reference": the oracle behind the interface of the kernels, for any array they take. Slow by design."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from revkernels.arrays import dtype_name, kind_of, memory_order
from revkernels.coupling import Coupling
from revkernels.reference import coupling as oracle
from revkernels.reference.accumulate import accumulate as plain_sum

CHECKS_OPERANDS = False


def missing(name: str = "reference") -> str | None:
    """Why this backend cannot run here: never."""
    return None


def couple(out: Any, x: Any, f: Any, coupling: Coupling | None) -> None:
    """out <- x + f"""
    _one(oracle.couple, out, x, f, coupling)


def uncouple(out: Any, y: Any, f: Any, coupling: Coupling | None) -> None:
    """out <- y - f"""
    _one(oracle.uncouple, out, y, f, coupling)


def reverse_step(y: Any, f: Any, dy: Any, df: Any, coupling: Coupling | None) -> None:
    """y <- y - f; dy <- dy + df"""
    arrays = (y, f, dy, df)
    y_values, f_values, dy_values, df_values = map(_values, arrays)
    dtypes = tuple(map(dtype_name, arrays))
    x, dx = oracle.reverse_step(y_values, f_values, dy_values, df_values, dtypes=dtypes, **_options(coupling))
    _write(y, x)
    _write(dy, dx)
    _report(y, x, coupling)


def accumulate(totals: Sequence[Any], parts: Sequence[Any]) -> None:
    """totals[i] <- totals[i] + parts[i]"""
    for total, part in zip(totals, parts, strict=True):
        _write(total, plain_sum(_values(total), _values(part), dtype_name(total), dtype_name(part)))


def _one(operation: Any, out: Any, x: Any, f: Any, coupling: Coupling | None) -> None:
    result = operation(_values(x), _values(f), dtype_name(x), dtype_name(f), **_options(coupling))
    _write(out, result)
    _report(out, result, coupling)


def _options(coupling: Coupling | None) -> dict[str, Any]:
    if coupling is None:
        return {}
    scales = {"channel_scale": coupling.channel_scale, "sample_scale": coupling.sample_scale}
    options = {name: None if scale is None else _values(scale) for name, scale in scales.items()}
    return options | {"channel_dim": coupling.channel_dim, "grid_exponent": coupling.grid_exponent}


def _report(out: Any, result: np.ndarray, coupling: Coupling | None) -> None:
    if coupling is None:
        return
    if coupling.checksum is not None:
        cell = coupling.checksum
        total = int(cell.reshape(()).item()) + oracle.checksum_of(result.transpose(memory_order(out)), dtype_name(out))
        total %= 2**64
        cell[...] = total - 2**64 if dtype_name(cell) == "int64" and total >= 2**63 else total
    if coupling.amax is not None:
        cell = coupling.amax
        cell[...] = float(np.maximum(float(cell.reshape(()).item()), oracle.amax_of(result)))


def _values(array: Any) -> np.ndarray:
    if kind_of(array) == "torch":
        array = array.detach().cpu().double().numpy()
    return np.asarray(array).astype(np.float64)


def _write(array: Any, values: np.ndarray) -> None:
    if kind_of(array) == "torch":
        import torch

        with torch.no_grad():
            array.copy_(torch.from_numpy(np.array(values)).to(array.dtype))
    else:
        array[...] = values.astype(array.dtype)
