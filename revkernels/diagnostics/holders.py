# SPDX-License-Identifier: Apache-2.0
"""Finds who holds a tensor other than a saved tensor: an attribute of a module or of an autograd node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction

from revkernels.diagnostics.untouched import tensors_in
from revkernels.diagnostics.watching import address, has_memory

_SKIPPED = ("_parameters", "_buffers", "_modules")
_DEPTH = 8  # nesting of containers


def attributes(net: nn.Module) -> dict[int, str]:
    """Memory held by a module's attribute: its address, and "self.NAME"."""
    found: dict[int, str] = {}
    for module in net.modules():
        for name, value in vars(module).items():
            if name not in _SKIPPED and not isinstance(value, nn.Module):
                for tensor in held(value):
                    found.setdefault(address(tensor), f"self.{name}")
    return found


def contexts(outputs: Iterable[torch.Tensor]) -> dict[int, str]:
    """Memory held by an attribute of a node in the outputs' graph: its address, and "ctx.NAME of NODE"."""
    found: dict[int, str] = {}
    waiting: list[Any] = [y.grad_fn for y in outputs if y.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if isinstance(node, BackwardCFunction):
            for name, value in vars(node).items():
                for tensor in held(value):
                    found.setdefault(address(tensor), f"ctx.{name} of {type(node).__name__.removesuffix('Backward')}")
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def notes(reversal: Any) -> Iterator[torch.Tensor]:
    """The tensors that a chain's call holds, besides its outputs: statistics, random states, copies of buffers."""
    if reversal is not None:
        yield from held(reversal, ours=True)


def kept_operators(reversal: Any) -> Iterator[torch.Tensor]:
    """Among these, the outputs of operators that a memory budget stores."""
    for step in () if reversal is None else reversal._steps:
        for _, outputs, _ in getattr(step, "kept", {}).values():
            yield from tensors_in(outputs)


def held(value: Any, ours: bool = False) -> Iterator[torch.Tensor]:
    """The tensors in nested containers; with ``ours`` also in the attributes of this package's own objects."""
    yield from _held(value, ours, _DEPTH, set())


def _held(value: Any, ours: bool, depth: int, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if has_memory(value):
            yield value
        return
    if depth == 0 or id(value) in seen or isinstance(value, (nn.Module, str, bytes, int, float, type(None))):
        return
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inside = value
    elif ours and type(value).__module__.startswith("revkernels."):
        names = [*vars(value)] if hasattr(value, "__dict__") else []
        names += [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        inside = [getattr(value, name, None) for name in names]
    seen.add(id(value))
    for item in inside:
        yield from _held(item, ours, depth - 1, seen)
