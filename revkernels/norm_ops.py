# SPDX-License-Identifier: Apache-2.0
"""The functions of `revkernels.ops` with a normalisation and an activation."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from revkernels import checks, checks_norm, tracking
from revkernels.allocation import empty, empty_like
from revkernels.arrays import compute_dtype, kind_of, seen
from revkernels.backends import select
from revkernels.norm import SUMS_COMPUTED, SUMS_GIVEN, SUMS_ONLY, Norm, Statistics

Array = TypeVar("Array")


def norm_act(
    x: Array, norm: Norm, *, statistics: Statistics | None = None, dtype: Any = None, backend: str | None = None
) -> tuple[Array, Statistics]:
    """Return (h, statistics) with h = activation(norm(x)), by the formulas of `Norm`.

    h is a new array of x's shape in x's memory order, of ``dtype`` (None: x's own). Given statistics are used and
    returned, and running statistics stay unchanged; otherwise both are computed. Differentiable in x, weight and bias.
    Given statistics of a batch norm count as constants, as in evaluation; those of any other norm count as x's own.

    The dimensions of x other than the channel dimension must merge in memory into one run before and one run after it:
    true for images, channels last or not, rows of tokens, and halves of such arrays. For a group norm the first is
    dimension 0.

    Args:
        x: float64, float32, bfloat16 or float16.
        norm: kind, parameters, running statistics and activation: see `Norm`.
        statistics: `Statistics` of an earlier call, in the compute type: float64 if x is float64, else float32.
        dtype: of h; a torch.dtype for torch tensors, otherwise a NumPy dtype.
        backend: as in `couple`.

    Raises:
        TypeError, ValueError, BackendError: before anything is written, for what `revkernels.ops` lists and for a norm
            that does not fit x.
    """
    if tracking.compiling() and tracking.is_tensor(x):
        return _operators().norm_act(x, norm, statistics, dtype, backend)
    kernels = select(x, backend, "x")
    _check_options(kernels, norm, "x", x)
    if _differentiable("x weight bias", (x, norm.weight, norm.bias)):
        statistics = _check_new(kernels, {"x": x}, norm, statistics, dtype)
        from revkernels.autograd.norm_act import differentiable_norm_act

        result = differentiable_norm_act(kernels, x, norm, statistics, dtype)
    else:
        h, (mean, rstd) = _outputs({"x": x}, norm, statistics, dtype)
        if not kernels.CHECKS_OPERANDS:
            _check(norm, {"h": h}, {"x": x}, (mean, rstd), statistics is not None)
        kernels.norm_act(h, x, norm, mean, rstd, statistics is not None)
        result = h, Statistics(mean, rstd)
    _wrote_running(norm, statistics)
    return result


def couple_norm_act(
    x: Array,
    f: Any,
    norm: Norm,
    *,
    statistics: Statistics | None = None,
    dtype: Any = None,
    backend: str | None = None,
) -> tuple[Array, Array, Statistics]:
    """Return (y, h, statistics) with y = x + f (eq. 6) and h = activation(norm(y)), computed from y as stored.

    y is as from `couple`, h and the statistics as from `norm_act` of y (in float64 if f is float64). Both are new
    arrays. Differentiable in x, f, weight and bias. Arguments and errors are those of these two.
    """
    if tracking.compiling() and tracking.is_tensor(x):
        return _operators().couple_norm_act(x, f, norm, statistics, dtype, backend)
    kernels = select(x, backend, "x")
    _check_options(kernels, norm, "x", x)
    if _differentiable("x f weight bias", (x, f, norm.weight, norm.bias)):
        statistics = _check_new(kernels, {"x": x, "f": f}, norm, statistics, dtype)
        from revkernels.autograd.norm_act import differentiable_couple_norm_act

        result = differentiable_couple_norm_act(kernels, x, f, norm, statistics, dtype)
    else:
        h, (mean, rstd) = _outputs({"x": x, "f": f}, norm, statistics, dtype)
        y = empty_like("x", x)
        if not kernels.CHECKS_OPERANDS:
            _check(norm, {"y": y, "h": h}, {"x": x, "f": f}, (mean, rstd), statistics is not None)
        kernels.couple_norm_act(h, y, x, f, norm, mean, rstd, statistics is not None)
        result = y, h, Statistics(mean, rstd)
    _wrote_running(norm, statistics)
    return result


def uncouple_norm_act_(
    y: Array,
    f: Any,
    norm: Norm,
    *,
    statistics: Statistics | None = None,
    dtype: Any = None,
    backend: str | None = None,
) -> tuple[Array, Array, Statistics]:
    """y <- y - f, in place (eq. 7), and h = activation(norm(y)) of the stored y. Returns (y, h, statistics).

    Turns a coupling's output back into its input, and gives the branch that read this input the same normalised values.
    A batch norm needs the forward's statistics here: new ones would be those of values that were rounded once more, and
    the running statistics would be updated twice. Arguments and errors are those of `uncouple_` and `norm_act`.
    """
    if tracking.compiling() and tracking.is_tensor(y):
        return _operators().uncouple_norm_act_(y, f, norm, statistics, dtype, backend)
    kernels = select(y, backend, "y")
    _check_options(kernels, norm, "y", y)
    tracked = tracking.tracks_versions("y f weight bias", (y, f, norm.weight, norm.bias))
    h, (mean, rstd) = _outputs({"y": y, "f": f}, norm, statistics, dtype)
    if not kernels.CHECKS_OPERANDS:
        _check(norm, {"y": y, "h": h}, {"f": f}, (mean, rstd), statistics is not None)
    kernels.uncouple_norm_act(h, y, y, f, norm, mean, rstd, statistics is not None)
    if tracked:
        tracking.wrote(y)
    _wrote_running(norm, statistics)
    return y, h, Statistics(mean, rstd)


def norm_act_backward_(
    dx: Array,
    dh: Any,
    x: Any,
    norm: Norm,
    statistics: Statistics,
    *,
    sums: tuple[Any, Any] | None = None,
    count: int = 0,
    constant: bool = False,
    backend: str | None = None,
) -> tuple[Array, Any, Any]:
    """The backward of `norm_act`, added into dx in place. Returns (dx, dweight, dbias).

        z       = xhat * weight + bias          xhat = (x - mean) * rstd, as in the forward
        dz      = dh * activation'(z)
        dweight = sum of dz * xhat              dbias = sum of dz, per channel
        g       = weight * dz                   m(.) the mean over the elements that share the statistics
        dx     <- dx + rstd * (g - m(g) - xhat * m(g * xhat))

    RMS norm drops m(g). Adding to dx is the sum of two gradients in Algorithm 1, lines 5 and 6 (Gomez et al. 2017).

    Args:
        dx: the gradient added to, writable, of x's shape; None computes the sums alone, of a batch norm.
        dh: the gradient of h, of x's shape.
        x: the forward's input, after the coupling if there was one.
        norm: as in the forward.
        statistics: of the forward.
        sums: (dweight, dbias), read instead of computed, of a batch norm. One whose batch is distributed over processes
            takes two calls: first with ``dx=None``; then, after sums and element counts have been added up over the
            processes, with these.
        count: with ``sums``, the number of elements per channel in them; 0 is that of x.
        constant: a batch norm's statistics do not depend on x, as in evaluation: dx <- dx + rstd * g.
        backend: as in `couple`.

    Returns:
        dx, dweight and dbias; both of these are ``[channels]``, of the compute type: float64 if x is float64, else
        float32. With ``sums`` they are those given.

    Raises:
        TypeError, ValueError, BackendError: before anything is written, for what `norm_act` lists, and where
            ``dx=None``, ``sums`` or ``constant`` is given with a norm other than a batch norm.
    """
    if tracking.compiling() and tracking.is_tensor(x):
        return _operators().norm_act_backward_(dx, dh, x, norm, statistics, sums, count, constant, backend)
    kernels = select(x, backend, "x")
    look = seen("x", x)
    checks_norm.check_norm_options(norm, "x", look)
    checks_norm.check_sums(norm, dx, sums, count, constant)
    mean, rstd = checks_norm.statistics_pair(statistics)
    tracked = tracking.tracks_versions("x dx dh weight bias", (x, dx, dh, norm.weight, norm.bias))
    if sums is None:
        channels, wide = (look.shape[norm.channel_axis(len(look.shape))],), compute_dtype(look)
        dweight, dbias = empty(channels, "x", x, wide), empty(channels, "x", x, wide)
        mode = SUMS_ONLY if dx is None else SUMS_COMPUTED
    else:
        (dweight, dbias), mode = sums, SUMS_GIVEN
    if not kernels.CHECKS_OPERANDS:
        written = {} if dx is None else {"dx": dx}
        _check(norm, written, {"x": x, "dh": dh}, (mean, rstd), True, {"dweight": dweight, "dbias": dbias})
    kernels.norm_act_backward(dx, dx, dh, x, norm, mean, rstd, dweight, dbias, mode, count, constant)
    if tracked and dx is not None:
        tracking.wrote(dx)
    return dx, dweight, dbias


def _differentiable(names: str, arrays: tuple[Any, ...]) -> bool:
    """Whether autograd must record the call. Rejects what autograd would lose."""
    if kind_of(arrays[0]) != "torch":
        return False
    if sys.modules["torch"].is_grad_enabled():
        for array in arrays:
            if getattr(array, "requires_grad", False):
                tracking.refuse_transforms(array)
                return True
    tracking.refuse_tangents(names, arrays)
    return False


def _check_options(kernels: Any, norm: Any, name: str, x: Any) -> None:
    """Check the norm for kernels that do not check it themselves. A group norm is always checked: the number of groups
    determines the size of the statistics."""
    if not kernels.CHECKS_OPERANDS or not isinstance(norm, Norm) or norm.kind == "group":
        checks_norm.check_norm_options(norm, name, seen(name, x))


def _outputs(
    operands: dict[str, Any], norm: Norm, statistics: Statistics | None, dtype: Any
) -> tuple[Any, tuple[Any, Any]]:
    """Allocate h, and return it with the given or newly allocated statistics."""
    name, x = next(iter(operands.items()))
    h = empty_like(name, x, dtype)
    if statistics is not None:
        return h, checks_norm.statistics_pair(statistics)
    try:
        looks = [seen(other, array) for other, array in operands.items()]
        rstd = empty(norm.statistics_shape(tuple(looks[0].shape)), name, x, compute_dtype(*looks))
    except Exception:
        checks.check_arrays(**operands)  # names the argument that is not an array
        checks_norm.check_norm_options(norm, name, seen(name, x))  # or the option for which no statistics exist
        raise
    return h, (None if norm.kind == "rms" else empty_like(name, rstd), rstd)


def _check(
    norm: Norm,
    written: dict[str, Any],
    read: dict[str, Any],
    statistics: tuple[Any, Any],
    given: bool,
    sums: dict[str, Any] | None = None,
) -> None:
    arrays = written | read
    name = "x" if "x" in arrays else "y"
    x = arrays.pop(name)
    checks.check_arrays(**{name: x})
    checks.check_float(**{name: x})  # before h, which defaults to x's dtype
    checks.check_operands(written, read)
    checks_norm.check_norm(
        norm, name, x, statistics=statistics, given=given, sums=sums, writes=tuple(written), **arrays
    )


def _check_new(kernels: Any, operands: dict[str, Any], norm: Norm, statistics: Any, dtype: Any) -> Statistics | None:
    """Check a call that becomes an autograd node, which allocates its own results. Returns the given statistics."""
    h, pair = _outputs(operands, norm, statistics, dtype)
    if not kernels.CHECKS_OPERANDS:
        _check(norm, {"h": h}, operands, pair, statistics is not None)
    return None if statistics is None else Statistics(*pair)


def _wrote_running(norm: Norm, statistics: Statistics | None) -> None:
    if statistics is None and norm.running_mean is not None and kind_of(norm.running_mean) == "torch":
        tracking.wrote(norm.running_mean)
        tracking.wrote(norm.running_var)


def _operators() -> Any:
    from revkernels.autograd import torch_norm_ops

    return torch_norm_ops
