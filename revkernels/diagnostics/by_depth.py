# SPDX-License-Identifier: Apache-2.0
"""Reconstruction errors and gradient angles of reversible chains, by depth, coupling and precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revkernels.cli.output import Table, plain
from revkernels.diagnostics.chains import chains_of
from revkernels.diagnostics.errors import relative_errors
from revkernels.diagnostics.untouched import detached, loss_from, tensors_in, untouched
from revkernels.errors import ReconstructionError
from revkernels.integers import as_int
from revkernels.measure import angle
from revkernels.nn import PerBlock, ReversibleSequential
from revkernels.nn.streams import check_options
from revkernels.options import Activations

__all__ = ["PRECISIONS", "Drift", "DriftRow", "drift"]

_MIXED = "float32, bfloat16 branches"
#: Name to the dtype of streams and weights, and the autocast dtype.
_DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    _MIXED: (torch.float32, torch.bfloat16),
}
PRECISIONS = tuple(_DTYPES)
COUPLINGS = ("float", "exact")


@dataclass(frozen=True)
class DriftRow:
    """One chain, truncated to one depth, at one precision and coupling.

    Attributes:
        chain: its dotted name in the network; "" for the network itself.
        coupling: "float" or "exact".
        precision: one of `PRECISIONS`.
        depth: number of reconstructed blocks.
        max_error, rms_error: of the reconstructed input streams, relative (`revkernels.diagnostics.relative_errors`);
            None if the backward had no reason to reconstruct them.
        angle_degrees: between the parameter gradients with reconstructed and with stored activations; None if there are
            none.
        problem: why the chain could not run this way (`ReconstructionError`), or None.
    """

    chain: str
    coupling: str
    precision: str
    depth: int
    max_error: float | None
    rms_error: float | None
    angle_degrees: float | None
    problem: str | None = None


@dataclass(frozen=True)
class Drift:
    """The result of `drift`.

    Attributes:
        rows: by chain, coupling, precision and depth.
        cut: "last" or "first", the end of the chain whose blocks were run.
        device: as text.
    """

    rows: tuple[DriftRow, ...]
    cut: str
    device: str

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as dictionaries."""
        return [asdict(row) for row in self.rows]

    def table(self) -> Table:
        """The rows as a table for the command line."""
        table = Table(
            f"Drift of reconstructed activations on {self.device}",
            {
                "chain": "chain",
                "coupling": "coupling",
                "precision": "streams",
                "depth": "blocks",
                "rms_error": "rms error",
                "max_error": "max error",
                "angle_degrees": "gradient angle, degrees",
            },
            self.as_dicts(),
            [
                f"errors: of the input reconstructed through the chain's {self.cut} blocks, relative to it",
                "angle: of the parameter gradients, reconstructed to stored; same kernels, weights, input and seed",
            ],
        )
        if not any(row.chain for row in self.rows):
            del table.columns["chain"]
        table.notes += dict.fromkeys(
            f"{row.coupling}, {row.precision}, {row.depth} blocks: {row.problem}" for row in self.rows if row.problem
        )
        return table

    def __str__(self) -> str:
        return plain(self.table()).lstrip("\n")

    def plot(self, path: str | Path, chain: str | None = None) -> None:
        """Draw error and angle against depth to a file (PNG, SVG or PDF by its extension).

        Args:
            path: of the picture.
            chain: its name; None is the chain with the most blocks.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is no such chain, or nothing to draw.
        """
        from revkernels.diagnostics.plots import by_depth

        if chain is None and self.rows:
            chain = max(self.rows, key=lambda row: row.depth).chain
        rows = [row for row in self.rows if row.chain == chain and row.problem is None]
        if not rows:
            known = ", ".join(sorted({repr(row.chain) for row in self.rows})) or "none"
            raise ValueError(f"there is nothing to draw for chain {chain!r}; the chains are {known}")
        by_depth(Path(path), rows, self.cut)


def drift(
    net: nn.Module,
    x: Any,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    depths: Sequence[int] | None = None,
    couplings: Sequence[Any] = COUPLINGS,
    precisions: Sequence[str] | None = None,
    cut: str = "last",
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    on_step: Callable[[str, int], None] | None = None,
) -> Drift:
    """Measure how reconstruction affects accuracy, by depth.

    A chain truncated to d of its blocks maps x to y. Its backward, run by the driver itself, reconstructs x' from y,
    and

        error(d) = max |x' - x| / max |x|  and  |x' - x| / |x|         (x the true input, both streams one vector)
        angle(d) = angle between dL/dw with reconstructed and with stored activations, degrees

    with the same weights, input (for an exact coupling, as rounded to its grid), random numbers and kernels: how far
    rounding alone moves the gradient (Gomez et al. 2017, section 5 and figure 4 (left) for the angle). In float64 both
    are about 1e-15 per block.

    Works on copies: ``net`` is unchanged afterwards, and the chains' memory is needed once more.

    Args:
        net: a `ReversibleSequential` or `ReversibleBlock`, or a module that contains some: then each of these, with its
            input in ``net(x, *args, **kwargs)``.
        x: the input.
        loss: makes a scalar from a chain's output. Default: the mean square of each stream, summed.
        depths: numbers of blocks; those larger than a chain are skipped. Default: powers of two and the whole chain.
        couplings: values of ``coupling``; unknown ones are skipped. An exact one keeps float32 streams at any
            precision, which then applies to the branches; it does not support float64.
        precisions: from `PRECISIONS`; default float32, bfloat16, and float32 streams with bfloat16 branches (autocast),
            as far as the device supports them.
        cut: "last", the chain's last blocks on their true input streams; "first", its first blocks.
        args, kwargs: more arguments of ``net``.
        on_step: called before each measurement with a description of it and the number of measurements.

    Raises:
        TypeError: ``net`` is not a module, or an option is not a list.
        ValueError: it has no reversible chain, or an option does not exist.
    """
    for what, value in (("depths", depths), ("couplings", couplings), ("precisions", precisions)):
        if value is not None and (isinstance(value, str) or not isinstance(value, Iterable)):
            raise TypeError(f"{what} is {value!r}; it must be a list or tuple of values")
    loss = loss_from(loss)
    if depths is not None:
        depths = [as_int(depth) for depth in depths]
    names, chains = list(precisions or _supported(x)), chains_of(net)
    for name in names:
        if name not in _DTYPES:
            raise ValueError(f"precisions has {name!r}; it must be some of {', '.join(map(repr, PRECISIONS))}")
    if cut not in ("last", "first"):
        raise ValueError(f"cut is {cut!r}; it must be 'last' or 'first'")
    if any(isinstance(depth, bool) or not isinstance(depth, int) or depth < 1 for depth in depths or ()):
        raise ValueError(f"depths is {depths}; it must be whole numbers of blocks, from 1 on")
    couplings = [coupling for coupling in couplings if _exists(coupling)]
    calls = _calls(net, chains, x, args, dict(kwargs or {}))
    cuts = [
        (name, coupling, precision, depth)
        for name, (chain, _) in calls.items()
        for coupling in couplings
        for precision in names
        for depth in sorted(set(_depths(len(chain)) if depths is None else depths))
        if depth <= len(chain) and (coupling == "float" or precision != "float64")  # a grid is float32
    ]
    if not cuts and depths is not None:
        most = max((len(chain) for chain, _ in calls.values()), default=0)
        raise ValueError(f"depths is {list(depths)}; no chain here has more than {most} blocks")
    rows = []
    for name, coupling, precision, depth in cuts:
        if on_step is not None:
            on_step(f"{name or 'chain'}, {coupling}, {precision}, {depth} blocks", len(cuts))
        rows.append(_row(name, *calls[name], coupling, precision, depth, cut, loss))
    device = next((t.device for t in tensors_in(x)), torch.device("cpu"))
    return Drift(tuple(rows), cut, str(device))


# ---- the chains and their inputs


def _calls(
    net: nn.Module, chains: Mapping[str, Any], x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, tuple[ReversibleSequential, tuple[Any, Any, Any]]]:
    """Every chain that runs, with the arguments of its first call."""
    calls: dict[str, tuple[Any, Any, Any]] = {}
    x, args, kwargs = detached((x, args, kwargs))
    if "" in chains:
        calls[""] = (x, args, kwargs)
    else:
        hooks = []
        for name, chain in chains.items():

            def note(_: Any, given: tuple[Any, ...], named: dict[str, Any], name: str = name) -> None:
                first, *more = given or (named["x"],)
                named = {key: value for key, value in named.items() if given or key != "x"}
                calls.setdefault(name, detached((first, tuple(more), named)))

            hooks.append(chain.register_forward_pre_hook(note, with_kwargs=True))
        try:
            with untouched(net), torch.no_grad():
                net(x, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: (_as_chain(chains[name]), given) for name, given in calls.items()}


def _as_chain(module: Any) -> ReversibleSequential:
    if isinstance(module, ReversibleSequential):
        return module
    return ReversibleSequential(module, **{name: getattr(module, name) for name in ("split_dim", "backend")})


def _depths(blocks: int) -> list[int]:
    return [*(1 << power for power in range(blocks.bit_length()) if 1 << power < blocks), blocks]


def _supported(x: Any) -> list[str]:
    device = next((t.device for t in tensors_in(x)), torch.device("cpu"))
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return ["float32"]
    mixed = [_MIXED] if torch.amp.is_autocast_available(device.type) else []
    return ["float32", "bfloat16", *mixed]


def _exists(coupling: Any) -> bool:
    try:
        check_options(1, "store", coupling, None)
    except (TypeError, ValueError):
        return False
    return True


# ---- one measurement


def _row(
    name: str, chain: Any, given: tuple[Any, Any, Any], coupling: Any, precision: str, depth: int, cut: str, loss: Any
) -> DriftRow:
    dtype, autocast = _DTYPES[precision]
    words = coupling if isinstance(coupling, str) else repr(coupling)
    x, args, kwargs = _cast(given, dtype)
    begin = len(chain) - depth if cut == "last" else 0
    whole = _copy(chain, dtype)
    device = next(tensors_in(x)).device

    def cut_to(first: int, last: int, activations: Activations) -> ReversibleSequential:
        blocks = list(whole)[first:last]
        made = ReversibleSequential(
            blocks, split_dim=chain.split_dim, activations=activations, coupling=coupling, backend=chain.backend
        )
        made.training = chain.training
        return made

    def context() -> AbstractContextManager[Any]:
        return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)

    def here(values: tuple[Any, Any], first: int, last: int) -> tuple[Any, Any]:
        return _per_block(values[0], first, last), _per_block(values[1], first, last)

    try:
        with untouched(whole):
            if begin:
                more, named = here((args, kwargs), 0, begin)
                with torch.no_grad(), context():
                    x = _streams(cut_to(0, begin, "store")(x, *more, **named))
            more, named = here((args, kwargs), begin, begin + depth)
            found: dict[str, list[torch.Tensor]] = {}
            errors: list[tuple[float, float]] = []
            order: tuple[Activations, ...] = ("store", "reconstruct")
            for activations in order:
                with untouched(whole):
                    net = cut_to(begin, begin + depth, activations)
                    net.__dict__["witness"] = _Errors(errors)
                    with torch.enable_grad():
                        with context():
                            total = loss(_streams(net(_leaves(x), *more, **named)))
                        total.backward()
                    found[activations] = [p.grad for p in net.parameters() if p.grad is not None]
    except ReconstructionError as problem:
        return DriftRow(name, words, precision, depth, None, None, None, str(problem))
    largest, rms = errors[0] if errors else (None, None)
    return DriftRow(name, words, precision, depth, largest, rms, _angle(found["reconstruct"], found["store"]))


class _Errors:
    """A witness that records the errors of the chain's input."""

    def __init__(self, errors: list[tuple[float, float]]) -> None:
        self.errors = errors

    def __call__(self, streams: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], None]:
        true = [stream.detach() for stream in streams]
        return lambda rebuilt: self.errors.append(relative_errors(rebuilt, true))


def _copy(chain: Any, dtype: torch.dtype) -> Any:
    made = copy.deepcopy(chain).to(dtype)
    for parameter in made.parameters():
        parameter.grad = None
    return made


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors cast to the dtype, in nested values; others unchanged."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, PerBlock):
        return PerBlock([_cast(item, dtype) for item in value.values])
    return value


def _per_block(value: Any, first: int, last: int) -> Any:
    """Arguments for a range of blocks."""
    if isinstance(value, dict):
        return {key: _per_block(item, first, last) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(_per_block(item, first, last) for item in value)
    if isinstance(value, PerBlock):
        return PerBlock(value.values[first:last])
    return value


def _streams(result: Any) -> Any:
    """A chain's output without its auxiliary outputs."""
    return result[0] if type(result) is tuple and len(result) == 2 and type(result[1]) is list else result


def _leaves(x: Any) -> Any:
    """The input as leaves that require grad, so that the first branch is reconstructed even if frozen."""
    if isinstance(x, torch.Tensor):
        return x.detach().requires_grad_()
    return tuple(t.detach().requires_grad_() for t in x)


def _angle(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float | None:
    try:
        return angle(a, b) if a else None
    except ValueError:  # no direction: a gradient is zero, or not finite
        return None
