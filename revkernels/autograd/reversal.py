# SPDX-License-Identifier: Apache-2.0
"""The driver: an ordinary autograd graph whose saved tensors are rebuilt instead of kept.

A chain of reversible blocks is one recurrence over half-steps. Half-step k adds a branch of some streams to another:

    forward   s[target] <- s[target] + B[k](h)      h = s[source], or the sum of several sources
    inverse   s[target] <- s[target] - B[k](h)      the target is no source, so h is the same both ways

With two streams and targets 0, 1, 0, 1 ... that is Algorithm 1 of Gomez et al. 2017, twice a block. The forward builds
the graph that plain torch would build, under saved-tensor hooks that keep a number (half-step, index) in a saved
tensor's place. When the backward first asks for a tensor of half-step k, branch k is run once more from the same h,
what it saves is collected, and its output turns the stream back into what it was. The streams, their gradients and one
branch's saved tensors are alive at a time, at any depth; gradients travel through torch's engine, so hooks, DDP and
frozen parameters are its business, not ours.

What is to come has its place: a tensor worth keeping is returned by `_pack` itself (memory budgets); the options of an
exact coupling go into the two calls, `couple` here and ``kernels.uncouple`` in `_rebuild`.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from revkernels import eager
from revkernels.autograd import fusion
from revkernels.autograd.accumulate import prepare
from revkernels.autograd.coupling import couple, enter
from revkernels.autograd.entry import Entry, Ready, Waiting, entry_of
from revkernels.autograd.half_step import HalfStep, check_aux, check_branch_output
from revkernels.autograd.kept import Kept
from revkernels.autograd.ownership import both_tensors, memory_is_free, same_memory
from revkernels.autograd.recorded import Frame, Metadata, RecordedStep
from revkernels.autograd.snapshot import put_back, version_of
from revkernels.autograd.surroundings import Surroundings, drawn, own_generators, refuses_a_race, states_of, strayed
from revkernels.errors import ReconstructionError

_INDEX_BITS = 24  # a token is (half-step << 24) | index of the saved tensor
_local = threading.local()
set_grad_enabled = torch._C._set_grad_enabled  # what torch.set_grad_enabled calls, without its object


def is_recomputing() -> bool:
    """Whether this thread is inside the second run of a branch. For hooks and branches that keep count."""
    return getattr(_local, "recomputing", False)


class Reversal:
    """One call of a chain: its forward, and all backwards through it. State lives here, never on a module.

    Args:
        streams: the streams, dense; none of them is ever written to.
        kernels: the backend that couples.
        keep: True stores activations as plain torch does; False rebuilds them.
        side_inputs: what the branches are given besides their stream, by name, to be checked for changes.
        name: turns a half-step's number into words for error messages.
    """

    def __init__(
        self,
        streams: Sequence[torch.Tensor],
        kernels: Any,
        keep: bool,
        side_inputs: dict[str, Any],
        name: Callable[[int], str],
    ) -> None:
        self.streams = list(streams)
        self._twin: tuple[int, torch.Tensor] | None = None  # a stream's number, and the second output of its node
        self._waiting: Waiting | None = None  # the last coupling, left to the norm that comes next: `_entry`
        self._entry: Entry | None = None
        self.kernels = kernels
        self.keep = keep
        self.name = name
        self.aux: list[Any] = []
        self.recording = not keep and torch.is_grad_enabled()
        if torch.is_grad_enabled() and kernels is not eager:
            prepare()
        compiling = sys.modules.get("revkernels.autograd.compiling")  # imported where torch.compile meets a chain
        self._compiler = None if compiling is None else compiling.compiler()
        self._count = 0
        self._steps: list[RecordedStep] = []
        self._saved: list[Metadata] = []  # of the half-step under way
        self._open: list[torch.Tensor] = []  # its saved tensors, for a branch that differentiates while it runs
        if self.recording:
            self._surroundings = Surroundings(streams[0].device, side_inputs)
            self._states = self._surroundings.states()
            self._hooks: Any = saved_tensors_hooks(self._pack, self._unpack)
        # Strides are part of a stream's value, since others give other bits: of the outputs, and of what is rebuilt.
        self._strides: list[tuple[int, ...]] = []
        self._strides_now: list[tuple[int, ...]] = []
        self._lock = threading.RLock()
        self._task, self._cursor = -1, 0
        self._kept: Any = None  # a tensor whose node holds the outputs
        self._frame: Frame = []
        self._first: int | None = None  # the first half-step that saved something
        self._unread: set[int] = set()  # the tensors of its frame that nobody has asked for yet
        self._ready: Ready | None = None  # what the norm of half-step `_cursor - 1` makes of its stream
        self._rebuilt: list[torch.Tensor] = []  # the streams before half-step `_cursor`, while a backward runs
        self.witness: Callable[[list[torch.Tensor]], None] | None = None  # shown the rebuilt inputs by each backward

    # ---- forward

    def advance(self, step: HalfStep, following: HalfStep | None = None) -> None:
        """Run the next half-step. ``following``: the one that comes directly after it."""
        kernels, streams = self.kernels, self.streams
        f = self._record(step) if self.recording else self._run(step, None)
        index = step.target
        target = streams[index]
        if type(f) is tuple:
            f, aux = check_aux(f, self.name, self._count)
            self.aux.append(aux)
        check_branch_output(f, target, self.name, self._count)
        if self.recording:
            self._steps[-1].strides = target.stride()
        self._count += 1
        if kernels is eager:
            streams[index] = (target + f).to(target.dtype)
            return
        read_next = following is not None and following.sources == (index,)
        if read_next:
            self._entry = self._entry_of(following)  # type: ignore[arg-type]
            if self._entry is not None:
                self._waiting = (index, target, f)
                return
        streams[index], twin = couple(target, f, kernels)
        if read_next:
            self._twin = (index, twin)

    def _entry_of(self, step: HalfStep) -> Entry | None:
        if self._compiler is not None:  # torch.compile fuses the branch by itself, and has to see all of it
            return None
        return entry_of(step, self.kernels)

    def _run(self, step: HalfStep, recorded: RecordedStep | None) -> Any:
        """Let the streams enter the branch, and call it."""
        sources, streams = step.sources, self.streams
        waiting, self._waiting = self._waiting, None
        entry, self._entry = (self._entry_of(step) if waiting is None else self._entry), None
        with fusion.Within(self.kernels, None if recorded is None else recorded.tape(False)):
            normed = None if entry is None else entry.apply(streams, sources[0], waiting, self.kernels)
            if normed is None:
                h = self._entered(sources[0])
                watched = streams[sources[0]]
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
            f = self._call(step, h, normed)
        if version_of(watched) != version:
            raise ReconstructionError(
                f"{self.name(self._count)} wrote to its input in place. It is a stream, needed again, or made of "
                f"such: make the branch's first operation out of place (such as ReLU(inplace=False))"
            )
        return f

    def _entered(self, index: int) -> torch.Tensor:
        """The stream for a branch to read: with the gradient that comes back from there accumulated by our own node."""
        twin, self._twin = self._twin, None
        if twin is not None and twin[0] == index:
            return twin[1]
        s = h = self.streams[index]
        if self.kernels is not eager and s.requires_grad and torch.is_grad_enabled():
            self.streams[index], h = enter(s, self.kernels)
        return h

    def _record(self, half_step: HalfStep) -> Any:
        """Run the branch, and note all that running it again will need."""
        step = RecordedStep(half_step)
        self._steps.append(step)
        self._saved = step.saved
        snapshot = step.snapshot
        own = own_generators(snapshot.modules)
        before = self._states + states_of(own) if own else self._states
        with snapshot.turn:
            snapshot.take()
            with self._hooks, self._surroundings.guard:
                f = self._run(half_step, step)
            snapshot.complete(step.counted())
        self._open = []
        after = self._surroundings.states()
        step.drawn = drawn(before, after + states_of(own) if own else after)
        if step.drawn:
            self._states = after
        return f

    def _call(self, step: HalfStep, h: torch.Tensor, normed: Any = None) -> Any:
        compiling = sys.modules.get("revkernels.autograd.compiling")
        if compiling is None:
            return fusion.call_branch(step, h, self.kernels, normed)
        if self._compiler is None:
            return compiling.call(None, fusion.call_branch, step, (h, self.kernels, normed), {})
        # Compiled in the forward, the branch is compiled in the recompute, and only then.
        return compiling.call(self._compiler, step.branch, h, step.args, step.kwargs)

    def _again(self, step: RecordedStep, h: torch.Tensor) -> Any:
        """Run the branch as `_run` did, from the rebuilt stream."""
        ready, self._ready = self._ready, None
        with fusion.Within(self.kernels, step.tape(True)):
            normed = None if step.entry is None else step.entry.again(h, ready)
            return self._call(step.half_step, h, normed)

    def adopt(self, streams: Any, whose: str) -> None:
        """Take over streams that went through a module's hooks: torch may wrap them, but their values must stay."""
        theirs = streams if type(streams) is tuple else ()
        alike = both_tensors if self.keep else same_memory
        if len(theirs) != len(self.streams) or not all(map(alike, theirs, self.streams)):
            raise ReconstructionError(
                f"a hook of {whose} replaced the streams. They are rebuilt by running the branches backwards, which "
                f"cannot undo a hook: put the change into a branch, or set activations='store' (where the hook is the "
                f"cast of FSDP's mixed precision: cast_forward_inputs=False)"
            )
        if self.recording:
            self._states = self._surroundings.states()  # what the hook drew is not the next branch's
        self.streams = list(theirs)
        self._twin = None

    def finish(self, outputs: Sequence[torch.Tensor], split: Callable[..., Sequence[torch.Tensor]]) -> None:
        """Keep what the backward starts from: ``outputs``, of which ``split`` makes the streams again."""
        self._strides = [stream.stride() for stream in self.streams]
        self._first = next((k for k, step in enumerate(self._steps) if step.saved), None)
        if self._first is not None:  # something is kept for the outputs, or for an aux output alone
            anchor = torch.zeros((), requires_grad=True)
            self._kept = Kept.apply(anchor, *(output.detach() for output in outputs))
            self._split = split
        self.release()

    def release(self) -> None:
        """Let go of the streams: they hold the graph, and the graph's hooks hold us, in a ring that gc cannot see."""
        self._twin = self._hooks = self._waiting = self._entry = None
        self.streams, self.aux, self._open, self._states = [], [], [], []

    def _pack(self, tensor: torch.Tensor) -> int:
        self._saved.append((tensor.dtype, tensor.shape))
        self._open.append(tensor)
        return (len(self._steps) - 1) << _INDEX_BITS | (len(self._saved) - 1)

    # ---- backward

    def _unpack(self, token: int) -> torch.Tensor:
        k, index = token >> _INDEX_BITS, token & ((1 << _INDEX_BITS) - 1)
        task = torch._C._current_graph_task_id()
        if self._hooks is not None and self._kept is None:  # the forward is not over
            if k == len(self._steps) - 1 and index < len(self._open):
                return self._open[index]
            raise ReconstructionError(
                f"{self.name(len(self._steps) - 1)} differentiates through {self.name(k)}; inside a chain a branch can "
                f"only differentiate what it computed itself"
            )
        if task == -1:
            raise ReconstructionError("a reversible chain's saved tensors exist only while a backward runs")
        with self._lock:
            try:
                if task != self._task or k > self._cursor:
                    self._begin(task)
                while self._cursor > k:
                    self._rebuild(self._cursor - 1)
            except BaseException:
                self._end()
                raise
            tensor, version = self._frame[index]
            if k == self._first:
                self._unread.discard(index)
                if not self._unread:
                    _local.read_up = weakref.ref(self)
        if version_of(tensor) != version:
            raise ReconstructionError(
                f"{self.name(k)}: a tensor needed for its gradient was changed in place inside the branch "
                f"(version {version}, now {tensor._version})"
            )
        return tensor

    def _begin(self, task: int) -> None:
        """A backward starts, or starts over: from the kept outputs, whatever an earlier one left."""
        other = getattr(_local, "read_up", lambda: None)()
        if other is not None and other is not self:
            other._let_go(task)
        try:
            outputs = self._kept.grad_fn.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise ReconstructionError(
                f"the output of the reversible chain was changed in place after the forward, and the backward starts "
                f"from it: make the operation that follows the chain out of place. ({error})"
            ) from None
        self._rebuilt = [stream.detach() for stream in self._split(*outputs)]
        self._strides_now = list(self._strides)
        self._task, self._cursor, self._frame, self._ready = task, len(self._steps), [], None
        self._unread = {-1}  # of a frame that is still to come
        self._hooks = saved_tensors_hooks(self._keep, self._kept_now)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(task))

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

    def _rebuild(self, k: int) -> None:
        """Run branch k again: what it saves becomes the frame, and the target what it was before half-step k."""
        self._frame = []  # first of all: one kept frame more, and memory would grow with depth
        step = self._steps[k]
        index, sources = step.half_step.target, step.half_step.sources
        higher_order = torch.is_grad_enabled()
        h = self._read(sources)
        if step.needs_grad:
            h.requires_grad_()
        with step.snapshot.turn:
            problem = step.snapshot.problem() or self._surroundings.problem()
            if problem is not None:
                raise ReconstructionError(f"{self.name(k)}: {problem}")
            outer, surroundings, undo = is_recomputing(), None, None
            try:  # memory may run out at any of these
                _local.recomputing = True
                surroundings = self._surroundings.restore(step.drawn)
                undo = step.snapshot.restore()
                set_grad_enabled(True)
                with self._hooks:
                    f = self._again(step, h)
                if step.drawn and strayed(step.drawn):
                    with refuses_a_race(self.name(k)):
                        self._again(step, h.detach())
            finally:
                set_grad_enabled(higher_order)
                if undo:
                    put_back(undo)
                if surroundings is not None:
                    surroundings.close()
                _local.recomputing = outer
        if not step.saved_alike(self._frame):
            problem = step.difference(self._frame)
            raise ReconstructionError(
                f"{self.name(k)}: {problem}. The branch did not do the same twice: does it depend on something that "
                f"changed in between, or count its calls?"
            )
        if k == 0 and self.witness is None:  # nobody reads what the first half-step added to
            self._rebuilt = []
        else:
            f = (f[0] if type(f) is tuple else f).detach()
            target = self._rebuilt[index]
            # Written over, unless it is the caller's, or a hook or a gradient's graph holds on to it.
            free = not higher_order and target.stride() == step.strides and memory_is_free(target)
            self._rebuilt[index] = target if free else _empty(target, step.strides)
            self._strides_now[index] = step.strides
            before = self._steps[k - 1]
            if k > 0 and before.entry is not None and before.half_step.sources == (index,):
                self._ready = before.entry.uncouple(self._rebuilt[index], target, f)
            else:
                self.kernels.uncouple(self._rebuilt[index], target, f, None)
            if k == 0:
                rebuilt, self._rebuilt = self._rebuilt, []
                self.witness(rebuilt)  # type: ignore[misc]
        if k == self._first:
            self._unread = set(range(len(self._frame)))
        self._cursor = k

    def _read(self, sources: Sequence[int]) -> torch.Tensor:
        """What the branch read, from the rebuilt streams: the same values in the same strides."""
        for index in sources:
            stream = self._rebuilt[index]
            if stream.stride() != self._strides_now[index]:  # a part of the caller's output
                self._rebuilt[index] = _empty(stream, self._strides_now[index]).copy_(stream)
        h = self._rebuilt[sources[0]].detach()
        for index in sources[1:]:
            h = h + self._rebuilt[index]
        return h

    def _keep(self, tensor: torch.Tensor) -> int:
        frame = self._frame
        frame.append((tensor.detach(), version_of(tensor)))
        return len(frame) - 1

    def _kept_now(self, index: int) -> torch.Tensor:
        """For a branch that differentiates while it runs; the recompute's graph is used for nothing else."""
        return self._frame[index][0]


def _empty(like: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)
