# SPDX-License-Identifier: Apache-2.0
"""A branch of plain layers: looked through once, and from then on asked whether it is still the same.

A half-step has to know that twice, and what is asked lies all over the memory: the extension asks.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from revkernels import native
from revkernels.autograd.plain_layers import are_plain, hold_more, unpatched
from revkernels.autograd.structure import Structure, tree_of
from revkernels.autograd.turns import turn_of

__all__ = ["PlainBranch", "Tree", "plain_branch"]

#: A branch's modules, itself first, and what is registered in them, one after another.
Tree = tuple[list[nn.Module], list[Any]]

_known: weakref.WeakKeyDictionary[nn.Module, PlainBranch] = weakref.WeakKeyDictionary()
_SAME, _EMPTY, _NAMES, _MODULES, _CLASS = range(5)  # what `native.module_tree` is to ask
_ASKED = {
    **dict.fromkeys(("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"), _EMPTY),
    **dict.fromkeys(("_parameters", "_buffers"), _NAMES),
    "_modules": _MODULES,
}


def plain_branch(branch: nn.Module) -> tuple[PlainBranch, Tree] | None:
    """What is known of a branch, all of whose layers are plain and hold nothing more; None of any other."""
    known = _known.get(branch)
    if known is not None and (tree := known.tree(branch)) is not None:
        return known, tree
    modules = tree_of(branch)
    if not are_plain(modules) or hold_more(modules):
        return None
    known = PlainBranch(modules)
    tree = known.tree(branch)
    if tree is None:  # without the extension, or with something unheard of in a registry's place
        return None
    _known[branch] = known
    return known, tree


class PlainBranch:
    """Of a branch, which this does not hold, nor its layers and tensors: it is there for as long as the branch is.

    Attributes:
        flags: whether each module is in training mode.
        stateful: the numbers of the modules with buffers.
        turn: the right to run them.
    """

    __slots__ = ("_kinds", "_rows", "_structure", "flags", "stateful", "turn")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.flags = [module.training for module in modules]
        self.stateful = [number for number, module in enumerate(modules) if module._buffers]
        self.turn = turn_of([modules[number] for number in self.stateful])
        self._structure = Structure(modules).of([])
        self._kinds = set(map(type, modules))
        self._rows = list(map(_row_of, modules))

    def tree(self, branch: nn.Module) -> Tree | None:
        """The branch as it is now; None if it is not what it was, or no longer plain."""
        tree: Tree | None = native.module_tree(branch, self._rows)
        return tree if unpatched(self._kinds) else None

    def structure(self, tree: Tree) -> Structure:
        """That of the branch when it was this tree."""
        registered, at = [], 0
        for _, hung, asked in self._rows:
            names = hung[asked.index(_MODULES)]
            registered.append(dict(zip(names, tree[1][at : at + len(names)], strict=True)))
            at += len(names)
        return self._structure.of(registered)


def _row_of(module: nn.Module) -> tuple[type, tuple[Any, ...], bytes]:
    """Its class; what hangs on it, or what is known of that; and what is to be asked of each of these."""
    table = module.__dict__.copy()
    asked = bytes(_ASKED.get(name, _SAME if _is_value(held) else _CLASS) for name, held in table.items())
    return type(module), tuple(map(_known_of, table.values(), asked)), asked


def _known_of(held: Any, ask: int) -> Any:
    if ask == _EMPTY:
        return None
    if ask == _CLASS:
        return type(held)
    return held if ask == _SAME else tuple(held)


def _is_value(held: Any) -> bool:
    """Whether it is like a number, and refers to nothing: what may refer to the branch must not be held here."""
    if type(held) is tuple:
        return all(map(_is_value, held))
    return not gc.is_tracked(held) and (type(held) is str or not hasattr(held, "__len__"))
