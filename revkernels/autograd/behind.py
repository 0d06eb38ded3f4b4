# SPDX-License-Identifier: Apache-2.0
"""What a plain callable reaches: modules and tensors behind it, as far as that shows."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["behind", "modules_in"]

_DEPTH = 3  # containers in containers that are looked into: one may hold itself
_MANY = 1024  # items of one: a function is looked through in every forward, and what is longer is data


def behind(function: Callable[..., Any]) -> tuple[list[nn.Module], list[tuple[str, torch.Tensor]]]:
    """Return the modules and the named tensors that a callable is bound to, closes over, defaults to, holds or names.

    Looked through are partials, other callables met on the way, lists, tuples and dictionaries that are not long, and,
    of the globals that its code names, modules, tensors and functions of the same file; of other objects, such as the
    one that a method is bound to, modules among their attributes.
    """
    modules: dict[nn.Module, None] = {}
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    waiting, seen = [function], {id(function)}
    while waiting:
        for name, held in _held_by(waiting.pop()):
            for item in _items(held):
                if isinstance(item, nn.Module):
                    modules.update(dict.fromkeys(item.modules()))
                elif isinstance(item, torch.Tensor):
                    tensors.setdefault(id(item), (name, item))
                elif isinstance(item, type | types.ModuleType) or id(item) in seen:
                    continue
                elif callable(item):
                    seen.add(id(item))
                    waiting.append(item)
                else:
                    modules.update(dict.fromkeys(modules_in(getattr(item, "__dict__", {}).values())))
    return list(modules), list(tensors.values())


def modules_in(values: Iterable[Any]) -> list[nn.Module]:
    """The modules among the values, and in lists, tuples and dictionaries of them, with all that they contain."""
    found: dict[nn.Module, None] = {}
    for value in values:
        for item in _items(value):
            if isinstance(item, nn.Module):
                found.update(dict.fromkeys(item.modules()))
    return list(found)


def _items(held: Any, depth: int = _DEPTH) -> Iterator[Any]:
    if not isinstance(held, list | tuple | dict):
        yield held
    elif depth and len(held) <= _MANY:
        for item in held.values() if isinstance(held, dict) else held:
            yield from _items(item, depth - 1)


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
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable not assigned yet
            continue
    yield from (("a default", value) for value in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()
    for name in _names(code):
        value = function.__globals__.get(name)
        if isinstance(value, nn.Module | torch.Tensor) or (
            isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__
        ):
            yield name, value


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals and attributes in the code, and in that of functions written inside it."""
    inner = (name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant))
    return tuple(dict.fromkeys((*code.co_names, *inner)))
