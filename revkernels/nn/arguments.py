# SPDX-License-Identifier: Apache-2.0
"""Routes extra arguments to the branches: masks, memories, flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from revkernels.autograd.fused.keywords import keywords_of

Call = tuple[tuple[Any, ...], dict[str, Any]]


class PerBlock:
    """An argument that differs from block to block: ``net(x, mask=PerBlock([mask_0, mask_1, ...]))``.

    Args:
        values: one of any kind for each block of the chain; another number of them is a ValueError in the call.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = tuple(values)

    def __repr__(self) -> str:
        return f"PerBlock({list(self.values)!r})"


def route(blocks: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[Call]]:
    """Return the arguments of each branch of each block.

    Positional arguments go to every branch. A keyword goes to the branches whose ``forward`` names it or takes
    ``**kwargs``, so an attention branch can have a mask that the MLP branch does not take.

    Raises:
        TypeError: no branch takes the keyword.
        ValueError: the number of values in a `PerBlock` is not the number of blocks.
    """
    if not args and not kwargs:
        return [[_NOTHING] * len(block.branches) for block in blocks]
    for name, value in (*((f"argument {i}", a) for i, a in enumerate(args)), *kwargs.items()):
        if isinstance(value, PerBlock) and len(value.values) != len(blocks):
            raise ValueError(
                f"{name} has {len(value.values)} values; it needs one for each of the {len(blocks)} blocks"
            )
    taken: set[str] = set()
    calls = []
    for index, block in enumerate(blocks):
        here_args = tuple(_here(value, index) for value in args)
        here_kwargs = {name: _here(value, index) for name, value in kwargs.items()}
        of_block = []
        for branch in block.branches:
            names = keywords_of(branch)
            mine = here_kwargs if names is None else {n: v for n, v in here_kwargs.items() if n in names}
            taken.update(mine)
            of_block.append((here_args, mine))
        calls.append(of_block)
    unknown = set(kwargs) - taken
    if unknown:
        takes = set().union(*(keywords_of(branch) or () for block in blocks for branch in block.branches))
        known = f"they take {', '.join(map(repr, sorted(takes)))}" if takes else "they take none"
        raise TypeError(
            f"no branch takes the keyword {', '.join(map(repr, sorted(unknown)))}; {known} (an nn.Sequential passes "
            f"none on, a revkernels.nn.FusedSequential does)"
        )
    return calls


_NOTHING: Call = ((), {})


def _here(value: Any, index: int) -> Any:
    return value.values[index] if isinstance(value, PerBlock) else value
