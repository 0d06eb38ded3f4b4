# SPDX-License-Identifier: Apache-2.0
"""The structure of a branch: its modules' classes, submodules, options and hooks. They are restored for the recompute,
since gradients of stored activations would be those of the forward's structure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as _torch_module
from torch.nn.modules.lazy import LazyModuleMixin

from revkernels.autograd.fused.known_layers import has_global_hooks, has_hooks
from revkernels.autograd.state.plain_layers import Options, options_of
from revkernels.autograd.state.rewinding import MISSING, Undo
from revkernels.errors import ReconstructionError

__all__ = ["Hooks", "Structure", "tree_of"]

_NONE: dict[str, Any] = {}


def tree_of(module: nn.Module) -> list[nn.Module]:
    """``list(module.modules())``, in any order except that the module comes first: each once."""
    found = [module]
    if module._modules:
        seen = {module}
        for parent in found:
            for child in parent._modules.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child)
    return found


class Structure:
    """The class of each of ``modules``, the modules and parameters registered in it as its forward left them, and the
    options of known layers.

    Attributes of other classes are not included: a branch may count there, or store what its recompute reads.
    """

    __slots__ = ("_children", "_kinds", "_names", "_options")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._kinds = list(map(type, modules))
        self._names = [(*module._parameters.keys(),) for module in modules]
        self._children = [_children_of(module) for module in modules]
        self._options = [options_of(module) for module in modules]

    def options(self) -> Iterator[Any]:
        """The values of all options."""
        return itertools.chain.from_iterable(values for _, values in self._options if values)

    def of(self, kinds: list[type], children: list[dict[str, Any]]) -> Structure:
        """The same names and options, for modules of these classes with these submodules."""
        made = object.__new__(Structure)
        made._kinds, made._names, made._options, made._children = kinds, self._names, self._options, children
        return made

    def hang(self, modules: Sequence[nn.Module], undo: Undo) -> None:
        """Restore this structure in the same modules."""
        own = zip(self._kinds, self._names, self._children, self._options, strict=True)
        for module, (kind, names, children, (options, values)) in zip(modules, own, strict=False):
            if type(module) is not kind:  # a parametrization changes the class
                undo.append((module, "__class__", type(module)))
                module.__class__ = kind
            if (*module._parameters.keys(),) != names:
                _take_away(module, names, children, undo)
            slots = module._modules
            if slots != children and isinstance(slots, dict):
                _hang_all(slots, children, undo)
            if options is not None and _values_of(options, module) != values:
                _set_all(module.__dict__, options.names, values, undo)  # type: ignore[arg-type]


class Hooks:
    """The hooks of ``modules`` before their forward, and the global hooks on all modules: a hook may remove itself, or
    be removed after the forward."""

    __slots__ = ("_everywhere", "_hooks", "lazy")

    def __init__(self, modules: Sequence[nn.Module] | None = None) -> None:
        """Without ``modules``: no hooks, and no global ones."""
        self._hooks = None if modules is None else [_hooks_of(m) for m in modules]
        everywhere = modules is not None and has_global_hooks()
        self._everywhere = [dict(table) for table in _global_tables()] if everywhere else None
        #: Whether the forward initializes parameters: torch's lazy modules have a hook for that.
        self.lazy = any(isinstance(m, LazyModuleMixin) for m in modules or ())

    def hang(self, modules: Sequence[nn.Module], undo: Undo) -> None:
        """Restore exactly these hooks on the same modules.

        Global hooks are shared by all threads: a forward in another thread sees them meanwhile too.
        """
        if self._everywhere is not None or has_global_hooks():
            for now, then in zip(_global_tables(), self._everywhere or itertools.repeat(_NONE)):  # noqa: B905, as below
                if now != then:
                    _hang_all(now, then, undo)
        for module, hooks in zip(modules, self._hooks or itertools.repeat(None)):  # noqa: B905, as many or endless
            if hooks is None and not has_hooks(module):
                continue
            for kind, then in zip(_KINDS, _NO_HOOKS if hooks is None else hooks, strict=False):
                now = getattr(module, kind)
                if now != then:
                    _hang_all(now, then, undo)


_KINDS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),  # they make views in the forward, which may not be written in place
)


_NO_HOOKS = (_NONE,) * len(_KINDS)


def _global_tables() -> list[dict[Any, Any]]:
    """Torch's tables of global hooks, in the order of `_KINDS`; a torch version may lack some."""
    tables = [getattr(_torch_module, f"_global{kind}", None) for kind in _KINDS]
    return [table for table in tables if table is not None]


def _hooks_of(module: nn.Module) -> tuple[dict[Any, Any], ...] | None:
    if not has_hooks(module):
        return None
    hooks = tuple([dict(getattr(module, kind)) for kind in _KINDS])
    own = getattr(module, "_initialize_hook", None) if isinstance(module, LazyModuleMixin) else None
    if own is not None:  # removed when the module changes its class
        for table in hooks:
            table.pop(own.id, None)
    return hooks


def _hang_all(slots: dict[Any, Any], things: dict[Any, Any], undo: Undo) -> None:
    """Replace all entries. Entries are removed and inserted anew, also in the undo, to restore their order: that of
    hooks, of a Sequential's layers and of parameters in optimizers matters."""
    undo += [(slots, name, thing) for name, thing in reversed(slots.items())]
    undo += [(slots, name, MISSING) for name in things]
    slots.clear()
    slots.update(things)


def _take_away(module: nn.Module, names: Sequence[str], children: dict[str, Any], undo: Undo) -> None:
    """Remove parameters added since the forward, which may have had a plain attribute or a computed tensor instead.
    Those with attributes are sharded now, and stay."""
    slots = module._parameters
    added = [name for name, now in slots.items() if name not in names and not getattr(now, "__dict__", None)]
    if not added:
        return
    if "parametrizations" in children:
        raise ReconstructionError(
            f"the parametrization of {added[-1]} in a {type(module).__name__} was removed between the forward and the "
            f"backward, so the branch cannot be recomputed as it was; do that after the backward"
        )
    _hang_all(slots, {name: now for name, now in slots.items() if name not in added}, undo)


def _set_all(table: dict[str, Any], names: Sequence[str], values: Sequence[Any], undo: Undo) -> None:
    for name, value in zip(names, values, strict=True):
        now = table.get(name, MISSING)
        if now is not value and now != value:
            undo.append((table, name, now))
            table[name] = value


def _children_of(module: nn.Module) -> dict[str, Any]:
    children = module._modules
    return dict(children) if children and isinstance(children, dict) else _NONE  # a scripted module has no dictionary


def _values_of(options: Options, module: nn.Module) -> tuple[Any, ...] | None:
    """None if an option was deleted."""
    try:
        return options.read(module.__dict__)
    except KeyError:
        return None
