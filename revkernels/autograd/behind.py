# SPDX-License-Identifier: Apache-2.0
"""What a callable, or a module, reaches without having registered it: modules, tensors and generators, as far as that
shows."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["STANDARD", "Reached", "behind", "beside", "items"]

_DEPTH = 3  # containers in containers that are looked into: one may hold itself
_MANY = 1024  # items of one: a function is looked through in every forward, and what is longer is data
#: What every module's ``__dict__`` has.
STANDARD = frozenset(nn.Module().__dict__)
_SIMPLE = frozenset((int, float, bool, str, type(None), torch.dtype, torch.Size, torch.device, torch.Tensor))

#: For a branch, modules that it holds and that contain it: it cannot call them.
_around: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


class Reached:
    """What was found.

    Attributes:
        modules: with all that they contain, and hold in turn.
        tensors: each with a name.
        generators: of random numbers.
    """

    def __init__(self, within: Sequence[nn.Module] = ()) -> None:
        self.modules: dict[nn.Module, None] = {}
        self._tensors: dict[int, tuple[str, torch.Tensor]] = {}
        self._generators: dict[int, torch.Generator] = {}
        self._within, self._branch = frozenset(within), within[0] if within else None  # known already
        self._seen: set[int] = set()
        self._waiting: list[Any] = []

    @property
    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        return list(self._tensors.values())

    @property
    def generators(self) -> list[torch.Generator]:
        return list(self._generators.values())

    def look(self, name: str, held: Any, objects: bool = False) -> None:
        """Note what is in ``held``; ``objects``: modules among the attributes of others too."""
        for item in items(held):
            if isinstance(item, nn.Module):
                self.take(item)
            elif isinstance(item, torch.Tensor):
                self._tensors.setdefault(id(item), (name, item))
            elif isinstance(item, torch.Generator):
                self._generators.setdefault(id(item), item)
            elif isinstance(item, type | types.ModuleType | types.BuiltinFunctionType) or id(item) in self._seen:
                continue
            elif callable(item):
                self._seen.add(id(item))
                self._waiting.append(item)
            elif objects:
                for value in getattr(item, "__dict__", {}).values():
                    for inner in items(value):
                        if isinstance(inner, nn.Module):
                            self.take(inner)

    def take(self, module: nn.Module) -> None:
        """Note the module, and all in it."""
        if module in self.modules or module in self._within or _contains(module, self._branch):
            return
        new = [found for found in module.modules() if found not in self.modules]
        self.modules.update(dict.fromkeys(new))
        for found in new:
            self.attributes(found)

    def attributes(self, module: nn.Module) -> None:
        """Look at what the module holds besides parameters, buffers and registered modules."""
        kind = type(module)
        if kind.__module__.startswith("torch.") and "forward" not in module.__dict__:
            if kind not in _WITH_FUNCTIONS:
                return  # its forward reads what it has registered
        else:
            for name, value in _named_globals(kind.forward):
                self.look(name, value)
        for name, value in module.__dict__.items():
            known = name in STANDARD or type(value) in _SIMPLE
            if not known and not (type(value) is tuple and _SIMPLE.issuperset(map(type, value))):
                self.look(name, value)

    def follow(self) -> Reached:
        """Look behind the callables that were met."""
        while self._waiting:
            for name, held in _held_by(self._waiting.pop()):
                self.look(name, held, objects=True)
        return self


_WITH_FUNCTIONS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def behind(function: Callable[..., Any]) -> Reached:
    """Return what a callable is bound to, closes over, defaults to, holds or names.

    Looked through are partials, other callables met on the way, lists, tuples and dictionaries that are not long, and,
    of the globals that its code names, modules, tensors and functions of the same file; of other objects, such as the
    one that a method is bound to, modules among their attributes.
    """
    reached = Reached()
    reached._seen.add(id(function))
    reached._waiting.append(function)
    return reached.follow()


def beside(modules: Sequence[nn.Module]) -> Reached:
    """Return what the modules, the first of which contains the others, hold in lists, tuples, dictionaries and
    callables, under names that they have not registered, and as globals that their ``forward`` names. Modules around
    them, which they could not call, are left out."""
    reached = Reached(modules)
    for module in modules:
        reached.attributes(module)
    return reached.follow() if reached._waiting else reached


def items(held: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """What is in lists, tuples and dictionaries that are not long, or the value itself."""
    if not isinstance(held, list | tuple | dict):
        yield held
    elif depth and len(held) <= _MANY:
        for item in held.values() if isinstance(held, dict) else held:
            yield from items(item, depth - 1)


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


def _held_by(function: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(function, functools.partial):
        yield from (("", function.func), ("", function.args), *function.keywords.items())
        return
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType | type):
        yield "__self__", owner
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType):
        yield from getattr(function, "__dict__", {}).items()
        return
    if str(getattr(function, "__module__", "")).startswith("torch."):
        return  # such as functional.relu
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable not assigned yet
            continue
    yield from (("a default", value) for value in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    yield from _named_globals(function, functions=True)


def _named_globals(function: Any, functions: bool = False) -> Iterable[tuple[str, Any]]:
    """Modules, tensors and generators among the globals that a function's code names; ``functions`` of its file too."""
    code, globals_ = getattr(function, "__code__", None), getattr(function, "__globals__", None)
    if code is None or globals_ is None:
        return
    for name in _names(code):
        value = globals_.get(name)
        if isinstance(value, nn.Module | torch.Tensor | torch.Generator) or (
            functions and isinstance(value, types.FunctionType) and value.__globals__ is globals_
        ):
            yield name, value


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals and attributes in the code, and in that of functions written inside it."""
    inner = (name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant))
    return tuple(dict.fromkeys((*code.co_names, *inner)))
