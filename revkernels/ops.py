# SPDX-License-Identifier: Apache-2.0
"""The kernels as functions on arrays, in place if the name ends in ``_``.

Arrays are torch tensors, NumPy and CuPy arrays, and anything that exports DLPack or a buffer, in host memory or on a
CUDA device. Nothing is copied. In one call, torch tensors and CuPy arrays go only with their own kind, and the work
runs on their library's current stream; NumPy arrays and the exporters may be mixed on one device. Exporters on a CUDA
device are used on the legacy default stream, and the call returns when it is done. A new result array is from the first
operand's library; for an exporter from its ``__array_namespace__``, or a NumPy array if it has none.

All shapes in a call are equal; dtypes (float64, float32, bfloat16, float16) and strides may differ. The arithmetic is
in float64 if either operand of a sum is float64, else in float32, and is rounded once to the written array's dtype. A
coupling's stream may be int16, in fixed point, if its `Coupling` has a grid_exponent. Normalising functions take a
`Norm` with its parameters and return `Statistics`; they are defined in `revkernels.norm_ops`. Every function raises
before it writes anything:

    TypeError       not an array, an integer dtype other than such a stream's, a byte-swapped array, libraries that do
                    not go together
    ValueError      unequal shapes, read-only, immutable or overlapping memory, negative strides, arrays on several
                    devices, an export that fails, a tensor that requires grad in a call in place outside no_grad, or
                    with an int16 stream
    BackendError    (a ValueError) the backend does not exist, cannot run here, or does not support such an array
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import numpy as np

from revkernels import checks, tracking
from revkernels.allocation import empty_like
from revkernels.arrays import INT16, dtype_name, kind_of
from revkernels.backends import select
from revkernels.checks_coupling import check_coupling
from revkernels.coupling import Coupling
from revkernels.norm import Norm, Statistics
from revkernels.norm_ops import couple_norm_act, norm_act, norm_act_backward_, uncouple_norm_act_

__all__ = [
    "Coupling",
    "Norm",
    "Statistics",
    "accumulate_",
    "couple",
    "couple_",
    "couple_norm_act",
    "norm_act",
    "norm_act_backward_",
    "reverse_step_",
    "uncouple",
    "uncouple_",
    "uncouple_norm_act_",
]

Array = TypeVar("Array")  # torch's, NumPy's, CuPy's, or an exporter's
Gradient = TypeVar("Gradient")


def couple(x: Array, f: Any, *, coupling: Coupling | None = None, backend: str | None = None) -> Array:
    """Return y = x + f, the additive coupling (Gomez et al. 2017, eq. 6).

    y is a new array of x's shape and dtype, dense in x's memory order: channels last stays channels last, and half of a
    larger array becomes dense. Differentiable in x, f and the scales. An int16 stream carries no gradient: with one, a
    tensor that requires grad is rejected outside no_grad.

    Args:
        x, f: of one shape, float64, float32, bfloat16 or float16 in any mixture; x also int16, with a grid.
        coupling: scales, a grid, a checksum and the like: see `Coupling`. None is the plain sum.
        backend: "cpu", "cuda", "triton", "eager" or "reference"; None is that of `use_backend`, or the best on x's
            device.

    Raises:
        TypeError, ValueError, BackendError: before anything is written, for what `revkernels.ops` lists.
    """
    if tracking.compiling() and tracking.is_tensor(x):
        return _operators().couple(x, f, coupling, backend)
    return _out_of_place("couple", x, f, coupling, backend)


def uncouple(y: Array, f: Any, *, coupling: Coupling | None = None, backend: str | None = None) -> Array:
    """Return x = y - f, the inverse of `couple` (Gomez et al. 2017, eq. 7).

    Layout of the result, differentiability, arguments and errors are those of `couple`.
    """
    if tracking.compiling() and tracking.is_tensor(y):
        return _operators().uncouple(y, f, coupling, backend)
    return _out_of_place("uncouple", y, f, coupling, backend)


def couple_(x: Array, f: Any, *, coupling: Coupling | None = None, backend: str | None = None) -> Array:
    """x <- x + f, in place (Gomez et al. 2017, eq. 6). Returns x.

    Arguments and errors are those of `couple`; x must be writable and share no memory with f.
    """
    if tracking.compiling() and tracking.is_tensor(x):
        return _operators().couple_(x, f, coupling, backend)
    kernels = select(x, backend, "x")
    tracked = _about_to_write(kernels, "x f", (x, f), 1, coupling)
    kernels.couple(x, x, f, coupling)
    if tracked:
        tracking.wrote(x)
        if coupling is not None:
            _wrote_value(coupling)
    return x


def uncouple_(y: Array, f: Any, *, coupling: Coupling | None = None, backend: str | None = None) -> Array:
    """y <- y - f, in place (Gomez et al. 2017, eq. 7): a coupling's output becomes its input again. Returns y.

    Arguments and errors are those of `couple`; y must be writable and share no memory with f.
    """
    if tracking.compiling() and tracking.is_tensor(y):
        return _operators().uncouple_(y, f, coupling, backend)
    kernels = select(y, backend, "y")
    tracked = _about_to_write(kernels, "y f", (y, f), 1, coupling)
    kernels.uncouple(y, y, f, coupling)
    if tracked:
        tracking.wrote(y)
        if coupling is not None:
            _wrote_value(coupling)
    return y


def reverse_step_(
    y: Array, f: Any, dy: Gradient, df: Any, *, coupling: Coupling | None = None, backend: str | None = None
) -> tuple[Array, Gradient]:
    """Reverse one half of a block and add its gradient, in one pass (Gomez et al. 2017, Algorithm 1, lines 3 to 6).

        y  <- y - f      dy <- dy + df

    All four have one shape; dtypes, other arguments and errors are those of `couple`. ``coupling`` acts on f only. y
    and dy must be writable and overlap nothing else. Returns (y, dy).
    """
    if tracking.compiling() and tracking.is_tensor(y):
        return _operators().reverse_step_(y, f, dy, df, coupling, backend)
    kernels = select(y, backend, "y")
    tracked = _about_to_write(kernels, "y dy f df", (y, dy, f, df), 2, coupling)
    kernels.reverse_step(y, f, dy, df, coupling)
    if tracked:
        tracking.wrote(y)
        tracking.wrote(dy)
        if coupling is not None:
            _wrote_value(coupling)
    return y, dy


def accumulate_(total: Array, part: Any, *, backend: str | None = None) -> Array:
    """total <- total + part, in place: a second contribution to a gradient (Gomez et al. 2017, Algorithm 1, 5 and 6).

    Both may be lists of arrays of equal length; a CUDA device then uses as few launches as possible. Shapes, dtypes,
    backend and errors are those of `couple`, pair by pair. Returns total.
    """
    if tracking.compiling() and tracking.is_tensor(total):
        return _operators().accumulate_(total, part, backend)
    if isinstance(total, list | tuple) or isinstance(part, list | tuple):
        return _accumulate_lists(total, part, backend)
    kernels = select(total, backend, "total")
    tracked = _about_to_write(kernels, "total part", (total, part), 1)
    kernels.accumulate((total,), (part,))
    if tracked:
        tracking.wrote(total)
    return total


def _accumulate_lists(totals: Any, parts: Any, backend: str | None) -> Any:
    if not isinstance(totals, list | tuple) or not isinstance(parts, list | tuple):
        raise TypeError("total and part must both be arrays, or both lists of arrays")
    if len(totals) != len(parts):
        raise ValueError(f"part has {len(parts)} arrays, total has {len(totals)}: they must be equal")
    if not totals:
        return totals
    given = totals
    totals, parts = tuple(totals), tuple(parts)  # held until the kernel is done, even if the lists change
    kernels = select(totals[0], backend, "total[0]")
    named = {f"total[{i}]": total for i, total in enumerate(totals)}
    named_parts = {f"part[{i}]": part for i, part in enumerate(parts)}
    if not kernels.CHECKS_OPERANDS:
        tracking.refuse_transforms(totals[0])
        checks.check_arrays(**named, **named_parts)
        checks.check_same_device(**named)
        for (name, total), (part_name, part) in zip(named.items(), named_parts.items(), strict=True):
            checks.check_operands({name: total}, {part_name: part})
        checks.check_disjoint(named, named_parts)
    tracked = tracking.tracks_versions(" ".join([*named, *named_parts]), (*totals, *parts))
    kernels.accumulate(totals, parts)
    if tracked:
        for total in totals:
            tracking.wrote(total)
    return given


def _out_of_place(name: str, x: Any, f: Any, coupling: Coupling | None, backend: str | None) -> Any:
    argument = "x" if name == "couple" else "y"
    kernels = select(x, backend, argument)
    if not kernels.CHECKS_OPERANDS or coupling is not None:
        _check(kernels, {}, {argument: x, "f": f}, coupling)
    kind = kind_of(x)
    if kind == "torch":
        torch = sys.modules["torch"]
        if torch.is_grad_enabled() and any(
            getattr(array, "requires_grad", False) for array in (x, f, *_scales(coupling))
        ):
            if dtype_name(x) == INT16:
                tracking.refuse_grad("f channel_scale sample_scale", (f, *_scales(coupling)))
            from revkernels.autograd.coupling import differentiable

            tracking.refuse_transforms(x)
            return differentiable(kernels, name, x, f, coupling)
        tracking.refuse_tangents(argument + " f channel_scale sample_scale", (x, f, *_scales(coupling)))
        out = torch.empty_like(x)
    elif kind == "numpy":
        out = np.empty_like(x, subok=False)
    else:
        out = empty_like(argument, x)
    getattr(kernels, name)(out, x, f, coupling)
    if coupling is not None and kind == "torch":
        _wrote_value(coupling)
    return out


def _wrote_value(coupling: Coupling) -> None:
    if coupling.value is not None:
        tracking.wrote(coupling.value)


def _check(kernels: Any, written: dict[str, Any], read: dict[str, Any], coupling: Coupling | None) -> None:
    tracking.refuse_transforms(next(iter(read.values())))
    if not kernels.CHECKS_OPERANDS:
        checks.check_operands(written, read, coupling, coupled="f" in read)
    if coupling is not None:
        check_coupling(coupling, written, read)


def _about_to_write(
    kernels: Any, names: str, arrays: tuple[Any, ...], writes: int, coupling: Coupling | None = None
) -> bool:
    """Check the arrays, the first ``writes`` of which are written. Returns whether they have version counters."""
    if not kernels.CHECKS_OPERANDS or coupling is not None:
        named = list(zip(names.split(), arrays, strict=True))
        _check(kernels, dict(named[:writes]), dict(named[writes:]), coupling)
    if coupling is not None:
        names, arrays = names + " channel_scale sample_scale", (*arrays, *_scales(coupling))
    return tracking.tracks_versions(names, arrays)


def _scales(coupling: Coupling | None) -> tuple[Any, ...]:
    return () if coupling is None else (coupling.channel_scale, coupling.sample_scale)


# ---- inside torch.compile these calls become operators of torch.library


def _operators() -> Any:
    from revkernels.autograd import torch_ops

    return torch_ops
