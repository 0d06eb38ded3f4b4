# SPDX-License-Identifier: Apache-2.0
"""The kernels with a normalisation as ``torch.library`` operators, beside those of `revkernels.autograd.torch_ops`.

    norm_act, couple_norm_act    new tensors, differentiable (twice too); given statistics are returned as empty
    norm_act_backward            their gradient
    uncouple_norm_act_           in place; running statistics are written as well
    norm_act_backward_           in place
    norm_statistics_             a batch's statistics only, which update the running ones

A differentiable operator may not write to its inputs, so in compiled code a batch norm with running statistics takes
two operators and one pass more than elsewhere. A schema has no `Norm`: its fields are separate arguments.
"""

from __future__ import annotations

from typing import Any

import torch

from revkernels import checks_norm, norm_ops, tracking
from revkernels.arrays import compute_dtype
from revkernels.autograd.norm_act import _differentiable
from revkernels.autograd.torch_ops import _library, exact_strides
from revkernels.backends import select
from revkernels.norm import SUMS_COMPUTED, Norm, Statistics

_NORM = "Tensor? weight, Tensor? bias, Tensor? mean, Tensor? rstd"
_OPTIONS = 'str kind, float eps=1e-05, str activation="none", int groups=1, int? channel_dim=None'
_BACKEND = 'str backend=""'
_NEW = f"bool constant=True, {_OPTIONS}, ScalarType? dtype=None, {_BACKEND}"
_MOMENTUM = "float momentum=0.1"

_SCHEMAS = {
    "norm_act": f"(Tensor x, {_NORM}, *, {_NEW}) -> (Tensor, Tensor, Tensor)",
    "couple_norm_act": f"(Tensor x, Tensor f, {_NORM}, *, {_NEW}) -> (Tensor, Tensor, Tensor, Tensor)",
    "norm_act_backward": f"(Tensor? base, Tensor dh, Tensor x, {_NORM}, *, bool constant, {_OPTIONS}, {_BACKEND}) "
    "-> (Tensor, Tensor, Tensor)",
    "uncouple_norm_act_": f"(Tensor(a!) y, Tensor f, {_NORM}, *, Tensor(b!)? running_mean=None, "
    f"Tensor(c!)? running_var=None, {_MOMENTUM}, {_OPTIONS}, ScalarType? dtype=None, {_BACKEND}) "
    "-> (Tensor, Tensor, Tensor)",
    "norm_act_backward_": f"(Tensor(a!)? dx, Tensor dh, Tensor x, {_NORM}, Tensor? dweight, Tensor? dbias, *, "
    f"int count=0, bool constant=False, {_OPTIONS}, {_BACKEND}) -> (Tensor, Tensor)",
    "norm_statistics_": f"(Tensor x, Tensor? f, *, Tensor(a!) running_mean, Tensor(b!) running_var, {_MOMENTUM}, "
    f"float eps=1e-05, int? channel_dim=None, {_BACKEND}) -> (Tensor, Tensor)",
}

# ---- the operators


def _norm_act(
    x: Any, weight: Any, bias: Any, mean: Any, rstd: Any, *, constant: bool = True, dtype: Any = None, **options: Any
) -> Any:
    backend, norm = _norm(weight, bias, options)
    h, statistics = norm_ops.norm_act(x, norm, statistics=_given(mean, rstd), dtype=dtype, backend=backend)
    return h, *_fresh(statistics, rstd is not None)


def _norm_act_fake(
    x: Any, weight: Any, bias: Any, mean: Any, rstd: Any, *, constant: bool = True, dtype: Any = None, **options: Any
) -> Any:
    norm = _norm(weight, bias, options)[1]
    return torch.empty_like(x, dtype=dtype), *_fresh(_empty(norm, x), rstd is not None)


def _couple_norm_act(
    x: Any,
    f: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    rstd: Any,
    *,
    constant: bool = True,
    dtype: Any = None,
    **options: Any,
) -> Any:
    backend, norm = _norm(weight, bias, options)
    y, h, statistics = norm_ops.couple_norm_act(x, f, norm, statistics=_given(mean, rstd), dtype=dtype, backend=backend)
    return y, h, *_fresh(statistics, rstd is not None)


def _couple_norm_act_fake(
    x: Any,
    f: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    rstd: Any,
    *,
    constant: bool = True,
    dtype: Any = None,
    **options: Any,
) -> Any:
    norm = _norm(weight, bias, options)[1]
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype), *_fresh(_empty(norm, x, f), rstd is not None)


def _norm_act_backward(
    base: Any, dh: Any, x: Any, weight: Any, bias: Any, mean: Any, rstd: Any, *, constant: bool, **options: Any
) -> Any:
    backend, norm = _norm(weight, bias, options)
    dx, dweight, dbias = _gradients_fake(base, dh, x, weight, bias, mean, rstd, constant=constant, **options)
    # A gradient has the strides of what came after, which a kernel may not support.
    base, dh = (
        t if t is None or checks_norm.merges(norm, [x, t]) else torch.empty_like(x, dtype=t.dtype).copy_(t)
        for t in (base, dh)
    )
    mean, rstd = (None if t is None else t.to(dbias.dtype) for t in (mean, rstd))  # wider if f was
    select(x, backend).norm_act_backward(
        dx, base, dh, x, norm, mean, rstd, dweight, dbias, SUMS_COMPUTED, 0, constant and norm.kind == "batch"
    )
    return dx, dweight, dbias


def _gradients_fake(
    base: Any, dh: Any, x: Any, weight: Any, bias: Any, mean: Any, rstd: Any, *, constant: bool, **options: Any
) -> Any:
    channels = (x.shape[_norm(weight, bias, options)[1].channel_axis(x.dim())],)
    wide = getattr(torch, compute_dtype(x))
    return torch.empty_like(x), x.new_empty(channels, dtype=wide), x.new_empty(channels, dtype=wide)


def _uncouple_norm_act_in_place(
    y: Any, f: Any, weight: Any, bias: Any, mean: Any, rstd: Any, *, dtype: Any = None, **options: Any
) -> Any:
    backend, norm = _norm(weight, bias, options)
    _, h, statistics = norm_ops.uncouple_norm_act_(
        y, f, norm, statistics=_given(mean, rstd), dtype=dtype, backend=backend
    )
    return h, *_fresh(statistics, rstd is not None)


def _uncouple_norm_act_fake(
    y: Any, f: Any, weight: Any, bias: Any, mean: Any, rstd: Any, *, dtype: Any = None, **options: Any
) -> Any:
    norm = _norm(weight, bias, options)[1]
    return torch.empty_like(y, dtype=dtype), *_fresh(_empty(norm, y, f), rstd is not None)


def _norm_act_backward_in_place(
    dx: Any,
    dh: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    rstd: Any,
    dweight: Any,
    dbias: Any,
    *,
    count: int = 0,
    constant: bool = False,
    **options: Any,
) -> Any:
    backend, norm = _norm(weight, bias, options)
    sums = None if dweight is None and dbias is None else (dweight, dbias)
    _, *found = norm_ops.norm_act_backward_(
        dx,
        dh,
        x,
        norm,
        Statistics(mean, rstd),
        sums=sums,
        count=count,
        constant=constant,
        backend=backend,
    )
    return tuple(found) if sums is None else (x.new_empty(0), x.new_empty(0))


def _norm_act_backward_fake(
    dx: Any, dh: Any, x: Any, weight: Any, bias: Any, mean: Any, rstd: Any, dweight: Any, dbias: Any, **options: Any
) -> Any:
    if dweight is not None or dbias is not None:
        return x.new_empty(0), x.new_empty(0)
    for name in ("count", "constant"):
        options.pop(name, None)
    return _gradients_fake(None, dh, x, weight, bias, mean, rstd, constant=False, **options)[1:]


def _norm_statistics_in_place(x: Any, f: Any, **options: Any) -> Any:
    backend, norm = _norm(None, None, {"kind": "batch", **options})
    if f is None:
        return tuple(norm_ops.norm_act(x, norm, backend=backend)[-1])
    return tuple(norm_ops.couple_norm_act(x, f, norm, backend=backend)[-1])


def _norm_statistics_fake(x: Any, f: Any, **options: Any) -> Any:
    norm = _norm(None, None, {"kind": "batch", **options})[1]
    return tuple(_empty(norm, x, *(() if f is None else (f,))))


def _norm(weight: Any, bias: Any, options: dict[str, Any]) -> tuple[str | None, Norm]:
    options = dict(options)
    backend = options.pop("backend", "") or None
    return backend, Norm(options.pop("kind"), weight, bias, **options)


def _given(mean: Any, rstd: Any) -> Statistics | None:
    return None if rstd is None else Statistics(mean, rstd)


def _empty(norm: Norm, x: Any, *f: Any) -> Statistics:
    shape, wide = norm.statistics_shape(tuple(x.shape)), getattr(torch, compute_dtype(x, *f))
    return Statistics(None if norm.kind == "rms" else x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide))


def _fresh(statistics: Statistics, given: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The statistics as an operator may return them: none of its inputs, and no None."""
    mean, rstd = statistics
    nothing = rstd.new_empty(0)
    return (nothing, rstd.new_empty(0)) if given else (nothing if mean is None else mean, rstd)


# ---- their gradients


def _remember(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    *operands, weight, bias, mean, rstd = inputs
    coupled = len(operands) == 2
    options = dict(keyword_only_inputs)
    options.pop("dtype")
    # Statistics computed here, or elsewhere from x, are functions of x.
    constant = options.pop("constant") and rstd is not None
    if rstd is None:
        mean, rstd = (None if options["kind"] == "rms" else output[-2]), output[-1]
    ctx.save_for_backward(output[0] if coupled else operands[0], weight, bias, mean, rstd)
    ctx.options, ctx.constant, ctx.coupled = options, constant, coupled
    ctx.f_dtype = operands[1].dtype if coupled else None
    ctx.mark_non_differentiable(*output[-2:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, *gradients: Any) -> Any:
    dy, dh = gradients[:2] if ctx.coupled else (None, gradients[0])
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = dy, None, None
    if dh is not None and torch.is_grad_enabled():
        norm = _norm(weight, bias, ctx.options)[1]
        constant = Statistics(mean, rstd) if ctx.constant and norm.kind == "batch" else None
        dx, dweight, dbias = _differentiable(x, norm, constant, dy, dh)
    elif dh is not None:
        dx, dweight, dbias = _calls.norm_act_backward.default(
            dy, dh, x, weight, bias, mean, rstd, constant=ctx.constant, **ctx.options
        )
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
    operands = (dx, None if dx is None else dx.to(ctx.f_dtype)) if ctx.coupled else (dx,)
    return *operands, dweight, dbias, None, None


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "norm_act": (_norm_act, _norm_act_fake),
    "couple_norm_act": (_couple_norm_act, _couple_norm_act_fake),
    "norm_act_backward": (_norm_act_backward, _gradients_fake),
    "uncouple_norm_act_": (_uncouple_norm_act_in_place, _uncouple_norm_act_fake),
    "norm_act_backward_": (_norm_act_backward_in_place, _norm_act_backward_fake),
    "norm_statistics_": (_norm_statistics_in_place, _norm_statistics_fake),
}
for _name, (_function, _fake) in _IMPLEMENTATIONS.items():
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag, exact_strides))
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"revkernels::{_name}", _fake, lib=_library)
for _name in ("norm_act", "couple_norm_act"):
    torch.library.register_autograd(f"revkernels::{_name}", _gradient, setup_context=_remember, lib=_library)

_calls = torch.ops.revkernels


# ---- the functions of `revkernels.ops` as they are traced


def norm_act(x: Any, norm: Norm, statistics: Any, dtype: Any, backend: str | None) -> Any:
    given = statistics if statistics is not None else _moved(x, None, norm, backend)
    h, *computed = _calls.norm_act.default(
        x, *_arguments(norm, given), constant=statistics is not None, dtype=dtype, **_fields(norm, backend)
    )
    return h, _statistics(norm, given, computed)


def couple_norm_act(x: Any, f: Any, norm: Norm, statistics: Any, dtype: Any, backend: str | None) -> Any:
    given = statistics if statistics is not None else _moved(x, f, norm, backend)
    y, h, *computed = _calls.couple_norm_act.default(
        x, f, *_arguments(norm, given), constant=statistics is not None, dtype=dtype, **_fields(norm, backend)
    )
    return y, h, _statistics(norm, given, computed)


def uncouple_norm_act_(y: Any, f: Any, norm: Norm, statistics: Any, dtype: Any, backend: str | None) -> Any:
    tracking.tracks_versions("y f weight bias", (y, f, norm.weight, norm.bias))
    running = {"running_mean": norm.running_mean, "running_var": norm.running_var, "momentum": norm.momentum}
    h, *computed = _calls.uncouple_norm_act_.default(
        y, f, *_arguments(norm, statistics), **running, dtype=dtype, **_fields(norm, backend)
    )
    return y, h, _statistics(norm, statistics, computed)


def norm_act_backward_(
    dx: Any,
    dh: Any,
    x: Any,
    norm: Norm,
    statistics: Any,
    sums: Any,
    count: int,
    constant: bool,
    backend: str | None,
) -> Any:
    tracking.tracks_versions("x dx dh weight bias", (x, dx, dh, norm.weight, norm.bias))
    computed = _calls.norm_act_backward_.default(
        dx,
        dh,
        x,
        *_arguments(norm, statistics),
        *(sums or (None, None)),
        count=count,
        constant=constant,
        **_fields(norm, backend),
    )
    return dx, *(sums or computed)


def _moved(x: Any, f: Any, norm: Norm, backend: str | None) -> Statistics | None:
    """The batch's statistics, if they update running ones; else None, for the operator to compute."""
    if norm.running_mean is None:
        return None
    with torch.no_grad():
        found = _calls.norm_statistics_.default(
            x.detach(),
            None if f is None else f.detach(),
            running_mean=norm.running_mean,
            running_var=norm.running_var,
            momentum=norm.momentum,
            eps=norm.eps,
            channel_dim=norm.channel_dim,
            backend=backend or "",
        )
    return Statistics(*found)


def _arguments(norm: Norm, statistics: Any) -> tuple[Any, Any, Any, Any]:
    mean, rstd = (None, None) if statistics is None else statistics
    return norm.weight, norm.bias, mean, rstd


def _statistics(norm: Norm, given: Any, computed: Any) -> Statistics:
    if given is not None:
        return Statistics(*given)
    return Statistics(None if norm.kind == "rms" else computed[0], computed[1])


def _fields(norm: Norm, backend: str | None) -> dict[str, Any]:
    options = {name: getattr(norm, name) for name in ("kind", "eps", "activation", "groups", "channel_dim")}
    return options | {"backend": backend or ""}
