# SPDX-License-Identifier: Apache-2.0
"""norm_act and the related functions of backend "triton": the checks, and the cache of prepared launches."""

from __future__ import annotations

from typing import Any

from revkernels import checks, checks_norm
from revkernels.norm import SUMS_GIVEN, Norm
from revkernels.triton_kernels.launch import check_place
from revkernels.triton_kernels.norm_launch import Empty, Prepared, prepare

_KEPT = 4096

_prepared: dict[Any, Prepared | Empty] = {}


def norm_act(h: Any, x: Any, norm: Norm, mean: Any, rstd: Any, given: bool) -> None:
    """h <- activation(norm(x)); mean and rstd are written, or read if given"""
    prepared = _checked({"h": h}, {"x": x}, (x, None, None, h), norm, mean, rstd, given)
    prepared.norm_act(h, None, x, None, False, norm, mean, rstd, given)


def couple_norm_act(h: Any, y: Any, x: Any, f: Any, norm: Norm, mean: Any, rstd: Any, given: bool) -> None:
    """y <- x + f; h <- activation(norm(y)). y may be x."""
    written, read = ({"x": x, "h": h}, {"f": f}) if y is x else ({"y": y, "h": h}, {"x": x, "f": f})
    prepared = _checked(written, read, (x, y, f, h), norm, mean, rstd, given)
    prepared.norm_act(h, y, x, f, False, norm, mean, rstd, given)


def uncouple_norm_act(h: Any, x: Any, y: Any, f: Any, norm: Norm, mean: Any, rstd: Any, given: bool) -> None:
    """x <- y - f; h <- activation(norm(x)). x may be y."""
    written, read = ({"y": y, "h": h}, {"f": f}) if x is y else ({"x": x, "h": h}, {"y": y, "f": f})
    prepared = _checked(written, read, (y, x, f, h), norm, mean, rstd, given)
    prepared.norm_act(h, x, y, f, True, norm, mean, rstd, given)


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
    written = {} if dx is None else {"dx": dx}
    read = {"x": x} if dh is dx and norm.kind == "batch" else {"x": x, "dh": dh}
    if base is not None and base is not dx:
        read["base"] = base
    own = {name: array for name, array in (("dweight", dweight), ("dbias", dbias)) if array is not None}
    prepared = _checked(written, read, (x, dx, base, dh), norm, mean, rstd, True, own, sums)
    prepared.norm_act_backward(dx, base, dh, x, norm, mean, rstd, dweight, dbias, sums, count, constant)


def _checked(
    written: dict[str, Any],
    read: dict[str, Any],
    operands: tuple[Any, ...],
    norm: Norm,
    mean: Any,
    rstd: Any,
    given: bool,
    sums: dict[str, Any] | None = None,
    mode: int = SUMS_GIVEN,
) -> Prepared | Empty:
    """Check the call and return its launches, cached ones if only addresses have changed."""
    kept = [a for a in (norm.weight, norm.bias) if a is not None]
    moved = [a for a in (norm.running_mean, norm.running_var) if a is not None and not given]
    own = [a for a in (mean, rstd) if a is not None]
    results = list((sums or {}).values())
    writes = [*written.values(), *([] if given else own + moved), *(results if mode != SUMS_GIVEN else [])]
    reads = [*read.values(), *kept, *(own if given else []), *(results if mode == SUMS_GIVEN else [])]
    arrays = (*writes, *reads)
    try:
        facts = tuple([(a.shape, a.stride(), a.dtype, a.device) for a in arrays])
    except (AttributeError, TypeError):
        _check(written, read, norm, mean, rstd, given, sums, mode)  # names the argument that is not a tensor
        raise
    present = tuple([a is None for a in (*operands, norm.weight, norm.bias, mean, *(sums or ()))])
    names = tuple(written), tuple(read), present, given, mode, tuple(sums or ())
    key = (facts, names, norm.kind, norm.activation, norm.groups, norm.channel_dim, norm.eps, len(moved))
    prepared = _prepared.get(key)
    if prepared is None:
        _check(written, read, norm, mean, rstd, given, sums, mode)
        if len(_prepared) >= _KEPT:
            _prepared.clear()
        prepared = _prepared[key] = prepare(norm, operands, arrays, rstd.dtype, backward=sums is not None)
        return prepared
    begins = [a.data_ptr() for a in arrays]
    ends = [begin + span for begin, span in zip(begins, prepared.spans, strict=True)]
    for i in range(len(writes)):
        for j in range(i + 1, len(arrays)):
            if begins[i] < ends[j] and begins[j] < ends[i]:
                _check(written, read, norm, mean, rstd, given, sums, mode)  # the ranges intersect: test the elements
                return prepared
    return prepared


def _check(
    written: dict[str, Any],
    read: dict[str, Any],
    norm: Norm,
    mean: Any,
    rstd: Any,
    given: bool,
    sums: dict[str, Any] | None,
    mode: int,
) -> None:
    checks.check_operands(written, read)
    arrays = written | read
    name = "x" if "x" in arrays else "y"
    x = arrays.pop(name)
    check_place(name, x)
    checks_norm.check_norm(
        norm, name, x, statistics=(mean, rstd), given=given, sums=sums, writes=tuple(written), **arrays
    )
    if sums and mode != SUMS_GIVEN:
        own = {other: a for other, a in (("mean", mean), ("rstd", rstd)) if a is not None}
        own |= {other: a for other, a in (("weight", norm.weight), ("bias", norm.bias)) if a is not None}
        checks.check_writable(**sums)
        checks.check_disjoint(sums, {name: x} | arrays | own)
