# SPDX-License-Identifier: Apache-2.0
"""The norms with activation as plain torch calls, one per operation, in the order of the contract.

`torch.nn.functional`'s norms do not fit: they fold the affine part into one multiplication and one addition, which
rounds differently, and support neither arbitrary layouts nor given statistics.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

from revkernels.norm import SUMS_GIVEN, SUMS_ONLY, Norm


def norm_act(h: Any, x: Any, norm: Norm, mean: Any, rstd: Any, given: bool) -> None:
    """h <- activation(norm(x)); mean and rstd are written, or read if given"""
    torch, over, wide = sys.modules["torch"], _axes(x, norm), rstd.dtype
    values = over.split(x.to(wide))
    if not given:
        _measure(values, over, norm, mean, rstd)
    in_place = h.dtype == wide
    z = over.split(h) if in_place else torch.empty_like(values)
    if mean is None:
        torch.mul(values, over.statistic(rstd), out=z)
    else:
        torch.sub(values, over.statistic(mean), out=z)
        z.mul_(over.statistic(rstd))
    if norm.weight is not None:
        z.mul_(over.parameter(norm.weight.to(wide)))
    if norm.bias is not None:
        z.add_(over.parameter(norm.bias.to(wide)))
    _activate_(z, norm.activation)
    if not in_place:
        over.split(h).copy_(z)


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
    over, wide = _axes(x, norm), rstd.dtype
    scale = over.statistic(rstd)
    xhat = over.split(x.to(wide))
    xhat = xhat * scale if mean is None else (xhat - over.statistic(mean)).mul_(scale)
    weight = None if norm.weight is None else over.parameter(norm.weight.to(wide))
    dz = over.split(dh.to(wide))
    if norm.activation != "none":
        z = xhat if weight is None else xhat * weight
        if norm.bias is not None:
            z = z + over.parameter(norm.bias.to(wide))
        dz = _activation_backward(dz, z, norm.activation)
    if sums != SUMS_GIVEN:
        if dweight is not None:
            dweight.copy_(_sum(dz * xhat, over.others).reshape(dweight.shape))
        if dbias is not None:
            dbias.copy_(_sum(dz, over.others).reshape(dbias.shape))
    if sums == SUMS_ONLY:
        return
    if norm.kind == "batch":
        if weight is not None:
            scale = weight * scale
        if constant:
            gradient = scale * dz
        else:
            n = count or over.size
            level, slope = (over.parameter(total / n) for total in (dbias, dweight))
            gradient = (dz - level).sub_(xhat * slope).mul_(scale)
    else:
        g = dz if weight is None else dz * weight
        slope = (g * xhat).mean(over.together, keepdim=True)
        gradient = g if mean is None else g - g.mean(over.together, keepdim=True)
        gradient = (gradient - xhat.mul_(slope)).mul_(scale)
    if base is not None:
        gradient = over.split(base.to(wide)) + gradient
    over.split(dx).copy_(gradient)


class _Axes(NamedTuple):
    """How the dimensions of an array are grouped, with its channels split into groups for a group norm."""

    axis: int
    groups: int | None
    together: list[int]  # over which a statistic is taken
    others: list[int]  # over which a parameter's gradient is summed
    size: int  # elements per statistic
    statistics: tuple[int, ...]
    parameters: tuple[int, ...]

    def split(self, array: Any) -> Any:
        """A view with the channels as [groups, channels per group]."""
        if self.groups is None:
            return array
        return array.unflatten(self.axis, (self.groups, array.shape[self.axis] // self.groups))

    def statistic(self, array: Any) -> Any:
        return array.view(self.statistics)

    def parameter(self, array: Any) -> Any:
        return array.view(self.parameters)


def _axes(x: Any, norm: Norm) -> _Axes:
    axis, shape = norm.channel_axis(x.dim()), tuple(x.shape)
    groups = norm.groups if norm.kind == "group" else None
    channels = [axis]
    if groups is not None:
        shape = (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
        channels = [axis, axis + 1]
    every = range(len(shape))
    others = [d for d in every if d not in channels]
    apart = {"batch": channels, "group": [0, axis]}.get(norm.kind, others)
    together = [d for d in every if d not in apart]
    return _Axes(
        axis,
        groups,
        together,
        others,
        math.prod(shape[d] for d in together),
        tuple(n if d in apart else 1 for d, n in enumerate(shape)),
        tuple(n if d in channels else 1 for d, n in enumerate(shape)),
    )


def _measure(values: Any, over: _Axes, norm: Norm, mean: Any, rstd: Any) -> None:
    torch = sys.modules["torch"]
    if values.numel() == 0:  # sums of nothing; running statistics stay unchanged
        rstd.fill_(1 / math.sqrt(norm.eps) if norm.eps else math.inf)
        if mean is not None:
            mean.zero_()
        return
    if mean is None:
        variance = values.square().mean(over.together)
    else:
        variance, center = _moments(values, over)
        mean.copy_(center.reshape(mean.shape))
    variance = variance.reshape(rstd.shape)
    torch.rsqrt(variance + norm.eps, out=rstd)
    if norm.running_mean is not None:
        unbiased = variance.double() * (over.size / (over.size - 1) if over.size > 1 else 1.0)
        for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.copy_((1 - norm.momentum) * running.double() + norm.momentum * batch.double())


def _moments(values: Any, over: _Axes) -> tuple[Any, Any]:
    """The biased variance and the mean."""
    torch = sys.modules["torch"]
    if not over.together:
        return torch.zeros_like(values), values
    if values.dtype != torch.float64:
        return torch.var_mean(values, over.together, correction=0)
    # On a CPU torch computes float32 with sums in float64, but has nothing wider for float64, and its running mean is
    # rounded at every element. So float64 takes a second pass around the first mean.
    near = values.mean(over.together, keepdim=True)
    rest = values - near
    off = rest.mean(over.together, keepdim=True)
    return (rest - off).square_().mean(over.together), near + off


def _sum(values: Any, dims: list[int]) -> Any:
    return values.sum(dims) if dims else values  # sum([]) would sum over all dimensions


def _activate_(z: Any, activation: str) -> None:
    torch = sys.modules["torch"]
    if activation == "relu":
        torch.threshold_(z, 0, 0)  # z <= 0 ? 0 : z. torch.relu keeps -0.
    elif activation == "gelu":
        torch.ops.aten.gelu_(z)
    elif activation == "gelu_tanh":
        torch.ops.aten.gelu_(z, approximate="tanh")
    elif activation == "silu":
        torch.nn.functional.silu(z, inplace=True)


def _activation_backward(dh: Any, z: Any, activation: str) -> Any:
    aten = sys.modules["torch"].ops.aten
    if activation == "relu":
        return aten.threshold_backward(dh, z, 0)
    if activation == "silu":
        return aten.silu_backward(dh, z)
    return aten.gelu_backward(dh, z, approximate="tanh" if activation == "gelu_tanh" else "none")
