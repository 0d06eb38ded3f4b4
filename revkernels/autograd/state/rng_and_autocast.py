# SPDX-License-Identifier: Apache-2.0
"""State outside the branch that its result depends on: random numbers, autocast, the default dtype, side inputs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from revkernels.autograd.ownership import memory_of
from revkernels.autograd.state.other_generators import OtherGenerator
from revkernels.autograd.state.rewinding import NONE
from revkernels.autograd.state.versions import version_of
from revkernels.errors import ReconstructionError

#: Generators, torch's or with the methods of torch's, their states, and the states' bytes for comparing (three times
#: faster than torch.equal).
States = list[tuple[Any, torch.Tensor, bytes]]
#: Generators that a branch drew from, with their states before it and a hash of those after; and generators that it
#: left unchanged, or may have moved and restored, with only the bytes of their states.
Drawn = list[tuple[Any, torch.Tensor | None, int | bytes]]


_IN_A_CAPTURE = (
    "this torch cannot draw them again for the recompute inside the capture of a CUDA graph (2.10 can): capture "
    "without dropout (p=0), or set activations='store'"
)


class Surroundings:
    """Recorded for one call of a chain, in the forward; restored for each recompute.

    Covers torch's default generators of the CPU and of the streams' device, and those that the branch reaches or is
    given. Of Python's and NumPy's generators those are covered that a branch reaches or that its code names.
    """

    def __init__(self, device: torch.device, side_inputs: dict[str, Any]) -> None:
        self.side_inputs = _as_they_are(side_inputs)
        kinds = [kind for kind in dict.fromkeys(("cpu", device.type)) if torch.amp.is_autocast_available(kind)]
        self.autocast = [(kind, *_autocast_state(kind)) for kind in kinds]
        self.default_dtype = torch.get_default_dtype()  # which trainers set for the forward alone
        self.shared = [torch.default_generator]
        self.guard: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if device.type == "cuda":
            generator = torch.cuda.default_generators[device.index]
            if torch.cuda.is_current_stream_capturing() and not _readable(generator):
                # A draw could be neither noticed nor repeated, so it is refused as it happens.
                self.guard = RefusesToDraw(_IN_A_CAPTURE)
            else:
                self.shared.append(generator)

    def states(self) -> States:
        """The shared generators' current states."""
        return states_of(self.shared)

    def extend(self, side_inputs: dict[str, Any]) -> None:
        """Check these side inputs as well, from now on."""
        known = {id(t) for _, t, *_ in self.side_inputs}
        self.side_inputs += [item for item in _as_they_are(side_inputs) if id(item[1]) not in known]

    def are_same(self) -> bool:
        """Whether autocast and the default dtype are unchanged."""
        same = all(state == (state[0], *_autocast_state(state[0])) for state in self.autocast)
        return same and torch.get_default_dtype() == self.default_dtype

    def problem(self) -> str | None:
        """Return which side input has changed since the forward, or None."""
        for name, tensor, version, memory in self.side_inputs:
            if tensor._version != version:
                return (
                    f"the side input {name} was changed in place between the forward and the backward (version "
                    f"{version}, now {tensor._version}), so the branch cannot be recomputed as it was"
                )
            if memory and memory_of(tensor) not in (0, memory):  # 0: it has been given attributes since
                return (
                    f"the side input {name} was given other memory between the forward and the backward (through "
                    f".data), so the branch cannot be recomputed as it was"
                )
        return None

    def restore(self, drawn: Drawn, undo: list[Callable[[], Any]]) -> None:
        """Restore everything except the side inputs; calling what ``undo`` gets, the last first, undoes that."""
        other = [
            state
            for state in self.autocast
            if state[1] != torch.is_autocast_enabled(state[0])
            or (state[1] and state[2] != torch.get_autocast_dtype(state[0]))
        ]
        elsewhere = []
        for generator, state, after in drawn:
            now, found = _state_of(generator)
            # Else it is in the state to restore. A hash (with a state) is not compared: python -bb takes offence.
            if state is not None or found != after:
                elsewhere.append((generator, _tensor_of(after) if state is None else state, now))
        default = torch.get_default_dtype()
        if default != self.default_dtype:
            undo.append(partial(torch.set_default_dtype, default))
            torch.set_default_dtype(self.default_dtype)
        if other:  # torch caches a weight's cast by the weight, whatever the dtype
            torch.clear_autocast_cache()
            undo.append(torch.clear_autocast_cache)
        for kind, enabled, dtype, cache in other:
            then = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache)
            then.__enter__()
            undo.append(partial(then.__exit__, None, None, None))
        for generator, state, now in elsewhere:
            undo.append(partial(generator.set_state, now))
            generator.set_state(state)


class RefusesToDraw(TorchDispatchMode):
    """Raises `ReconstructionError` where an operator draws random numbers. ``why``: why that is not allowed here."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and draws(func, args, kwargs):
            raise ReconstructionError(f"{func} draws random numbers, and {self.why}")
        return func(*args, **kwargs)


def draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call draws. Operators are tagged by what they can do: attention without dropout, say, does not."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "training", "train"):
            return bool(args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value))
    return True


def _as_they_are(side_inputs: dict[str, Any]) -> list[tuple[str, torch.Tensor, int, int]]:
    """The tensors in them, each with its path, version and memory."""
    return [(name, t, t._version, memory_of(t)) for name, t in tensors_in(side_inputs) if version_of(t) >= 0]


def _readable(generator: torch.Generator) -> bool:
    try:
        generator.get_state()
    except RuntimeError:  # "Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture"
        return False
    return True


def states_of(generators: Sequence[Any]) -> States:
    """Copies of the generators' states: 5 KB for a CPU generator, 16 bytes for a CUDA one."""
    return [(generator, *_state_of(generator)) for generator in generators]


def _state_of(generator: Any) -> tuple[torch.Tensor, bytes]:
    if torch._C._len_torch_dispatch_stack():  # FakeTensorMode, say, allows no tensor with memory
        with _disable_current_modes():
            state = generator.get_state()
            return state, state.numpy().tobytes()
    state = generator.get_state()
    return state, state.numpy().tobytes()


def drawn(before: States, after: States, plain: bool) -> Drawn:
    """Those of ``before`` whose generator was drawn from; all, if the branch is not ``plain``.

    Custom code may fork or seed a generator and restore it, which looks like no draw at all.
    """
    found: Drawn = []
    for (generator, state, then), (_, _, now) in zip(before, after, strict=True):
        if then != now:
            found.append((generator, state, hash(now)))
        elif not plain:
            found.append((generator, None, _shared(then)))
    return found or NONE


_recent = threading.local()


def _shared(state: bytes) -> bytes:
    """The bytes, or this thread's equal copy from an earlier half-step: one copy for many that draw nothing."""
    recent: list[bytes] = getattr(_recent, "states", [])  # a branch may reach several generators
    if state not in recent:
        _recent.states = recent = [state, *recent[:3]]
    return recent[recent.index(state)]


def _tensor_of(state: Any) -> torch.Tensor:
    with _disable_current_modes():
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def moved(drawn: Drawn) -> bool:
    """Whether a generator was drawn from."""
    return any(before is not None for _, before, _ in drawn)


@contextlib.contextmanager
def refuses_a_race(name: str, lazy: bool, astray: Sequence[Any]) -> Iterator[None]:
    """To recompute a branch once more whose generators ``astray`` have `strayed`: valid if it draws nothing from them.
    ``lazy``: it had lazy modules, whose parameters were drawn in the forward and are not drawn again."""
    others = states_of([generator for generator in astray if isinstance(generator, OtherGenerator)])
    of_torch = len(others) < len(astray)
    if lazy and of_torch:
        why = (
            f"in the forward {name} also drew the parameters of its lazy modules, so that the numbers cannot be the "
            f"same again. Call the network once before its first step, under torch.no_grad()"
        )
    else:
        why = (
            f"while {name} ran, in the forward or now, another thread drew from the same generator: the numbers cannot "
            f"be the same again. Give that thread a generator of its own"
        )
    with RefusesToDraw(why) if of_torch else contextlib.nullcontext():
        yield
    if any(_state_of(generator)[1] != before for generator, _, before in others):
        raise ReconstructionError(f"{name} draws random numbers from Python's or NumPy's generators, and {why}")


def strayed(drawn: Drawn) -> list[Any]:
    """After the recompute: the generators that were drawn from and are not in the state that the forward left."""
    found = []
    for generator, before, after in drawn:
        if before is not None and hash(now := _state_of(generator)[1]) != after:
            with _disable_current_modes():
                if now != before.numpy().tobytes():
                    found.append(generator)
    return found


def _autocast_state(kind: str) -> tuple[bool, torch.dtype, bool]:
    enabled = torch.is_autocast_enabled(kind)
    return enabled, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of autocast for devices of this kind; None where it is off or not supported, as for "meta"."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested lists, tuples and dicts, each with its path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_in(item, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{name}[{index}]")
