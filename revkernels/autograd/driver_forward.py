# SPDX-License-Identifier: Apache-2.0
"""The driver's forward: an ordinary autograd graph whose saved tensors are recomputed instead of kept.

A chain of reversible blocks is one recurrence over half-steps. Half-step k adds a branch of some streams to another:

    forward   s[target] <- s[target] + B[k](h)      h = s[source], or the sum of several sources
    inverse   s[target] <- s[target] - B[k](h)      the target is not a source, so h is the same both ways

With two streams and targets 0, 1, 0, 1 ... this is Algorithm 1 of Gomez et al. 2017, two half-steps a block. The
forward builds the same graph as plain torch, under saved-tensor hooks that store a token (half-step, index) in place of
each saved tensor. When the backward first unpacks a tensor of half-step k, branch k is recomputed from the same h: the
tensors it saves are collected, and its output is subtracted to reconstruct the stream. Only the streams, their
gradients and one branch's saved tensors are alive at a time, at any depth. Gradients flow through torch's own engine,
so hooks, DDP and frozen parameters need no handling here.

The backward is in `revkernels.autograd.driver_backward`. With a `Grid` the couplings are exact: streams are rounded to
the grid on entry and at every coupling, and are reconstructed bit for bit. With a `Keeping` (a memory budget) some
half-steps keep their saved tensors, and others the outputs of their slowest operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from revkernels import eager
from revkernels.autograd.accumulate import prepare
from revkernels.autograd.coupling import couple, enter
from revkernels.autograd.driver_backward import Rebuilding
from revkernels.autograd.early_recompute import leaf_comes_first, reach_first
from revkernels.autograd.exact_coupling import Grid
from revkernels.autograd.exact_coupling_int16 import FixedGrid
from revkernels.autograd.fused import fusion
from revkernels.autograd.fused.coupled_norm import Entry, Waiting, entry_of
from revkernels.autograd.fused.norm_context import Within, outputs_alone
from revkernels.autograd.half_step import HalfStep, check_aux, check_branch_output, resolved
from revkernels.autograd.kept_tensors import Kept, KeptTensor
from revkernels.autograd.ownership import both_tensors, has_memory, same_memory
from revkernels.autograd.planning.kept_ops import Noting
from revkernels.autograd.planning.offload import OffloadGroup
from revkernels.autograd.planning.planner import Keeping
from revkernels.autograd.planning.rematerialize import Outputs
from revkernels.autograd.recomputing import within_a_branch
from revkernels.autograd.state.known_branch import turn_to_run
from revkernels.autograd.state.rng_and_autocast import Surroundings, drawn, moved, states_of, tensors_in
from revkernels.autograd.state.versions import version_of
from revkernels.autograd.step_record import RearrangedStep, Rearrangement, RecordedStep, frames_compiled
from revkernels.errors import ReconstructionError
from revkernels.tracking import met_compiler

__all__ = ["Reversal"]


class Reversal(Rebuilding):
    """One call of a chain: its forward, and all backwards through it. State is stored here, never on a module.

    Args:
        streams: the streams, dense; none of them is ever written to.
        kernels: the backend that computes the couplings.
        keep: True stores activations as plain torch does; False recomputes them.
        side_inputs: the branches' other inputs by name, checked for changes.
        name: turns a half-step's number into words for error messages.
        grid: the grid of an exact coupling; None couples in floating point.
        keeping: what to keep under a memory budget; None recomputes everything.
    """

    def __init__(
        self,
        streams: Sequence[torch.Tensor],
        kernels: Any,
        keep: bool,
        side_inputs: dict[str, Any],
        name: Callable[[int], str],
        grid: Grid | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        super().__init__(grid, keeping)
        self.streams = list(streams)
        self._shown: tuple[torch.Tensor, ...] = ()
        self._twin: tuple[int, torch.Tensor] | None = None  # a stream's index, and the second output of its node
        self._waiting: Waiting | None = None  # the last coupling, deferred to the next branch's norm: `_entry`
        self._entry: Entry | None = None
        self.kernels, self.keep, self.name = kernels, keep, name
        self.aux: list[Any] = []
        self.recording = not keep and torch.is_grad_enabled()
        if torch.is_grad_enabled() and kernels is not eager:
            prepare()
        compiling = met_compiler()
        self._compiler = None if compiling is None else compiling.compiler()
        self._count = 0
        self.planned = 0  # the count after the half-steps that follow now, to locate errors
        #: For each stream, the last half-step that writes it before hooks or the caller see it; None if nobody does.
        self.last_written: dict[int, int] | None = None
        self.end: Any = None  # identifies its outputs: `revkernels.autograd.linked_calls`
        self._claimed: Any = None  # the previous end, while the call is reopened
        self._watched = 0  # side inputs of the calls before
        self._finished: tuple[Any, ...] = ()  # the state to return to if a reopened call fails
        if self.recording:
            self._surroundings = Surroundings(streams[0].device, side_inputs)
            self._states = self._surroundings.states()
            self._hooks = self._saving()

    @property
    def count(self) -> int:
        """The number of half-steps and rearrangements so far."""
        return self._count

    def _is_seen(self, index: int) -> bool:
        """Whether the stream has the value that hooks or the caller will see. Its gradient from a branch then flows
        through this very tensor, as in plain torch: its hooks and `retain_grad` see it, the engine accumulates it."""
        return self.last_written is not None and self.last_written.get(index, -1) < self._count

    def advance(self, step: HalfStep, following: HalfStep | None = None) -> None:
        """Run the next half-step. ``following``: the half-step directly after it."""
        kernels, streams, grid = self.kernels, self.streams, self._grid
        if self.recording:
            f = self._record(step)
        else:
            with turn_to_run(step.branch):
                f = self._run(step, None)
        index = step.target
        target = streams[index]
        if type(f) is tuple:
            f, aux = check_aux(f, self.name, self._count)
            self.aux.append(aux)
        check_branch_output(f, target, self.name, self._count)
        f = resolved(f)
        if self.recording:
            recorded = self._steps[-1]
            before = target if grid is None else grid.kept(target, index)
            recorded.strides = before.stride()
            if self._keeping is not None and self._keeping.steps_over(self._count):
                recorded.before = before.detach()
                if recorded.offloaded is not None:
                    recorded.before = recorded.offloaded.send(recorded.before)
            if recorded.offloaded is not None:
                recorded.offloaded.sealed(self._steps[-2].offloaded if self._count else None)
        self._count += 1
        if kernels is eager and grid is None:
            streams[index] = (target + f).to(target.dtype)
            return
        read_next = following is not None and following.sources == (index,) and not self._is_seen(index)
        if grid is not None:
            streams[index], twin = grid.couple(target, f, index)
            own = grid.fixed or kernels is not eager  # else the engine accumulates, as in plain torch
            read_next = read_next and own and self._entry_of(following) is None  # type: ignore[arg-type]
        elif read_next:
            self._entry = self._entry_of(following)  # type: ignore[arg-type]
            if self._entry is not None:
                self._waiting = (index, target, f)
                return
        if grid is None:
            streams[index], twin = couple(target, f, kernels, None)
        if read_next:
            self._twin = (index, twin)

    def rearrange(self, rearrangement: Rearrangement) -> None:
        """Rearrange the elements of the streams. Not supported with a grid or a memory budget."""
        before, self._twin = self.streams, None
        self.streams = list(rearrangement.there(*before))
        if self.recording:
            self._steps.append(RearrangedStep(rearrangement, before))  # type: ignore[arg-type]
        self._count += 1

    def _entry_of(self, step: HalfStep) -> Entry | None:
        # torch.compile fuses the branch itself, and has to see all of it.
        grid = self._grid
        if self._compiler is not None or (grid is not None and (grid.fixed or grid.narrow(step.branch) is not None)):
            return None
        return entry_of(step, self.kernels)

    def _run(self, step: HalfStep, recorded: RecordedStep | None) -> Any:
        """Compute the branch's input from the streams, and call the branch."""
        sources, streams = step.sources, self.streams
        waiting, self._waiting = self._waiting, None
        entry, self._entry = (self._entry_of(step) if waiting is None else self._entry), None
        with Within(self.kernels, outputs_alone() if recorded is None else recorded.tape(False)):
            normed = None
            if entry is not None:
                normed = entry.apply(streams, sources[0], waiting, self.kernels, self._is_seen(sources[0]))
            if normed is None:
                h = self._entered(sources[0])
                watched = h if self._grid is not None and self._grid.fixed else streams[sources[0]]
                if len(sources) > 1:
                    for source in sources[1:]:
                        h = h + self._entered(source)
                    watched = h
            else:
                h = watched = streams[sources[0]]
            if recorded is not None:
                recorded.needs_grad = h.requires_grad
                recorded.entry = None if normed is None else entry
            version = version_of(watched)
            compiled, began = (0, 0) if recorded is None else (frames_compiled(), torch.autograd._get_sequence_nr())
            f = self._call(step, h, normed)
        if version_of(watched) != version:
            raise ReconstructionError(
                f"{self.name(self._count)} wrote to its input in place, a stream that the backward needs: make the "
                f"branch's first operation out of place (such as ReLU(inplace=False))"
            )
        if recorded is not None and (frames_compiled() != compiled or recorded.may_run_scripts()):
            recorded.note_nodes(f, h, began)
        if recorded is not None:
            for output in [tensor for _, tensor in tensors_in(f)] if type(f) is tuple else (f,):
                if leaf_comes_first(output, h):
                    reach_first(self, self._count, output)
        return f

    def _entered(self, index: int) -> torch.Tensor:
        """The stream as a branch's input: its gradient is accumulated by our own node."""
        twin, self._twin = self._twin, None
        if twin is not None and twin[0] == index:
            return twin[1]
        seen = self._is_seen(index)
        if isinstance(self._grid, FixedGrid):
            self.streams[index], h = self._grid.read(self.streams[index], index, seen)
            return h
        s = h = self.streams[index]
        if not seen and self.kernels is not eager and s.requires_grad and torch.is_grad_enabled():
            self.streams[index], h = enter(s, self.kernels)
        return h

    def _record(self, half_step: HalfStep) -> Any:
        """Run the branch, and record everything that its recompute needs."""
        step = RecordedStep(half_step)
        self._steps.append(step)
        self._saved, self._dtypes = step.saved, step.dtypes
        snapshot = step.snapshot
        own = snapshot.generators
        before = self._states + states_of(own) if own else self._states
        keeping, noting = self._keeping, None
        if keeping is not None:
            self._whole = keeping.whole(self._count)
            self._mode = noting = None if self._compiler is not None else keeping.mode(self._count)
            if isinstance(noting, Noting):
                noting.generators = [*self._surroundings.shared, *own]
            if keeping.makes_again(self._count):
                step.outputs = Outputs()
        with snapshot.turn:
            snapshot.take()
            if keeping is not None and keeping.away(self._count):
                at_home = (t.untyped_storage().data_ptr() for t in snapshot.tensors() if has_memory(t))
                step.offloaded = OffloadGroup(frozenset(at_home))
            with self._hooks, self._surroundings.guard, within_a_branch():
                since = 0 if keeping is None else torch.autograd._get_sequence_nr()
                f = self._run(half_step, step)
            snapshot.complete(step.counted())
            step.over()
        if self._grid is None:  # else checksums detect a difference
            step.note_result(f, self.streams[half_step.target])
        if keeping is not None and keeping.meter is not None:
            keeping.meter.forward_ran(self._count, f, since)
        step.outputs = None
        if isinstance(noting, Noting):
            step.kept = noting.settle()
        self._open = []
        after = self._surroundings.states()
        step.drawn = drawn(before, after + states_of(own) if own else after, snapshot.own is None)
        if moved(step.drawn):  # otherwise all steps share one copy
            self._states = after
        return f

    def _call(self, step: HalfStep, h: torch.Tensor, normed: Any = None) -> Any:
        if self._grid is not None and (narrow := self._grid.narrow(step.branch)) is not None:
            h = h.to(narrow)
        mode, self._mode = self._mode, None
        if mode is not None:
            with mode:
                return self._call(step, h, normed)
        compiling = met_compiler()
        if compiling is None:
            return fusion.call_branch(step, h, self.kernels, normed)
        if self._compiler is None:
            return compiling.call(None, fusion.call_branch, step, (h, self.kernels, normed), {})
        # The recompute is compiled if and only if the forward was.
        return compiling.call(self._compiler, step.branch, h, step.args, step.kwargs)

    def _again(self, step: RecordedStep, h: torch.Tensor) -> Any:
        """Recompute the branch, as `_run` ran it, from the reconstructed stream."""
        ready, self._ready = self._ready, None
        with Within(self.kernels, step.tape(True)):
            normed = None if step.entry is None else step.entry.again(h, ready)
            self._began = torch.autograd._get_sequence_nr()
            return self._call(step.half_step, h, normed)

    def adopt(self, streams: Any, whose: str) -> None:
        """Replace the streams by what a module's hooks returned: torch may wrap them, but values must not change."""
        theirs = streams if type(streams) is tuple else ()
        alike = both_tensors if self.keep and self._grid is None else same_memory
        if len(theirs) != len(self.streams) or not all(map(alike, theirs, self._shown)):
            raise ReconstructionError(
                f"a hook of {whose} replaced the streams. They are reconstructed by undoing the branches, and a "
                f"hook cannot be undone: put the change into a branch, or set activations='store' (where the hook is "
                f"the cast of FSDP's mixed precision: cast_forward_inputs=False)"
            )
        if self.recording:
            self._states = self._surroundings.states()  # a hook's random numbers are not the next branch's
        self.streams = list(theirs) if self._grid is None else self._grid.adopt(list(theirs))
        self._twin = None

    def show(self) -> tuple[torch.Tensor, ...]:
        """The current streams, as hooks and the caller see them."""
        self._shown = tuple(self.streams) if self._grid is None else tuple(self._grid.values(self.streams))
        return self._shown

    def finish(self, outputs: Sequence[torch.Tensor], split: Callable[..., Sequence[torch.Tensor]]) -> None:
        """Keep ``outputs``, which the backward starts from; ``split`` recovers the streams from them."""
        grid = self._grid
        if grid is not None:
            grid.finish()
        self._strides = [
            (stream if grid is None else grid.kept(stream, index)).stride() for index, stream in enumerate(self.streams)
        ]
        keeping = self._keeping
        if keeping is not None and keeping.meter is not None:
            keeping.meter.forward_over()
        self._first = next(
            (k for k, step in enumerate(self._steps) if step.saved and not (keeping and keeping.whole(k))), None
        )
        if self._first is not None:  # some branch saved tensors, perhaps for an aux output only
            self._kept = _keep(outputs)
            self._split = split
        elif keeping is not None and any(step.saved for step in self._steps):
            # Nothing reads this, and it is freed at once. But a checkpoint around the chain compares what its two runs
            # save, and hands the second run's tensors to the first, which may have run without a plan.
            _keep(outputs)
        self._finished = ()
        self.release()

    def claim(self, end: Any, streams: Sequence[torch.Tensor], kernels: Any) -> bool:
        """Claim this call for more half-steps from ``streams``, the outputs of `finish` that ``end`` identifies.

        ``kernels`` must be this call's; a rearrangement passes None. Only the first claim succeeds. The backward then
        starts from the later outputs, and these are reconstructed like all other streams.
        """
        with self._lock:
            may = (
                self.end is end
                and (self._hooks is None and self._kept is not None and self._task == -1)  # no forward or backward runs
                and self._grid is None
                and self._keeping is None
                and kernels in (None, self.kernels)
                and [stream.stride() for stream in streams] == self._strides
                and self._surroundings.are_same()
            )
            if may:
                self.end, self._claimed = None, end
            return may

    def reopen(self, streams: Sequence[torch.Tensor], side_inputs: dict[str, Any], name: Callable[[int], str]) -> None:
        """Continue a claimed call from the outputs of the last `finish`, with more half-steps and another `finish`.

        ``name`` has the words for the added half-steps, counting from 0.
        """
        self.name.add(self._count, name)  # type: ignore[attr-defined]
        self._finished = (len(self._steps), self._kept, self._split, self._strides, self._first)
        self._watched = len(self._surroundings.side_inputs)
        self.streams, self._kept = list(streams), None
        self._surroundings.extend(side_inputs)
        self._states = self._surroundings.states()
        self._hooks = self._saving()

    def shut(self) -> None:
        """After a failure since `reopen`: return to the state that `finish` left."""
        self._count, self._kept, self._split, self._strides, self._first = self._finished
        del self._steps[self._count :], self._surroundings.side_inputs[self._watched :]
        self.end, self._finished = self._claimed, ()
        self.release()

    def release(self) -> None:
        """Drop the streams: they hold the graph, whose hooks hold this object, a reference cycle that gc cannot see."""
        self._twin = self._hooks = self._waiting = self._entry = None
        self.streams, self.aux, self._open, self._states, self._shown = [], [], [], [], ()
        if isinstance(self._grid, FixedGrid):
            self._grid.integers = {}

    def _saving(self) -> saved_tensors_hooks:
        # Only under a memory budget are saved tensors kept whole; otherwise skip `_pack`'s check.
        return saved_tensors_hooks(super()._pack if self._keeping is None else self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> int | KeptTensor:
        if not self._whole:
            return super()._pack(tensor)
        self._saved.append(tensor.shape)
        self._dtypes.append(tensor.dtype)
        step, k = self._steps[-1], len(self._steps) - 1
        offloaded, again = step.offloaded, None if step.outputs is None else step.outputs.find(tensor)
        if again is not None:
            if offloaded is not None:
                again.output.leave(offloaded)
            return KeptTensor(again, step=k)
        kept = tensor.detach()
        return KeptTensor(kept if offloaded is None else offloaded.send(kept), version_of(tensor), k)


def _keep(outputs: Sequence[torch.Tensor]) -> Any:
    return Kept.apply(torch.zeros((), requires_grad=True), *(output.detach() for output in outputs))
