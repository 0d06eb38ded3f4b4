# SPDX-License-Identifier: Apache-2.0
"""The modules, tensors and generators that a branch consists of or reaches, found before each of its forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from revkernels.autograd.state.bytecode import draws_elsewhere, reads_running
from revkernels.autograd.state.known_branch import KnownBranch, Tree, known_branch
from revkernels.autograd.state.locks import turn_of
from revkernels.autograd.state.own_state import OwnState
from revkernels.autograd.state.reachable import Reached, behind, beside
from revkernels.autograd.state.rewinding import NONE
from revkernels.autograd.state.structure import tree_of
from revkernels.errors import ReconstructionError

__all__ = ["Parts", "is_scripted"]


class Parts:
    """The modules of a branch, and what is known of them.

    Args:
        given: the branch's arguments, whose modules are included.

    Attributes:
        modules: all of them, the branch first if it is a module.
        registered: how many are registered; later ones are only held by the branch, which may not run them.
        known: the cached `KnownBranch`; None if the branch is inspected anew.
        tree: of a known branch, its modules and what is registered in them.
        kinds: of a known branch, the classes of its modules that are not plain layers.
        own: the state in its modules' attributes; None if all are plain layers, which have none.
        generators: random generators that it reaches, Python's and NumPy's included.
        held: tensors that it reaches or has as attributes, other than parameters and buffers, by name.
        reads_running: whether its code may read running statistics, which are then rewound like other buffers.
        scripted: whether some of its modules were created by torch.jit.
        turn: the lock to hold while it runs.
    """

    __slots__ = (
        *("branch", "generators", "held", "kinds", "known", "modules", "own", "reads_running", "registered"),
        *("scripted", "tree", "turn"),
    )

    def __init__(self, branch: Any, given: Sequence[Any] = ()) -> None:
        self.branch = branch
        self.held: list[tuple[str, torch.Tensor]] = []
        self.generators: list[Any] = []
        self.known: KnownBranch | None = None
        self.tree: Tree | None = None
        self.kinds: Sequence[type] = NONE
        found = known_branch(branch) if isinstance(branch, nn.Module) else None
        if found is not None:
            self.known, self.tree = found
            self.modules = self.tree[0]
            code = [self.modules[number] for number in self.known.others]
            self.kinds = (*map(type, code),)
        else:
            self.modules = code = tree_of(branch) if isinstance(branch, nn.Module) else []
        hidden = self._look_beside(code) if code or not self.modules else []
        if given:
            among = Reached(self.modules)
            among.look("an argument", list(given))
            self.generators += among.follow().generators
            if among.modules:
                self.known, self.modules = None, [*self.modules, *among.modules]
        self.registered = len(self.modules)
        if hidden:
            self.known, self.modules = None, list(dict.fromkeys((*self.modules, *hidden)))
        if not isinstance(branch, nn.Module):
            self.registered = len(self.modules)
        self.own: OwnState | None = None
        self.reads_running = self.scripted = False
        self.turn: Any = None if self.known is None else self.known.turn(self.modules)
        if self.known is None or code:
            self._look_into(self.modules if self.known is None else code)

    def _look_beside(self, modules: Sequence[nn.Module]) -> list[nn.Module]:
        """Record what the branch reaches. ``modules``: all of its modules, or those that need a look. Returns the
        modules that it has not registered."""
        reached = beside(modules, self.modules) if self.modules else behind(self.branch)
        self.held += reached.tensors
        self.generators = reached.generators
        return [module for module in reached.modules if not is_scripted(module)]

    def _look_into(self, modules: Sequence[nn.Module]) -> None:
        """Record the state of these modules."""
        self.own = OwnState(self.branch, modules)
        for module in modules:
            if not is_scripted(module):
                continue
            self.scripted = True
            if next(iter(module._buffers.items()), None) is not None:
                raise ReconstructionError(
                    f"{type(self.branch).__name__} holds a {type(module).__name__}, whose buffers cannot be put back to"
                    f" recompute it: set activations='store', or give the module that it was made of"
                )
        stateful = [module for module in self.modules if module._buffers]
        code = modules[: self.registered]
        self.reads_running = bool(stateful) and reads_running(self.branch, code)
        if others := draws_elsewhere(self.branch, code):
            self.generators = [*dict.fromkeys((*self.generators, *others))]
        if self.own.holders:
            stateful = list({*stateful, *self.own.holders})
        if self.known is None or self.own.holders:
            self.turn = turn_of(stateful)

    def look_again(self) -> None:
        """Inspect again, with `turn` held: until then another thread's recompute may have changed the modules."""
        known = self.known
        if known is not None and (known.stateful or (self.own and self.own.holders)) and not self.is_same():
            self.known, self.modules = None, tree_of(self.branch)
            self.registered, self.own = len(self.modules), OwnState(self.branch, self.modules)

    def stateful(self) -> list[nn.Module]:
        """Its modules with buffers, without those that it may not run."""
        if self.known is not None:
            return [self.modules[number] for number in self.known.stateful]
        return [module for module in self.modules[: self.registered] if module._buffers]

    def has_code(self) -> bool:
        """Whether code runs in it that is neither torch's nor this package's."""
        return self.own is not None or (self.known is not None and self.known.declared)

    def is_same(self) -> bool:
        """Whether it is a known branch whose modules and registered tensors have not changed."""
        return self.known is not None and self.known.is_tree(self.branch, self.tree)  # type: ignore[arg-type]

    def looked_at(self, is_same: bool) -> Sequence[nn.Module]:
        """Its modules, without the plain layers that `is_same` has checked."""
        if not is_same:
            return self.modules
        return NONE if self.own is None else self.own.modules


def is_scripted(module: nn.Module) -> bool:
    """Whether torch.jit created it: its tables are not dictionaries."""
    return isinstance(module, torch.jit.ScriptModule)
