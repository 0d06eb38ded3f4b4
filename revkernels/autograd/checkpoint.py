# SPDX-License-Identifier: Apache-2.0
"""Recomputes what is not reversible from its kept inputs: the driver's other half, for layers between the chains.

A stem or a transition changes shapes, so its input cannot be reconstructed from its output. Its inputs are kept instead
(those that come from a chain are kept anyway, as its outputs), and its saved tensors are recomputed by the code that
recomputes branches: same random numbers, same autocast, batch statistics of the forward, running statistics updated
once, errors where a parameter or an input has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from revkernels.autograd.driver_backward import Rebuilding
from revkernels.autograd.early_recompute import leaf_comes_first, reach_first
from revkernels.autograd.fused.norm_context import Within, ambient
from revkernels.autograd.half_step import HalfStep
from revkernels.autograd.kept_tensors import Kept
from revkernels.autograd.recomputing import within_a_branch
from revkernels.autograd.state.rng_and_autocast import Surroundings, drawn, states_of, tensors_in
from revkernels.autograd.state.thread_state import ThreadState
from revkernels.autograd.state.versions import version_of
from revkernels.autograd.step_record import RecordedStep, frames_compiled
from revkernels.errors import ReconstructionError

__all__ = ["Checkpoint"]


class Checkpoint(Rebuilding):
    """One call of a function in grad mode, and all backwards through it.

    Args:
        function: a module, or any callable; what a plain callable reads is checked for changes as far as visible.
        args, kwargs: of the call. Tensors in them, also in lists, tuples and dicts, are the inputs that are kept.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(None, None)
        self._function = function
        leaves, self._structure = tree_flatten((args, kwargs))
        tensors: list[torch.Tensor] = []
        places: dict[int, int] = {}  # each tensor once: one in several places stays one
        self._leaves: list[tuple[int, Any]] = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                self._leaves.append((-1, leaf))
                continue
            if id(leaf) not in places:
                places[id(leaf)] = len(tensors)
                tensors.append(leaf)
            self._leaves.append((places[id(leaf)], None))
        self._wanted = [tensor.requires_grad for tensor in tensors]
        self._given = [(tensor, version_of(tensor)) for tensor in tensors]  # until the forward is over
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        self._surroundings = Surroundings(device, {})
        self.name = lambda k: f"the checkpointed {type(function).__name__}"
        self.kernels = ambient.kernels
        self._keep_inputs(tensors)

    def _keep_inputs(self, tensors: Sequence[torch.Tensor]) -> None:
        # Outside our own hooks: inside a branch of a chain, the chain's hooks take them, so they are recomputed.
        self._inputs = Kept.apply(torch.zeros((), requires_grad=True), *(tensor.detach() for tensor in tensors))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, and record everything that its recompute needs."""
        others = tuple(other for place, other in self._leaves if place < 0)
        step = RecordedStep(HalfStep(self._function, 0, (0,), others))
        self._steps.append(step)
        self._saved, self._dtypes = step.saved, step.dtypes
        snapshot, surroundings = step.snapshot, self._surroundings
        own = snapshot.generators
        before = surroundings.states() + states_of(own)
        self._hooks = hooks = saved_tensors_hooks(self._pack, self._unpack)
        before_all = ThreadState()
        try:
            with snapshot.turn:
                snapshot.take()
                compiled, since = frames_compiled(), torch.autograd._get_sequence_nr()
                with hooks, surroundings.guard, within_a_branch(), Within(self.kernels, step.tape(False)):
                    result = self._function(*args, **kwargs)
                if frames_compiled() != compiled or step.may_run_scripts():
                    step.note_nodes(result, [tensor for tensor, _ in self._given], since)
                snapshot.complete(step.counted())
                step.over()
            step.note_result(result)
            step.drawn = drawn(before, surroundings.states() + states_of(own), snapshot.own is None)
            if any(version_of(tensor) != version for tensor, version in self._given):
                raise ReconstructionError(
                    f"{self.name(0)} wrote to an input of its own in place, which it is to be recomputed from: make "
                    f"its first operation out of place (such as ReLU(inplace=False))"
                )
            for _, output in tensors_in(result) if step.saved else ():
                if leaf_comes_first(output, *(tensor for tensor, _ in self._given)):
                    reach_first(self, 0, output)
        except BaseException:
            before_all.put_back()
            raise
        finally:
            self._hooks, self._given = None, []
        self._first = 0 if step.saved else None
        self._kept = self._inputs if step.saved else None
        self._inputs = None
        return result

    def _pack(self, tensor: torch.Tensor) -> int:
        self._saved.append(tensor.shape)  # unlike a branch's, the tensor is not held: it may be large
        self._dtypes.append(tensor.dtype)
        return len(self._saved) - 1

    def _differentiates_too_early(self, k: int) -> str:
        return f"{self.name(k)} differentiates while it runs: of a checkpointed call nothing is kept to do so"

    def _fetch(self) -> None:
        self._rebuilt = list(
            self._kept_tensors(
                "an input of a checkpointed call was changed in place after the forward, and the backward starts from "
                "it: make the operation that changes it out of place"
            )
        )

    def _rebuild(self, k: int) -> None:
        self._frame = []
        inputs = [t.detach().requires_grad_(wanted) for t, wanted in zip(self._rebuilt, self._wanted, strict=True)]
        self._run_again(k, inputs)
        self._rebuilt = []
        self._rebuilt_all()
        self._cursor = k

    def _again(self, step: RecordedStep, inputs: Sequence[torch.Tensor]) -> Any:
        leaves = [other if place < 0 else inputs[place] for place, other in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        self._began = torch.autograd._get_sequence_nr()
        with Within(self.kernels, step.tape(True)):
            return self._function(*args, **kwargs)
