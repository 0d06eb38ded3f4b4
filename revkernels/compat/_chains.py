# SPDX-License-Identifier: Apache-2.0
"""Splits another library's container into chains of modules that can run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from revkernels.nn.hooks import have_hooks

Part = list[tuple[int, Any]]  # modules with their indices


def kind_of(value: Any, wanted: type) -> str:
    """The name of the class of ``value``, with its module if the name is the same as that of ``wanted``."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ == wanted.__name__ else kind.__name__


def together(
    modules: Sequence[Any], forward: Any = None, alike: Callable[[Any], Any] = lambda module: None
) -> list[tuple[bool, Part]]:
    """Split ``modules`` into parts that are one chain each (with equal ``alike``), and modules called alone.

    A module is called alone if it has hooks, or a ``forward`` other than the given one.
    """
    alone = [
        hooked or (forward is not None and type(module).forward is not forward)
        for module, hooked in zip(modules, have_hooks(modules), strict=True)
    ]
    parts = groupby(enumerate(modules), lambda numbered: (alone[(i := numbered[0])] and i + 1, alike(numbered[1])))
    return [(bool(number), list(part)) for (number, _), part in parts]
