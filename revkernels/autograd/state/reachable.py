# SPDX-License-Identifier: Apache-2.0
"""Finds the modules, tensors and generators that a callable or a module reaches without registering them, as far as
they are visible."""

from __future__ import annotations

import collections
import dis
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from revkernels.autograd.state.other_generators import KINDS, OtherGenerator, as_torchs, shared_by

__all__ = [
    "FUNCTIONS",
    "LISTS",
    "WITH_FUNCTIONS",
    "Reached",
    "behind",
    "beside",
    "drawn_from",
    "is_layers",
    "named",
    "own_names",
    "written_by_torch",
]

_DEPTH = 3  # nesting depth of containers to search: one may hold itself
_MANY = 1024  # items to search per branch, which is done in every forward; longer containers are data
_BEGINNING = 16  # items after which a container without a find is data
#: The names that every module's ``__dict__`` has, in order.
_STANDARD = list(nn.Module().__dict__)
_SIMPLE = frozenset((int, float, bool, str, type(None), torch.dtype, torch.Size, torch.device))
_CONTAINERS = (list, tuple, dict, collections.OrderedDict, collections.defaultdict)  # others may do anything
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)

#: For a branch, the modules that it holds and that contain it.
_around: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


class Reached:
    """The modules, tensors and generators found.

    Attributes:
        modules: with all that they contain, and hold in turn.
        tensors: each with a name.
        generators: random generators, those of other kinds with the methods of torch's.
    """

    def __init__(self, within: Sequence[nn.Module] = ()) -> None:
        self.modules: dict[nn.Module, None] = {}
        self._tensors: dict[int, tuple[str, torch.Tensor]] = {}
        self._generators: dict[int, Any] = {}
        self._within, self._branch = frozenset(within), within[0] if within else None  # known already
        self._seen: set[int] = set()
        self._waiting: list[Any] = []
        self._left = _MANY

    @property
    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        return list(self._tensors.values())

    @property
    def generators(self) -> list[Any]:
        return list(self._generators.values())

    def look(self, name: str, held: Any, objects: bool = False, depth: int = _DEPTH) -> bool:
        """Record what is in ``held``; with ``objects``, also modules among other objects' attributes. Returns whether
        there is anything relevant: a long container whose first items have nothing is data."""
        kind = type(held)  # not __class__: a weak proxy's is its target's
        if kind in _CONTAINERS:
            return self._look_into(name, held, objects, depth - 1) if depth and len(held) <= _MANY else False
        if issubclass(kind, nn.Module):
            self.take(held)
        elif issubclass(kind, torch.Tensor):
            self._tensors.setdefault(id(held), (name, held))
        elif issubclass(kind, torch.Generator | OtherGenerator):
            self._generators.setdefault(id(held), held)
        elif kind in KINDS:
            self._generators.setdefault(id(held), as_torchs(held))
        elif issubclass(kind, FUNCTIONS) or (callable(held) and not issubclass(kind, _UNSEEN)):
            if id(held) not in self._seen and not _is_torchs(held):
                self._seen.add(id(held))
                self._waiting.append(held)
        else:
            for value in _attributes(held).values() if objects else ():
                self._take_modules(value, _DEPTH)
            return objects
        return True

    def _take_modules(self, value: Any, depth: int) -> None:
        if issubclass(type(value), nn.Module):
            self.take(value)
        elif type(value) in _CONTAINERS and depth and len(value) <= _MANY:
            for item in list(value.values() if isinstance(value, dict) else value):
                self._take_modules(item, depth - 1)

    def _look_into(self, name: str, container: Any, objects: bool, depth: int) -> bool:
        found = False
        for place, item in enumerate(list(container.values() if isinstance(container, dict) else container)):
            self._left -= 1
            if self._left < 0 or (place >= _BEGINNING and not found):
                break
            if type(item) not in _SIMPLE:
                found = self.look(name, item, objects, depth) or found
        return found

    def take(self, module: nn.Module) -> None:
        """Record the module and all its submodules."""
        if module in self.modules or module in self._within or _contains(module, self._branch):
            return
        new = [found for found in module.modules() if found not in self.modules]
        self.modules.update(dict.fromkeys(new))
        for found in new:
            self.attributes(found)

    def attributes(self, module: nn.Module) -> None:
        """Search what the module holds besides parameters, buffers and registered modules."""
        kind: Any = type(module)
        own = module.__dict__
        torchs, names = _about(getattr(kind, "forward", None))
        torchs = torchs and "forward" not in own
        if torchs and not is_layers(getattr(kind, "forward", None)):
            return  # its forward reads only what is registered; a layer's attributes may be read by other code
        if not torchs and names is not None:
            for name in names.globals:
                value = kind.forward.__globals__.get(name)
                if issubclass(type(value), nn.Module | torch.Generator) or type(value) in KINDS:
                    self.look(name, value)
        for name in own_names(own):
            value = own.get(name)
            if (
                type(value) not in _SIMPLE
                and not issubclass(type(value), torch.Tensor)
                and not (torchs and name in LISTS)
            ):
                self.look(name, value)

    def follow(self) -> Reached:
        """Search what the callables found so far reach."""
        while self._waiting:
            function = self._waiting.pop()
            for name, held in _held_by(function):
                self.look(name, held, objects=True)
        return self


#: torch's own layers that take a function, and hold it.
WITH_FUNCTIONS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
#: Lists that convolutions and recurrent layers create themselves.
LISTS = frozenset(
    ("_reversed_padding_repeated_twice", "_flat_weights", "_flat_weight_refs", "_flat_weights_names", "_all_weights")
)
_UNSEEN = (type, types.ModuleType, types.BuiltinFunctionType, *weakref.ProxyTypes)


def behind(function: Callable[..., Any]) -> Reached:
    """Return what a callable is bound to, closes over, defaults to, holds or names.

    Searched are partials, other callables found on the way, short lists, tuples and dictionaries, and, of the globals
    that its code names, modules, tensors, generators and functions of the same file; of other objects, such as the one
    that a method is bound to, the modules among their attributes.
    """
    reached = Reached()
    reached._seen.add(id(function))
    reached._waiting.append(function)
    return reached.follow()


def beside(modules: Sequence[nn.Module], within: Sequence[nn.Module] | None = None) -> Reached:
    """Return what the modules hold in lists, tuples, dictionaries and callables, or in attributes that are not
    registered, and the modules and generators among the globals that their ``forward`` names.

    Excluded are the modules ``within``, of which ``modules`` are all or a part, and modules that contain the first of
    them: a branch may hold the whole model."""
    reached = Reached(modules if within is None else within)
    for module in modules:
        reached.attributes(module)
    return reached.follow() if reached._waiting else reached


def _contains(module: nn.Module, branch: nn.Module | None) -> bool:
    if branch is None:
        return False
    known = _around.get(branch)
    if known is not None and module in known:
        return True
    if not any(found is branch for found in module.modules()):
        return False
    _around.setdefault(branch, weakref.WeakSet()).add(module)
    return True


def _is_torchs(function: Any) -> bool:
    """Whether it is a function of torch's own, such as functional.relu or a layer's forward.

    Not a wrapper of one, which copies its names, nor a function that torch wraps.
    """
    if not issubclass(type(function), types.FunctionType):
        return False
    return all(str(name).startswith("torch.") for name in (function.__module__, function.__globals__.get("__name__")))


def is_layers(forward: Any) -> bool:
    """Whether a forward belongs to one of torch's own layers."""
    return written_by_torch(forward, "torch.nn.modules.")


def written_by_torch(forward: Any, where: str = "torch.") -> bool:
    """Whether a forward is torch's own. Uses its globals: a wrapper copies __module__."""
    written_in: str = getattr(forward, "__globals__", {}).get("__name__", "")
    return written_in.startswith(where)


def _attributes(item: Any) -> dict[str, Any]:
    try:
        return dict(object.__getattribute__(item, "__dict__"))
    except (AttributeError, TypeError):
        return {}


def _held_by(function: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(function, functools.partial):
        yield from (("", function.func), ("", function.args), *function.keywords.items())
        return
    if isinstance(function, types.MethodType):
        if not isinstance(function.__self__, type | types.ModuleType):
            yield "__self__", function.__self__
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        yield from _attributes(function).items()
        return
    if _is_torchs(function):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable not assigned yet
            continue
    yield from (("a default", value) for value in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    yield from (("a generator", shared) for shared in drawn_from(function))
    for name in named(function).globals:
        value: Any = function.__globals__.get(name)
        if (
            issubclass(type(value), nn.Module | torch.Tensor | torch.Generator)
            or type(value) in KINDS
            or (issubclass(type(value), types.FunctionType) and value.__globals__ is function.__globals__)
        ):
            yield name, value


def drawn_from(function: types.FunctionType) -> set[OtherGenerator]:
    """Which of the generators behind the functions of ``random`` and ``numpy.random`` its code may draw from."""
    names, here = named(function), function.__globals__
    values = (*map(here.get, names.globals), *map(sys.modules.get, names.imported))
    return {shared for value in values if (shared := shared_by(value, names.all)) is not None}


class _Names:
    """The names in a function's code and in functions nested in it; which of them are globals, and which modules it
    imports."""

    def __init__(self, codes: Sequence[types.CodeType]) -> None:
        self.all = frozenset(name for code in codes for name in code.co_names)
        steps = [step for code in codes for step in dis.get_instructions(code)]
        self.globals = tuple(
            dict.fromkeys(step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
        )
        self.imported = tuple({step.argval for step in steps if step.opname == "IMPORT_NAME"})


_forwards: weakref.WeakKeyDictionary[types.FunctionType, tuple[bool, _Names]] = weakref.WeakKeyDictionary()


def _about(forward: Any) -> tuple[bool, _Names | None]:
    """Whether a class's forward is torch's own (or there is none), and the names in it."""
    if not isinstance(forward, types.FunctionType):
        return forward is None, None
    found = _forwards.get(forward)  # weak: it may close over the network
    if found is None:
        found = _forwards[forward] = _is_torchs(forward), named(forward)
    return found


def own_names(table: dict[str, Any]) -> list[str]:
    """The names in a module's ``__dict__`` that not every module has. (A new list: another thread may add names.)"""
    names = list(table)
    if names[: len(_STANDARD)] == _STANDARD:  # unless some were set before `nn.Module.__init__`
        return names[len(_STANDARD) :]
    return [name for name in names if name not in _STANDARD]


def named(function: Any) -> _Names:
    """The names in its code."""
    code = getattr(function, "__code__", None)
    return _NONE if code is None else _names_in(code)


@functools.lru_cache(1024)
def _names_in(code: types.CodeType) -> _Names:
    found = [code]
    for one in found:
        found += [constant for constant in one.co_consts if isinstance(constant, types.CodeType)]
    return _Names(found)


_NONE = _Names(())
