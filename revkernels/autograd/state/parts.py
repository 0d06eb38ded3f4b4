# SPDX-License-Identifier: Apache-2.0
"""What a branch is made of, and what it reaches besides, as found before each of its forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from revkernels.autograd.state.bytecode import reads_running
from revkernels.autograd.state.known_branch import KnownBranch, Tree, known_branch
from revkernels.autograd.state.locks import turn_of
from revkernels.autograd.state.own_state import OwnState
from revkernels.autograd.state.reachable import Reached, behind, beside
from revkernels.autograd.state.rewinding import NONE
from revkernels.autograd.state.structure import tree_of
from revkernels.errors import ReconstructionError

__all__ = ["Parts", "is_scripted"]


class Parts:
    """The modules of a branch, and what there is to know of them.

    Args:
        given: the branch's arguments, for the modules among them.

    Attributes:
        modules: all of them, itself first if it is one.
        registered: behind so many come modules that the branch holds without having registered them, and may not run.
        known: what is known of it; None where it is looked through anew.
        tree: of a known one, what it is made of.
        kinds: of a known one, the classes of its modules that are not plain layers.
        own: what its modules have on themselves; None if all are plain layers, which have nothing.
        generators: that it reaches.
        held: tensors that it reaches or has on itself and that are no parameters or buffers, by name.
        reads_running: whether its code may look at running statistics, which are then rewound like other buffers.
        turn: the right to run it.
    """

    __slots__ = (
        *("branch", "generators", "held", "kinds", "known", "modules", "own", "reads_running", "registered"),
        *("tree", "turn"),
    )

    def __init__(self, branch: Any, given: Sequence[Any] = ()) -> None:
        self.branch = branch
        self.held: list[tuple[str, torch.Tensor]] = []
        self.generators: list[torch.Generator] = []
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
        self.reads_running = False
        self.turn: Any = None if self.known is None else self.known.turn(self.modules)
        if self.known is None or code:
            self._look_into(self.modules if self.known is None else code)

    def _look_beside(self, modules: Sequence[nn.Module]) -> list[nn.Module]:
        """Note what the branch reaches, of which these modules are all or those that are worth a look. Returns modules
        that it has not registered."""
        reached = beside(modules, self.modules) if self.modules else behind(self.branch)
        self.held += reached.tensors
        self.generators = reached.generators
        return [module for module in reached.modules if not is_scripted(module)]

    def _look_into(self, modules: Sequence[nn.Module]) -> None:
        """Likewise what is on these."""
        self.own = OwnState(self.branch, modules)
        for module in modules:
            if is_scripted(module) and next(iter(module._buffers.items()), None) is not None:
                raise ReconstructionError(
                    f"{type(self.branch).__name__} holds a {type(module).__name__}, whose buffers cannot be put back to"
                    f" run it again: set activations='store', or give the module that it was made of"
                )
        stateful = [module for module in self.modules if module._buffers]
        self.reads_running = bool(stateful) and reads_running(self.branch, modules[: self.registered])
        if self.own.holders:
            stateful = list({*stateful, *self.own.holders})
        if self.known is None or self.own.holders:
            self.turn = turn_of(stateful)

    def look_again(self) -> None:
        """In its turn: before that, another thread's recompute may have had it as that one's forward had found it."""
        known = self.known
        if known is not None and (known.stateful or (self.own and self.own.holders)) and not self.is_same():
            self.known, self.modules = None, tree_of(self.branch)
            self.registered, self.own = len(self.modules), OwnState(self.branch, self.modules)

    def stateful(self) -> list[nn.Module]:
        """Its modules with buffers, but for those that it may not run."""
        if self.known is not None:
            return [self.modules[number] for number in self.known.stateful]
        return [module for module in self.modules[: self.registered] if module._buffers]

    def is_same(self) -> bool:
        """Whether it is a known branch, and its modules and what is registered in them what they were."""
        return self.known is not None and self.known.is_tree(self.branch, self.tree)  # type: ignore[arg-type]

    def looked_at(self, is_same: bool) -> Sequence[nn.Module]:
        """Its modules, but for plain layers that `is_same` has seen."""
        if not is_same:
            return self.modules
        return NONE if self.own is None else self.own.modules


def is_scripted(module: nn.Module) -> bool:
    """Whether torch.jit has made it, so that its tables are no dictionaries."""
    return isinstance(module, torch.jit.ScriptModule)
