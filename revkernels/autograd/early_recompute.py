# SPDX-License-Identifier: Apache-2.0
"""Decides which branches must be recomputed before their output's gradient is passed on.

A branch is normally recomputed when autograd unpacks a tensor that it saved. Where a branch ends with ``+ bias``, the
bias receives its gradient before anything is unpacked, and a hook may have stepped it by then, as optimizers that step
inside the backward do: the recompute would use the new bias. Such a branch is recomputed as soon as a gradient reaches
its output. The same applies to calls of `nn.checkpoint`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

__all__ = ["leaf_comes_first", "reach_first"]

_MANY = 64  # nodes to visit: beyond these, assume a leaf
#: For each type of node, whether it has saved tensors; None for a custom Function, whose nodes differ.
_of_type: weakref.WeakKeyDictionary[type, bool | None] = weakref.WeakKeyDictionary()


def leaf_comes_first(output: Any, *read: torch.Tensor) -> bool:
    """Whether the gradient of a branch's output may reach a leaf through nodes without saved tensors.

    The search stops at ``read``: the stream, or the other inputs.
    """
    node = getattr(output, "grad_fn", None)  # that it is a tensor is checked later
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
    """Whether the node has saved tensors, which it unpacks before it passes a gradient on."""
    kind = type(node)
    if kind not in _of_type:
        names = dir(kind)
        own = "_raw_saved_tensors" in names
        _of_type[kind] = None if own else any(name.startswith("_raw_saved_") for name in names)
    saves = _of_type[kind]
    return bool(node._raw_saved_tensors) if saves is None else saves


def reach_first(reversal: Any, k: int, output: Any) -> None:
    """Recompute half-step k before the gradient of an output of its branch is passed on."""
    ref = weakref.ref(reversal)  # avoids a cycle: the graph holds this hook

    def reach(_: Any) -> None:
        found = ref()
        if found is not None:
            found.reach(k)

    output.grad_fn.register_prehook(reach)
