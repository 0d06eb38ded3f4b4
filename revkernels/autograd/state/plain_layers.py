# SPDX-License-Identifier: Apache-2.0
"""Plain layers: known to reach nothing but what they have registered.

Searching what a branch holds and reads besides (`revkernels.autograd.state.reachable`) takes longer than a small layer
runs. torch's own layers, this package's and those that a user declares `stateless` need no search, unless one of them
has been given a tensor attribute, a function or a hook, or the methods through which their class is called have been
replaced.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from revkernels.autograd.fused.known_layers import has_global_hooks, has_hooks
from revkernels.autograd.ownership import PLAIN
from revkernels.autograd.state.attributes import CONTAINERS
from revkernels.autograd.state.reachable import FUNCTIONS, LISTS, WITH_FUNCTIONS, is_layers, own_names
from revkernels.autograd.state.rewinding import is_state

__all__ = ["Options", "are_declared", "has_options", "is_plain", "options_of", "plain", "stateless", "unpatched"]

Kind = TypeVar("Kind", bound=type)

#: The plain classes, each with the methods that call its modules.
_known: dict[type, tuple[Any, Any]] = {}
#: Those of them that are the user's: `stateless`.
_declared: set[Any] = set()
_call_impl = nn.Module._call_impl


def plain(kind: Kind) -> Kind:
    """Class decorator: declares that the modules read only what they have registered and numbers, and set nothing on
    themselves."""
    _known[kind] = kind.forward, kind.__call__  # type: ignore[attr-defined]
    return kind


def stateless(kind: Kind) -> Kind:
    """Class decorator: declares that modules of this class keep no state of their own, so that a chain need not search
    for it in every half-step.

        @stateless
        class Branch(nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.norm, self.conv = NormAct(nn.BatchNorm2d(channels), nn.ReLU()), nn.Conv2d(channels, channels, 1)

            def forward(self, x):
                return self.conv(self.norm(x))

    ``forward`` must compute its result from its arguments, the module's own parameters, buffers and submodules, and
    numbers or strings in its attributes, and must set no attribute. It may draw from torch's default generators, and
    write buffers by ordinary in-place operations. Everything that is registered is watched and rewound as ever:
    parameters, buffers, modes, random numbers, hooks. So are modules inside whose class is neither declared nor torch's
    own. The declaration holds for this class, not for those derived from it, and not for a module that has a tensor, a
    list, a dictionary or a function for an attribute: that one is searched as before. The first three recomputes of a
    branch are still compared with its forwards; what is wrong with a declaration and not found by these gives wrong
    gradients.

    Args:
        kind: a class derived from `torch.nn.Module` with a ``forward``. It is kept for the life of the process.

    Returns:
        The class.

    Raises:
        TypeError: ``kind`` is something else, such as a module.
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        what = f"the class {kind.__name__}" if isinstance(kind, type) else f"an object of type {type(kind).__name__}"
        raise TypeError(f"stateless is given {what}; it decorates a class derived from torch.nn.Module")
    if kind.forward is nn.Module.forward:
        raise TypeError(f"stateless is given {kind.__name__}, which has no forward to declare anything of")
    _declared.add(kind)
    return plain(kind)


def are_declared(kinds: Iterable[type]) -> bool:
    """Whether one of these classes is the user's, declared `stateless`."""
    return not _declared.isdisjoint(kinds)


def is_plain(module: nn.Module) -> bool:
    """Whether it is of a plain class whose methods have not changed, has no hooks, and no attribute is a tensor (as in
    a parameter's place), a function (as in a method's place), or an object in which the code of a parent module may
    store what it reads in its next call."""
    kind, table = type(module), module.__dict__
    if kind not in _known or "forward" in table or has_hooks(module) or not unpatched((kind,)):
        return False
    if not _MORE.isdisjoint(map(type, list(table.values()))):
        return False
    return not any(_may_keep(table.get(name)) for name in own_names(table) if name not in LISTS)


def _may_keep(value: Any) -> bool:
    """Whether it is a container other than a tuple of numbers, a generator, a module or other callable, or a tensor of
    a custom class."""
    kind = type(value)
    if kind is tuple:
        return is_state(value) or any(map(_may_keep, value))
    return kind in CONTAINERS or issubclass(kind, torch.Generator | torch.Tensor) or callable(value)


def unpatched(kinds: Iterable[Any]) -> bool:
    """Whether plain classes are called through their original methods, and there are no global hooks."""
    for kind in kinds:
        forward, call = _known[kind]
        if kind.forward is not forward or kind.__call__ is not call:
            return False
    return nn.Module._call_impl is _call_impl and not has_global_hooks()


class Options(NamedTuple):
    """The names of a class's options, such as ``p`` of a dropout, and a function that reads a ``__dict__``'s values."""

    names: tuple[str, ...]
    read: Callable[[dict[str, Any]], tuple[Any, ...]]


def options_of(module: nn.Module) -> tuple[Options | None, tuple[Any, ...] | None]:
    """The options of a layer of a plain class, and their current values."""
    kind, table = type(module), module.__dict__
    options = _options.get(kind)
    if options is None:
        if kind not in _known:
            return None, None
        options = _options[kind] = _options_named(name for name in own_names(table) if type(table[name]) in _OPTIONS)
    try:
        return options, options.read(table)
    except KeyError:  # the first module had additional attributes
        options = _options[kind] = _options_named(name for name in options.names if name in table)
        return options, options.read(table)


def has_options(module: nn.Module) -> bool:
    """Whether it is of a plain class, even if it `is_plain` no longer."""
    return type(module) in _known


def _options_named(names: Iterable[str]) -> Options:
    names = tuple(names)
    return Options(names, _reader(names))


def _reader(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    if len(names) > 1:
        return operator.itemgetter(*names)  # one call, since every half-step does this for every layer
    return lambda table: tuple([table[name] for name in names])


_options: dict[type, Options] = {}  # for each class, those that all of its modules so far have
_OPTIONS = frozenset((int, float, bool, str, tuple, type(None)))
_MORE = frozenset((*PLAIN, *FUNCTIONS, types.BuiltinFunctionType))


def _is_torchs(kind: Any) -> bool:
    if not isinstance(kind, type) or not issubclass(kind, nn.Module) or kind in WITH_FUNCTIONS:
        return False
    return is_layers(kind.forward)


for _kind in filter(_is_torchs, list(vars(nn.modules).values())):
    plain(_kind)
