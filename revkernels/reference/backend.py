# SPDX-License-Identifier: Apache-2.0
"""Backend "reference": the oracle with the kernels' interface, for any array they support. Slow by design."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from revkernels.arrays import INT16, dtype_name, kind_of, memory_order
from revkernels.coupling import Coupling
from revkernels.norm import SUMS_GIVEN, SUMS_ONLY, Norm
from revkernels.reference import coupling as oracle
from revkernels.reference.accumulate import accumulate as plain_sum
from revkernels.reference.norm_act import norm_act as normalise
from revkernels.reference.norm_act import norm_act_backward as normalise_backward
from revkernels.reference.norm_act import owners, statistics_of

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
    _report(y, x, coupling, (y_values, f_values, True, dtypes[1]))


def accumulate(totals: Sequence[Any], parts: Sequence[Any]) -> None:
    """totals[i] <- totals[i] + parts[i]"""
    for total, part in zip(totals, parts, strict=True):
        _write(total, plain_sum(_values(total), _values(part), dtype_name(total), dtype_name(part)))


def norm_act(h: Any, x: Any, norm: Norm, mean: Any, rstd: Any, given: bool) -> None:
    """h <- activation(norm(x)); mean and rstd are written, or read if given"""
    values, of, wide = _values(x), _owners(x, norm), _wide(rstd)
    if not given:
        found = statistics_of(values, of, norm.eps, wide, center=norm.kind != "rms")
        for array, statistic in zip((mean, rstd), found, strict=False):
            if array is not None:
                _write(array, statistic.reshape(tuple(array.shape)))
        if norm.running_mean is not None and values.size:
            _move(norm.running_mean, found[0], norm.momentum)
            n = values.size // of.channels
            _move(norm.running_var, found[2] * (n / max(n - 1, 1)), norm.momentum)
    _write(h, normalise(values, of, **_shared(norm, mean, rstd), h_dtype=dtype_name(h)))


def couple_norm_act(h: Any, y: Any, x: Any, f: Any, norm: Norm, mean: Any, rstd: Any, given: bool) -> None:
    """y <- x + f; h <- activation(norm(y)). y may be x."""
    couple(y, x, f, None)
    norm_act(h, y, norm, mean, rstd, given)


def uncouple_norm_act(h: Any, x: Any, y: Any, f: Any, norm: Norm, mean: Any, rstd: Any, given: bool) -> None:
    """x <- y - f; h <- activation(norm(x)). x may be y."""
    uncouple(x, y, f, None)
    norm_act(h, x, norm, mean, rstd, given)


def norm_act_backward(
    dx: Any,
    base: Any,
    dh: Any,
    x: Any,
    norm: Norm,
    mean: Any,
    rstd: Any,
    dweight: Any,
    dbias: Any,
    sums: int,
    count: int,
    constant: bool,
) -> None:
    """dx <- base + the gradient of x, dh that of h; dweight and dbias are written, or read if the sums are given"""
    total, *found = normalise_backward(
        None if base is None else _values(base),
        _values(dh),
        _values(x),
        _owners(x, norm),
        **_shared(norm, mean, rstd),
        dx_dtype="float64" if dx is None else dtype_name(dx),
        kind=norm.kind,
        sums=(_flat(dweight), _flat(dbias)) if sums == SUMS_GIVEN else None,
        count=count,
        constant=constant,
    )
    if sums != SUMS_GIVEN:
        for array, values in zip((dweight, dbias), found, strict=True):
            if array is not None:
                _write(array, values)
    if sums != SUMS_ONLY:
        _write(dx, total)


def _owners(x: Any, norm: Norm) -> Any:
    return owners(tuple(x.shape), norm.kind, norm.channel_axis(x.ndim), norm.groups)


def _wide(rstd: Any) -> Any:
    return np.float64 if dtype_name(rstd) == "float64" else np.float32


def _shared(norm: Norm, mean: Any, rstd: Any) -> dict[str, Any]:
    arrays = {"mean": mean, "rstd": rstd, "weight": norm.weight, "bias": norm.bias}
    flat = {name: None if array is None else _flat(array) for name, array in arrays.items()}
    return flat | {"activation": norm.activation, "wide": _wide(rstd)}


def _flat(array: Any) -> np.ndarray:
    return _values(array).ravel()


def _move(running: Any, batch: np.ndarray, momentum: float) -> None:
    _write(running, (1 - momentum) * _values(running) + momentum * batch.astype(np.float64))


def _one(operation: Any, out: Any, x: Any, f: Any, coupling: Coupling | None) -> None:
    x_values, f_values = _values(x), _values(f)
    result = operation(x_values, f_values, dtype_name(x), dtype_name(f), **_options(coupling))
    _write(out, result)
    _report(out, result, coupling, (x_values, f_values, operation is oracle.uncouple, dtype_name(f)))


def _options(coupling: Coupling | None) -> dict[str, Any]:
    if coupling is None:
        return {}
    scales = {"channel_scale": coupling.channel_scale, "sample_scale": coupling.sample_scale}
    options = {name: None if scale is None else _values(scale) for name, scale in scales.items()}
    return options | {"channel_dim": coupling.channel_dim, "grid_exponent": coupling.grid_exponent}


def _report(out: Any, result: np.ndarray, coupling: Coupling | None, operands: tuple[Any, ...]) -> None:
    if coupling is None:
        return
    fixed = dtype_name(out) == INT16
    if coupling.checksum is not None:
        cell = coupling.checksum
        total = int(cell.reshape(()).item()) + oracle.checksum_of(result.transpose(memory_order(out)), dtype_name(out))
        total %= 2**64
        cell[...] = total - 2**64 if dtype_name(cell) == "int64" and total >= 2**63 else total
    if coupling.amax is not None:
        cell = coupling.amax
        largest = oracle.amax_before_wrapping(*operands, **_options(coupling)) if fixed else oracle.amax_of(result)
        cell[...] = float(np.maximum(float(cell.reshape(()).item()), largest))
    if coupling.value is not None:
        _write(coupling.value, oracle.value_of(result, coupling.grid_exponent or 0, dtype_name(coupling.value)))


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
