# SPDX-License-Identifier: Apache-2.0
"""The driver's backward: reconstructs the streams and recomputes saved tensors when autograd asks for them.

The forward is in `revkernels.autograd.driver_forward`.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from revkernels.autograd.as_in_forward import run_as_in_forward
from revkernels.autograd.exact_coupling import Grid
from revkernels.autograd.fused.coupled_norm import Ready
from revkernels.autograd.half_step import resolved
from revkernels.autograd.kept_tensors import KeptTensor
from revkernels.autograd.ownership import has_memory, memory_is_free
from revkernels.autograd.planning.kept_ops import Replaying
from revkernels.autograd.planning.offload import OffloadedTensor, Prefetcher
from revkernels.autograd.planning.planner import Keeping
from revkernels.autograd.planning.rematerialize import AtHand, Outputs, SavedView
from revkernels.autograd.state.locks import leave_turns, turns_taken
from revkernels.autograd.state.rng_and_autocast import Surroundings, refuses_a_race, strayed
from revkernels.autograd.state.versions import version_of
from revkernels.autograd.step_record import Frame, RearrangedStep, RecordedStep, frames_compiled
from revkernels.errors import ReconstructionError

INDEX_BITS = 24  # a token is (half-step << 24) | index of the saved tensor
_local = threading.local()
INDEX_MASK = (1 << INDEX_BITS) - 1
#: The C functions below torch's own, called directly: every saved tensor calls them.
graph_task, in_inference_mode = torch._C._current_graph_task_id, torch.is_inference_mode_enabled


class Rebuilding:
    """The part that all backwards through one call of a chain share. `Reversal` adds the forward."""

    kernels: Any
    name: Callable[[int], str]
    _surroundings: Surroundings
    _again: Callable[..., Any]
    _split: Callable[..., Sequence[torch.Tensor]]
    #: Called with the reconstructed input, once a backward.
    witness: Callable[[list[torch.Tensor]], None] | None = None

    def __init__(self, grid: Grid | None, keeping: Keeping | None) -> None:
        self._grid, self._keeping = grid, keeping
        self._steps: list[RecordedStep] = []
        self._compiled = frames_compiled()
        self._saved: list[torch.Size] = []  # shapes, of the current half-step
        self._dtypes: list[torch.dtype] = []
        self._open: list[torch.Tensor] = []  # its saved tensors, for a branch that calls autograd itself
        self._whole = False  # the current half-step keeps its saved tensors
        self._mode: Any = None  # a dispatch mode for the next branch
        self._outputs: Outputs | None = None  # of the half-step being measured
        self._prefetcher = Prefetcher()
        self._made = AtHand()  # the outputs that this backward has recomputed
        self._strides: list[tuple[int, ...]] = []  # of the outputs; restored, for other strides give other bits
        self._strides_now: list[tuple[int, ...]] = []  # of the reconstructed streams
        self._lock = threading.RLock()
        self._task = -1  # autograd's number of the backward that runs, if one does
        self._cursor = 0  # the half-steps that it has not undone yet
        self._hooks: Any = None
        self._kept: Any = None  # a tensor whose grad_fn holds the outputs
        self._frame: Frame = []
        self._first: int | None = None  # the first half-step that saved something
        self._began = 0  # autograd's sequence number when the recompute of the branch began, after its norm
        self._unread: set[int] = set()  # the tensors of its frame that were not unpacked yet
        self._ready: Ready | None = None  # the norm's output of half-step `_cursor - 1`, computed ahead
        self._rebuilt: list[torch.Tensor] = []  # the streams before half-step `_cursor`, while a backward runs

    def _pack(self, tensor: torch.Tensor) -> int | KeptTensor:
        self._saved.append(tensor.shape)
        self._dtypes.append(tensor.dtype)
        self._open.append(tensor)
        return (len(self._steps) - 1) << INDEX_BITS | (len(self._saved) - 1)

    def _unpack(self, token: int | KeptTensor) -> torch.Tensor:
        if in_inference_mode():  # the recompute would record no graph
            with torch.inference_mode(False):
                return self._unpack(token)
        if type(token) is not int:
            return self._unpack_kept(token)  # type: ignore[arg-type]
        k, index, task = token >> INDEX_BITS, token & INDEX_MASK, graph_task()
        if self._hooks is not None and self._kept is None:  # the forward is not over
            if k == len(self._steps) - 1 and index < len(self._open):
                return self._open[index]
            raise ReconstructionError(self._differentiates_too_early(k))
        if task == -1:
            raise ReconstructionError("a reversible chain's saved tensors exist only while a backward runs")
        meter = None if self._keeping is None else self._keeping.meter
        if meter is not None:
            meter.asked()
        with self._lock:
            if k != self._cursor or task != self._task:  # checked for every saved tensor
                self._reach(k, task)
            tensor, version = self._frame[index]
            if k == self._first:
                self._unread.discard(index)
                if not self._unread:
                    _local.read_up = weakref.ref(self)
        if version >= 0 and tensor._version != version:
            raise ReconstructionError(
                f"{self.name(k)}: a tensor needed for its gradient was changed in place inside the branch "
                f"(version {version}, now {tensor._version})"
            )
        if meter is not None:
            meter.look(k)
        return tensor

    def _reach(self, k: int, task: int) -> None:
        """Recompute down to half-step k for this backward, and no further."""
        turns = turns_taken()
        try:
            if task != self._task or k > self._cursor:
                self._begin(task)
            while self._cursor > k:
                _as_it_is(self._step_back)
        except BaseException:
            leave_turns(turns)
            self._end()
            raise

    def reach(self, k: int) -> None:
        """Pre-hook: a gradient has reached branch k's output, and may reach a leaf before any saved tensor is unpacked.

        Does nothing if half-step k kept all its saved tensors, or comes before the first that must be recomputed.
        """
        if in_inference_mode():
            with torch.inference_mode(False):
                self.reach(k)
        elif self._kept is not None and self._first is not None and k >= self._first and self._steps[k].before is None:
            with self._lock:
                self._reach(k, graph_task())

    def _differentiates_too_early(self, k: int) -> str:
        return (
            f"{self.name(len(self._steps) - 1)} differentiates through {self.name(k)}; inside a chain a branch can "
            f"only differentiate what it computed itself"
        )

    def _unpack_kept(self, token: KeptTensor) -> torch.Tensor:
        k, kept = token.step, token.tensor
        if token.changed():
            problem = self._steps[k].snapshot.problem() or self._surroundings.problem()
            problem = problem or "a tensor needed for its gradient was changed in place, or its memory was freed"
            raise ReconstructionError(f"{self.name(k)}: {problem}")
        tensor = self._at_hand(k, kept)
        task = graph_task()
        if task != -1 and not (self._hooks is not None and self._kept is None):  # the forward is over
            self._keeping.watch(task, weakref.WeakMethod(self._unload))  # type: ignore[union-attr]
            with self._lock:
                if task == self._task and self._cursor == k + 1 and self._steps[k].before is not None:
                    self._step_back()
        return tensor

    def _at_hand(self, k: int, kept: torch.Tensor | OffloadedTensor | SavedView) -> torch.Tensor:
        """A saved tensor of half-step k: as it is, copied back from host memory, or recomputed."""
        if isinstance(kept, torch.Tensor):
            return kept
        with self._lock:
            self._prefetcher.come(self._steps[k].offloaded, self._steps[k - 1].offloaded if k else None)
            return kept.here() if isinstance(kept, OffloadedTensor) else self._made.get(kept, k)

    def _unload(self) -> None:
        with self._lock:
            self._prefetcher.let_go()
            self._made.clear()

    def _step_back(self) -> None:
        """Undo one more half-step: by recomputing it, or with its kept stream."""
        k = self._cursor - 1
        step = self._steps[k]
        if type(step) is RearrangedStep:
            self._rebuilt, self._strides_now = step.undo(self._rebuilt), list(step.strides)
            self._frame, self._ready, self._cursor = [], None, k
            return
        if step.before is None:
            self._rebuild(k)
            return
        index = step.half_step.target
        before, step.before = step.before, None
        self._rebuilt[index] = before.here() if isinstance(before, OffloadedTensor) else before
        self._strides_now[index] = step.strides
        self._frame, self._ready, self._cursor = [], None, k

    def _begin(self, task: int) -> None:
        """Start a backward, or restart one, from the kept outputs, discarding the state of any earlier one."""
        other = getattr(_local, "read_up", lambda: None)()
        if other is not None and other is not self:
            other._let_go(task)
        self._fetch()
        if self._keeping is not None:
            self._keeping.watch(task, weakref.WeakMethod(self._unload))
            if self._keeping.meter is not None:
                self._keeping.meter.backward_begins()
        self._task, self._cursor, self._frame, self._ready = task, len(self._steps), [], None
        self._unread = {-1}  # until the first frame is there
        self._hooks = saved_tensors_hooks(self._keep, self._kept_now)
        # Weak: the engine frees this object and the outputs with the chain's last node, before the whole backward ends.
        over = functools.partial(_over, weakref.ref(self), self._grid, task)
        torch.autograd.Variable._execution_engine.queue_callback(over)

    def _fetch(self) -> None:
        """Load the kept outputs: the streams that a backward starts from."""
        outputs = self._kept_tensors(
            "the output of the reversible chain was changed in place after the forward, and the backward starts from "
            "it: make the operation that follows the chain out of place"
        )
        keep = torch.Tensor.detach if self._grid is None else self._grid.stored
        self._rebuilt = [keep(stream) for stream in self._split(*outputs)]
        self._strides_now = list(self._strides)
        if self._grid is not None:
            self._grid.begin()

    def _kept_tensors(self, if_changed: str) -> Sequence[torch.Tensor]:
        try:
            tensors: Sequence[torch.Tensor] = self._kept.grad_fn.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise ReconstructionError(f"{if_changed}. ({error})") from None
        return tensors

    def _let_go(self, task: int) -> None:
        """Drop the first branch's saved tensors once the last one was unpacked, before the whole backward is over: of
        many chains in one graph, only the active one holds a branch's tensors. If asked for again, start over."""
        if self._lock.acquire(blocking=False):  # if another thread uses it, leave it
            try:
                if self._task == task and not self._unread:
                    self._frame, self._rebuilt, self._cursor, self._ready = [], [], -1, None
            finally:
                self._lock.release()

    def _end(self, task: int | None = None) -> None:
        with self._lock:  # another thread may be about to begin
            if task is not None and task != self._task:
                return
            self._task, self._frame, self._rebuilt, self._hooks, self._ready = -1, [], [], None, None
            if self._grid is not None and task is not None:
                self._grid.end()

    def _rebuild(self, k: int) -> None:
        """Recompute branch k, whose saved tensors become the frame, and reconstruct the target before half-step k."""
        self._frame = []  # first, so that two branches' tensors are never alive together
        step = self._steps[k]
        index, sources = step.half_step.target, step.half_step.sources
        higher_order = torch.is_grad_enabled()
        meter = None if self._keeping is None else self._keeping.meter
        if self._keeping is not None:
            self._keeping.rebuilds(k)
        self._outputs = step.outputs = None if meter is None else Outputs()  # also drops those of a failed recompute
        if meter is not None:
            self._mode = meter.begin(k, [*self._surroundings.shared, *step.snapshot.generators])
        elif step.kept:
            self._mode, step.kept = Replaying(step.kept), {}
        h = self._read(sources)
        if step.needs_grad:
            h.requires_grad_()
        f = self._run_again(k, h)
        target = self._rebuilt[index]
        read = [self._rebuilt[source] for source in sources] if meter is not None else []
        if k == 0 and self._grid is None and self.witness is None:  # nothing reads the target's first value
            self._rebuilt = []
        else:
            f = resolved((f[0] if type(f) is tuple else f).detach())
            # Reconstruct in place, unless the memory is the caller's, or a hook or a gradient's graph holds it.
            free = not higher_order and target.stride() == step.strides and memory_is_free(target)
            self._rebuilt[index] = target if free or not has_memory(target) else _empty(target, step.strides)
            self._strides_now[index] = step.strides
            self._uncouple(k, index, target, f)
        if meter is not None:
            meter.end(k, step, self._frame, read, target.numel() * target.element_size())
            self._outputs = step.outputs = None
        if k == self._first:
            self._rebuilt_all()
        self._cursor = k

    def _rebuilt_all(self) -> None:
        """The first half-step that saved something has been recomputed: nothing is left to run."""
        self._unread, self._hooks = set(range(len(self._frame))), None  # breaks a reference cycle

    def _run_again(self, k: int, h: Any) -> Any:
        """Recompute branch k under the forward's conditions; its saved tensors go to the frame. Returns its output."""
        step, surroundings = self._steps[k], self._surroundings
        with step.snapshot.turn:
            if (problem := step.snapshot.problem() or surroundings.problem()) is not None:
                raise ReconstructionError(f"{self.name(k)}: {problem}")
            run = functools.partial(self._run_once_more, k, h)
            f, began = run_as_in_forward(step.snapshot, surroundings, step.drawn, run, torch.is_grad_enabled())
        if (problem := step.difference(self._frame, f, h, began, self._compiled)) is not None:
            raise ReconstructionError(f"{self.name(k)}: {problem}")
        return f

    def _run_once_more(self, k: int, h: Any) -> tuple[Any, int]:
        """Its output, and autograd's sequence number when the branch began."""
        step = self._steps[k]
        with self._hooks:
            f = self._again(step, h)
        began = self._began
        if (problem := step.snapshot.misplaced()) is not None:
            raise ReconstructionError(f"{self.name(k)}: {problem}")
        if step.drawn and (astray := strayed(step.drawn)) and step.saved_alike(self._frame):
            with refuses_a_race(self.name(k), step.snapshot.hooks.lazy, astray):
                self._again(step, h)
        return f, began

    def _uncouple(self, k: int, index: int, target: torch.Tensor, f: torch.Tensor) -> None:
        """Reconstruct the target's value before half-step k, which added f, from its value ``target`` after it."""
        out, before, grid = self._rebuilt[index], self._steps[k - 1] if k else None, self._grid
        if grid is not None:
            grid.uncouple(k, out, target, f)
        elif (
            before is not None
            and before.entry is not None
            and before.half_step.sources == (index,)
            and before.entry.uncouples(out, target, f)
        ):
            self._ready = before.entry.uncouple(out, target, f)
        elif has_memory(out):
            self.kernels.uncouple(out, target, f, None)
        else:  # a DTensor or nested tensor, say, may not support out=
            self._rebuilt[index] = (target - f).to(target.dtype)
        if k == 0:
            if self.witness is not None:
                self.witness(self._rebuilt if grid is None else [grid.value(stream) for stream in self._rebuilt])
            self._rebuilt = []

    def _read(self, sources: Sequence[int]) -> torch.Tensor:
        """The branch's input from the reconstructed streams: the same values in the same strides."""
        for index in sources:
            stream = self._rebuilt[index]
            if stream.stride() != self._strides_now[index]:  # it is a view of the caller's output
                self._rebuilt[index] = _empty(stream, self._strides_now[index]).copy_(stream)
        grid = self._grid
        streams = [self._rebuilt[index] if grid is None else grid.value(self._rebuilt[index]) for index in sources]
        h = streams[0].detach()
        for stream in streams[1:]:
            h = h + stream
        return h

    def _keep(self, tensor: torch.Tensor) -> int:
        frame = self._frame
        if self._outputs is not None and (view := self._outputs.find(tensor)) is not None:
            self._outputs.views.append((view, len(frame)))
        frame.append((tensor.detach(), version_of(tensor)))
        return len(frame) - 1

    def _kept_now(self, index: int) -> torch.Tensor:
        """Unpack for a branch that calls autograd itself; the recompute's graph is used for nothing else."""
        if index >= len(self._frame):
            raise ReconstructionError(
                "something is differentiated that a branch left behind when it was recomputed, whose tensors are gone: "
                "take what its forward has left, or return it beside the branch's output, as (f, aux)"
            )
        return self._frame[index][0]


def _as_it_is(function: Callable[[], None]) -> None:
    """Call it uncompiled: torch.compile also traces our frames when it compiles a backward."""
    if "torch._dynamo" in sys.modules:
        from revkernels.autograd.compiling import uncompiled  # slow unless dynamo is already imported

        uncompiled(function)
    else:
        function()


def _over(ref: weakref.ref[Rebuilding], grid: Grid | None, task: int) -> None:
    """A backward is over; the call of the chain may have been freed."""
    reversal = ref()
    if reversal is not None:
        reversal._end(task)
    elif grid is not None:
        grid.end()


def _empty(like: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    return like.new_empty_strided(like.shape, strides)  # keeps its class
