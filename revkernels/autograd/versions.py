# SPDX-License-Identifier: Apache-2.0
"""Whether a tensor is what it was: its version, how often autograd counts that it was written, and the rest."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from revkernels.autograd.ownership import PLAIN, memory_of
from revkernels.autograd.rewinding import Slot
from revkernels.errors import ReconstructionError

#: Where a tensor hangs, its name, itself, its version, whether it required grad, and its memory.
Constant = tuple[dict[str, Any], str, torch.Tensor, int, bool, int]


def version_of(tensor: torch.Tensor) -> int:
    """The tensor's version, or -1 where it has none: in inference mode, and before a lazy module's first call."""
    try:
        return -1 if isinstance(tensor, UninitializedTensorMixin) else tensor._version
    except RuntimeError:  # an inference tensor: it has none
        return -1


def version_behind(ref: weakref.ref[torch.Tensor]) -> int | None:
    """The same of what is no longer kept alive; None where it has gone."""
    tensor = ref()
    return None if tensor is None else version_of(tensor)


def constant_of(slot: Slot) -> Constant:
    """The same with what else is to stay."""
    try:
        return *slot, slot[2].requires_grad, memory_of(slot[2])
    except RuntimeError as error:  # of a class that is not to be asked, as in torch.nn.utils._per_sample_grad
        raise ReconstructionError(
            f"{slot[1]} is a {type(slot[2]).__name__}, which cannot be watched for changes ({error}): set "
            f"activations='store' for the time that such tensors take the place of parameters"
        ) from error


def differs(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether the values are others: `torch.batch_norm` writes running statistics and does not count it as a write.

    Asked in a module's first run in train or eval mode, not of buffers known to be written: a device is waited for.
    """
    if before.shape != now.shape:  # an operator may give a buffer its shape in a first call, as an observer's range
        return True
    if now.is_meta or now.layout is not torch.strided:
        return False
    if now.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return not torch.equal(before, now)


def is_elsewhere(tensor: torch.Tensor, memory: int) -> bool:
    """Whether it was given other memory than this, which no version tells."""
    return memory != 0 and memory_of(tensor) not in (0, memory)


def has_moved(one: Constant) -> bool:
    """Whether it `was_written`, or is elsewhere."""
    return was_written(one[:4]) or is_elsewhere(one[2], one[5])


def placed_by_forward(constant: Sequence[Constant]) -> dict[tuple[int, str], int]:
    """After a forward: of those in whose place it has itself put another tensor, where they hang and the memory of that
    one."""
    found = {}
    for slots, name, tensor, _, _, _ in constant:
        now: Any = slots.get(name)
        if now is not tensor and type(now) in PLAIN:
            found[id(slots), name] = memory_of(now)
    return found


def misplaced(constant: Sequence[Constant], placed: dict[tuple[int, str], int]) -> str | None:
    """After a recompute: what is wrong where it has put another tensor in place than the forward did, or None. In the
    same memory it is no other: what is sharded comes back to it."""
    for slots, name, tensor, _, _, memory in constant:
        now: Any = slots.get(name)
        if now is not tensor and type(now) in PLAIN and is_elsewhere(now, placed.get((id(slots), name), memory)):
            return (
                f"{name} is put in its place by the branch's own forward, and is another tensor now than it was then "
                f"(as fast weights are that have been updated since): set activations='store'"
            )
    return None


def was_written(slot: Slot) -> bool:
    """Whether its version is another, or another tensor hangs in its place."""
    slots, name, tensor, version = slot
    return version_of(tensor) != version or slots.get(name) is not tensor
