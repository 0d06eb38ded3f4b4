# SPDX-License-Identifier: Apache-2.0
"""The additive coupling as autograd nodes.

A chain's node is ``(a, f) -> (s, h)``: s = a + f is the new stream, h the same values as the next branch's input. Its
backward receives both gradients of the stream, ds from the coupling after next and dh from the branch, and accumulates
them itself, so that the engine adds nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from revkernels.autograd.accumulate import gather
from revkernels.coupling import Coupling


def walkable(f: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """f in a layout that a kernel with a checksum can traverse along with s: three dimensions at most, once merged."""
    if f.dim() <= 3 or f.stride() == s.stride() or (in_usual_order(f) and in_usual_order(s)):
        return f
    return torch.empty_strided(s.shape, s.stride(), dtype=f.dtype, device=f.device).copy_(f)


def in_usual_order(t: torch.Tensor) -> bool:
    """Whether t is dense and contiguous, or channels last."""
    if t.is_contiguous():
        return True
    memory_format = CHANNELS_LAST.get(t.dim())
    return memory_format is not None and t.is_contiguous(memory_format=memory_format)


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Enter(torch.autograd.Function):
    """s -> (s, h), both s: where a branch reads a stream that was not coupled just before."""

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor, kernels: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        return s.detach(), s.detach()

    @staticmethod
    def backward(ctx: Any, ds: Any, dh: Any) -> Any:
        return gather(ds, dh, ctx.kernels), None


class Couple(torch.autograd.Function):
    """(a, f) -> (s, h) with s = a + f and h its twin; the gradient of the sum is passed to both unchanged.

    The same holds where ``coupling`` rounds f to a grid: the gradient of rounding is taken as the identity.
    """

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, f: torch.Tensor, kernels: Any, coupling: Coupling | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        s = torch.empty_like(a)
        kernels.couple(s, a, f if coupling is None else walkable(f, s), coupling)
        return s, s.detach()

    @staticmethod
    def backward(ctx: Any, ds: Any, dh: Any) -> Any:
        total = gather(ds, dh, ctx.kernels)
        return total, total, None, None


#: `Function.apply` without its torch.func handling, which is not needed here: saves a microsecond a call.
enter: Any = super(torch.autograd.Function, Enter).apply
couple: Any = super(torch.autograd.Function, Couple).apply


class _Op(torch.autograd.Function):
    """`revkernels.ops.couple` and `uncouple` with every option, on tensors that require grad."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, f: Any, channel_scale: Any, sample_scale: Any, kernels: Any, name: str, coupling: Any
    ) -> Any:
        out = torch.empty_like(x)
        getattr(kernels, name)(out, x, f, coupling)
        ctx.sign = 1 if name == "couple" else -1
        ctx.dims = (coupling.channel_dim if coupling else 1, f.dtype)
        scaled = channel_scale is not None or sample_scale is not None
        ctx.save_for_backward(f if scaled else None, channel_scale, sample_scale)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        f, channel_scale, sample_scale = ctx.saved_tensors
        channel_dim, f_dtype = ctx.dims
        df = dy if ctx.sign == 1 else -dy
        if f is None:
            return dy, df.to(f_dtype), None, None, None, None, None
        rank = dy.dim()
        channels = None if channel_scale is None else channel_scale.reshape(_along(channel_dim, rank))
        samples = None if sample_scale is None else sample_scale.reshape(_along(0, rank))
        wide = df.to((channel_scale if sample_scale is None else sample_scale).dtype)
        of_scale = wide * f  # the gradient of the product of the scales
        dc = None if channels is None else _sum_to(of_scale if samples is None else of_scale * samples, channel_dim)
        ds = None if samples is None else _sum_to(of_scale if channels is None else of_scale * channels, 0)
        for scale in (channels, samples):
            wide = wide if scale is None else wide * scale
        return dy, wide.to(f_dtype), dc, ds, None, None, None


def differentiable(kernels: Any, name: str, x: Any, f: Any, coupling: Coupling | None) -> torch.Tensor:
    """Run ``couple`` or ``uncouple`` as a node of the graph. The gradient of the grid's rounding is the identity."""
    scales = (None, None) if coupling is None else (coupling.channel_scale, coupling.sample_scale)
    return _Op.apply(x, f, *scales, kernels, name, coupling)


def _along(dim: int, rank: int) -> list[int]:
    shape = [1] * rank
    shape[dim] = -1
    return shape


def _sum_to(values: torch.Tensor, dim: int) -> torch.Tensor:
    others = [d for d in range(values.dim()) if d != dim % values.dim()]
    return values.sum(others) if others else values  # sum([]) would be the sum over all
