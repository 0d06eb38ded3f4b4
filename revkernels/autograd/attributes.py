# SPDX-License-Identifier: Apache-2.0
"""Tensors that a branch keeps on itself while it runs, such as the auxiliary loss of a mixture of experts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from revkernels.autograd.behind import STANDARD

__all__ = ["attributes_of", "put_attributes_back"]

#: Of a module: its ``__dict__``, what it holds there besides what every module has, and the contents of containers.
Attributes = list[tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]]


def attributes_of(modules: Sequence[nn.Module]) -> Attributes:
    """Before a recompute: the modules' own attributes."""
    found: Attributes = []
    for module in modules:
        own = {name: value for name, value in module.__dict__.items() if name not in STANDARD}
        held = (value for value in own.values() if type(value) in _CONTAINERS and len(value) <= _FEW)
        containers = [(container, container.copy()) for container in held]
        found.append((module.__dict__, own, containers))
    return found


def put_attributes_back(before: Attributes) -> None:
    """After it: tensors that a branch keeps as attributes, or in lists and dictionaries there, are the forward's again.
    Those of the recompute belong to a graph that nobody uses, and would hold a stream's memory."""
    for table, own, containers in before:
        for name, value in [(name, value) for name, value in table.items() if name not in STANDARD]:
            if value is not own.get(name, _MISSING) and (_has_tensors(value) or _has_tensors(own.get(name))):
                if name in own:
                    table[name] = own[name]
                else:
                    del table[name]
        table.update({name: value for name, value in own.items() if name not in table and _has_tensors(value)})
        for container, contents in containers:
            if not _same_items(container, contents) and (_has_tensors(container) or _has_tensors(contents)):
                container.clear()
                container.extend(contents) if type(container) is list else container.update(contents)


_CONTAINERS = (list, dict, set)
_FEW = 1024
_MISSING = object()


def _has_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple | set | dict):
        return len(value) <= 2 * _FEW and any(
            isinstance(item, torch.Tensor) for item in (value.values() if isinstance(value, dict) else value)
        )
    return isinstance(value, torch.Tensor)


def _same_items(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if type(a) is dict:
        return all(key in b and b[key] is value for key, value in a.items())
    return a == b if type(a) is set else all(map(operator.is_, a, b))
