# SPDX-License-Identifier: Apache-2.0
"""Caches what was found out about a branch, and checks whether the branch is still the same.

A half-step makes this check twice, and what it reads is scattered all over memory, so the C++ extension does it. For
plain layers nothing else is needed; what modules with custom code hold is searched in addition.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from revkernels import native
from revkernels.autograd.fused.known_layers import has_hooks
from revkernels.autograd.state.locks import turn_of
from revkernels.autograd.state.plain_layers import are_declared, has_options, is_plain, unpatched
from revkernels.autograd.state.reachable import own_names
from revkernels.autograd.state.rewinding import MISSING
from revkernels.autograd.state.structure import Structure, tree_of

__all__ = ["KnownBranch", "Tree", "known_branch", "turn_to_run"]

#: A branch's modules, itself first, and what is registered in them, in one list.
Tree = tuple[list[nn.Module], list[Any]]

#: A module, the dictionary, a name, and its value before: None, or `MISSING` if there was none.
Gap = tuple[nn.Module, dict[str, Any], str, Any]

_known: weakref.WeakKeyDictionary[nn.Module, KnownBranch] = weakref.WeakKeyDictionary()
_SAME, _EMPTY, _NAMES, _MODULES, _CLASS = range(5)  # the kinds of check
_ASKED = {
    "training": _SAME,
    **dict.fromkeys(("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"), _EMPTY),
    **dict.fromkeys(("_parameters", "_buffers"), _NAMES),
    "_modules": _MODULES,
}
_HEAP_TYPE = 1 << 9  # a type flag of Python: made by a class statement


def known_branch(branch: nn.Module) -> tuple[KnownBranch, Tree] | None:
    """What is known of a branch; None if it has hooks on its modules or on all modules, or scripted modules."""
    known = _known.get(branch)
    if known is not None and (tree := known.tree(branch)) is not None:
        return known, tree
    modules = tree_of(branch)
    if not unpatched(()) or not all(map(_is_usual, modules)):
        return None
    known = KnownBranch(modules)
    if not known.may_be_held():
        return None
    tree = known.tree(branch)
    if tree is None:  # no extension, or a registry of an unknown type
        return None
    _known[branch] = known
    return known, tree


def turn_to_run(branch: Any) -> Any:
    """The lock for a run of the branch that is not recorded: that of its last recorded run, whose recompute in another
    thread hangs throw-away buffers into its modules, and sets the modes of its forward."""
    known = _known.get(branch) if isinstance(branch, nn.Module) else None
    return turn_of(()) if known is None else known.last_turn


class KnownBranch:
    """What is known of a branch. Holds no references to it, its layers or its tensors; lives as long as the branch.

    Attributes:
        others: the indices of the modules that are not plain. Of these only the following is known: what is registered
            in them, that they have no hooks, and the options of those that have the class of a known layer.
        flags: whether each module is in training mode.
        stateful: the indices of the modules with buffers.
        declared: whether some of the plain ones are of the user's classes.
    """

    __slots__ = ("_kinds", "_names", "_rows", "_structure", "_turn", "declared", "flags", "others", "stateful")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        plain = list(map(is_plain, modules))
        tables = [module.__dict__.copy() for module in modules]  # a copy: another thread's recompute may change them
        self._rows = list(map(_row_of, modules, tables, plain))
        self._names = [tuple(table) if is_ else () for table, is_ in zip(tables, plain, strict=True)]
        self._kinds = {type(module) for module, is_ in zip(modules, plain, strict=True) if is_}
        self.declared = are_declared(self._kinds)
        self._structure = Structure(modules).of([], [])
        self.others = [number for number, is_ in enumerate(plain) if not is_]
        self.flags = [table["training"] for table in tables]
        self.stateful = [number for number, table in enumerate(tables) if table["_buffers"]]
        self._turn = self._turn_of([modules[number] for number in self.stateful])

    def may_be_held(self) -> bool:
        """Whether no option may refer to an object, such as the branch."""
        return all(map(_is_value, self._structure.options()))

    def tree(self, branch: nn.Module) -> Tree | None:
        """The branch's current tree; None if it has changed, or a layer is no longer plain."""
        tree: Tree | None = native.module_tree(branch, self._rows)
        return tree if unpatched(self._kinds) else None

    def is_tree(self, branch: nn.Module, tree: Tree) -> bool:
        """Whether the branch still has this tree."""
        return native.is_module_tree(branch, self._rows, *tree) and unpatched(self._kinds)

    @property
    def last_turn(self) -> Any:
        """The last result of `turn`."""
        return self._turn[1]

    def turn(self, modules: Sequence[nn.Module]) -> Any:
        """The lock for these modules, the branch's current ones: they may have replaced the first ones, if alike."""
        refs, turn = self._turn
        stateful = [modules[number] for number in self.stateful]
        if any(ref() is not module for ref, module in zip(refs, stateful, strict=True)):
            _, turn = self._turn = self._turn_of(stateful)
        return turn

    @staticmethod
    def _turn_of(stateful: Sequence[nn.Module]) -> tuple[list[weakref.ref[nn.Module]], Any]:
        return list(map(weakref.ref, stateful)), turn_of(stateful)

    def gaps(self, tree: Tree) -> Iterator[Gap]:
        """Attributes and buffers of plain layers that were missing or None when it had this tree, and now are not."""
        for module, names, (_, _, known, _) in zip(tree[0], self._names, self._rows, strict=True):
            if not names:
                continue
            table, buffers = module.__dict__, module._buffers
            then = dict(zip(names, known, strict=True))
            for name in own_names(table):
                if then.get(name) is None and table.get(name) is not None:
                    yield module, table, name, None if name in then else MISSING
            for name in list(buffers):
                if name not in then["_buffers"]:
                    yield module, buffers, name, MISSING

    def structure(self, tree: Tree, kinds: Iterable[type]) -> Structure:
        """The structure of the branch when it had this tree and its ``others`` had these classes."""
        registered, at, left = [], 0, iter(kinds)
        for _, _, held, asked in self._rows:
            below = held[asked.index(_MODULES)]
            registered.append(dict(zip(below, tree[1][at : at + len(below)], strict=True)))
            at += len(below)
        return self._structure.of([row[0] if row[1] is None else next(left) for row in self._rows], registered)


#: A module's class, or a reference to it; the names of the attributes to check, None for all in order; their values, or
#: what is known of these; and the kind of check for each.
_Row = tuple[Any, tuple[str, ...] | None, tuple[Any, ...], bytes]


def _is_usual(module: nn.Module) -> bool:
    """Whether it has no hooks, and the usual dictionaries, which a scripted module does not have."""
    return not has_hooks(module) and type(module._modules) is dict and _ASKED.keys() <= module.__dict__.keys()


def _row_of(module: nn.Module, table: dict[str, Any], plain: bool) -> _Row:
    own = own_names(table) if has_options(module) else []
    names = None if plain else (*_ASKED, *(name for name in own if _is_value(table[name])))
    hung = [(name, table[name]) for name in names or table]
    asked = bytes(_ASKED.get(name, _SAME if _is_value(held) else _CLASS) for name, held in hung)
    known = tuple(_known_of(held, ask) for (_, held), ask in zip(hung, asked, strict=True))
    return type(module) if plain else _class_of(module), names, known, asked


def _known_of(held: Any, ask: int) -> Any:
    if ask == _EMPTY:
        return None
    if ask == _CLASS:
        return _class_of(held)
    return held if ask == _SAME else tuple(held)


def _class_of(held: Any) -> Any:
    """Its class, or a weak reference: one defined in a function may refer to the branch."""
    kind = type(held)
    return weakref.ref(kind) if kind.__flags__ & _HEAP_TYPE else kind


def _is_value(held: Any) -> bool:
    """Whether it is like a number and refers to no object: a reference to the branch must not be held here."""
    if type(held) is tuple:
        return all(map(_is_value, held))
    return not gc.is_tracked(held) and (type(held) is str or not hasattr(held, "__len__"))
