# SPDX-License-Identifier: Apache-2.0
"""What a branch is made of besides tensors: the layers in its modules, and their options. It is run again on those of
the forward, as stored activations are differentiated through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from revkernels.autograd.plain_layers import options_of
from revkernels.autograd.rewinding import MISSING, Undo

__all__ = ["Structure"]

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
                # Taken out and put in again, also to undo it: their order is that of a Sequential's layers.
                undo += [(slots, name, child) for name, child in reversed(slots.items())]
                undo += [(slots, name, MISSING) for name in children]
                slots.clear()
                slots.update(children)
            for name, value in zip(names, values, strict=True):
                now = table.get(name, MISSING)
                if now is not value and now != value:
                    undo.append((table, name, now))
                    table[name] = value


def _children(module: nn.Module) -> dict[str, Any]:
    children = module._modules
    return dict(children) if children and isinstance(children, dict) else _NONE  # a scripted module's is no dictionary
