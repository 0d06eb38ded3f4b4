# SPDX-License-Identifier: Apache-2.0
"""Backend "eager": plain torch calls, one per step. The unfused baseline of every benchmark, on any torch device.

Where float64 meets a half type, torch rounds twice (through float32), the kernels once: the last bit may differ.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from revkernels.arrays import INT16, dtype_name, memory_order
from revkernels.coupling import Coupling
from revkernels.eager_norm_act import norm_act, norm_act_backward
from revkernels.norm import Norm

__all__ = [
    "accumulate",
    "couple",
    "couple_norm_act",
    "missing",
    "norm_act",
    "norm_act_backward",
    "reverse_step",
    "uncouple",
    "uncouple_norm_act",
]

CHECKS_OPERANDS = False


def missing(name: str = "eager") -> str | None:
    """Why this backend cannot run here, or None."""
    return None if importlib.util.find_spec("torch") else "torch is not installed: pip install 'revkernels[torch]'"


def couple(out: Any, x: Any, f: Any, coupling: Coupling | None) -> None:
    """out <- x + f"""
    if coupling is not None:
        _store(out, x, _branch_output(x, f, coupling), 1, coupling)
    elif out is x:
        x.add_(f)
    else:
        _torch().add(x, f, out=out)


def uncouple(out: Any, y: Any, f: Any, coupling: Coupling | None) -> None:
    """out <- y - f"""
    if coupling is not None:
        _store(out, y, _branch_output(y, f, coupling), -1, coupling)
    elif out is y:
        y.sub_(f)
    else:
        _torch().sub(y, f, out=out)


def reverse_step(y: Any, f: Any, dy: Any, df: Any, coupling: Coupling | None) -> None:
    """y <- y - f; dy <- dy + df"""
    uncouple(y, y, f, coupling)
    dy.add_(df)


def accumulate(totals: Sequence[Any], parts: Sequence[Any]) -> None:
    """totals[i] <- totals[i] + parts[i]"""
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)


def couple_norm_act(h: Any, y: Any, x: Any, f: Any, norm: Norm, mean: Any, rstd: Any, given: bool) -> None:
    """y <- x + f; h <- activation(norm(y)). y may be x."""
    couple(y, x, f, None)
    norm_act(h, y, norm, mean, rstd, given)


def uncouple_norm_act(h: Any, x: Any, y: Any, f: Any, norm: Norm, mean: Any, rstd: Any, given: bool) -> None:
    """x <- y - f; h <- activation(norm(x)). x may be y."""
    uncouple(x, y, f, None)
    norm_act(h, x, norm, mean, rstd, given)


def _torch() -> Any:
    return sys.modules["torch"]


def _branch_output(x: Any, f: Any, coupling: Coupling) -> Any:
    """f scaled and rounded to the grid; for an int16 stream in multiples of 2^-k."""
    torch = _torch()
    f = f.to(torch.promote_types(torch.promote_types(x.dtype, f.dtype), torch.float32))
    if coupling.channel_scale is not None or coupling.sample_scale is not None:
        scale = torch.ones((), dtype=f.dtype, device=f.device)
        if coupling.channel_scale is not None:
            shape = [1] * f.dim()
            shape[coupling.channel_dim] = -1
            scale = coupling.channel_scale.reshape(shape)
        if coupling.sample_scale is not None:
            scale = scale * coupling.sample_scale.reshape([-1] + [1] * (f.dim() - 1))
        f = scale * f
    if coupling.grid_exponent is not None:
        f = torch.round(f * 2.0**coupling.grid_exponent)
        if dtype_name(x) != INT16:
            f = f * 2.0**-coupling.grid_exponent
    return f


def _store(out: Any, x: Any, f: Any, sign: int, coupling: Coupling) -> None:
    torch = _torch()
    if dtype_name(x) == INT16:
        sizes = _store_fixed(out, x, f, sign, coupling)
    else:
        wide = torch.promote_types(torch.promote_types(x.dtype, f.dtype), torch.float32)
        out.copy_(torch.add(x.to(wide), f.to(wide), alpha=sign))
        sizes = out.abs() if coupling.amax is not None else None
    if coupling.amax is not None and out.numel():
        coupling.amax.copy_(torch.maximum(coupling.amax.reshape(()), sizes.amax().float()).reshape(coupling.amax.shape))
    if coupling.checksum is not None:
        coupling.checksum.view(torch.int64).add_(_checksum(out))


def _store_fixed(out: Any, q: Any, steps: Any, sign: int, coupling: Coupling) -> Any:
    """Store an int16 stream. Returns the sizes of the results before wrapping if an amax is wanted."""
    torch = _torch()
    unit = 2.0 ** -(coupling.grid_exponent or 0)
    sizes = None if coupling.amax is None else torch.add(q.to(steps.dtype), steps, alpha=sign).abs() * unit
    most = 2.0**23
    whole = torch.nan_to_num(steps, nan=0.0, posinf=most, neginf=-most).clamp(-most, most).to(torch.int32)
    total = torch.add(q.to(torch.int32), whole, alpha=sign)
    out.copy_(((total + 2**15) & 0xFFFF) - 2**15)
    if coupling.value is not None:
        wide = torch.promote_types(coupling.value.dtype, torch.float32)
        coupling.value.copy_(out.to(wide) * unit)
    return sizes


def _checksum(stored: Any) -> Any:
    torch = _torch()
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[stored.element_size()]
    bits = stored.permute(memory_order(stored)).contiguous().view(integer).reshape(-1).to(torch.int64)
    if stored.element_size() < 8:
        bits = bits & ((1 << 8 * stored.element_size()) - 1)
    return (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum()
