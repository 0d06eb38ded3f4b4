# SPDX-License-Identifier: Apache-2.0
"""The state that a branch saw when it ran, restored for its recompute, which is refused if the state has changed.

Saved-tensor hooks disable autograd's own version check, so everything that a branch reads besides its input is
recorded here: parameters, buffers, train/eval flags, and other tensors that it holds. `rng_and_autocast` has the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from revkernels.autograd.ownership import PLAIN
from revkernels.autograd.state.bytecode import writes_silently
from revkernels.autograd.state.parametrized import Cached, cached_weights
from revkernels.autograd.state.parts import Parts, is_scripted
from revkernels.autograd.state.rewinding import (
    MISSING,
    NONE,
    Slot,
    Undo,
    copies_of,
    hang_again,
    hang_flat_weights,
    inner,
    is_registered,
    known_to_write,
    written_by,
)
from revkernels.autograd.state.structure import Hooks, Structure
from revkernels.autograd.state.versions import (
    Constant,
    Placed,
    constant_of,
    differs,
    has_moved,
    is_elsewhere,
    misplaced,
    placed_by_forward,
    version_behind,
    version_of,
    was_written,
)
from revkernels.errors import ReconstructionError

_batchnorm = nn.modules.batchnorm
#: In training these forwards write running statistics that their output does not depend on.
_STATISTICS_ONLY = {
    _batchnorm._BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    nn.modules.instancenorm._InstanceNorm.forward,
}

_NO_HOOKS = Hooks()


class Snapshot(Parts):
    """One branch at one half-step: taken before its forward, completed after it, checked before its recompute.

    Call its methods inside ``with snapshot.turn``, together with the run of the branch. ``given``: the branch's
    arguments, whose modules are included.
    """

    __slots__ = (
        *("absent", "cached", "constant", "fixed", "flags", "hooks", "late", "others", "placed", "rewound"),
        *("since", "statistics", "structure"),
    )

    def __init__(self, branch: Any, given: Sequence[Any] = ()) -> None:
        super().__init__(branch, given)
        #: Parameters and buffers that the branch does not write.
        self.constant: list[Constant] = []
        self.absent: list[tuple[dict[str, Any], str]] = []  # parameters and buffers that are None, such as a bias
        self.cached: Cached | None = None  # parametrized weights that its forward found computed
        self.fixed: list[Slot] = []  # attributes that it wrote in place, without a copy
        self.late: set[int] = set()  # ids of fixed and constant tensors found to be written
        #: Tensor attributes of modules that are not parameters or buffers, with their versions. Weak references.
        self.others: list[tuple[str, weakref.ref[torch.Tensor], int]] = []
        self.placed: Placed = NONE  # what its own forward put in place of parameters
        self.structure: Structure | None = None  # set after the forward, unless `known`
        self.statistics: list[Slot] = []
        self.rewound: list[tuple[nn.Module, Slot, torch.Tensor]] = []

    def take(self) -> None:
        """Before the forward: record the current state."""
        self.look_again()
        known = self.known
        self.flags = [module.training for module in self.modules] if known is None else known.flags
        self.hooks = _NO_HOOKS if known is not None else Hooks(self.modules)
        self.cached = cached_weights(self.modules)
        for place, module in enumerate(self.modules):
            parameters = module._parameters
            if parameters:
                if known is None and is_scripted(module):
                    parameters = dict(parameters.items())
                for name, p in parameters.items():
                    if p is None:
                        self.absent.append((parameters, name))
                    else:
                        self.constant.append(constant_of((parameters, name, p, version_of(p))))
            if module._buffers:
                self._take_buffers(module, place >= self.registered)
        if self.own is not None:
            self.held += self.own.take(self.registered)
            self.since = torch.autograd._get_sequence_nr()
        if self.held:
            self.others = [(name, weakref.ref(tensor), version_of(tensor)) for name, tensor in self.held]
            self.held = []

    def _take_buffers(self, module: nn.Module, hidden: bool) -> None:
        only_statistics = module.training and type(module).forward in _STATISTICS_ONLY
        if (only_statistics and self.reads_running) or (self.own is not None and writes_silently(module)):
            only_statistics = False
            written_by(module).update(module._buffers)
        written = known_to_write(module)
        for name, buffer in module._buffers.items():
            if buffer is None:
                self.absent.append((module._buffers, name))
                continue
            slot = (module._buffers, name, buffer, version_of(buffer))
            if only_statistics:
                self.statistics.append(slot)
            elif (written is None or hidden or name in written) and not isinstance(buffer, UninitializedTensorMixin):
                self.rewound.append((module, slot, buffer.detach().clone().requires_grad_(buffer.requires_grad)))
            elif not hidden:
                self.constant.append(constant_of(slot))

    def complete(self, counted: Sequence[nn.Module] = ()) -> None:
        """After the forward: of the copied buffers, keep the copies of those that it wrote.

        ``counted``: batch norms that the recompute runs with the forward's statistics, so that it writes no buffers,
        one entry for each call.
        """
        made = [(slots, name) for slots, name in self.absent if slots.get(name) is not None]
        if made:  # do not remove what the forward itself created
            self.absent = [(slots, name) for slots, name in self.absent if slots.get(name) is None]
        if self.known is None:
            self.structure = Structure(self.modules)
        elif self.own is not None:
            stateful = self.stateful() if made else ()
            self.own.gaps = [(m, slots, name, None) for slots, name in made for m in stateful if m._buffers is slots]
            if not self.is_same():  # it may have registered a module, or set a plain layer's attribute
                self.own.gaps += self.known.gaps(self.tree)  # type: ignore[arg-type]
                self.known, self.structure = None, Structure(self.modules)
        if counted:
            self._set_aside(counted)
        if self.rewound:
            changed = []
            own = set(self.modules[: self.registered]) if len(self.modules) > self.registered else None
            for module, slot, value in self.rewound:
                if own is not None and module not in own:
                    # Held, not registered, and perhaps another branch's: ignore it unless this branch wrote it.
                    if was_written(slot) or differs(value, slot[2]):
                        changed.append((module, slot, value))
                    continue
                found = written_by(module)
                if slot[1] not in found and (was_written(slot) or differs(value, slot[2])):
                    found.add(slot[1])
                if slot[1] in found:  # by this branch, or by another one that shares the module
                    changed.append((module, slot, value))
                else:
                    self.constant.append(constant_of(slot))
            self.rewound = changed
        own_writes = () if self.own is None else self.own.complete({module for module, _, _ in self.rewound})
        for module, slot, before in own_writes:
            if before is None:
                self.fixed.append(slot)
                self.late.add(id(slot[2]))
            else:
                self.rewound.append((module, slot, before))
        moves = self.known is None  # memory may change: a hook, say, casts a layer's weights during its forward
        for _, _, tensor, version, _, memory in self.constant:
            written = version >= 0 and tensor._version != version
            if (written or (moves and is_elsewhere(tensor, memory))) and isinstance(tensor, nn.Parameter):
                self.late.add(id(tensor))
        if self.own is not None:
            self.placed = placed_by_forward(self.constant, self.modules, self.since) or NONE
        for module in self.stateful():
            known = known_to_write(module)
            if known is not None:  # first write of a buffer: no copy in this step, but from the next on
                late = [one for one in self.constant if one[0] is module._buffers and has_moved(one)]
                known.update(one[1] for one in late)
                self.late.update(id(one[2]) for one in late)
        # Tensors that the forward itself writes are neither rewound nor checked.
        if self.others:
            self.others = [held for held in self.others if version_behind(held[1]) == held[2]]
        # A deep chain has thousands of these lists, mostly empty: spare the garbage collector the empty ones.
        self.fixed, self.statistics, self.rewound = self.fixed or NONE, self.statistics or NONE, self.rewound or NONE
        self.others, self.held, self.late = self.others or NONE, NONE, self.late or NONE
        self.absent, self.generators = self.absent or NONE, self.generators or NONE

    def _set_aside(self, counted: Sequence[nn.Module]) -> None:
        calls: dict[int, int] = {}
        for module in counted:
            calls[id(module._buffers)] = calls.get(id(module._buffers), 0) + 1
        for slots, name, tensor, version in self.statistics:
            # Each call adds 1 to this buffer. A higher count: the module was also called without recorded statistics.
            if name == "num_batches_tracked" and version_of(tensor) - version != calls.get(id(slots)):
                calls.pop(id(slots), None)
        self.statistics = [slot for slot in self.statistics if id(slot[0]) not in calls]

    def tensors(self) -> list[torch.Tensor]:
        """The branch's parameters and buffers."""
        tensors = [tensor for _, _, tensor, *_ in self.constant]
        tensors += [slot[2] for slot in (*self.fixed, *self.statistics, *(slot for _, slot, _ in self.rewound))]
        return [tensor for tensor in tensors if not isinstance(tensor, UninitializedTensorMixin)]

    def problem(self) -> str | None:
        """Return what the branch reads that has changed since the forward, or None."""
        for _, name, tensor, version, _, memory in self.constant:
            if version >= 0 and tensor._version != version:
                return self._written(tensor, name, version)
            if is_elsewhere(tensor, memory):
                if id(tensor) in self.late:
                    return self._written(tensor, name, version)
                return (
                    f"{self._tensor_name(tensor, name)} was given other memory between the forward and the backward "
                    f"(through .data, as .to(dtype) and vector_to_parameters do it), so the branch cannot be "
                    f"recomputed as it was; do that after the backward"
                )
        for _, name, tensor, version in self.fixed:
            if version >= 0 and tensor._version != version:
                return self._written(tensor, name, version)
        for name, ref, version in self.others:
            now = version_behind(ref)
            if version >= 0 and now is not None and now != version:
                return (
                    f"the tensor {name}, which is no parameter or buffer, was changed in place between the forward and "
                    f"the backward (version {version}, now {now}), so the branch cannot be recomputed as it was; write "
                    f"to it after the backward"
                )
        return None

    def _written(self, tensor: torch.Tensor, name: str, version: int) -> str:
        name = self._tensor_name(tensor, name)
        if id(tensor) not in self.late:
            return (
                f"{name} was changed in place between the forward and the backward (version {version}, now "
                f"{tensor._version}), so the branch cannot be recomputed as it was; step the optimizer, or write to "
                f"it, after the backward"
            )
        if isinstance(tensor, nn.Parameter):
            return (
                f"{name} was written by the branch's own forward (as by a max_norm, or a hook that casts it), and "
                f"parameters are not rewound: set activations='store' for it, or write to it before the step"
            )
        return (
            f"{name} was written by the branch's own forward, which it had not been before, so that what it held is "
            f"lost for this step; from the next one on it is rewound"
        )

    def restore(self, undo: Undo, is_same: bool = False) -> None:
        """Restore the forward's modes and tensors, with throw-away buffers to write to. ``undo`` gets how to undo it,
        step by step, so that it says so too if memory runs out or an interrupt comes in between.

        ``is_same``: the result of `is_same` just before.
        """
        if not is_same:
            self._restore_modules(undo)
        self._restore(undo)

    def misplaced(self) -> str | None:
        """After the recompute: what it put in a parameter's place and the forward did not, or None."""
        return None if self.own is None else misplaced(self.constant, self.modules, self.placed or {})

    def _restore_modules(self, undo: Undo) -> None:
        if [module.training for module in self.modules] != self.flags:
            for module, flag in zip(self.modules, self.flags, strict=True):
                if module.training is not flag:
                    undo.append((module.__dict__, "training", module.training))
                    module.__dict__["training"] = flag
        self.hooks.hang(self.modules, undo)
        tree: Any = self.tree
        structure = self.structure if self.known is None else self.known.structure(tree, self.kinds)
        if structure is not None:  # None in an inverse, which runs a branch without a forward
            structure.hang(self.modules, undo)

    def _restore(self, undo: Undo) -> None:
        before = len(undo)
        for slots, name, tensor, _, wanted, _ in self.constant:
            if slots.get(name) is not tensor:
                self._hang(slots, name, tensor, undo)
            if tensor.requires_grad is not wanted:  # its graph would have other nodes than the forward's
                undo.append((tensor, "requires_grad", not wanted))
                tensor.requires_grad = wanted
        for slots, name, tensor, _ in self.fixed:
            if slots.get(name) is not tensor:
                self._hang(slots, name, tensor, undo)
        for slots, name in self.absent:
            if slots.get(name) is not None:
                undo.append((slots, name, slots[name]))
                slots[name] = None
        if len(undo) > before:
            hang_flat_weights(self.modules, undo)
        if self.own is not None:
            self.own.restore(undo)
        for slots, name, tensor, _ in self.statistics:
            undo.append((slots, name, slots.get(name, MISSING)))
            slots[name] = tensor.detach().clone() if tensor.requires_grad else tensor.clone()
        for (_, (slots, name, _, _), was), copy in zip(self.rewound, copies_of(self.rewound), strict=True):
            undo.append((slots, name, slots.get(name, MISSING)))
            slots[name] = inner(copy) if was.requires_grad else copy

    def _hang(self, slots: dict[str, Any], name: str, tensor: torch.Tensor, undo: Undo) -> None:
        """Restore a parameter or buffer that has been replaced by another."""
        if type(tensor) not in PLAIN:  # sharded in the forward: left to the sharding library
            return
        now = slots.get(name)
        if type(now) in PLAIN:  # torch.func.functional_call has since replaced it
            undo.append((slots, name, now))
            slots[name] = tensor
        elif now is None and (not tensor.__dict__ or name in slots or is_registered(self.modules, tensor)):
            hang_again(self.modules, (slots, name, tensor), undo)  # else it has attributes: it was sharded
        elif isinstance(now, nn.Parameter):
            raise ReconstructionError(
                f"{self._tensor_name(now, name)} is a {type(now).__name__} now and was whole in the forward: the group "
                f"that it is sharded in is not gathered while this branch is recomputed. Give the branch a group of "
                f"its own: fully_shard(branch)"
            )

    def _tensor_name(self, tensor: torch.Tensor, name: str) -> str:
        for root in [self.branch] if isinstance(self.branch, nn.Module) else self.modules:
            for kind, named in (("parameter", root.named_parameters()), ("buffer", root.named_buffers())):
                for path, candidate in named:
                    if candidate is tensor:
                        return f"{kind} {path}"
        return name
