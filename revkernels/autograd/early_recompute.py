# SPDX-License-Identifier: Apache-2.0
"""What has to be run again before its gradient goes on.

A recompute is due when autograd asks for a tensor that the branch has saved. Where a branch ends with ``+ bias``, the
bias has its gradient before anything is asked for, and a hook may have stepped it by then, as optimizers that step
inside the backward do: the branch would be run again with the new one. Such a branch is run again as soon as a gradient
comes to what it returned, and so is what `nn.checkpoint` called.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

__all__ = ["leaf_comes_first", "reach_first"]

_MANY = 64  # nodes that are looked at: behind more, a leaf is taken for granted
#: For each type of node: whether it has saved tensors; None for a Function of somebody's, which has some or not.
_of_type: weakref.WeakKeyDictionary[type, bool | None] = weakref.WeakKeyDictionary()


def leaf_comes_first(f: Any, *read: torch.Tensor) -> bool:
    """Whether a gradient of the branch's output f may come to a leaf through nodes that ask for nothing saved.

    Not behind ``read``, the stream, or whatever it was given.
    """
    node = getattr(f[0] if type(f) is tuple and f else f, "grad_fn", None)  # that it is a tensor is checked later
    if node is None or _asks(node):
        return False
    seen = {tensor.grad_fn for tensor in read}
    if node in seen:
        return False
    left = [node]
    while left and len(seen) < _MANY:
        for following, _ in left.pop().next_functions:
            if following is None or following in seen:
                continue
            seen.add(following)
            if type(following).__name__ == "AccumulateGrad":
                return True
            if not _asks(following):
                left.append(following)
    return bool(left)


def _asks(node: Any) -> bool:
    """Whether the node has saved tensors, which it asks for before it passes a gradient on."""
    kind = type(node)
    if kind not in _of_type:
        names = dir(kind)
        own = "_raw_saved_tensors" in names
        _of_type[kind] = None if own else any(name.startswith("_raw_saved_") for name in names)
    saves = _of_type[kind]
    return bool(node._raw_saved_tensors) if saves is None else saves


def reach_first(reversal: Any, k: int, f: Any) -> None:
    """Have half-step k rebuilt before the gradient of its branch's output f goes on."""
    ref = weakref.ref(reversal)  # which holds the graph, and the graph this

    def reach(_: Any) -> None:
        found = ref()
        if found is not None:
            found.reach(k)

    (f[0] if type(f) is tuple else f).grad_fn.register_prehook(reach)
