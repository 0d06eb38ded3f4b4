# SPDX-License-Identifier: Apache-2.0
"""Tensors in a branch's attributes that are not registered, such as a mask or the state of a recurrent cell.

If a forward replaces or writes them, the recompute sees the values from before the forward; of tensors with a gradient
only the values, since their graph may reach back through all earlier steps. Items of lists and dictionaries are
restored only for branches that do not call `is_recomputing`: those that do store something there for the recompute.
"""

from __future__ import annotations

import enum
import warnings
import weakref
from collections.abc import Sequence
from operator import is_
from typing import Any

import numpy
import torch
from torch import nn

from revkernels.autograd.ownership import PLAIN
from revkernels.autograd.recomputing import times_asked
from revkernels.autograd.state.bytecode import may_read
from revkernels.autograd.state.other_generators import KINDS
from revkernels.autograd.state.reachable import is_layers, own_names, written_by_torch
from revkernels.autograd.state.rewinding import (
    FEW,
    FLAT,
    MISSING,
    NONE,
    Slot,
    Undo,
    hang,
    is_state,
    item_of,
    known_to_write,
    may_be_state,
    without_graph,
    written_by,
)
from revkernels.autograd.state.versions import version_behind, version_of

#: Placeholders that a state later replaces.
_BLANK = (type(None), type(MISSING), int, float)
_HOLD = (tuple, list, dict)
#: What may tell a forward how far its state has come, such as the length of a table; and what it draws from.
_ABOUT = frozenset((*_BLANK, bool, complex, str, torch.Size, torch.dtype, torch.device, torch.Generator, *KINDS))
_ABOUT |= {kind for kind in numpy.ScalarType if issubclass(kind, numpy.number | numpy.bool_)}
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Settings:
    """A module's attributes by name; and of its lists and dictionaries, each container with its items by key."""

    __slots__ = ("__weakref__", "attributes", "items")

    def __init__(self, attributes: dict[str, Any], items: Sequence[tuple[Any, dict[Any, Any]]]) -> None:
        self.attributes, self.items = attributes, items

    def is_like(self, other: Settings) -> bool:
        """Whether the other has the same objects."""
        return (
            _alike(self.attributes, other.attributes)
            and len(self.items) == len(other.items)
            and all(a is b and _alike(c, d) for (a, c), (b, d) in zip(self.items, other.items, strict=True))
        )


#: For a module, the settings that its last forward found: one copy for many half-steps. The half-steps hold it, nothing
#: else: a container may hold the module, by one of its methods, and what is held from here would never be freed.
_settings: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Settings]] = weakref.WeakKeyDictionary()
#: Modules whose forward has written or replaced state: not every call of them need do so.
_stateful: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _holds_items(module: nn.Module) -> bool:
    """Whether an attribute of the module is a non-empty list or dictionary."""
    table = module.__dict__
    return any(type(value) in (list, dict) and value for value in map(table.get, own_names(table)))


def _is_setting(value: Any, depth: int = 3) -> bool:
    """Whether it is a number, a flag, a string, an enum's member or a generator, or a short tuple, list or dictionary
    of these, such as the names of the active adapters and the scale of each."""
    kind = type(value)
    if kind not in _HOLD:
        return kind in _ABOUT or issubclass(kind, enum.Enum)
    if not 0 < len(value) <= FEW or not depth:
        return False
    return all(_is_setting(item, depth - 1) for item in (value.values() if kind is dict else value))


def _unchanged_settings(container: Any, before: Any) -> dict[Any, Any]:
    """The settings in a list or dictionary that a forward has not changed: of a list, all or none."""
    if type(before) is dict:
        items = [(key, was) for key, was in before.items() if container.get(key, MISSING) is was]
    else:
        items = list(enumerate(before)) if len(container) == len(before) and all(map(is_, container, before)) else []
    return {key: was for key, was in items if _is_setting(was)}


def _alike(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether keys and values are the same objects in the same order. By ``is``: ``==`` of tensors is no answer."""
    return len(one) == len(other) and all(map(is_, one, other)) and all(map(is_, one.values(), other.values()))


class OwnState:
    """The unregistered state of one branch at one half-step; part of a `Snapshot`.

    If the branch's ``revkernels_comes_back`` is True, its attributes are not restored: the recompute finds them as the
    forward left them.
    """

    __slots__ = (
        "about",
        "asked",
        "blank",
        "branch",
        "comes_back",
        "containers",
        "gaps",
        "graphs",
        "holders",
        "hung",
        "items",
        "loose",
        "modules",
        "tables",
    )

    def __init__(self, branch: Any, modules: Sequence[nn.Module]) -> None:
        self.branch, self.modules = branch, modules
        #: Modules whose lists and dictionaries are inspected. They must run in one thread at a time: a replacement
        #: by another thread's run would look like this one's.
        self.holders = [module for module in modules if _holds_items(module)]
        self.comes_back = getattr(branch, "revkernels_comes_back", False) is True
        #: Attributes without a gradient, tensors or tuples or lists of tensors: the dict, the name, the value.
        self.hung: list[tuple[dict[str, Any], str, Any]] = []
        #: The tensors among them during the forward, with copies of those that it may write in place.
        self.loose: list[tuple[nn.Module, Slot, torch.Tensor | None]] = []
        #: Attributes with a gradient, without their graphs: also a reference to the tensor, and its version.
        self.graphs: list[tuple[dict[str, Any], str, Any, weakref.ref[torch.Tensor] | None, int]] = []
        #: Attributes that were None, a number or missing and became tensors: the dict, the name, the old value.
        self.blank: list[tuple[dict[str, Any], str, Any]] = []
        #: Numbers, flags, strings, members of enums and generators that the forward does not change, such as a domain,
        #: and lists and dictionaries of these: the dict, and the module's settings.
        self.about: list[tuple[dict[str, Any], Settings]] = []
        #: Items of lists and dictionaries before the forward, in order: the container, the key, the value, and
        #: whether the forward replaced or removed it.
        self.items: list[tuple[Any, Any, Any, bool]] = []
        #: Those lists and dictionaries with their modules and copies from before the forward, while it runs.
        self.containers: list[tuple[nn.Module, Any, Any]] = []
        #: Attribute and buffer tables with copies from before the forward, while it runs.
        self.tables: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        #: Names that the forward added to layers outside ``modules``.
        self.gaps: list[tuple[nn.Module, dict[str, Any], str, Any]] = []
        self.asked = times_asked()

    def take(self, registered: int) -> list[tuple[str, torch.Tensor]]:
        """Before the forward: record the modules' state. The first ``registered`` of them may run. Returns the tensors,
        by name."""
        held: list[tuple[str, torch.Tensor]] = []
        for place, module in enumerate(self.modules):
            held += self._take(module, place < registered)
        return held

    def _take(self, module: nn.Module, registered: bool) -> list[tuple[str, torch.Tensor]]:
        table, held = module.__dict__, []
        names = own_names(table)
        if registered:
            self.tables.append((module, module._buffers, dict(module._buffers)))
        if not self.comes_back:
            self.tables.append((module, table, {name: table.get(name) for name in names}))
        written = known_to_write(module)
        for name in names:
            value: Any = table.get(name)
            if type(value) in PLAIN:
                held.append((name, value))
                if not value.requires_grad and not self.comes_back:
                    self.hung.append((table, name, value))
                    slot = (table, name, value, version_of(value))
                    copied = written is None or f".{name}" in written
                    self.loose.append((module, slot, value.detach().clone() if copied else None))
                elif registered and not self.comes_back and may_read(module, name):
                    self.graphs.append((table, name, without_graph(value), weakref.ref(value), version_of(value)))
            elif not self.comes_back:
                if is_state(value):
                    if not (name == FLAT and isinstance(module, nn.RNNBase)):
                        self.hung.append((table, name, value))  # parameters, frozen ones too, are the snapshot's affair
                elif registered and may_be_state(value) and may_read(module, name):
                    self.graphs.append((table, name, without_graph(value), None, 0))
                if registered and type(value) in (list, dict) and module in self.holders:
                    self._note(module, value)
        return held

    def _note(self, module: nn.Module, container: Any, depth: int = 3) -> None:
        if len(container) > FEW or not depth:
            return
        before = container.copy()
        self.containers.append((module, container, before))
        for value in before.values() if type(before) is dict else before:
            if type(value) in (list, dict):
                self._note(module, value, depth - 1)

    def complete(self, renewed: set[nn.Module]) -> list[tuple[nn.Module, Slot, torch.Tensor | None]]:
        """After the forward: return what it wrote in place, with copies from before where they exist.

        ``renewed``: the modules whose buffers it wrote. Those whose state it wrote or replaced are added."""
        changed, stays = [], set()
        for module, slot, value in self.loose:
            found = written_by(module)
            if version_of(slot[2]) != slot[3]:
                found.add(f".{slot[1]}")
                changed.append((module, slot, value))
                renewed.add(module)
        asked = times_asked() != self.asked and not self.comes_back
        if asked:
            self.containers = []
        unchanged: dict[nn.Module, list[tuple[Any, dict[Any, Any]]]] = {}
        for module, container, copy in self.containers:
            if settings := _unchanged_settings(container, copy):
                unchanged.setdefault(module, []).append((container, settings))
        for module, table, before in self.tables:
            now = dict(table.items())  # a scripted module's is no dictionary
            numbers: list[tuple[dict[str, Any], str, Any]] = []
            about: dict[str, Any] = {}
            for name in own_names(now):
                was, value = before.get(name, MISSING), now[name]
                if was is value and type(value) in (list, dict):
                    stays.add((id(table), name))  # its contents are restored through `items`
                if was is value:
                    if table is module.__dict__ and (type(value) in _ABOUT or _is_setting(value)):
                        about[name] = value
                    continue
                if not may_be_state(value):
                    if type(was) in _ABOUT and type(value) in _ABOUT:
                        numbers.append((table, name, was))
                    continue
                if is_state(value):
                    renewed.add(module)
                blank, state = type(was) in _BLANK, is_state(value)
                if blank and (state or (not asked and (table is module._buffers or may_read(module, name)))):
                    self.blank.append((table, name, was))
                if asked and state and (blank or is_state(was)):
                    self._tell(module, name)
            if numbers and not asked and (module in renewed or module in _stateful):
                # With the state goes what says how far it has come: a table that has grown would be too short for the
                # length next to it, and what the first batch set would not be set by it again.
                self.blank += numbers
            held = unchanged.get(module, NONE) if table is module.__dict__ else NONE
            if (about or held) and not asked:
                self._note_settings(module, table, Settings(about, held))
        for module, table, name, was in self.gaps:
            if is_state(table.get(name)) and not (self.comes_back and table is module.__dict__):
                self.blank.append((table, name, was))
                if asked:
                    self._tell(module, name)
        _stateful.update(renewed)
        for _, container, before in self.containers:
            # Added items are ignored: another thread may have added them.
            for key, was in before.items() if type(before) is dict else enumerate(before):
                value = item_of(container, key)
                if value is was:
                    kind = type(was)
                    if was.is_leaf if kind in PLAIN else kind in _HOLD and is_state(was):  # else a graph would be held
                        self.items.append((container, key, was, False))
                elif may_be_state(was) and (value is MISSING or may_be_state(value)):
                    self.items.append((container, key, without_graph(was), True))
                elif type(was) in _BLANK and may_be_state(value):
                    self.items.append((container, key, was, True))
        # A branch that asks may keep values for the recompute; values accumulated in place are not restored either.
        graphs = (one for one in self.graphs if (id(one[0]), one[1]) not in stays)
        unwritten = (one for one in graphs if one[3] is None or version_behind(one[3]) in (None, one[4]))
        self.graphs = [] if asked else list(unwritten)
        self.loose = self.tables = self.containers = self.gaps = NONE
        self.holders, self.hung = self.holders or NONE, self.hung or NONE
        self.blank, self.items, self.graphs = self.blank or NONE, self.items or NONE, self.graphs or NONE
        self.about = self.about or NONE
        return changed

    def _note_settings(self, module: nn.Module, table: dict[str, Any], found: Settings) -> None:
        ref = _settings.get(module)
        known = None if ref is None else ref()
        if known is None or not known.is_like(found):
            forward = getattr(type(module), "forward", None)
            if written_by_torch(forward) and not is_layers(forward):  # such as FSDP's
                return
            known = found
            _settings[module] = weakref.ref(found)
        self.about.append((table, known))

    def restore(self, undo: Undo) -> None:
        """Before the recompute: restore the attributes and items from before the forward."""
        for table, name, value in self.hung:
            if table.get(name) is not value:
                undo.append((table, name, table.get(name, MISSING)))
                table[name] = value
        for table, name, value, ref, _ in self.graphs:
            now = table.get(name, MISSING)
            if ref is None or now is None or ref() is not now:  # a dead reference is None too
                undo.append((table, name, now))
                table[name] = value
        for table, settings in self.about:
            for name, value in settings.attributes.items():
                now = table.get(name, MISSING)
                if now is not value and (type(now) in _HOLD or _is_setting(now)):
                    undo.append((table, name, now))
                    table[name] = value
            for container, items in settings.items:
                for key, value in items.items():
                    if (now := item_of(container, key)) is not value:
                        undo.append((container, key, now))
                        hang(container, key, value)
        for place, name, was, written in (*((*one, True) for one in self.blank), *self.items):
            now = item_of(place, name)
            if written or now is not was:
                undo.append((place, name, now))
                hang(place, name, was)

    def _tell(self, module: nn.Module, name: str) -> None:
        """Warn once per module: the recompute could need the forward's value, or the one from before it."""
        if module in _told:
            return
        _told.add(module)
        warnings.warn(
            f"{type(module).__name__} has got another {name} from a forward that asks is_recomputing(): the second run "
            f"finds there what the forward found, as a recurrent cell has to. What the forward keeps for the second "
            f"run belongs in a list or dictionary that stays; or set revkernels_comes_back = True on the branch "
            f"({type(self.branch).__name__}), and its attributes are not put back",
            UserWarning,
            stacklevel=2,
        )
