# SPDX-License-Identifier: Apache-2.0
"""The kernels as ``torch.library`` operators, ``torch.ops.revkernels.*``: what torch.compile sees of `revkernels.ops`.

Importing this module registers them; `revkernels.ops` does so when it is traced for the first time.

    couple, uncouple      new tensors, differentiable (twice too), without a coupling's additional outputs
    couple_, uncouple_    in place, return nothing; checksum, amax and value are written as well
    reverse_step_         likewise
    accumulate_           lists of tensors, likewise

A schema has no `Coupling`: its fields are separate arguments, and ``backend=""`` chooses by device. An operator runs
the function of the same name in `revkernels.ops`, so that compiled code makes the same checks, raises the same errors
and obeys `use_backend`, all at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from revkernels import ops, tracking
from revkernels.autograd.coupling import _Op
from revkernels.coupling import Coupling

_SCALES = "Tensor? channel_scale=None, Tensor? sample_scale=None"
_PLAIN = "int channel_dim=1, int? grid_exponent=None"
_BACKEND = 'str backend=""'
_WRITTEN = "Tensor({}!)? checksum=None, Tensor({}!)? amax=None, Tensor({}!)? value=None"

_SCHEMAS = (
    f"couple(Tensor x, Tensor f, {_SCALES}, *, {_PLAIN}, {_BACKEND}) -> Tensor",
    f"uncouple(Tensor y, Tensor f, {_SCALES}, *, {_PLAIN}, {_BACKEND}) -> Tensor",
    f"couple_(Tensor(a!) x, Tensor f, {_SCALES}, *, {_PLAIN}, {_WRITTEN.format('b', 'c', 'd')}, {_BACKEND}) -> ()",
    f"uncouple_(Tensor(a!) y, Tensor f, {_SCALES}, *, {_PLAIN}, {_WRITTEN.format('b', 'c', 'd')}, {_BACKEND}) -> ()",
    f"reverse_step_(Tensor(a!) y, Tensor f, Tensor(b!) dy, Tensor df, {_SCALES}, *, {_PLAIN}, "
    f"{_WRITTEN.format('c', 'd', 'e')}, {_BACKEND}) -> ()",
    f"accumulate_(Tensor(a!)[] total, Tensor[] part, *, {_BACKEND}) -> ()",
)

# ---- the operators


def _couple(x: Any, f: Any, c: Any = None, s: Any = None, *, backend: str = "", **options: Any) -> torch.Tensor:
    return ops.couple(x, f, coupling=_coupling(c, s, **options), backend=backend or None)


def _uncouple(y: Any, f: Any, c: Any = None, s: Any = None, *, backend: str = "", **options: Any) -> torch.Tensor:
    return ops.uncouple(y, f, coupling=_coupling(c, s, **options), backend=backend or None)


def _couple_in_place(x: Any, f: Any, c: Any = None, s: Any = None, *, backend: str = "", **options: Any) -> None:
    ops.couple_(x, f, coupling=_coupling(c, s, **options), backend=backend or None)


def _uncouple_in_place(y: Any, f: Any, c: Any = None, s: Any = None, *, backend: str = "", **options: Any) -> None:
    ops.uncouple_(y, f, coupling=_coupling(c, s, **options), backend=backend or None)


def _reverse_step_in_place(
    y: Any, f: Any, dy: Any, df: Any, c: Any = None, s: Any = None, *, backend: str = "", **options: Any
) -> None:
    ops.reverse_step_(y, f, dy, df, coupling=_coupling(c, s, **options), backend=backend or None)


def _accumulate_in_place(total: Sequence[Any], part: Sequence[Any], *, backend: str = "") -> None:
    ops.accumulate_(total, part, backend=backend or None)


def _coupling(channel_scale: Any, sample_scale: Any, **options: Any) -> Coupling | None:
    if not options and channel_scale is None and sample_scale is None:  # the dispatcher leaves defaults out
        return None
    return Coupling(channel_scale=channel_scale, sample_scale=sample_scale, **options)


def _like_stream(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _remember(sign: int) -> Any:
    def setup_context(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
        x, f, channel_scale, sample_scale = inputs
        if x.dtype == torch.int16:
            tracking.refuse_grad("f channel_scale sample_scale", (f, channel_scale, sample_scale))
        ctx.sign = sign
        ctx.dims = (keyword_only_inputs["channel_dim"], f.dtype)
        scaled = channel_scale is not None or sample_scale is not None
        ctx.save_for_backward(f if scaled else None, channel_scale, sample_scale)

    return setup_context


def _gradient(ctx: Any, dy: torch.Tensor) -> Any:
    return _Op.backward(ctx, dy)[:4]


#: Other strides give other bits: a compiler must pass the strides that the uncompiled call would have seen.
exact_strides = getattr(torch.Tag, "needs_exact_strides", None) or torch.Tag.needs_fixed_stride_order


def _register() -> torch.library.Library:
    library = torch.library.Library("revkernels", "DEF")
    implementations: tuple[tuple[Any, Any, int], ...] = (
        (_couple, _like_stream, 1),
        (_uncouple, _like_stream, -1),
        (_couple_in_place, _nothing, 0),
        (_uncouple_in_place, _nothing, 0),
        (_reverse_step_in_place, _nothing, 0),
        (_accumulate_in_place, _nothing, 0),
    )
    for schema, (function, fake, sign) in zip(_SCHEMAS, implementations, strict=True):
        name = f"revkernels::{schema.partition('(')[0]}"
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag, exact_strides))
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=library)
        if sign:
            torch.library.register_autograd(name, _gradient, setup_context=_remember(sign), lib=library)
    return library


_library = _register()  # the operators live as long as this does


# ---- the functions of `revkernels.ops` as they are traced


def couple(x: Any, f: Any, coupling: Any, backend: str | None) -> torch.Tensor:
    return _new(_calls.couple.default, _calls.couple_.default, x, f, coupling, backend)


def uncouple(y: Any, f: Any, coupling: Any, backend: str | None) -> torch.Tensor:
    return _new(_calls.uncouple.default, _calls.uncouple_.default, y, f, coupling, backend)


def couple_(x: Any, f: Any, coupling: Any, backend: str | None) -> torch.Tensor:
    _refuse_grad("x f", (x, f), coupling)
    _calls.couple_.default(x, f, **_fields(coupling, backend), **_written(coupling))
    return x


def uncouple_(y: Any, f: Any, coupling: Any, backend: str | None) -> torch.Tensor:
    _refuse_grad("y f", (y, f), coupling)
    _calls.uncouple_.default(y, f, **_fields(coupling, backend), **_written(coupling))
    return y


def reverse_step_(y: Any, f: Any, dy: Any, df: Any, coupling: Any, backend: str | None) -> tuple[Any, Any]:
    _refuse_grad("y dy f df", (y, dy, f, df), coupling)
    _calls.reverse_step_.default(y, f, dy, df, **_fields(coupling, backend), **_written(coupling))
    return y, dy


def accumulate_(total: Any, part: Any, backend: str | None) -> Any:
    totals, parts = (total, part) if type(total) in (list, tuple) else ([total], [part])
    names = " ".join([f"{name}[{i}]" for name in ("total", "part") for i in range(len(totals))])
    tracking.tracks_versions(names, (*totals, *parts))
    _calls.accumulate_.default(list(totals), list(parts), backend=backend or "")
    return total


_calls = torch.ops.revkernels


def _new(operator: Any, in_place: Any, x: Any, f: Any, coupling: Any, backend: str | None) -> torch.Tensor:
    """A new tensor. A differentiable operator may not write to its inputs, so a coupling's additional outputs are
    written by a second call, in place."""
    if x.dtype == torch.int16 and torch.is_grad_enabled() and coupling is not None:
        scales = coupling.channel_scale, coupling.sample_scale
        tracking.refuse_grad("f channel_scale sample_scale", (f, *scales))
    written = _written(coupling)
    if written:
        with torch.no_grad():
            y = torch.empty_like(x).copy_(x)
            in_place(y, f, **_fields(coupling, backend), **written)
        if not torch.is_grad_enabled() or x.dtype == torch.int16:
            return y
    result: torch.Tensor = operator(x, f, **_fields(coupling, backend))
    return result


def _refuse_grad(names: str, arrays: tuple[Any, ...], coupling: Any) -> None:
    if coupling is not None:
        names, arrays = names + " channel_scale sample_scale", (*arrays, coupling.channel_scale, coupling.sample_scale)
    tracking.tracks_versions(names, arrays)


def _fields(coupling: Any, backend: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if backend is None else {"backend": backend}
    if coupling is not None:
        options["channel_scale"] = coupling.channel_scale
        options["sample_scale"] = coupling.sample_scale
        options["channel_dim"] = coupling.channel_dim
        options["grid_exponent"] = coupling.grid_exponent
    return options


def _written(coupling: Any) -> dict[str, Any]:
    if coupling is None:
        return {}
    arrays = {"checksum": coupling.checksum, "amax": coupling.amax, "value": coupling.value}
    return {name: array for name, array in arrays.items() if array is not None}
