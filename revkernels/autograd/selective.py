# SPDX-License-Identifier: Apache-2.0
"""A call that keeps its saved tensors, except outputs that one pass recomputes from what is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from revkernels.autograd.fused.norm_context import Tape, Within, ambient
from revkernels.autograd.kept_tensors import KeptTensor
from revkernels.autograd.planning.rematerialize import AtHand, Outputs, SavedView
from revkernels.autograd.state.thread_state import ThreadState
from revkernels.autograd.state.versions import version_of
from revkernels.errors import ReconstructionError


class Selective:
    """One call of a function, and all backwards through it."""

    def __init__(self) -> None:
        self._outputs: Outputs | None = Outputs()
        self._made = AtHand()  # in the backward under way
        self._task = -1
        self._lock = threading.Lock()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return ``function(*args, **kwargs)``."""
        tape = Tape([], [], False, self._outputs)
        before = ThreadState()
        try:
            with saved_tensors_hooks(self._pack, self._unpack), Within(ambient.kernels, tape):
                return function(*args, **kwargs)
        except BaseException:
            before.put_back()
            raise
        finally:
            self._outputs = None  # it holds inputs of norms whose outputs nobody saved

    def _pack(self, tensor: torch.Tensor) -> KeptTensor:
        view = None if self._outputs is None else self._outputs.find(tensor)
        return KeptTensor(tensor.detach(), version_of(tensor)) if view is None else KeptTensor(view)

    def _unpack(self, saved: KeptTensor) -> torch.Tensor:
        kept = saved.tensor
        if saved.changed():
            raise ReconstructionError(
                "one of the variables needed for gradient computation has been modified by an inplace operation, or "
                "what a norm's or an activation's output is made of again has been, or was freed (a parameter that "
                "was sharded again before the layer behind its norm had its backward: put both into one unit)"
            )
        if isinstance(kept, SavedView):
            with self._lock:
                task = torch._C._current_graph_task_id()
                if task not in (-1, self._task):
                    self._task = task
                    torch.autograd.Variable._execution_engine.queue_callback(self._let_go)
                return self._made.get(kept)
        return kept  # type: ignore[return-value]

    def _let_go(self) -> None:
        with self._lock:
            self._made.clear()
            self._task = -1
