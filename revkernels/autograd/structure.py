# SPDX-License-Identifier: Apache-2.0
"""What a branch is made of besides tensors: the layers in its modules, their options, and the forward hooks on them. It
is run again with those of the forward, as stored activations are differentiated through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from revkernels.autograd.plain_layers import options_of
from revkernels.autograd.rewinding import MISSING, Undo

__all__ = ["Hooks", "Structure"]

_NONE: dict[str, Any] = {}


class Structure:
    """The modules registered in each of ``modules`` as its forward left them, and the options of layers that are known.

    Attributes of other classes are not looked at: a branch may keep a count there, or what its second run is to read.
    """

    __slots__ = ("_modules", "_parts")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._parts = [(_children(module), options_of(module)) for module in modules]

    def hang(self, undo: Undo) -> None:
        """Let the modules be made of these again."""
        for module, (children, (names, values)) in zip(self._modules, self._parts, strict=False):
            slots, table = module._modules, module.__dict__
            if slots != children and isinstance(slots, dict):
                _hang_all(slots, children, undo)
            for name, value in zip(names, values, strict=True):
                now = table.get(name, MISSING)
                if now is not value and now != value:
                    undo.append((table, name, now))
                    table[name] = value


class Hooks:
    """The forward hooks of ``modules`` before their forward, for one may take itself off, or be taken off behind it."""

    __slots__ = ("_hooks", "_modules")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # A lazy one takes off its own as it becomes another class.
        self._modules = [module for module in modules if not isinstance(module, LazyModuleMixin)]
        self._hooks = [
            tuple([dict(getattr(module, kind)) for kind in _KINDS]) if _has_hooks(module) else None
            for module in self._modules
        ]

    def hang(self, undo: Undo) -> None:
        """Let the modules have these again, and no others."""
        for module, hooks in zip(self._modules, self._hooks, strict=True):
            if hooks is None and not _has_hooks(module):
                continue
            for kind, then in zip(_KINDS, hooks or (_NONE,) * len(_KINDS), strict=True):
                now = getattr(module, kind)
                if now != then:
                    _hang_all(now, then, undo)


_KINDS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _hang_all(slots: dict[Any, Any], things: dict[Any, Any], undo: Undo) -> None:
    """Put these there and nothing else. Out and in again, also to undo it: hooks and a Sequential's layers run in their
    order."""
    undo += [(slots, name, thing) for name, thing in reversed(slots.items())]
    undo += [(slots, name, MISSING) for name in things]
    slots.clear()
    slots.update(things)


def _children(module: nn.Module) -> dict[str, Any]:
    children = module._modules
    return dict(children) if children and isinstance(children, dict) else _NONE  # a scripted module's is no dictionary
