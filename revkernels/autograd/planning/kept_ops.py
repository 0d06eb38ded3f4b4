# SPDX-License-Identifier: Apache-2.0
"""Keeps outputs of operators from a branch's forward, so that its recompute does not run them again.

An operator is identified by its number among those counted: those that compute new tensors, deterministically. The
branch's forward and its recompute run the same ones in the same order. If they do not, since a hook runs in only one of
them, say, nothing is kept or used from there on: each operator has a fingerprint of it and all before it.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from revkernels.autograd.coupling import CHANNELS_LAST
from revkernels.autograd.ownership import blocks_of, has_memory
from revkernels.autograd.state.rng_and_autocast import States, draws, states_of
from revkernels.autograd.state.thread_state import ThreadState

#: Kept outputs of an operator: its fingerprint, its result, and the versions of the tensors in it.
KeptOp = tuple[int, Any, list[int]]


@dataclass(frozen=True)
class OpCost:
    """The cost of one operator of a branch.

    Attributes:
        number: among those counted; -1 if not counted.
        print: fingerprint of it and all counted before it.
        name: of the operator.
        seconds: its run time.
        bytes: of its outputs.
        passing: bytes that its backward may allocate besides its inputs.
        keepable: whether its outputs may be kept.
    """

    number: int
    name: str
    seconds: float
    bytes: int
    keepable: bool
    passing: int = 0
    print: int = 0


class _Counting(TorchDispatchMode):
    """Numbers the operators to count."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Code compiled by torch.compile runs compiled in this mode too (where torch has this option, from 2.9)."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self._next = self._print = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _counts(func) or (torch.Tag.nondeterministic_seeded in func.tags and draws(func, args, kwargs)):
            return self.uncounted(func, args, kwargs)
        number, self._next = self._next, self._next + 1
        self._print = hash((self._print, func))
        return self.run(number, func, args, kwargs)

    def run(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def uncounted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


class Noting(_Counting):
    """In the forward: keeps the outputs of the ``wanted`` operators (number: fingerprint), in ``kept`` by number.

    ``generators``: if an operator outside torch draws from one of these, its output is not kept.
    """

    def __init__(self, wanted: Mapping[int, int]) -> None:
        super().__init__()
        self.wanted = wanted
        self.generators: Sequence[torch.Generator] = ()
        self.kept: dict[int, KeptOp] = {}

    def run(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted = self.wanted.get(number) == self._print
        # It may draw now even if it did not when measured, with a probability of 0.
        states = states_of(self.generators) if wanted and func.namespace not in _TAGGED else []
        out = func(*args, **kwargs)
        if wanted and _is_plain(out) and not _drew(states):
            self.kept[number] = self._print, out, [t._version for t in _tensors(out)]
        return out

    def settle(self) -> dict[int, KeptOp]:
        """After the branch: the kept outputs, without those that it has since overwritten."""
        kept, self.kept = self.kept, {}
        # Detached only now: inside the mode, an alias has its own version counter, which would not show a write.
        return {
            number: (mark, _each(out, torch.Tensor.detach), versions)
            for number, (mark, out, versions) in kept.items()
            if _unwritten(out, versions)
        }


class Replaying(_Counting):
    """In the recompute: returns kept outputs instead of running their operators."""

    def __init__(self, kept: dict[int, KeptOp]) -> None:
        super().__init__()
        self.kept = kept

    def run(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = self.kept.get(number)
        if known is not None and known[0] == self._print and _unwritten(*known[1:]):
            return _each(known[1], torch.Tensor.detach)  # a new alias, since autograd makes it part of its graph
        return func(*args, **kwargs)


class Looking(_Counting):
    """Reads ``level`` after every operator that computes new tensors, and inside it and operators that write in place.

    Calls ``look`` with the operator (None for a cast, which the recompute may lack), the level before and after it, and
    its peak bytes on top of the former. ``begin`` starts a measurement inside an operator, whose ``end()`` returns the
    peak.
    """

    def __init__(
        self, level: Watched, look: Callable[[Any, int | None, int | None, int], None], begin: Callable[[], Any | None]
    ) -> None:
        super().__init__()
        self.level, self.look, self.begin = level, look, begin

    def run(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, most = self.level.raw(), 0
        stretch = self.begin()
        try:
            out = func(*args, **kwargs)
        finally:  # a profiler must not stay
            if stretch is not None:
                most = stretch.end()
        now = self.level.raw()
        stays = self.level.learn(before, now, size_of(out)) if _makes(func) else 0
        self.look(None if func in _CASTS else func, before, now, max(0, most - stays))
        return out

    def uncounted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.run(-1, func, args, kwargs) if _works(func) else func(*args, **kwargs)


class Measuring(_Counting):
    """Times every operator that computes new tensors. Read ``costs`` when ``clock`` is ready.

    ``inside``: what `Looking` has seen inside the operators, passed on to ``look``. ``generators``: an operator that
    moves one of them draws, whatever its tags. ``talks``: an operator has communicated with other processes, or may
    have, as torch's DTensor does by itself.
    """

    def __init__(
        self,
        clock: Callable[[], Any],
        level: Watched,
        inside: Sequence[tuple[Any, int]] = (),
        look: Callable[[int | None, int], None] | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        super().__init__()
        self.clock, self.level, self.generators = clock, level, generators
        self._inside, self._look = iter(inside), look
        self._seen: list[tuple[OpCost, Any, Any, list[tuple[Any, int]]]] = []
        # Outputs by storage, held weakly so that the key stays theirs: an alias without the version may write too.
        self._memory: dict[int, tuple[StorageWeakRef, tuple[int, ...]]] = {}
        self._written: set[int] = set()
        self.talks = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.talks = self.talks or "c10d" in str(func) or any(map(is_distributed, types))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def run(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        since = self.level.since()
        states = states_of(self.generators) if number >= 0 else []
        before = self._within(func)
        start = self.clock()
        out = func(*args, **kwargs)
        end = self.clock()
        size = size_of(out)
        if self.level.cheap:  # on the host the forward ran in the same thread, and has learnt it
            self.level.learn(before, self.level.raw(), size)
        versions = [(weakref.ref(t), t._version) for t in _tensors(out)]  # not held: the step's peak must not rise
        keepable = number >= 0 and _is_plain(out) and not _drew(states)
        cost = OpCost(number, str(func), 0.0, size, keepable, _passing(func, out, size), self._print)
        for tensor in _tensors(out) if keepable else ():
            storage = tensor.untyped_storage()
            ref, indices = self._memory.get(storage._cdata) or (StorageWeakRef(storage), ())
            # Several: `unsafe_chunk`, as in a GRU, returns views of its input and does not declare it.
            self._memory[storage._cdata] = ref, (*indices, len(self._seen))
        self._seen.append((cost, start, end, versions))
        self.level.aside(since, start, end)
        return out

    def uncounted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for tensor in _written_by(func, args, kwargs):
            if (place := self._memory.get(tensor.untyped_storage()._cdata)) is not None:
                self._written.update(place[1])
        if _makes(func):
            return self.run(-1, func, args, kwargs)
        if _works(func):
            self._within(func)
        return func(*args, **kwargs)

    def _within(self, func: Any) -> int | None:
        """Report what was seen inside the operator in the forward: measuring again would distort its time. Returns the
        level, if there was something to report or reading it is cheap."""
        of, most = (None, 0) if func in _CASTS else next(self._inside, (None, 0))
        if of is not func and func not in _CASTS:  # the branch runs other operators now
            self._inside = iter(())
        before = self.level.raw() if most or self.level.cheap else None
        if of is func and self._look is not None:
            self._look(before, most)
        return before

    def settle(self) -> None:
        """After the branch: find outputs that it has overwritten, if they still exist. (`Noting` handles the rest.)"""
        for index, (cost, start, end, versions) in enumerate(self._seen):
            now = ((ref(), version) for ref, version in versions)
            written = index in self._written or any(t is not None and t._version != version for t, version in now)
            self._seen[index] = replace(cost, keepable=cost.keepable and not written), start, end, []

    def costs(self, between: Callable[[Any, Any], float]) -> list[OpCost]:
        """The operators, in order. ``between``: returns the seconds between two readings of the clock."""
        return [replace(cost, seconds=between(start, end)) for cost, start, end, _ in self._seen]


class Watched(Protocol):
    """The part of `revkernels.autograd.planning.memory_meter.Level` that the modes use."""

    cheap: bool

    def raw(self) -> int | None: ...

    def learn(self, before: int | None, now: int | None, made: int) -> int: ...

    def since(self) -> tuple[float, float]: ...

    def aside(self, since: tuple[float, float], start: Any, end: Any) -> None: ...


_KNOWN: dict[Any, bool] = {}
_TAGGED = ("aten", "prims", "revkernels")  # namespaces whose operators are tagged if they draw
#: Autocast casts a leaf once and other tensors each time, and a stream is a leaf only in the recompute.
_CASTS = {torch.ops.aten._to_copy.default}
_FACTORIES = ("empty", "new_", "zeros_like", "ones_like", "full_like")


def _counts(func: Any) -> bool:
    """Whether the operator computes new tensors from tensors, and is not a cast."""
    return func not in _CASTS and _makes(func)


def _makes(func: Any) -> bool:
    """Whether the operator computes new tensors from tensors: no view, nothing in place, no mere allocation."""
    known = _KNOWN.get(func)
    if known is None and not isinstance(func, torch._ops.OpOverload):
        known = _KNOWN[func] = False  # a higher-order operator
    if known is None:
        schema = func._schema
        reads = any("Tensor" in str(argument.type) for argument in schema.arguments)
        aliases = any(value.alias_info is not None for value in (*schema.arguments, *schema.returns))
        makes = any("Tensor" in str(value.type) for value in schema.returns)
        name = schema.name.rpartition("::")[2]
        known = reads and makes and not aliases and not name.startswith(_FACTORIES) and "c10d" not in schema.name
        _KNOWN[func] = known  # (communication must be repeated)
    return known


def _drew(states: States) -> bool:
    """Whether one of the generators has moved since."""
    now = states_of([generator for generator, *_ in states])
    return any(one[2] != other[2] for one, other in zip(states, now, strict=True))


def _works(func: Any) -> bool:
    """Whether the operator computes new tensors from tensors, or writes to some: no view."""
    mutable = isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable and func.namespace != "c10d"
    return mutable or _makes(func)


def _written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that the operator writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from filter(has_memory, _tensors(value))


def _passing(func: Any, out: Any, size: int) -> int:
    """Two gradients, of inputs of the output's size. For a convolution one, and where the host's library reorders the
    data, a second and a third for that."""
    if "convolution" not in str(func) or not isinstance(out, torch.Tensor):
        return 2 * size
    last = CHANNELS_LAST.get(out.dim())
    as_it_is = last is not None and out.is_contiguous(memory_format=last)
    return size if as_it_is or out.device.type != "cpu" else 3 * size


def is_distributed(kind: type) -> bool:
    """Whether tensors of the class are parts of a tensor distributed over several processes."""
    return kind.__module__.startswith("torch.distributed.")


def _is_plain(out: Any) -> bool:
    """Whether it is a plain dense tensor, or a tuple of such tensors and numbers."""
    items = out if isinstance(out, (tuple, list)) else (out,)
    return all(
        item is None
        or type(item) in (int, float, bool)
        or (type(item) is torch.Tensor and item.layout is torch.strided)
        for item in items
    )


def _tensors(out: Any) -> Iterator[torch.Tensor]:
    for item in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(item, torch.Tensor):
            yield item


def _unwritten(out: Any, versions: list[int]) -> bool:
    return [tensor._version for tensor in _tensors(out)] == versions


def size_of(out: Any) -> int:
    """Bytes of the tensors in it."""
    return sum({block._cdata: block.nbytes() for t in _tensors(out) for block in blocks_of(t)}.values())


def _each(out: Any, action: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(out, (tuple, list)):
        return type(out)(_each(item, action) for item in out)
    return action(out) if isinstance(out, torch.Tensor) else out


class Stopwatch:
    """Readings of the time on a device: of the host's clock, or events in the device's stream.

    ``beside``: seconds of the host that do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.beside = device, 0.0

    def read(self) -> Any:
        """A reading now."""
        if self.device.type != "cuda":
            return time.perf_counter() - self.beside
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one reading to another. Waits for a device."""
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


_overhead: list[float] = []


def overhead() -> float:
    """Seconds that numbering an operator costs on the host; measured once a process."""
    if not _overhead:
        x, watch, times = torch.zeros(1, device="cpu"), Stopwatch(torch.device("cpu")), []
        before = ThreadState()
        try:
            for _ in range(50):
                start, _, plain = watch.read(), torch.neg(x), watch.read()
                with Noting({}):
                    inside, _, end = watch.read(), torch.neg(x), watch.read()
                times.append((end - inside) - (plain - start))
        except BaseException:
            before.put_back()
            raise
        _overhead.append(max(0.0, statistics.median(times)))
    return _overhead[0]
