# SPDX-License-Identifier: Apache-2.0
"""Normalisation with its activation as autograd nodes, alone and together with the coupling in front.

    norm_act          x -> h                h = activation(norm(x))
    enter_norm_act    s -> (s, h)           a stream that enters a branch
    couple_norm_act   (a, f) -> (s, h)      s = a + f, h = activation(norm(s))

The last two are `revkernels.autograd.coupling`'s nodes with the next branch's first layers inside: their backward
receives the stream's gradient, and the norm's backward kernel accumulates straight into it (Algorithm 1, lines 5 and
6). Only x (or s) and the statistics are saved: the activation's mask is recomputed from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from revkernels.autograd.accumulate import owned
from revkernels.autograd.ownership import is_batched
from revkernels.checks_norm import merges
from revkernels.norm import SUMS_COMPUTED, Norm, Statistics

_WIDE = {torch.float64: torch.float64}

#: In torch 2.6, and maybe later versions, a leaf that a Python node saves under saved-tensor hooks loses its own
#: hooks when the node unpacks it. There weight and bias are stored beside the saved tensors.
_SAVES_LEAVES = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"


class Call:
    """One application of a norm.

    Attributes:
        kernels: the backend.
        norm: what to compute; the nodes take weight and bias as separate arguments.
        dtype: of h; None for x's.
        given: the statistics to use, or None to compute them.
        constant: the statistics do not depend on x (batch norm in evaluation).
        statistics: the statistics used, once the node has run.
        ready: h, if already computed (then ``given`` is not None).
        source: the buffer that constant statistics were copied from: saved so that writes to it raise, as in torch.
    """

    __slots__ = ("constant", "dtype", "given", "kernels", "norm", "ready", "source", "statistics")

    def __init__(
        self, kernels: Any, norm: Norm, dtype: Any = None, given: Statistics | None = None, constant: bool = False
    ) -> None:
        self.kernels, self.norm, self.dtype, self.given, self.constant = kernels, norm, dtype, given, constant
        self.statistics: Statistics | None = given
        self.ready: torch.Tensor | None = None
        self.source: torch.Tensor | None = None

    def outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, Any, Any, bool]:
        """Return (h, mean, rstd, whether the statistics are given); what must be computed is still empty."""
        h = torch.empty_like(x, dtype=self.dtype)
        statistics = self.given
        if statistics is None:
            statistics = self.statistics = empty_statistics(x, self.norm)
        return h, statistics.mean, statistics.rstd, self.given is not None


def empty_statistics(x: torch.Tensor, norm: Norm, f: torch.Tensor | None = None) -> Statistics:
    """Memory for the statistics of x, or of x + f."""
    shape = norm.statistics_shape(x.shape)
    dtype = _WIDE.get(x.dtype, torch.float32 if f is None else _WIDE.get(f.dtype, torch.float32))
    rstd = torch.empty(shape, dtype=dtype, device=x.device)
    return Statistics(None if norm.kind == "rms" else torch.empty_like(rstd), rstd)


class NormAct(torch.autograd.Function):
    """x -> h"""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any, call: Call) -> torch.Tensor:
        h, mean, rstd, given = call.outputs(x)
        call.kernels.norm_act(h, x, call.norm, mean, rstd, given)
        _remember(ctx, call, x, weight, bias, mean, rstd)
        return h

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor) -> Any:
        return *_gradients(ctx, None, dh, None, _over(ctx, dh) and owned(dh)), None


class EnterNormAct(torch.autograd.Function):
    """s -> (s, h)"""

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor, weight: Any, bias: Any, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        if call.ready is None:
            h, mean, rstd, given = call.outputs(s)
            call.kernels.norm_act(h, s, call.norm, mean, rstd, given)
        else:
            h, (mean, rstd) = call.ready, call.given  # type: ignore[misc]
        _remember(ctx, call, s, weight, bias, mean, rstd)
        return s.detach(), h

    @staticmethod
    def backward(ctx: Any, ds: Any, dh: Any) -> Any:
        into = ds if ds is not None and dh is not None and owned(ds) else None
        return *_gradients(ctx, ds, dh, into, into is None and _over(ctx, dh) and owned(dh)), None


class CoupleNormAct(torch.autograd.Function):
    """(a, f) -> (s, h)"""

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, f: torch.Tensor, weight: Any, bias: Any, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s = torch.empty_like(a)
        if call.given is None:
            call.statistics = empty_statistics(a, call.norm, f)
        mean, rstd = call.statistics  # type: ignore[misc]
        h = torch.empty_like(a, dtype=call.dtype)
        call.kernels.couple_norm_act(h, s, a, f, call.norm, mean, rstd, call.given is not None)
        _remember(ctx, call, s, weight, bias, mean, rstd)
        return s, h

    @staticmethod
    def backward(ctx: Any, ds: Any, dh: Any) -> Any:
        into = ds if ds is not None and dh is not None and owned(ds) else None
        total, dweight, dbias = _gradients(ctx, ds, dh, into, into is None and _over(ctx, dh) and owned(dh))
        return total, total, dweight, dbias, None


def making_again(call: Call, s: torch.Tensor, h: torch.Tensor) -> tuple[Callable[..., torch.Tensor], Any]:
    """A function that recomputes h from s and the statistics used, and the tensors that it takes."""
    own, kernels, dtype = call.norm, call.kernels, h.dtype
    # Detached: a holder of the output would hold its own graph, a reference cycle that gc cannot see.
    weight, bias = (t if t is None or t.grad_fn is None else t.detach() for t in (own.weight, own.bias))

    def make(s: torch.Tensor, weight: Any, bias: Any, mean: Any, rstd: Any) -> torch.Tensor:
        norm = Norm(own.kind, weight, bias, own.eps, own.activation, own.groups, own.channel_dim)
        made = torch.empty_like(s, dtype=dtype)
        kernels.norm_act(made, s, norm, mean, rstd, True)
        return made

    return make, (s.detach(), weight, bias, *call.statistics)  # type: ignore[misc]


#: `Function.apply` without its torch.func handling, which is not needed here: saves a microsecond a call.
norm_act: Any = super(torch.autograd.Function, NormAct).apply
enter_norm_act: Any = super(torch.autograd.Function, EnterNormAct).apply
couple_norm_act: Any = super(torch.autograd.Function, CoupleNormAct).apply


def _remember(ctx: Any, call: Call, s: Any, weight: Any, bias: Any, mean: Any, rstd: Any) -> None:
    # Statistics are saved tensors too: a chain that recomputes its activations drops them. Those of rows, a float for
    # every position, would otherwise grow with its depth.
    if _SAVES_LEAVES:
        ctx.save_for_backward(s, weight, bias, mean, rstd, call.source)
    else:
        ctx.leaves = [None if t is None or t.grad_fn is not None else (t, t._version) for t in (weight, bias)]
        others = (t if leaf is None else None for t, leaf in zip((weight, bias), ctx.leaves, strict=True))
        ctx.save_for_backward(s, *others, mean, rstd, call.source)
    ctx.kernels, ctx.norm, ctx.constant = call.kernels, call.norm, call.constant
    ctx.set_materialize_grads(False)


def _unchanged(saved: Any, leaf: tuple[torch.Tensor, int] | None) -> Any:
    """The saved tensor, or the leaf stored beside it, after the version check that torch would make."""
    if leaf is None:
        return saved
    if leaf[0]._version != leaf[1]:
        raise RuntimeError(
            f"one of the variables needed for gradient computation has been modified by an inplace operation: a norm's "
            f"parameter of shape {tuple(leaf[0].shape)} is at version {leaf[0]._version}; expected version {leaf[1]}"
        )
    return leaf[0]


def _over(ctx: Any, dh: Any) -> bool:
    """Whether the kernel may write over dh: batch norm's can, once it has its sums."""
    return dh is not None and ctx.norm.kind == "batch"


def _gradients(ctx: Any, ds: Any, dh: Any, into: Any = None, over: bool = False) -> tuple[Any, Any, Any]:
    """(ds + the gradient of h at s, dweight, dbias), the first written to ``into`` unless that is None.

    ``over``: without ``into`` it may be written over dh, which saves memory.
    """
    if dh is None:
        return ds, None, None
    s, weight, bias, mean, rstd, _ = ctx.saved_tensors
    if not _SAVES_LEAVES:
        weight, bias = map(_unchanged, (weight, bias), ctx.leaves)
    own = ctx.norm  # without its running statistics; `replace` would take twice as long
    norm = Norm(own.kind, weight, bias, own.eps, own.activation, own.groups, own.channel_dim)
    constant = Statistics(mean, rstd) if ctx.constant else None
    if torch.is_grad_enabled():
        return _differentiable(s, norm, constant, ds, dh)
    if is_batched(dh) or (ds is not None and is_batched(ds)):
        raise NotImplementedError(
            "batched gradients (is_grads_batched=True, vectorize=True) cannot go through the kernel of a norm: set "
            "backend='eager' for them"
        )
    dh = _walkable(dh, s, norm)
    if ds is not None and (walked := _walkable(ds, s, norm)) is not ds:
        ds = into = walked  # a copy, safe to overwrite
    if rstd.dtype != (wide := _WIDE.get(s.dtype, torch.float32)):  # a coupling with a float64 branch
        mean, rstd = None if mean is None else mean.to(wide), rstd.to(wide)
    wanted = ctx.needs_input_grad[-3:-1]
    dweight = dbias = None
    if norm.kind == "batch":
        dweight, dbias = torch.empty_like(rstd), torch.empty_like(rstd)
    elif any(wanted):
        channels = s.shape[norm.channel_axis(s.dim())]
        dweight, dbias = rstd.new_empty(channels), rstd.new_empty(channels)
    if into is None:
        over = over and dh.dtype == s.dtype and dh.stride() == s.stride()
        into = dh if over else torch.empty_like(s)
    ctx.kernels.norm_act_backward(
        into, ds, dh, s, norm, mean, rstd, dweight, dbias, SUMS_COMPUTED, 0, constant is not None
    )
    return into, _like(dweight, weight) if wanted[0] else None, _like(dbias, bias) if wanted[1] else None


def _like(gradient: Any, parameter: torch.Tensor) -> Any:
    """In the parameter's dtype."""
    return gradient if gradient is None or gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)


def _walkable(gradient: torch.Tensor, s: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The gradient in a layout that kernels can traverse along with s: torch may pass any."""
    gradient = gradient.resolve_neg()
    if gradient.stride() == s.stride() or not any(gradient.stride()):
        return gradient
    dense = gradient.is_contiguous()
    dense = dense or (gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last))
    if dense and walk_together(norm, s, gradient):
        return gradient
    return torch.empty_like(s, dtype=gradient.dtype).copy_(gradient)


def walk_together(norm: Norm, s: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the norm's kernels can traverse tensors with these layouts together."""
    strides = s.stride()
    return s.dim() <= 3 or all(t.stride() == strides for t in others) or merges(norm, (s, *others))


def _differentiable(s: Any, norm: Norm, constant: Statistics | None, ds: Any, dh: Any) -> tuple[Any, Any, Any]:
    """Under create_graph: the same gradients by torch's own operators, which are differentiable again."""
    arguments = [t for t in (s, norm.weight, norm.bias) if t is not None and t.requires_grad]
    # An alias of each, so that the gradient stops at this norm's own inputs.
    own = {id(t): t.view_as(t) for t in arguments}
    x, weight, bias = (own.get(id(t), t) for t in (s, norm.weight, norm.bias))
    h = plain(x, replace(norm, weight=weight, bias=bias), constant).to(dh.dtype)
    found = torch.autograd.grad(h, list(own.values()), dh, create_graph=True, allow_unused=True)
    by_input = dict(zip(own, found, strict=True))
    dx = by_input.get(id(s))
    total = dx if ds is None else ds if dx is None else ds + dx
    return total, by_input.get(id(norm.weight)), by_input.get(id(norm.bias))


def plain(x: torch.Tensor, norm: Norm, constant: Statistics | None = None) -> torch.Tensor:
    """h by torch's own operators, differentiable any number of times; the result has the compute type."""
    axis = norm.channel_axis(x.dim())
    shape = [1] * x.dim()
    shape[axis] = -1
    wide = x.to(_WIDE.get(x.dtype, torch.float32))
    if norm.kind == "batch":
        others = [dim for dim in range(x.dim()) if dim != axis]
        mean = wide.mean(others, keepdim=True) if constant is None else constant.mean.reshape(shape)
        xhat = wide - mean
        if constant is None:
            xhat = xhat * (xhat.square().mean(others, keepdim=True) + norm.eps).rsqrt()
        else:
            xhat = xhat * constant.rstd.reshape(shape)
    elif norm.kind == "group":
        xhat = functional.group_norm(wide.movedim(axis, 1), norm.groups, eps=norm.eps).movedim(1, axis)
    else:
        xhat = wide if norm.kind == "rms" else wide - wide.mean(axis, keepdim=True)
        xhat = xhat * (xhat.square().mean(axis, keepdim=True) + norm.eps).rsqrt()
    z = xhat if norm.weight is None else xhat * norm.weight.reshape(shape)
    z = z if norm.bias is None else z + norm.bias.reshape(shape)
    return ACTIVATIONS[norm.activation](z)


ACTIVATIONS: dict[str, Any] = {
    "none": lambda z: z,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}


def differentiable_norm_act(
    kernels: Any, x: Any, norm: Norm, statistics: Statistics | None, dtype: Any
) -> tuple[Any, Statistics]:
    """`revkernels.ops.norm_act` on tensors that require grad. Given statistics count as constants."""
    call = Call(kernels, norm, dtype, statistics, constant=statistics is not None and norm.kind == "batch")
    h = NormAct.apply(x, norm.weight, norm.bias, call)
    return h, call.statistics  # type: ignore[return-value]


def differentiable_couple_norm_act(
    kernels: Any, x: Any, f: Any, norm: Norm, statistics: Statistics | None, dtype: Any
) -> tuple[Any, Any, Statistics]:
    """`revkernels.ops.couple_norm_act` on tensors that require grad. Given statistics count as constants."""
    call = Call(kernels, norm, dtype, statistics, constant=statistics is not None and norm.kind == "batch")
    y, h = CoupleNormAct.apply(x, f, norm.weight, norm.bias, call)
    return y, h, call.statistics  # type: ignore[return-value]
