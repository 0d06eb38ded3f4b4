# SPDX-License-Identifier: Apache-2.0
"""A chain of half-steps applied to a tensor or a tuple of streams: the core of every reversible module here."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, zip_longest
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from revkernels.autograd.driver_forward import Reversal
from revkernels.autograd.exact_coupling import check_streams, to_grid
from revkernels.autograd.fused.fusion import is_recorded
from revkernels.autograd.half_step import HalfStep, check_aux, check_branch_output
from revkernels.autograd.inverse import invert
from revkernels.autograd.linked_calls import Names, ending_in, mark
from revkernels.autograd.ownership import PLAIN
from revkernels.autograd.planning.live_bytes import bytes_of
from revkernels.autograd.planning.planner import Keeping, planner_of
from revkernels.autograd.recomputing import is_within_a_branch
from revkernels.autograd.state.reachable import behind, beside
from revkernels.autograd.state.rng_and_autocast import autocast_dtype, tensors_in
from revkernels.autograd.state.thread_state import ThreadState
from revkernels.budget import MemoryBudget
from revkernels.errors import ReconstructionError
from revkernels.nn.exact import Exponents, exact_of, grid_for, known_exponent
from revkernels.nn.kernels_of import kernels_of, rebuilds
from revkernels.nn.streams import check_options, dense, is_narrowed, is_store, streams_of
from revkernels.options import ActivationsOption, CouplingOption
from revkernels.tracking import met_compiler

__all__ = ["HalfStep", "run", "run_inverse"]

Name = Callable[[int], str]


class Options(NamedTuple):
    """The options of a chain that is not a module; a module has them as attributes."""

    split_dim: int = 1
    activations: ActivationsOption = "reconstruct"
    coupling: CouplingOption = "float"
    backend: str | None = None


def run(half_steps: Sequence[HalfStep], x: Any, groups: int = 2, name: Name | None = None, **options: Any) -> Any:
    """Run any half-steps, in order: ``streams[target] += branch(sum of streams[sources], *args, **kwargs)``.

    `ReversibleSequential` is this with the half-steps of its blocks. Use it for a recurrence in another order, an odd
    number of half-steps, or branches owned by your own module.

    Args:
        half_steps: `HalfStep`s. An empty list is the identity.
        x: one tensor, split into ``groups`` equal streams along ``split_dim`` and joined again; or a tuple of
            ``groups`` streams, and the result is a tuple.
        groups: the number of streams.
        name: maps k to the name of half-step k in error messages.
        **options: split_dim, activations, coupling and backend, see `ReversibleBlock`.

    Returns:
        y, or (y, [aux, ...]) if a branch returns (f, aux).

    Raises:
        TypeError: x or a half-step does not have the form above.
        ValueError: an option or a stream's number does not exist, a half-step's target is among its sources.
        ReconstructionError: see `ReversibleSequential`.
    """
    owner = Options(**options)
    check_options(*owner)
    _check(half_steps, groups)
    return forward(owner, x, groups, half_steps, name or _number)


def run_inverse(
    half_steps: Sequence[HalfStep], y: Any, groups: int = 2, name: Name | None = None, **options: Any
) -> Any:
    """Return the x that `run` maps to ``y``, up to rounding: the half-steps in reverse order, each subtracting.

    With an exact coupling it is x on its grid, bit for bit, for a y from `run`; k must be given, as in `run`.
    """
    owner = Options(**options)
    check_options(*owner)
    _check(half_steps, groups)
    return inverse(owner, y, groups, half_steps, name or _number)


def forward(
    owner: Any,
    x: Any,
    groups: int,
    half_steps: Sequence[HalfStep],
    name: Name,
    through: Callable[[Reversal], None] | None = None,
    linked: bool = False,
) -> Any:
    """`run` with the options of ``owner``, unchecked.

    ``through`` advances the reversal by the half-steps, in place of `advance`. ``linked``: continue the call that
    returned x, if that was linked too: see `nn.linked`."""
    if torch.compiler.is_dynamo_compiling():
        # Dynamo of torch 2.6 gives up on the whole frame if a dataclass is compared with a string.
        floats = isinstance(owner.coupling, str) and owner.coupling == "float"
        if through is None and floats and not rebuilds(owner):
            return _traced(owner, x, groups, half_steps, name)
        from revkernels.autograd.compiling import untraced  # slow if dynamo is not imported yet

        return untraced(forward, owner, x, groups, half_steps, name, through, linked)
    if is_recorded():
        if through is not None:
            raise ReconstructionError("blocks have hooks, which a recorded graph would not have: remove them first")
        return _traced(owner, x, groups, half_steps, name)
    compiling = met_compiler()
    if compiling is not None and compiling.active():  # dynamo was active here and has given up
        return compiling.untraced(forward, owner, x, groups, half_steps, name, through, linked)
    streams, joined = streams_of(x, owner.split_dim, groups, "x")
    keep = is_store(owner.activations)
    if not half_steps:
        return x
    kernels = kernels_of(owner, streams, half_steps)
    streams = [dense(s) for s in streams]
    rebuilding = torch.is_grad_enabled() and not keep
    grid, exponents = grid_for(owner, streams, len(half_steps), kernels, rebuilding, name)
    if grid is not None:
        streams = [grid.enter(stream, index) for index, stream in enumerate(streams)]
    side_inputs = _side_inputs(half_steps)
    keeping = _keeping(owner, x, half_steps, streams, side_inputs, name) if rebuilding else None
    witness = getattr(owner, "witness", None)  # to see this call's own input reconstructed, not a longer chain's
    alone = grid is not None or keeping is not None or witness is not None
    form = (joined, groups, owner.split_dim) if linked and rebuilding and not alone else None
    earlier = None if form is None else ending_in(x, form, streams, kernels)
    if earlier is None:
        if rebuilding and is_narrowed(streams[0]):
            _warn_of_half_streams(owner, half_steps[0], streams[0].dtype)
        reversal = Reversal(streams, kernels, keep, side_inputs, name if form is None else Names(name), grid, keeping)
    else:
        reversal = earlier
        reversal.reopen(streams, side_inputs, name)
    if witness is not None and rebuilding:
        reversal.witness = witness(streams if grid is None else grid.values(streams))
    del streams
    before = ThreadState()
    try:
        if through is None:
            advance(reversal, half_steps, shown=not joined)
        else:
            through(reversal)
        aux, dim = reversal.aux, owner.split_dim
        if joined:
            y: Any = torch.cat(reversal.show(), dim)
            reversal.finish((y,), lambda y: y.chunk(groups, dim))
        else:
            y = reversal.show()
            reversal.finish(y, lambda *streams: streams)
    except BaseException as error:
        before.put_back()
        _say_where(error, reversal, owner)
        reversal.release() if earlier is None else reversal.shut()
        raise
    if form is not None:
        mark(reversal, y, form)
    if exponents is not None:
        exponents.end(grid.largest)  # type: ignore[union-attr]
    return (y, aux) if aux else y


_warned: weakref.WeakSet[Any] = weakref.WeakSet()


def _warn_of_half_streams(owner: Any, first: HalfStep, dtype: torch.dtype) -> None:
    """Warn once per chain: under autocast a convolution's output is narrow, and so are a chain's streams."""
    if owner.coupling != "float":
        return
    whole = isinstance(owner, nn.Module)
    whose = owner if whole else first.branch  # options are new in every call
    try:
        if whose in _warned:
            return
        _warned.add(whose)
    except TypeError:  # a callable without weak references: Python shows a warning once per place
        pass
    or_exact = ", or set coupling='exact'" if whole else ""
    warnings.warn(
        f"a chain that reconstructs its activations is given {dtype} streams under autocast, and reconstructs them to "
        f"within the rounding of {dtype}: its gradients drift with depth. Hand it x.float() (its branches run in "
        f"{dtype} all the same){or_exact}",
        UserWarning,
        stacklevel=6,
    )


def _say_where(error: BaseException, reversal: Reversal, owner: Any) -> None:
    """Add a note to an error from inside a branch: which branch, and its input."""
    if not isinstance(error, Exception) or not hasattr(error, "add_note"):  # in Python 3.10
        return
    where = reversal.name(reversal.count) if reversal.count < reversal.planned else ""
    if where and where not in str(error) and reversal.streams:
        stream = reversal.streams[0]
        error.add_note(
            f"in {where}; its stream has shape {tuple(stream.shape)} and {stream.dtype}, cut from the chain's input "
            f"along split_dim={owner.split_dim}"
        )


def _traced(owner: Any, x: Any, groups: int, half_steps: Sequence[HalfStep], name: Name) -> Any:
    """`forward` with stored activations, as torch.compile traces it: the couplings become operators of its graph."""
    from revkernels.autograd.torch_ops import couple

    if owner.coupling != "float":
        raise ReconstructionError("an exact coupling cannot be recorded as a graph: set coupling='float' for that")
    streams, joined = streams_of(x, owner.split_dim, groups, "x")
    if not half_steps:
        return x
    streams = [dense(s) for s in streams]
    subclass = type(streams[0]) not in PLAIN
    plain = owner.backend == "eager" or (owner.backend is None and subclass)
    # functorch has no gradient for the operators, and a recorded graph must run elsewhere.
    plain = plain or torch._C._are_functorch_transforms_active() or not torch.compiler.is_dynamo_compiling()
    aux = []
    for k, (branch, index, sources, args, kwargs) in enumerate(half_steps):
        h = streams[sources[0]]
        for source in sources[1:]:
            h = h + streams[source]
        f = branch(h, *args, **kwargs)
        if type(f) is tuple:
            f, extra = check_aux(f, name, k)
            aux.append(extra)
        target = streams[index]
        check_branch_output(f, target, name, k)
        streams[index] = (target + f).to(target.dtype) if plain else couple(target, f, None, owner.backend)
    y = torch.cat(streams, owner.split_dim) if joined else tuple(streams)
    return (y, aux) if aux else y


def advance(reversal: Reversal, half_steps: Sequence[HalfStep], shown: bool) -> None:
    """Run consecutive half-steps. ``shown``: the streams are visible one by one afterwards."""
    reversal.planned = reversal.count + len(half_steps)
    reversal.last_written = {step.target: k for k, step in enumerate(half_steps, reversal.count)} if shown else None
    for step, following in zip_longest(half_steps, half_steps[1:]):
        reversal.advance(step, following)


def inverse(owner: Any, y: Any, groups: int, half_steps: Sequence[HalfStep], name: Name) -> Any:
    """`run_inverse` with the options of ``owner``, unchecked."""
    if torch.compiler.is_dynamo_compiling():
        from revkernels.autograd.compiling import untraced

        return untraced(inverse, owner, y, groups, half_steps, name)
    streams, joined = streams_of(y, owner.split_dim, groups, "y")
    if not half_steps:
        return y
    kernels, k = kernels_of(owner, streams), known_exponent(owner)
    if k is not None:
        check_streams(streams, "y")
    streams = [dense(s) for s in streams]
    if k is not None:
        streams = _on_grid(owner, streams, k, kernels)
    before = ThreadState()
    try:
        x = invert(streams, half_steps, kernels, name, k)
    except BaseException:
        before.put_back()
        raise
    return torch.cat(x, owner.split_dim) if joined else tuple(x)


def input_on_grid(owner: Any, x: Any, groups: int) -> Any:
    """x as a chain with the options of ``owner`` sees it: on the grid of its exact coupling."""
    streams, joined = streams_of(x, owner.split_dim, groups, "x")
    exact = exact_of(owner.coupling)
    if exact is None:
        return x
    check_streams(streams)
    k, kernels = Exponents(owner, exact).begin(streams, adapting=False), kernels_of(owner, streams)
    streams = _on_grid(owner, [dense(s) for s in streams], k, kernels)
    return torch.cat(streams, owner.split_dim) if joined else tuple(streams)


def _on_grid(owner: Any, streams: Sequence[torch.Tensor], k: int, kernels: Any) -> list[torch.Tensor]:
    storage = exact_of(owner.coupling).storage  # type: ignore[union-attr]
    return [to_grid(stream, k, kernels, storage) for stream in streams]


class _ById:
    """A branch as a key, by identity (ignoring its __eq__), without keeping it alive."""

    __slots__ = ("at", "ref")

    def __init__(self, it: Any) -> None:
        bound = isinstance(it, MethodType)  # a new object each time
        self.at = (id(it.__self__), it.__func__) if bound else (id(it), None)
        try:
            self.ref: Any = weakref.ref(it.__self__ if bound else it)
        except TypeError:  # then hold it: no other object may get its address
            self.ref = partial(getattr, it, "__self__" if bound else "__call__")

    def __hash__(self) -> int:
        return hash(self.at)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.at == other.at and self.ref() is not None and other.ref() is not None


def _keeping(
    owner: Any, x: Any, half_steps: Sequence[HalfStep], streams: Sequence[torch.Tensor], side_inputs: Any, name: Name
) -> Keeping | None:
    """What the call stores under a memory budget; None if there is no budget, or it makes no difference."""
    budget = owner.activations
    # Inside a branch the outer chain decides: stored in the inner forward too, a tensor would exist twice.
    if not isinstance(budget, MemoryBudget) or is_within_a_branch():
        return None
    kind = (
        tuple(_ById(step.branch) for step in half_steps),
        tuple((s.shape, s.stride(), s.dtype, s.device, s.requires_grad) for s in streams),
        tuple((path, t.shape, t.dtype, t.requires_grad) for path, t in tensors_in(side_inputs)),
        autocast_dtype(streams[0].device.type),
        owner.backend,
        owner.coupling,
        hash(tuple(map(_mode_of, half_steps))),
    )
    names, branches = [name(k) for k in range(len(half_steps))], [step.branch for step in half_steps]
    given = {t.untyped_storage()._cdata: bytes_of(t) for t in (x if isinstance(x, (tuple, list)) else [x])}
    copied = sum(bytes_of(stream) for stream in streams if stream.untyped_storage()._cdata not in given)
    return planner_of(budget).enter(kind, names, streams, branches, sum(given.values()) + copied)


def _mode_of(step: HalfStep) -> tuple[Any, ...]:
    """What the branch trains, and its mode: frozen it saves less, in evaluation it saves other tensors."""
    branch: Any = step.branch
    modules = list(branch.modules()) if isinstance(branch, nn.Module) else []
    reached = beside(modules) if modules else behind(branch)
    modes: list[bool] = [tensor.requires_grad for _, tensor in reached.tensors]
    for module in (*modules, *reached.modules):
        modes.append(module.training)
        modes += [parameter.requires_grad for parameter in module._parameters.values() if parameter is not None]
    return tuple(modes)


def _side_inputs(half_steps: Sequence[HalfStep]) -> dict[str, Any]:
    """The branches' inputs besides their stream, by name; a list if they are not the same for all."""
    found: dict[str, list[Any]] = {}
    for step in half_steps:
        if step.args or step.kwargs:
            for name, value in _named(step.args, step.kwargs):
                known = found.setdefault(name, [])
                if all(value is not other for other in known):
                    known.append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return chain(((f"argument {index}", value) for index, value in enumerate(args)), kwargs.items())


def _number(k: int) -> str:
    return f"half-step {k}"


def _check(half_steps: Sequence[HalfStep], groups: int) -> None:
    if not isinstance(half_steps, Sequence):
        raise TypeError(f"half_steps is a {type(half_steps).__name__}; it must be a list of HalfSteps")
    if not isinstance(groups, int):
        raise TypeError(f"groups is a {type(groups).__name__}; it must be an int")
    if groups < 1:
        raise ValueError(f"groups is {groups}; it must be at least 1")
    for k, step in enumerate(half_steps):
        if not isinstance(step, HalfStep):
            raise TypeError(f"half_steps[{k}] is a {type(step).__name__}; it must be a HalfStep")
        if not callable(step.branch):
            raise TypeError(f"half_steps[{k}].branch is a {type(step.branch).__name__}; it must be callable")
        if not isinstance(step.sources, (tuple, list)):
            raise TypeError(f"half_steps[{k}].sources is a {type(step.sources).__name__}; it must be a tuple of ints")
        numbers = (step.target, *step.sources)
        if not step.sources or any(not 0 <= number < groups for number in numbers) or step.target in step.sources:
            raise ValueError(
                f"half_steps[{k}] adds a branch of streams {step.sources} to stream {step.target}; it must read one or "
                f"more of the streams 0 to {groups - 1} and add to another"
            )
