# SPDX-License-Identifier: Apache-2.0
"""Backend "triton": the checks, and the launches on the caller's stream.

The first call with given shapes, strides and dtypes checks everything; later ones compare addresses only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from revkernels import checks
from revkernels.arrays import compute_dtype
from revkernels.coupling import Coupling
from revkernels.triton_kernels.launch import (
    TILE,
    Prepared,
    check_place,
    interpreting,
    on,
    prepare,
    threads,
    warp_width,
)
from revkernels.triton_kernels.norm_backend import (  # noqa: F401 (functions of this backend)
    couple_norm_act,
    norm_act,
    norm_act_backward,
    uncouple_norm_act,
)

CHECKS_OPERANDS = True
_PAIRS = (8, 32)  # pairs per list launch: few variants to compile, and far fewer argument bytes than a launch's 4 KiB
_LARGEST_LISTED = 2**29  # four times the count is an int32
_KEPT = 4096
_GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, Windows Subsystem for Linux

_prepared: dict[Any, Prepared] = {}


def missing(name: str = "triton") -> str | None:
    """Why this backend cannot run here, or None. Imports neither torch nor triton."""
    for module, extra in (("torch", "'revkernels[torch]'"), ("triton", "'triton>=3.6'")):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install {extra}"
    version = _triton_version()
    if version is not None and tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        return f"triton {version} is too old: pip install 'triton>=3.6'"
    if not interpreting() and not _gpu_in_sight():
        return "there is no GPU (TRITON_INTERPRET=1, set before the start, runs the kernels on CPU tensors)"
    return None


def couple(out: Any, x: Any, f: Any, coupling: Coupling | None) -> None:
    """out <- x + f"""
    _run({"x": x, "f": f} if out is x else {"out": out, "x": x, "f": f}, 1, coupling, False)


def uncouple(out: Any, y: Any, f: Any, coupling: Coupling | None) -> None:
    """out <- y - f"""
    _run({"y": y, "f": f} if out is y else {"out": out, "y": y, "f": f}, 1, coupling, True)


def reverse_step(y: Any, f: Any, dy: Any, df: Any, coupling: Coupling | None) -> None:
    """y <- y - f; dy <- dy + df"""
    _run({"y": y, "dy": dy, "f": f, "df": df}, 2, coupling, True)


def accumulate(totals: Sequence[Any], parts: Sequence[Any]) -> None:
    """totals[i] <- totals[i] + parts[i]

    Dense pairs of the same two dtypes share launches of 32 pairs each. A pair gets its own launch if it is not dense,
    if its memory is not 16-byte aligned, or if it has 2^29 elements or more. (A table of pointers in device memory
    would serve any number of pairs in one launch, but filling it takes a synchronising copy, which a graph cannot
    capture.)
    """
    if len(totals) == len(parts) == 1:
        _run({"total": totals[0], "part": parts[0]}, 1, None, False)
        return
    named = {f"total[{i}]": total for i, total in enumerate(totals)}
    named_parts = {f"part[{i}]": part for i, part in enumerate(parts)}
    launches = [
        _checked(dict([total, part]), 1, None, False)
        for total, part in zip(named.items(), named_parts.items(), strict=True)
    ]
    if _ranges_meet(launches, totals, parts):
        checks.check_disjoint(named, named_parts)
    groups = defaultdict(list)
    for launch, total, part in zip(launches, totals, parts, strict=True):
        aligned = total.data_ptr() % 16 == 0 and part.data_ptr() % 16 == 0
        if launch.dense and aligned and launch.count < _LARGEST_LISTED:
            groups[launch.device, total.dtype, part.dtype].append((total, part))
        else:
            launch.launch((total, part), None)
    for pairs in groups.values():
        for begin in range(0, len(pairs), _PAIRS[-1]):
            _accumulate_listed(pairs[begin : begin + _PAIRS[-1]])


def _triton_version() -> str | None:
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _gpu_in_sight() -> bool:
    torch = sys.modules.get("torch")
    if torch is not None:
        return bool(torch.cuda.is_available())
    return any(map(os.path.exists, _GPU_NODES))


def _run(arrays: dict[str, Any], writes: int, coupling: Coupling | None, subtract: bool) -> None:
    _checked(arrays, writes, coupling, subtract).launch(tuple(arrays.values()), coupling)


def _checked(arrays: dict[str, Any], writes: int, coupling: Coupling | None, subtract: bool) -> Prepared:
    """Check the arrays, the first ``writes`` of which are written, and return their launch."""
    values = tuple(arrays.values())
    try:
        facts = tuple([(a.shape, a.stride(), a.dtype, a.device) for a in values])
    except (AttributeError, TypeError):
        checks.check_arrays(**arrays)  # names the argument that is not a tensor
        raise
    key = (facts, writes, subtract, None if coupling is None else _facts_of(coupling))
    prepared = _prepared.get(key)
    if prepared is None:
        _check(arrays, writes, coupling)
        if len(_prepared) >= _KEPT:
            _prepared.clear()
        prepared = _prepared[key] = prepare(values, coupling, subtract)
        return prepared
    begins = [a.data_ptr() for a in values]
    spans = prepared.spans
    for i in range(writes):
        for j in range(i + 1, len(values)):
            if begins[i] < begins[j] + spans[j] and begins[j] < begins[i] + spans[i]:
                _check(arrays, writes, coupling)  # the ranges intersect; the full check tests the elements
    return prepared


def _check(arrays: dict[str, Any], writes: int, coupling: Coupling | None) -> None:
    named = list(arrays.items())
    checks.check_operands(dict(named[:writes]), dict(named[writes:]), coupling, coupled="f" in arrays)
    check_place(*named[0])


def _facts_of(coupling: Coupling) -> tuple[Any, ...]:
    channel, sample = coupling.channel_scale, coupling.sample_scale
    return (
        None if channel is None else (channel.stride(), coupling.channel_dim),
        None if sample is None else sample.stride(),
        coupling.checksum is not None,
        coupling.amax is not None,
        None if coupling.value is None else (coupling.value.stride(), coupling.value.dtype),
        coupling.grid_exponent is None,
    )


def _ranges_meet(launches: Sequence[Prepared], totals: Sequence[Any], parts: Sequence[Any]) -> bool:
    """Whether any total's memory range intersects another array's, so that the order of the sums could matter."""
    ranges = []
    for launch, total, part in zip(launches, totals, parts, strict=True):
        ranges.append((total.data_ptr(), total.data_ptr() + launch.spans[0], True))
        ranges.append((part.data_ptr(), part.data_ptr() + launch.spans[1], False))
    end, written_end = 0, 0
    for begin, stop, written in sorted(ranges):
        if begin < stop and begin < (end if written else written_end):
            return True
        end = max(end, stop)
        written_end = max(written_end, stop) if written else written_end
    return False


def _accumulate_listed(pairs: list[tuple[Any, Any]]) -> None:
    import triton.language as tl

    from revkernels.triton_kernels.accumulate import accumulate_kernel

    size = next(size for size in _PAIRS if len(pairs) <= size)
    # Padding has no elements. A count n is passed as 4n + 2, because Triton would recompile whenever a count became 1
    # or a multiple of 16.
    padded = pairs + [pairs[-1]] * (size - len(pairs))
    counts = [total.numel() for total, _ in pairs] + [0] * (size - len(pairs))
    programs = sum(-(-count // TILE) for count in counts)
    if programs == 0:
        return
    total, part = pairs[0]
    with on(total.device):
        accumulate_kernel[(programs,)](
            tuple(total for total, _ in padded),
            tuple(part for _, part in padded),
            tuple(4 * count + 2 for count in counts),
            PAIRS=size,
            WIDE=getattr(tl, compute_dtype(total, part)),
            COLS=TILE,
            num_warps=threads(TILE, total, part) // warp_width(),
            enable_fp_fusion=False,
        )
