# SPDX-License-Identifier: Apache-2.0
"""What a branch saw when it ran, so that it can be run again and come out the same, or be refused.

Saved-tensor hooks switch off autograd's own version check, so everything that a branch reads besides its input is
recorded here: parameters, buffers and train/eval flags. `surroundings` has the rest.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from revkernels.autograd.ownership import PLAIN
from revkernels.errors import ReconstructionError

Slot = tuple[dict[str, Any], str, torch.Tensor, int]  # where the tensor hangs, its name, itself, its version
Undo = list[tuple[dict[str, Any], str, Any]]

_batchnorm = nn.modules.batchnorm
#: In training these forwards write running statistics that their output does not depend on.
_STATISTICS_ONLY = {
    _batchnorm._BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    nn.modules.instancenorm._InstanceNorm.forward,
}

#: For each module seen, the names of those buffers that its forward was found to write, statistics aside.
_written: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def will_write(module: nn.Module, name: str) -> None:
    """Tell beforehand that the module's forward writes this buffer, in some calls if not in all."""
    _written.setdefault(module, set()).add(name)


class Turn:
    """The right to run modules that have buffers: one thread's at a time.

    A recompute hangs throw-away buffers into them, where another thread's forward would lose its statistics.
    """

    __slots__ = ("locks",)

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # In one order for all threads, so that no two wait for each other.
        self.locks = [_locks.setdefault(module, threading.RLock()) for module in sorted(modules, key=id)]

    def __enter__(self) -> None:
        for lock in self.locks:
            lock.acquire()

    def __exit__(self, *_: object) -> None:
        for lock in self.locks:
            lock.release()


class Snapshot:
    """One branch at one half-step: taken before its forward, completed after it, consulted before its recompute.

    Each of these belongs inside ``with snapshot.turn``, together with the run of the branch.
    """

    __slots__ = ("branch", "fixed", "flags", "modules", "rewound", "statistics", "turn")

    def __init__(self, branch: Any) -> None:
        self.branch = branch
        self.fixed: list[Slot] = []
        self.statistics: list[Slot] = []
        self.rewound: list[tuple[nn.Module, Slot, torch.Tensor]] = []
        self.modules = _tree(branch) if isinstance(branch, nn.Module) else modules_behind(branch)
        stateful = [module for module in self.modules if module._buffers]
        self.turn: Any = Turn(stateful) if stateful else threading.RLock()  # nobody else's: free, and cheap to take

    def take(self) -> None:
        """Before the forward: note what there is."""
        self.flags = [module.training for module in self.modules]
        for module in self.modules:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.fixed.append((module._parameters, name, parameter, version_of(parameter)))
            if module._buffers:
                self._take_buffers(module)

    def _take_buffers(self, module: nn.Module) -> None:
        only_statistics = module.training and type(module).forward in _STATISTICS_ONLY
        written = _written.get(module)
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            slot = (module._buffers, name, buffer, version_of(buffer))
            if only_statistics:
                self.statistics.append(slot)
            elif written is None or name in written:
                self.rewound.append((module, slot, buffer.detach().clone()))
            else:
                self.fixed.append(slot)

    def complete(self, counted: Sequence[nn.Module] = ()) -> None:
        """After the forward: of the buffers copied, keep the copies of those that it wrote.

        ``counted``: batch norms that the recompute runs with the forward's statistics, so that it writes no buffers,
        once for each call.
        """
        if counted:
            self._set_aside(counted)
        if self.rewound:
            changed = []
            for module, slot, value in self.rewound:
                found = _written.setdefault(module, set())
                if _changed(slot):
                    found.add(slot[1])
                if slot[1] in found:  # by this branch, or by another one that shares the module
                    changed.append((module, slot, value))
                else:
                    self.fixed.append(slot)
            self.rewound = changed
        for module in self.modules:
            known = _written.get(module) if module._buffers else None
            if known is not None:  # a buffer written now and never before: lost for this step, kept from the next
                known.update(slot[1] for slot in self.fixed if slot[0] is module._buffers and _changed(slot))

    def _set_aside(self, counted: Sequence[nn.Module]) -> None:
        calls: dict[int, int] = {}
        for module in counted:
            calls[id(module._buffers)] = calls.get(id(module._buffers), 0) + 1
        for slots, name, tensor, version in self.statistics:
            # Each call adds to this buffer: one more, and the module was also called in another way.
            if name == "num_batches_tracked" and version_of(tensor) - version != calls.get(id(slots)):
                calls.pop(id(slots), None)
        self.statistics = [slot for slot in self.statistics if id(slot[0]) not in calls]

    def tensors(self) -> list[torch.Tensor]:
        """The branch's parameters and buffers."""
        slots = [*self.fixed, *self.statistics, *(slot for _, slot, _ in self.rewound)]
        return [tensor for _, _, tensor, _ in slots if not isinstance(tensor, UninitializedTensorMixin)]

    def problem(self) -> str | None:
        """Return what the branch reads and is not as it was in the forward, or None."""
        for _, name, tensor, version in self.fixed:
            if version >= 0 and tensor._version != version:
                return (
                    f"{self._tensor_name(tensor, name)} was changed in place between the forward and the backward "
                    f"(version {version}, now {tensor._version}), so the branch cannot be run again as it was; step "
                    f"the optimizer, or write to it, after the backward"
                )
        return None

    def restore(self) -> Undo:
        """Let the branch run as it did: in the mode and on the tensors of then, writing to throw-away buffers."""
        undo: Undo = []
        try:
            self._restore(undo)
        except BaseException:  # memory may run out for a copy
            put_back(undo)
            raise
        return undo

    def _restore(self, undo: Undo) -> None:
        for module, flag in zip(self.modules, self.flags, strict=True):
            if module.training is not flag:
                undo.append((module.__dict__, "training", module.training))
                module.__dict__["training"] = flag
        for slots, name, tensor, _ in self.fixed:
            now = slots.get(name)
            if now is tensor or type(tensor) not in PLAIN:  # what was sharded then is its owner's affair
                continue
            if type(now) in PLAIN:  # torch.func.functional_call has put other tensors in since
                undo.append((slots, name, now))
                slots[name] = tensor
            elif isinstance(now, nn.Parameter):
                raise ReconstructionError(
                    f"{self._tensor_name(now, name)} is a {type(now).__name__} now and was whole in the forward: the "
                    f"group that it is sharded in is not gathered while this branch is run again. Give the branch a "
                    f"group of its own: fully_shard(branch)"
                )
        for slots, name, tensor, _ in self.statistics:
            undo.append((slots, name, slots[name]))
            slots[name] = tensor.detach().clone()
        for _, (slots, name, _, _), value in self.rewound:
            undo.append((slots, name, slots[name]))
            slots[name] = value.clone()

    def _tensor_name(self, tensor: torch.Tensor, name: str) -> str:
        for root in [self.branch] if isinstance(self.branch, nn.Module) else self.modules:
            for kind, named in (("parameter", root.named_parameters()), ("buffer", root.named_buffers())):
                for path, candidate in named:
                    if candidate is tensor:
                        return f"{kind} {path}"
        return name


def _tree(module: nn.Module) -> list[nn.Module]:
    """``list(module.modules())``, in any order: each module once."""
    found = [module]
    if module._modules:
        seen = {module}
        for parent in found:
            for child in parent._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child)
    return found


def put_back(undo: Undo) -> None:
    """Undo `Snapshot.restore`: the branch has its own tensors again."""
    for slots, name, tensor in reversed(undo):
        slots[name] = tensor


def version_of(tensor: torch.Tensor) -> int:
    """The tensor's version, or -1 where it has none: in inference mode, and before a lazy module's first call."""
    try:
        return -1 if isinstance(tensor, UninitializedTensorMixin) else tensor._version
    except RuntimeError:  # an inference tensor: it has none
        return -1


def modules_behind(function: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a plain callable reaches through what it is bound to, closes over, defaults to or holds."""
    found: dict[nn.Module, None] = {}
    waiting, seen = [function], {id(function)}
    while waiting:
        for held in _held_by(waiting.pop()):
            for item in held if isinstance(held, list | tuple) else (held,):
                if isinstance(item, nn.Module):
                    found.update(dict.fromkeys(item.modules()))
                elif callable(item) and not isinstance(item, type) and id(item) not in seen:
                    seen.add(id(item))
                    waiting.append(item)
    return list(found)


def _held_by(function: Any) -> Iterator[Any]:
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
        return
    yield getattr(function, "__self__", None)
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable not assigned yet
            continue
    yield from getattr(function, "__defaults__", None) or ()
    if not hasattr(function, "__code__"):
        yield from getattr(function, "__dict__", {}).values()


def _changed(slot: Slot) -> bool:
    slots, name, tensor, version = slot
    return version_of(tensor) != version or slots.get(name) is not tensor
