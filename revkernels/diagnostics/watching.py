# SPDX-License-Identifier: Apache-2.0
"""Observes every tensor that a forward makes, without changing what runs.

Hooks on modules would change it: a chain calls a branch that has hooks as a module, instead of fusing its first norm
with the coupling. So the call of a module, and the places where a chain runs a branch, are patched from outside during
a measurement; a dispatch mode below autograd observes new memory, and only weak references to it are kept.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from revkernels.autograd.driver_forward import Reversal
from revkernels.autograd.fused import fusion
from revkernels.autograd.kept_tensors import KeptTensor
from revkernels.autograd.ownership import PLAIN
from revkernels.autograd.recomputing import recomputes
from revkernels.autograd.selective import Selective
from revkernels.diagnostics.untouched import tensors_in

_LOSS = "(loss)"


@dataclass
class Made:
    """Memory that a forward made: in which module, by which operator."""

    memory: StorageWeakRef
    module: str
    operator: str | None
    packed: Any = None  # a weak reference to what autograd holds for it
    budget: bool = False  # stored by a chain under a memory budget

    @property
    def saved(self) -> bool:
        """Whether autograd holds it as a saved tensor."""
        return self.packed is not None and self.packed() is not None

    def nbytes(self) -> int:
        """Its size now, 0 once it is freed."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        return 0 if storage is None else storage.nbytes()


@dataclass
class Chain:
    """One call of a reversible chain, and the saved tensors of each recompute: half-step to bytes."""

    module: str
    reversal: Any  # a weak reference
    half_steps: int
    outputs: list[int] = field(default_factory=list)
    name: Callable[[int], str] = str
    frames: dict[int, int] = field(default_factory=dict)
    stored: bool = False


class _Packed:
    """A stand-in for a saved tensor: alive as long as autograd holds it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Watch(TorchDispatchMode):
    """What the modules of ``net`` make in this thread while it is on.

    Attributes:
        made: the memory by address; a weak reference keeps the address from being reused.
        chains: the calls of reversible chains, in order.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.made: dict[int, Made] = {}
        self.chains: list[Chain] = []
        self.names: dict[int, str] = {}
        self.root = f"({type(net).__name__})"
        for name, module in net.named_modules():
            self.names.setdefault(id(module), name or self.root)
        self.stack = [_LOSS]
        self._own = {address(t) for t in (*net.parameters(), *net.buffers()) if has_memory(t)}
        self._thread = threading.get_ident()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and note memory that it returned for the first time."""
        # A subclass's own operators arrive here one by one. (Torch 2.6 lists plain tensors as well.)
        if any(kind not in PLAIN for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.note(tensor, func)
        return result

    def note(self, tensor: torch.Tensor, func: Any = None) -> Made | None:
        """Return the record of the tensor's memory, a new one if it was not seen before."""
        if not has_memory(tensor):
            return None
        storage = tensor.untyped_storage()
        if storage._cdata in self._own:
            return None
        known = self.made.get(storage._cdata)
        if known is None:
            operator = None if func is None else func.name().removesuffix(".default")
            known = Made(StorageWeakRef(storage), self.stack[-1], operator)
            self.made[storage._cdata] = known
        return known

    # ---- saved tensors

    def saved_tensors(self) -> saved_tensors_hooks:
        """``with watch.saved_tensors()``: notes autograd's saved tensors. They are returned unchanged."""
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> _Packed:
        packed = _Packed(tensor)
        known = self.note(tensor)
        if known is not None and not known.saved:
            known.packed = weakref.ref(packed)
        return packed

    # ---- modules and chains

    @contextmanager
    def modules(self) -> Iterator[None]:
        """``with watch.modules()``: tracks the stack of running modules, notes chains and their recomputes."""
        originals = [
            (nn.Module, "__call__", nn.Module.__call__),
            (fusion, "fused", fusion.fused),
            *((Reversal, name, getattr(Reversal, name)) for name in ("_run", "finish", "_rebuild", "_pack")),
            (Selective, "_pack", Selective._pack),
        ]
        call, fused, run, finish, rebuild, *packs = (original for _, _, original in originals)

        def watched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._within(module, call, module, *args, **kwargs)

        def watched_fused(fusable: Any, *args: Any) -> Any:
            return self._within(fusable.norm, fused, fusable, *args)

        def watched_run(reversal: Any, step: Any, *args: Any) -> Any:
            return self._within(step.branch, run, reversal, step, *args)

        def watched_finish(reversal: Any, outputs: Any, *args: Any) -> None:
            finish(reversal, outputs, *args)
            if recomputes():  # a chain inside a branch, recorded in the forward already
                return
            chain = Chain(
                self.stack[-1], weakref.ref(reversal), reversal._count, name=reversal.name, stored=reversal.keep
            )
            if reversal._kept is not None:
                chain.outputs = [address(y) for y in outputs]
            self.chains.append(chain)

        def watched_rebuild(reversal: Any, k: int, *args: Any) -> None:
            streams = {address(s) for s in reversal._rebuilt}
            rebuild(reversal, k, *args)
            streams.update(address(s) for s in reversal._rebuilt)
            frame = {address(t): t.untyped_storage().nbytes() for t, _ in reversal._frame if has_memory(t)}
            size = sum(count for place, count in frame.items() if place not in streams and place not in self._own)
            for chain in self.chains:
                if chain.reversal() is reversal:
                    chain.frames[k] = max(size, chain.frames.get(k, 0))

        def watched_pack(pack: Callable[..., Any], holder: Any, tensor: torch.Tensor) -> Any:
            packed = pack(holder, tensor)
            if isinstance(packed, KeptTensor) and isinstance(packed.tensor, torch.Tensor):
                known = self.note(tensor)
                if known is not None and not known.saved:
                    known.packed, known.budget = weakref.ref(packed), isinstance(holder, Reversal)
            return packed

        theirs = [name not in vars(owner) for owner, name, _ in originals]  # inherited from a base class
        replacements = (
            *(watched_call, watched_fused, watched_run, watched_finish, watched_rebuild),
            *(functools.partialmethod(functools.partial(watched_pack, pack)) for pack in packs),
        )
        try:
            for (owner, name, _), replacement in zip(originals, replacements, strict=True):
                setattr(owner, name, replacement)
            yield
        finally:
            for (owner, name, original), inherited in zip(originals, theirs, strict=True):
                if inherited:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)

    def _within(self, module: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = self.names.get(id(module))
        if name is None or threading.get_ident() != self._thread:
            return function(*args, **kwargs)
        self.stack.append(name)
        try:
            return function(*args, **kwargs)
        finally:
            self.stack.pop()


def _unpack(packed: _Packed) -> torch.Tensor:
    return packed.tensor


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor has one plain block of memory (not sparse, not a wrapper, not on the meta device)."""
    try:
        return tensor.device.type != "meta" and tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > 0
    except (RuntimeError, NotImplementedError):
        return False


def address(tensor: torch.Tensor) -> int:
    """The address of the object that owns the tensor's memory: the same for all its views."""
    return tensor.untyped_storage()._cdata
