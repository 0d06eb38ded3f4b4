# SPDX-License-Identifier: Apache-2.0
"""The backward half of the driver: streams and a branch's saved tensors, rebuilt when autograd asks for them.

See `revkernels.autograd.driver_forward`, which is the forward half.
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

from revkernels.autograd.exact_coupling import Grid
from revkernels.autograd.fused.coupled_norm import Ready
from revkernels.autograd.half_step import resolved
from revkernels.autograd.kept_tensors import KeptTensor
from revkernels.autograd.ownership import has_memory, memory_is_free
from revkernels.autograd.planning.offload import OffloadedTensor, Prefetcher
from revkernels.autograd.planning.planner import Keeping, Replaying
from revkernels.autograd.planning.rematerialize import AtHand, Outputs, SavedView
from revkernels.autograd.recomputing import recomputes, set_recomputing
from revkernels.autograd.state.attributes import attributes_of, put_attributes_back
from revkernels.autograd.state.rewinding import put_back
from revkernels.autograd.state.rng_and_autocast import Surroundings, refuses_a_race, strayed
from revkernels.autograd.state.versions import version_of
from revkernels.autograd.step_record import Frame, RearrangedStep, RecordedStep
from revkernels.errors import ReconstructionError

INDEX_BITS = 24  # a token is (half-step << 24) | index of the saved tensor
_local = threading.local()
INDEX_MASK = (1 << INDEX_BITS) - 1
#: What torch.set_grad_enabled calls, without its object, and other things that every half-step or saved tensor asks.
set_grad_enabled = torch._C._set_grad_enabled
graph_task, in_inference_mode = torch._C._current_graph_task_id, torch.is_inference_mode_enabled


class Rebuilding:
    """What all backwards through one call of a chain have in common. `Reversal` adds the forward."""

    kernels: Any
    name: Callable[[int], str]
    _surroundings: Surroundings
    _again: Callable[..., Any]
    _split: Callable[..., Sequence[torch.Tensor]]
    #: Is given the rebuilt input, once a backward.
    witness: Callable[[list[torch.Tensor]], None] | None = None

    def __init__(self, grid: Grid | None, keeping: Keeping | None) -> None:
        self._grid, self._keeping = grid, keeping
        self._steps: list[RecordedStep] = []
        self._saved: list[torch.Size] = []  # of the half-step under way
        self._dtypes: list[torch.dtype] = []
        self._open: list[torch.Tensor] = []  # its saved tensors, for a branch that differentiates while it runs
        self._whole = False  # the half-step under way keeps what it saves
        self._mode: Any = None  # to run the next branch in
        self._prefetcher = Prefetcher()
        self._outputs: Outputs | None = None  # of the half-step that is measured
        self._made = AtHand()  # outputs that were made again in this backward
        # Strides are part of a stream's value, since others give other bits: of the outputs, and of what is rebuilt.
        self._strides: list[tuple[int, ...]] = []
        self._strides_now: list[tuple[int, ...]] = []
        self._lock = threading.RLock()
        self._task, self._cursor = -1, 0
        self._hooks: Any = None
        self._kept: Any = None  # a tensor whose node holds the outputs
        self._frame: Frame = []
        self._first: int | None = None  # the first half-step that saved something
        self._began = 0  # autograd's count of its nodes when the branch itself began, behind its norm, to run again
        self._unread: set[int] = set()  # the tensors of its frame that nobody has asked for yet
        self._ready: Ready | None = None  # what the norm of half-step `_cursor - 1` makes of its stream
        self._rebuilt: list[torch.Tensor] = []  # the streams before half-step `_cursor`, while a backward runs

    def _pack(self, tensor: torch.Tensor) -> int | KeptTensor:
        self._saved.append(tensor.shape)
        self._dtypes.append(tensor.dtype)
        self._open.append(tensor)
        return (len(self._steps) - 1) << INDEX_BITS | (len(self._saved) - 1)

    def _unpack(self, token: int | KeptTensor) -> torch.Tensor:
        if in_inference_mode():  # where a branch that is run again would record nothing
            with torch.inference_mode(False):
                return self._unpack(token)
        if type(token) is not int:
            return self._unpack_kept(token)  # type: ignore[arg-type]
        k, index = token >> INDEX_BITS, token & INDEX_MASK
        task = graph_task()
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
            if k != self._cursor or task != self._task:  # asked for every saved tensor
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
        """Have half-step k rebuilt, in this backward, and none before it."""
        try:
            if task != self._task or k > self._cursor:
                self._begin(task)
            while self._cursor > k:
                _as_it_is(self._step_back)
        except BaseException:
            self._end()
            raise

    def reach(self, k: int) -> None:
        """A gradient has come to what branch k returned, and may leave it before anything saved is asked for.

        Nothing is run again that has kept all that it saved, or that nothing to be rebuilt lies before.
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
        """A saved tensor of half-step k: as it is, back from host memory, or made again."""
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
        """Undo the last half-step that is not undone: by running it again, or with what it has kept."""
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
        """A backward starts, or starts over: from the kept outputs, whatever an earlier one left."""
        other = getattr(_local, "read_up", lambda: None)()
        if other is not None and other is not self:
            other._let_go(task)
        self._fetch()
        if self._keeping is not None:
            self._keeping.watch(task, weakref.WeakMethod(self._unload))
            if self._keeping.meter is not None:
                self._keeping.meter.backward_begins()
        self._task, self._cursor, self._frame, self._ready = task, len(self._steps), [], None
        self._unread = {-1}  # of a frame that is still to come
        self._hooks = saved_tensors_hooks(self._keep, self._kept_now)
        # Not held until the backward is over: with the last of its nodes the engine lets go of it, and of the outputs.
        over = functools.partial(_over, weakref.ref(self), self._grid, task)
        torch.autograd.Variable._execution_engine.queue_callback(over)

    def _fetch(self) -> None:
        """Read the kept outputs: the streams that a backward starts from."""
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
        """Drop what the first branch saved, after its last tensor was read and before the backward as a whole is over:
        of many chains in one graph, only the one at work holds a branch's tensors. Asked once more, we start over.
        """
        if self._lock.acquire(blocking=False):  # in use by another thread, it is not ours to empty
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
        """Run branch k again: what it saves becomes the frame, and the target what it was before half-step k."""
        self._frame = []  # first of all: one kept frame more, and memory would grow with depth
        step = self._steps[k]
        index, sources = step.half_step.target, step.half_step.sources
        higher_order = torch.is_grad_enabled()
        meter = None if self._keeping is None else self._keeping.meter
        if self._keeping is not None:
            self._keeping.rebuilds(k)
        self._outputs = step.outputs = None if meter is None else Outputs()  # whatever one that failed has left
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
        if k == 0 and self._grid is None and self.witness is None:  # nobody reads what the first half-step added to
            self._rebuilt = []
        else:
            f = resolved((f[0] if type(f) is tuple else f).detach())
            # Written over, unless it is the caller's, or a hook or a gradient's graph holds on to it.
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
        """The frame is that of the first half-step that saved something: there is nothing more to run."""
        self._unread, self._hooks = set(range(len(self._frame))), None  # hooks hold us, and we them

    def _run_again(self, k: int, h: Any) -> Any:
        """Run branch k as it ran in the forward: what it saves is the frame. Returns what it returns."""
        step, higher_order = self._steps[k], torch.is_grad_enabled()
        with step.snapshot.turn:
            problem = step.snapshot.problem() or self._surroundings.problem()
            if problem is not None:
                raise ReconstructionError(f"{self.name(k)}: {problem}")
            outer, surroundings, undo = recomputes(), None, None
            is_same = step.snapshot.is_same()
            attributes = attributes_of(step.snapshot.looked_at(is_same))
            try:  # memory may run out at any of these
                set_recomputing(True)
                surroundings = self._surroundings.restore(step.drawn)
                undo = step.snapshot.restore(is_same)
                set_grad_enabled(True)
                with self._hooks:
                    f = self._again(step, h)
                began = self._began
                if (problem := step.snapshot.misplaced()) is not None:
                    raise ReconstructionError(f"{self.name(k)}: {problem}")
                if step.drawn and strayed(step.drawn):
                    with refuses_a_race(self.name(k), step.snapshot.hooks.lazy):
                        self._again(step, h)
            finally:  # what this thread would keep comes first: an interrupt may end this too
                set_recomputing(outer)
                set_grad_enabled(higher_order)
                if undo:
                    put_back(undo)
                put_attributes_back(attributes)
                if surroundings is not None:
                    surroundings.close()
        if (problem := step.difference(self._frame, f, h, began)) is not None:
            raise ReconstructionError(f"{self.name(k)}: {problem}")
        return f

    def _uncouple(self, k: int, index: int, target: torch.Tensor, f: torch.Tensor) -> None:
        """Make of ``target``, which half-step k has added f to, what it was before."""
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
        else:  # a DTensor, say, or a nested one: written nowhere, for it may know no out=
            self._rebuilt[index] = (target - f).to(target.dtype)
        if k == 0:
            if self.witness is not None:
                self.witness(self._rebuilt if grid is None else [grid.value(stream) for stream in self._rebuilt])
            self._rebuilt = []

    def _read(self, sources: Sequence[int]) -> torch.Tensor:
        """What the branch read, from the rebuilt streams: the same values in the same strides."""
        for index in sources:
            stream = self._rebuilt[index]
            if stream.stride() != self._strides_now[index]:  # a part of the caller's output
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
        """For a branch that differentiates while it runs; the recompute's graph is used for nothing else."""
        if index >= len(self._frame):
            raise ReconstructionError(
                "something is differentiated that a branch left behind when it was run again, whose tensors are gone: "
                "take what its forward has left, or return it beside the branch's output, as (f, aux)"
            )
        return self._frame[index][0]


def _as_it_is(function: Callable[[], None]) -> None:
    """Call it, so that torch.compile traces nothing of it: what compiles a backward meets our frames as well."""
    if "torch._dynamo" in sys.modules:
        from revkernels.autograd.compiling import uncompiled  # slow where dynamo is not there already

        uncompiled(function)
    else:
        function()


def _over(ref: weakref.ref[Rebuilding], grid: Grid | None, task: int) -> None:
    """A backward is over, whether the call of the chain is still there or not."""
    reversal = ref()
    if reversal is not None:
        reversal._end(task)
    elif grid is not None:
        grid.end()


def _empty(like: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    return like.new_empty_strided(like.shape, strides)  # of its class
