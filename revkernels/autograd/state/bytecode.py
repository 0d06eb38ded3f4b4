# SPDX-License-Identifier: Apache-2.0
"""Finds out from the names in a branch's code how it uses buffers and attributes, where nothing else shows that.

`torch.batch_norm` writes running statistics without a new version, and fake quantisation the range that it observes; so
does code that writes through ``.data`` or NumPy. What a branch reads of a batch norm's statistics leaves no trace at
all. To treat every buffer as written and read would cost copies in every forward, so only code that names such things
is: the code of the module's class, of hooks, and of functions that these name, torch's own excluded.

An attribute with a gradient may be state that the next call reads, whose old value a recompute needs, or a feature or
loss kept for others, which must not be kept alive. It is state if the code reads it before it writes it.
"""

from __future__ import annotations

import dis
import functools
import re
import sys
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from revkernels.autograd.state.other_generators import NUMPYS, PYTHONS, OtherGenerator
from revkernels.autograd.state.reachable import drawn_from, named

__all__ = ["draws_elsewhere", "may_read", "reads_running", "writes_silently"]

_RUNNING = frozenset(
    ("running_mean", "running_var", "num_batches_tracked", "_buffers", "buffers", "named_buffers", "get_buffer")
)
_SILENT = frozenset(
    ("batch_norm", "instance_norm", "native_batch_norm", "fused_moving_avg_obs_fake_quant", "data", "numpy", "_buffers")
)
#: torch's own modules for fake quantisation. The operator writes buffers of one module and of another that this one
#: holds, so all of them are treated as if they named it.
_TORCHS_SILENT = "torch.ao.quantization."
_MANY = 256  # functions to search for one class
#: What stands among the names of code that draws from these. No name has a space.
_SHARED = {"Python's generator": PYTHONS, "NumPy's generator": NUMPYS}

_BY_NAME = frozenset(("getattr", "__dict__", "vars"))  # these can read any attribute
_READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "DELETE_ATTR")
#: Patterns of `_accesses` to an attribute, in a function and in a forward. If the first access may be a write, it is
#: state if read and then written again; else it is created once, as by `if not self.made: self.weight = ...`.
_READ, _STATES = re.compile(".*r"), re.compile("r|m.*r.*[wm]")
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))

#: Versions of Python whose instructions these names are; of others nothing is known, and every attribute may be read.
_KNOWN = sys.version_info < (3, 14)

_read_by: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_of_class: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_of_function: weakref.WeakKeyDictionary[types.FunctionType, frozenset[str]] = weakref.WeakKeyDictionary()


def reads_running(branch: Any, modules: Sequence[nn.Module]) -> bool:
    """Whether code in the branch may read running statistics, its own or those of a norm inside it."""
    return any(not _RUNNING.isdisjoint(names) for names in _in(branch, modules))


def draws_elsewhere(branch: Any, modules: Sequence[nn.Module]) -> list[OtherGenerator]:
    """Which of the generators of Python's and NumPy's own functions code in the branch may draw from."""
    found = frozenset().union(*(names for names in _in(branch, modules) if not _SHARED.keys().isdisjoint(names)))
    return [generator for mark, generator in _SHARED.items() if mark in found] if found else []


def writes_silently(module: nn.Module) -> bool:
    """Whether the forward of the module, or of one that holds it, may write its buffers without a new version."""
    return not _SILENT.isdisjoint(_names_of_class(type(module)))


def may_read(module: nn.Module, name: str) -> bool:
    """Whether the module's code may read the value that a previous call left in this attribute: not if its forward
    writes it first, and no other code of its class, or called by it, reads it."""
    if not _KNOWN:
        return True
    kind = type(module)
    found = _read_by.get(kind)
    if found is None:
        found = _read_by[kind] = _read_first(kind)
    return name in found or not _BY_NAME.isdisjoint(found) or "forward" in module.__dict__


def _read_first(kind: type) -> frozenset[str]:
    forwards = {id(vars(base).get("forward")) for base in kind.__mro__}
    found: set[str] = set()
    for function in _reached(_held_by(kind)):
        ways: dict[str, str] = {}
        for attribute, way in _accesses(function.__code__):
            ways[attribute] = ways.get(attribute, "") + way
        is_read = _STATES.match if id(function) in forwards else _READ.match
        found.update(attribute for attribute, way in ways.items() if is_read(way))
    return frozenset(found)


def _accesses(code: types.CodeType, whole: bool = True) -> Iterator[tuple[str, str]]:
    """The attributes and globals that the code names, in order, each with r (read), w (written) or m (may be written:
    in one of several paths, or in a nested function, for which ``whole`` is False)."""
    furthest = 0
    for one in dis.get_instructions(code):
        if one.opcode in _JUMPS:
            furthest = max(furthest, one.argval)
        elif isinstance(one.argval, types.CodeType):  # may run from here on
            yield from _accesses(one.argval, False)
        elif one.opname.startswith("STORE_ATTR"):
            yield str(one.argval), "w" if whole and one.offset >= furthest else "m"
        elif one.opname.startswith(_READS):
            yield str(one.argval), "r"


def _in(branch: Any, modules: Sequence[nn.Module]) -> Iterator[frozenset[str]]:
    if not isinstance(branch, nn.Module):
        yield from _names_behind(branch)
    for module in modules:
        yield _names_of_class(type(module))
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in list(hooks.values()) if hooks else ():
                yield from _names_behind(hook)
        if "forward" in module.__dict__:
            yield from _names_behind(module.__dict__["forward"])


def _names_behind(function: Any) -> Iterator[frozenset[str]]:
    """The names in the code of a callable other than a module. Partials and methods may be made anew in every call, but
    what they consist of is known."""
    if isinstance(function, types.FunctionType):
        yield _names_of(function)
    elif isinstance(function, types.MethodType):  # it may call others of its class
        yield from _names_behind(function.__func__)
        yield _names_of_class(type(function.__self__))
    elif isinstance(function, functools.partial):
        for part in (function.func, *function.args, *function.keywords.values()):
            if callable(part):
                yield from _names_behind(part)
    elif not isinstance(function, nn.Module):
        yield _names_of_class(type(function))


def _names_of_class(kind: type) -> frozenset[str]:
    found = _of_class.get(kind)
    if found is None:
        found = _follow(_held_by(kind))
        if any(base.__module__.startswith(_TORCHS_SILENT) for base in kind.__mro__):
            found |= {"fused_moving_avg_obs_fake_quant"}
        _of_class[kind] = found
    return found


def _held_by(kind: type) -> list[Any]:
    return [value for base in kind.__mro__ if not _is_torchs(base.__module__) for value in vars(base).values()]


def _names_of(function: types.FunctionType) -> frozenset[str]:
    found = _of_function.get(function)
    if found is None:
        found = _of_function[function] = _follow([function])
    return found


def _follow(waiting: list[Any]) -> frozenset[str]:
    """The names in the code of these, and of functions that they name, close over or consist of; and the marks of
    `_SHARED`."""
    found: set[str] = set()
    for function in _reached(waiting):
        found |= named(function).all
        # Reading a generator's state in every half-step takes as long as a small layer. What draws as a module is made
        # needs none of it; a function that is made there is found where it is held.
        if function.__name__ != "__init__":
            drawn = drawn_from(function)
            found.update(mark for mark, generator in _SHARED.items() if generator in drawn)
    return frozenset(found)


def _reached(waiting: list[Any]) -> Iterator[types.FunctionType]:
    """These functions, and those that they name, close over or consist of."""
    seen: set[int] = set()
    while waiting and len(seen) < _MANY:
        held = waiting.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, functools.partial):
            waiting += [held.func, *held.args, *held.keywords.values()]
        elif isinstance(held, types.MethodType | staticmethod | classmethod):
            waiting.append(held.__func__)
            if isinstance(held, types.MethodType):  # it may call others of its class
                waiting += _held_by(type(held.__self__))
        elif isinstance(held, property):
            waiting.append(held.fget)
        elif isinstance(held, types.FunctionType) and not _is_torchs(held.__globals__.get("__name__")):
            waiting += [cell.cell_contents for cell in held.__closure__ or () if _is_full(cell)]
            waiting += _named_by(named(held).all, held.__globals__)
            yield held


def _named_by(names: frozenset[str], table: dict[str, Any]) -> Iterator[Any]:
    """Functions of these names among the globals, and in modules among the globals."""
    for name in names:
        value: Any = table.get(name)
        kind = type(value)  # not __class__, which a proxy may raise anything for
        if issubclass(kind, types.FunctionType | functools.partial):
            yield value
        elif issubclass(kind, types.ModuleType) and not _is_torchs(value.__name__):
            inside = (getattr(value, other, None) for other in names)
            yield from (found for found in inside if isinstance(found, types.FunctionType))


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable not assigned yet
        return False


def _is_torchs(module: Any) -> bool:
    """Whether it is torch's own code or this package's, which read statistics only to normalise with them, except for
    the layers of quantisation-aware training, which scale their weights by them first."""
    name = str(module)
    first = name.partition(".")[0]
    ours = first in ("torch", "revkernels", "builtins", "numpy", "functools", "typing")
    return ours and not name.startswith("torch.ao.")
