# SPDX-License-Identifier: Apache-2.0
"""Tensors that a branch sets as attributes while it runs, such as the auxiliary loss of a mixture of experts."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from revkernels.autograd.state.reachable import own_names

__all__ = ["CONTAINERS", "attributes_of", "put_attributes_back"]

#: For a module: its ``__dict__``, its entries that not every module has, and the contents of containers in them.
Attributes = list[tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]]


def attributes_of(modules: Sequence[nn.Module]) -> Attributes:
    """Before a recompute: the modules' attributes."""
    found: Attributes = []
    for module in modules:
        own = {name: module.__dict__.get(name) for name in own_names(module.__dict__)}
        containers: list[tuple[Any, Any]] = []
        room = _ROOM
        for value in own.values():
            if type(value) in CONTAINERS:
                room = _copy(value, containers, _DEPTH, room)
        found.append((module.__dict__, own, containers))
    return found


def put_attributes_back(before: Attributes) -> None:
    """After a recompute: restore the forward's tensors with a graph, in attributes and in lists and dictionaries there.
    The recompute's belong to a graph that nobody uses, and would keep a stream's memory alive. Values without a graph
    stay: code that collects such values can call `is_recomputing`."""
    for table, own, containers in before:
        for name in own_names(table):
            value = table.get(name)
            if value is not own.get(name, _MISSING) and _has_graphs(value):
                if name in own:
                    table[name] = own[name]
                else:
                    table.pop(name, None)
        for container, contents in containers:
            _put_back(container, contents)


def _copy(container: Any, into: list[tuple[Any, Any]], depth: int, room: int) -> int:
    """Record the container and its contents. Returns how many of ``room`` items are left. Of a list with more items,
    which is data, only the length is recorded, so that items appended to it can be removed."""
    if len(container) > room or len(into) > room:
        if isinstance(container, list | collections.deque) and len(into) <= room:
            into.append((container, len(container)))
        return room
    contents = container.copy()
    into.append((container, contents))
    room -= len(contents)
    if depth and not isinstance(container, set):
        for value in contents.values() if isinstance(contents, dict) else contents:
            if type(value) in CONTAINERS:
                room = _copy(value, into, depth - 1, room)
    return room


def _put_back(container: Any, contents: Any) -> None:
    """Undo what the recompute added, item by item: other threads may add items at the same time."""
    if isinstance(container, dict):
        for key, value in list(container.items()):
            if value is not contents.get(key, _MISSING) and _has_graphs(value):
                if key in contents:
                    container[key] = contents[key]
                else:
                    container.pop(key, None)
        return
    if isinstance(container, set):
        container -= {item for item in list(container) if item not in contents and _has_graphs(item)}
        return
    count = contents if isinstance(contents, int) else len(contents)
    if not isinstance(contents, int):
        for index, (value, before) in enumerate(zip(list(container), contents, strict=False)):
            if value is not before and _has_graphs(value):
                container[index] = before
    for index in range(len(container) - 1, count - 1, -1):
        if _has_graphs(container[index]):
            del container[index]


CONTAINERS = (list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict)
_DEPTH = 2  # nesting of containers
_ROOM = 256  # items to copy of a module's containers
_FEW = 1024  # items to search for tensors
_MISSING = object()


def _has_graphs(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _FEW and any(_has_graphs(item) for item in value)
    if isinstance(value, dict):
        return len(value) <= _FEW and any(_has_graphs(item) for item in list(value.values()))
    return isinstance(value, torch.Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)
