# SPDX-License-Identifier: Apache-2.0
"""Joins calls that directly follow each other into one call of the driver, so that the first one's outputs are dropped.

A network whose reversible modules are called one by one, ``for layer in layers: x = layer(x)``, would keep every
layer's output. But an output that goes unchanged into the next such module can be reconstructed from that module's
output. So a linked call marks the grad_fn of what it returns as the end of its reversal; a linked call whose input has
this mark reopens the reversal and continues it.
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
        reversal: open or finished; held by a weak reference.
        outputs: one tensor that holds all streams, or the streams.
        form: the streams' layout in the outputs. A call of another form cannot continue, nor one under other
            saved-tensor hooks: a checkpoint could not continue the call a second time when it recomputes.
    """

    __slots__ = ("form", "hooks", "places", "reversal")

    def __init__(self, reversal: Reversal, outputs: Sequence[torch.Tensor], form: Any) -> None:
        self.reversal = weakref.ref(reversal)
        self.form, self.hooks = form, _outer_hooks()
        self.places = [(output.output_nr, output._version) for output in outputs]


def mark(reversal: Reversal, outputs: Any, form: Any) -> None:
    """Mark this tensor, or these, as the current outputs of the reversal.

    If one has no grad_fn nothing can be marked, and the next call starts a new reversal.
    """
    outputs = _as_tuple(outputs)
    if reversal.recording and all(output.grad_fn is not None for output in outputs):
        reversal.end = end = End(reversal, outputs, form)
        for index, output in enumerate(outputs):
            output.grad_fn.metadata[_KEY] = (end, index)


def ending_in(inputs: Any, form: Any, streams: Sequence[torch.Tensor], kernels: Any) -> Reversal | None:
    """The reversal whose outputs ``inputs`` are, with these streams, claimed; None if there is none.

    They must be exactly its last outputs, unchanged.
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
    """Identify the saved-tensor hooks in effect: the id of the unpack hook, which the reversal's graph holds, or 0.

    Torch 2.6 only tells whether there are any: then return an object equal to nothing, so that calls are not joined.
    """
    if _top_hooks is None:
        return object() if _any_hooks() else 0
    hooks = _top_hooks(True)
    return 0 if hooks is None else id(hooks[1])


def _any_hooks() -> bool:
    """Whether saved-tensor hooks are in effect: torch refuses to disable them then."""
    if _graph._saved_tensors_hooks_get_disabled_error_message() is not None:
        return True  # unknown; keep the message
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
    """The names of the half-steps of joined calls."""

    def __init__(self, name: Callable[[int], str]) -> None:
        self._starts, self._names = [0], [name]

    def add(self, start: int, name: Callable[[int], str]) -> None:
        """From half-step ``start`` on, use ``name``, the last one added, counting from 0."""
        self._starts.append(start)
        self._names.append(name)

    def __call__(self, k: int) -> str:
        place = bisect_right(self._starts, k) - 1
        return self._names[place](k - self._starts[place])
