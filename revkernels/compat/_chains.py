# SPDX-License-Identifier: Apache-2.0
"""Which modules of another library's container can be run together, as one chain, and what others are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from revkernels.nn.reversible import have_hooks

Part = list[tuple[int, Any]]  # modules with their numbers


def kind_of(value: Any, wanted: type) -> str:
    """The name of the class of ``value``, with its module where that is the name of ``wanted`` too."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ == wanted.__name__ else kind.__name__


def together(
    modules: Sequence[Any], forward: Any = None, alike: Callable[[Any], Any] = lambda module: None
) -> list[tuple[bool, Part]]:
    """Cut ``modules`` into parts that are one chain each, ``alike`` being the same throughout, and those left alone.

    A module is alone, to be called as it is, if it has hooks, or a ``forward`` other than the one given.
    """
    alone = [
        hooked or (forward is not None and type(module).forward is not forward)
        for module, hooked in zip(modules, have_hooks(modules), strict=True)
    ]
    parts = groupby(enumerate(modules), lambda numbered: (alone[(i := numbered[0])] and i + 1, alike(numbered[1])))
    return [(bool(number), list(part)) for (number, _), part in parts]
