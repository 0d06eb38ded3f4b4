# SPDX-License-Identifier: Apache-2.0
"""Replaces tensors of modules during a recompute, and restores them afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from revkernels.autograd.ownership import PLAIN, has_memory

Slot = tuple[dict[str, Any], str, torch.Tensor, int]  # the dictionary, name, tensor, version
Undo = list[tuple[Any, Any, Any]]
FEW = 64  # items of a state at most: longer containers are data
NONE: Any = ()  # replaces an empty list to which nothing more is added
MISSING = object()  # in place of a tensor: there was none
FLAT = "_flat_weights"  # a recurrent layer's list of its parameters

#: For each module seen, in train and in eval mode, the names of the buffers that its forward was found to write, except
#: statistics; with a dot in front, the attributes that it was found to write in place.
_written: weakref.WeakKeyDictionary[nn.Module, dict[bool, set[str]]] = weakref.WeakKeyDictionary()


def will_write(module: nn.Module, name: str) -> None:
    """Declare that the module's forward writes this buffer, in some calls at least."""
    for training in (False, True):
        _written.setdefault(module, {}).setdefault(training, set()).add(name)


def known_to_write(module: nn.Module) -> set[str] | None:
    """The names that the module's forward was found to write in its current mode, or None before its first."""
    return _written.get(module, {}).get(module.training)


def written_by(module: nn.Module) -> set[str]:
    """The same set, to be extended."""
    return _written.setdefault(module, {}).setdefault(module.training, set())


def item_of(slots: Any, name: Any) -> Any:
    """The item of a dictionary, or of a list by its index."""
    if type(slots) is list:
        return slots[name] if name < len(slots) else MISSING
    return slots.get(name, MISSING)


def hang(slots: Any, name: Any, tensor: Any) -> None:
    """Set or remove an item; a list gets no gap before it. For a module, ``tensor`` is the new class; for a tensor,
    whether it requires grad."""
    if type(slots) is list:
        if name <= len(slots):
            slots[name : name + 1] = () if tensor is MISSING else (tensor,)
    elif isinstance(slots, nn.Module):
        slots.__class__ = tensor
    elif isinstance(slots, torch.Tensor):
        slots.requires_grad = tensor
    elif tensor is MISSING:
        slots.pop(name, None)
    else:
        slots[name] = tensor


def is_state(value: Any, depth: int = 3, with_graph: bool = False) -> bool:
    """Whether a branch may have set this as state for its next call: a tensor without a gradient, or a short tuple,
    list or dictionary of such tensors, such as the (h, c) of an LSTM."""
    if type(value) in PLAIN:
        return with_graph or not value.requires_grad
    if type(value) not in (tuple, list, dict) or not depth or len(value) > FEW:
        return False
    items = list(value.values() if type(value) is dict else value)
    return all(item is None or is_state(item, depth - 1, with_graph) for item in items)


def may_be_state(value: Any) -> bool:
    """The same, also for tensors with a gradient, which flows from call to call."""
    return is_state(value, with_graph=True)


def without_graph(value: Any) -> Any:
    """The value, as a recompute reads it, without its graph, which may be that of all previous steps."""
    if type(value) is dict:
        return {name: without_graph(item) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(without_graph, value))
    if type(value) in PLAIN and value.requires_grad and not value.is_leaf:
        return value.detach().requires_grad_()
    return value


def inner(tensor: torch.Tensor) -> torch.Tensor:
    """A non-leaf copy with a gradient: saved wherever the original was, and writable in place."""
    with torch.enable_grad():
        return tensor.requires_grad_().clone()


def put_back(undo: Undo) -> None:
    """Restore the branch's own tensors."""
    for slots, name, tensor in reversed(undo):
        hang(slots, name, tensor)


def is_registered(modules: Sequence[nn.Module], tensor: torch.Tensor) -> bool:
    """Whether it is a parameter, perhaps under another name, as after pruning."""
    return any(now is tensor for module in modules for now in module._parameters.values())


def hang_again(modules: Sequence[nn.Module], what: tuple[dict[str, Any], str, torch.Tensor], undo: Undo) -> None:
    """Restore a parameter or buffer of these modules that was removed, as by pruning, which sets a plain attribute of
    that name: the attribute, which would be found first, is removed."""
    slots, name, tensor = what
    for module in modules:
        table = module.__dict__
        if name in table and (slots is module._parameters or slots is module._buffers):
            undo.append((table, name, table.pop(name)))
    undo.append((slots, name, slots.get(name, MISSING)))
    slots[name] = tensor


def hang_flat_weights(modules: Sequence[nn.Module], undo: Undo) -> None:
    """Make recurrent layers use their current parameters. They read a list of these, ``_flat_weights``, which they
    update when they notice that a parameter was replaced, but not when the replacement was assigned to them. They
    notice by a second list, of references: both are restored together."""
    for module in modules:
        table = module.__dict__
        flat = table.get(FLAT) if isinstance(module, nn.RNNBase) else None
        if flat:
            parameters, names = module._parameters, table["_flat_weights_names"]
            undo += [(table, name, table.get(name, MISSING)) for name in (FLAT, "_flat_weight_refs")]
            table[FLAT] = [parameters.get(name, weight) for name, weight in zip(names, flat, strict=True)]


def copies_of(rewound: Sequence[tuple[nn.Module, Slot, torch.Tensor]]) -> list[torch.Tensor]:
    """Writable copies of the values. Tensors that share memory share it in the copies too."""
    memories = [slot[2].untyped_storage()._cdata if has_memory(slot[2]) else None for _, slot, _ in rewound]
    bases: dict[int, torch.UntypedStorage] = {}
    same: dict[int, torch.Tensor] = {}  # by the id of the original
    copies = []
    for memory, (_, (_, _, tensor, _), value) in zip(memories, rewound, strict=True):
        if memory is None or memories.count(memory) == 1:
            copies.append(value.clone())
            continue
        if memory not in bases:
            bases[memory] = tensor.untyped_storage().clone()
        if id(tensor) not in same:
            view = value.new_empty(0).set_(bases[memory], tensor.storage_offset(), tensor.shape, tensor.stride())
            same[id(tensor)] = view.copy_(value)
        copies.append(same[id(tensor)])
    return copies
