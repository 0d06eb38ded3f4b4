# SPDX-License-Identifier: Apache-2.0
"""The names in a branch's code, and what they tell of its buffers that nothing else does.

`torch.batch_norm` writes running statistics without counting it as a write, fake quantisation the range that it
observes, and so does who writes through ``.data`` or NumPy; what a branch reads of a batch norm's statistics leaves no
trace at all. To take every buffer for written and read would cost copies in every forward, so it is done where the code
names such things: that of the module's class, of hooks, and of functions that these name, torch's own left out.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from revkernels.autograd.behind import named

__all__ = ["may_read", "reads_running", "writes_silently"]

_RUNNING = frozenset(
    ("running_mean", "running_var", "num_batches_tracked", "_buffers", "buffers", "named_buffers", "get_buffer")
)
_SILENT = frozenset(
    ("batch_norm", "instance_norm", "native_batch_norm", "fused_moving_avg_obs_fake_quant", "data", "numpy", "_buffers")
)
#: Where torch's own modules are that fake quantisation runs in. Its operator writes buffers of one of them and of
#: another that this one holds, so that all of them are taken to name it.
_TORCHS_SILENT = "torch.ao.quantization."
_MANY = 256  # functions that are looked at for one class

_BY_NAME = frozenset(("getattr", "__dict__", "vars"))  # by which any attribute is read

_read_by: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_of_class: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()
_of_function: weakref.WeakKeyDictionary[types.FunctionType, frozenset[str]] = weakref.WeakKeyDictionary()


def reads_running(branch: Any, modules: Sequence[nn.Module]) -> bool:
    """Whether code in the branch may look at running statistics, its own or those of a norm inside it."""
    return any(not _RUNNING.isdisjoint(names) for names in _in(branch, modules))


def writes_silently(module: nn.Module) -> bool:
    """Whether the module's forward may write its buffers so that no version tells, or that of one that holds it."""
    return not _SILENT.isdisjoint(_names_of_class(type(module)))


def may_read(module: nn.Module, name: str) -> bool:
    """Whether the module's code may read this attribute as a call before has left it: not where its forward writes it
    first, and no other method reads it."""
    kind = type(module)
    found = _read_by.get(kind)
    if found is None:
        found = _read_by[kind] = _read_first(kind)
    return name in found or not _BY_NAME.isdisjoint(found)


def _read_first(kind: type) -> frozenset[str]:
    found: set[str] = set()
    for base in kind.__mro__:
        for name, value in () if _is_torchs(base.__module__) else vars(base).items():
            value = getattr(value, "fget", value)
            value = getattr(value, "__func__", value)
            if isinstance(value, types.FunctionType):
                order = _accesses(value.__code__)
                if name == "forward":
                    order = list(dict(reversed(order)).items())  # the first of each
                found.update(attribute for attribute, reads in order if reads)
    return frozenset(found)


def _accesses(code: types.CodeType) -> list[tuple[str, bool]]:
    """The attributes, and globals, that the code names, in its order, and whether it reads each."""
    found = [(str(one.argval), not one.opname.startswith("STORE")) for one in dis.get_instructions(code) if _names(one)]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _accesses(constant)
    return found


def _names(instruction: dis.Instruction) -> bool:
    return instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "STORE_ATTR"))


def _in(branch: Any, modules: Sequence[nn.Module]) -> Iterator[frozenset[str]]:
    if not isinstance(branch, nn.Module):
        yield _names_of(branch)
    for module in modules:
        yield _names_of_class(type(module))
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in list(hooks.values()) if hooks else ():
                yield _names_of(hook)
        if "forward" in module.__dict__:
            yield _names_of(module.__dict__["forward"])


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


def _names_of(function: Any) -> frozenset[str]:
    if not isinstance(function, types.FunctionType):
        return _follow([function])
    found = _of_function.get(function)
    if found is None:
        found = _of_function[function] = _follow([function])
    return found


def _follow(waiting: list[Any]) -> frozenset[str]:
    """The names in the code of these, and in that of functions that they name, close over or are made of."""
    names: set[str] = set()
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
            if isinstance(held, types.MethodType):  # which may call others of its class
                waiting += _held_by(type(held.__self__))
        elif isinstance(held, property):
            waiting.append(held.fget)
        elif isinstance(held, types.FunctionType) and not _is_torchs(held.__globals__.get("__name__")):
            waiting += [cell.cell_contents for cell in held.__closure__ or () if _is_full(cell)]
            names |= named(held).all
            waiting += _named_by(named(held).all, held.__globals__)
    return frozenset(names)


def _named_by(names: frozenset[str], table: dict[str, Any]) -> Iterator[Any]:
    """Functions of these names among the globals, and in modules that are."""
    for name in names:
        value = table.get(name)
        if isinstance(value, types.FunctionType | functools.partial):
            yield value
        elif isinstance(value, types.ModuleType) and not _is_torchs(value.__name__):
            inside = (getattr(value, other, None) for other in names)
            yield from (found for found in inside if isinstance(found, types.FunctionType))


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable not assigned yet
        return False


def _is_torchs(module: Any) -> bool:
    """Torch's own code, and this package's, read no statistics but to normalise with them."""
    first = str(module).partition(".")[0]
    return first in ("torch", "revkernels", "builtins", "numpy", "functools", "typing")
