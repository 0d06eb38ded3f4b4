# SPDX-License-Identifier: Apache-2.0
"""A branch that was looked through once, and is asked from then on whether it is still the same.

A half-step has to know that twice, and what is asked lies all over the memory: the extension asks. Of layers that are
plain that is all there is to know; what modules with code of somebody's own hold is looked at besides.
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
from revkernels.autograd.state.plain_layers import has_options, is_plain, unpatched
from revkernels.autograd.state.reachable import own_names
from revkernels.autograd.state.rewinding import MISSING
from revkernels.autograd.state.structure import Structure, tree_of

__all__ = ["KnownBranch", "Tree", "known_branch"]

#: A branch's modules, itself first, and what is registered in them, one after another.
Tree = tuple[list[nn.Module], list[Any]]

#: A module, where something hangs, its name, and None or `MISSING`, which was there before.
Gap = tuple[nn.Module, dict[str, Any], str, Any]

_known: weakref.WeakKeyDictionary[nn.Module, KnownBranch] = weakref.WeakKeyDictionary()
_SAME, _EMPTY, _NAMES, _MODULES, _CLASS = range(5)  # what the extension is to ask
_ASKED = {
    "training": _SAME,
    **dict.fromkeys(("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"), _EMPTY),
    **dict.fromkeys(("_parameters", "_buffers"), _NAMES),
    "_modules": _MODULES,
}
_HEAP_TYPE = 1 << 9  # of Python's type flags: of a class that was made by a class statement


def known_branch(branch: nn.Module) -> tuple[KnownBranch, Tree] | None:
    """What is known of a branch; None of one with hooks on its modules or on all modules, or with scripted modules."""
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
    if tree is None:  # without the extension, or with something unheard of in a registry's place
        return None
    _known[branch] = known
    return known, tree


class KnownBranch:
    """Of a branch, which this does not hold, nor its layers and tensors: it is there for as long as the branch is.

    Attributes:
        others: the numbers of the modules that are not plain. Of these only what follows is known, what is registered
            in them, that they have no hooks, and the options of one of torch's own that has more than these.
        flags: whether each module is in training mode.
        stateful: the numbers of the modules with buffers.
    """

    __slots__ = ("_kinds", "_names", "_rows", "_structure", "_turn", "flags", "others", "stateful")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        plain = list(map(is_plain, modules))
        tables = [module.__dict__.copy() for module in modules]  # once: another thread's recompute may change them
        self._rows = list(map(_row_of, modules, tables, plain))
        self._names = [tuple(table) if is_ else () for table, is_ in zip(tables, plain, strict=True)]
        self._kinds = {type(module) for module, is_ in zip(modules, plain, strict=True) if is_}
        self._structure = Structure(modules).of([], [])
        self.others = [number for number, is_ in enumerate(plain) if not is_]
        self.flags = [table["training"] for table in tables]
        self.stateful = [number for number, table in enumerate(tables) if table["_buffers"]]
        self._turn = self._turn_of([modules[number] for number in self.stateful])

    def may_be_held(self) -> bool:
        """Whether no option refers to something, such as the branch."""
        return all(map(_is_value, self._structure.options()))

    def tree(self, branch: nn.Module) -> Tree | None:
        """The branch as it is now; None if it is not what it was, or a layer no longer plain."""
        tree: Tree | None = native.module_tree(branch, self._rows)
        return tree if unpatched(self._kinds) else None

    def is_tree(self, branch: nn.Module, tree: Tree) -> bool:
        """Whether that is still this tree."""
        return native.is_module_tree(branch, self._rows, *tree) and unpatched(self._kinds)

    def turn(self, modules: Sequence[nn.Module]) -> Any:
        """The right to run these, which it is made of now: perhaps others than at first, that are like them."""
        refs, turn = self._turn
        stateful = [modules[number] for number in self.stateful]
        if any(ref() is not module for ref, module in zip(refs, stateful, strict=True)):
            _, turn = self._turn = self._turn_of(stateful)
        return turn

    @staticmethod
    def _turn_of(stateful: Sequence[nn.Module]) -> tuple[list[weakref.ref[nn.Module]], Any]:
        return list(map(weakref.ref, stateful)), turn_of(stateful)

    def gaps(self, tree: Tree) -> Iterator[Gap]:
        """Where nothing was on its plain layers, or None, when it was this tree, and something is now."""
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
        """That of the branch when it was this tree, whose ``others`` were of these classes."""
        registered, at, left = [], 0, iter(kinds)
        for _, _, held, asked in self._rows:
            below = held[asked.index(_MODULES)]
            registered.append(dict(zip(below, tree[1][at : at + len(below)], strict=True)))
            at += len(below)
        return self._structure.of([row[0] if row[1] is None else next(left) for row in self._rows], registered)


#: A module's class, or a reference to it; of which attributes something is asked, None for all in their order; what
#: hangs there, or what is known of that; and what is to be asked of each of these.
_Row = tuple[Any, tuple[str, ...] | None, tuple[Any, ...], bytes]


def _is_usual(module: nn.Module) -> bool:
    """Whether it has no hooks, and what there is to ask of: a scripted module's are no dictionaries."""
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
    """Its class, or a weak reference: one that was made in a function may refer to the branch."""
    kind = type(held)
    return weakref.ref(kind) if kind.__flags__ & _HEAP_TYPE else kind


def _is_value(held: Any) -> bool:
    """Whether it is like a number, and refers to nothing: what may refer to the branch must not be held here."""
    if type(held) is tuple:
        return all(map(_is_value, held))
    return not gc.is_tracked(held) and (type(held) is str or not hasattr(held, "__len__"))
