# SPDX-License-Identifier: Apache-2.0
"""Calls that follow each other directly, made one call of the driver: the first one's outputs need not be kept.

A network whose reversible modules are called one by one, ``for layer in layers: x = layer(x)``, would keep every
layer's output. But an output that goes unchanged into the next such module can be rebuilt from that module's output. So
what a linked call returns is marked, on the node of the graph that made it, as the end of its reversal; a linked call
that is given just this reopens the reversal and goes on with it.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch

from revkernels.autograd.driver_forward import Reversal

_KEY = "revkernels.end"


class End:
    """The outputs of a reversal, as its caller has them.

    Args:
        reversal: open or shut, it is not kept alive.
        outputs: one tensor that holds all streams, or the streams.
        form: how the streams lie in them; a call of another form does not go on here, nor one under other saved-tensor
            hooks: a checkpoint, run again, would find that its call cannot go on once more.
    """

    __slots__ = ("form", "hooks", "places", "reversal")

    def __init__(self, reversal: Reversal, outputs: Sequence[torch.Tensor], form: Any) -> None:
        self.reversal = weakref.ref(reversal)
        self.form, self.hooks = form, _outer_hooks()
        self.places = [(output.output_nr, output._version) for output in outputs]


def mark(reversal: Reversal, outputs: Any, form: Any) -> None:
    """Note that this tensor, or these, are the outputs of the reversal now.

    Where one has no gradient nothing can be noted, and the next call begins anew.
    """
    outputs = _as_tuple(outputs)
    if reversal.recording and all(output.grad_fn is not None for output in outputs):
        reversal.end = end = End(reversal, outputs, form)
        for index, output in enumerate(outputs):
            output.grad_fn.metadata[_KEY] = (end, index)


def ending_in(inputs: Any, form: Any, streams: Sequence[torch.Tensor], kernels: Any) -> Reversal | None:
    """The reversal that goes on with ``inputs``, whose streams these are, claimed; None if there is none.

    They have to be just what it has returned last, unchanged.
    """
    inputs = _as_tuple(inputs)
    if any(x.grad_fn is None for x in inputs):
        return None
    marks = [x.grad_fn.metadata.get(_KEY) for x in inputs]
    end: End | None = None if marks[0] is None else marks[0][0]
    if end is None or end.form != form or marks != [(end, index) for index in range(len(end.places))]:
        return None
    reversal = end.reversal()
    if reversal is None or [(x.output_nr, x._version) for x in inputs] != end.places or end.hooks != _outer_hooks():
        return None
    return reversal if reversal.claim(end, streams, kernels) else None


_graph: Any = torch._C._autograd
_top_hooks: Any = getattr(_graph, "_top_saved_tensors_default_hooks", None)


def _outer_hooks() -> object:
    """Which saved-tensor hooks are on: the id of the one that the graph holds with what a reversal keeps, or 0.

    Torch 2.6 tells only whether any are on: then it is something that equals nothing, and calls are not joined.
    """
    if _top_hooks is None:
        return object() if _any_hooks() else 0
    hooks = _top_hooks(True)
    return 0 if hooks is None else id(hooks[1])


def _any_hooks() -> bool:
    """Whether saved-tensor hooks are on: torch refuses to disable them then."""
    if _graph._saved_tensors_hooks_get_disabled_error_message() is not None:
        return True  # nobody knows, and the message stays as it is
    try:
        _graph._saved_tensors_hooks_disable("they are looked for")
    except RuntimeError:
        return True
    finally:
        _graph._saved_tensors_hooks_enable()
    return False


def _as_tuple(tensors: Any) -> tuple[torch.Tensor, ...]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)


class Names:
    """The words for the half-steps of calls that were joined to one."""

    def __init__(self, name: Callable[[int], str]) -> None:
        self._starts, self._names = [0], [name]

    def add(self, start: int, name: Callable[[int], str]) -> None:
        """From half-step ``start`` on it is ``name``, the last one given, that has the words, counting from 0."""
        self._starts.append(start)
        self._names.append(name)

    def __call__(self, k: int) -> str:
        place = bisect_right(self._starts, k) - 1
        return self._names[place](k - self._starts[place])
