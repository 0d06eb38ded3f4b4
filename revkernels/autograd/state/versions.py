# SPDX-License-Identifier: Apache-2.0
"""Detects changes of tensors: by the version counter, memory and other properties."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from revkernels.autograd.ownership import PLAIN, memory_of
from revkernels.autograd.state.rewinding import Slot
from revkernels.errors import ReconstructionError

#: The dictionary that holds a tensor, its name, itself, its version, whether it required grad, and its memory.
Constant = tuple[dict[str, Any], str, torch.Tensor, int, bool, int]


def version_of(tensor: torch.Tensor) -> int:
    """The tensor's version, or -1 where it has none: in inference mode, and before a lazy module's first call."""
    try:
        return -1 if isinstance(tensor, UninitializedTensorMixin) else tensor._version
    except RuntimeError:  # an inference tensor: it has none
        return -1


def version_behind(ref: weakref.ref[torch.Tensor]) -> int | None:
    """The version of a weakly referenced tensor; None if it was freed."""
    tensor = ref()
    return None if tensor is None else version_of(tensor)


def constant_of(slot: Slot) -> Constant:
    """The slot with the other properties that must not change."""
    try:
        return *slot, slot[2].requires_grad, memory_of(slot[2])
    except RuntimeError as error:  # a class without these, as in torch.nn.utils._per_sample_grad
        raise ReconstructionError(
            f"{slot[1]} is a {type(slot[2]).__name__}, which cannot be watched for changes ({error}): set "
            f"activations='store' for the time that such tensors take the place of parameters"
        ) from error


def differs(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether the values differ: `torch.batch_norm` writes running statistics without a new version.

    Called in a module's first run in train or eval mode, not for buffers known to be written: it synchronizes a device.
    """
    if before.shape != now.shape:  # the first call may set a buffer's shape, as an observer's range
        return True
    if now.is_meta or now.layout is not torch.strided:
        return False
    if now.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return not torch.equal(before, now)


def is_elsewhere(tensor: torch.Tensor, memory: int) -> bool:
    """Whether it has other memory than this, which its version does not show."""
    return memory != 0 and memory_of(tensor) not in (0, memory)


def has_moved(one: Constant) -> bool:
    """Whether it `was_written`, or has other memory."""
    return was_written(one[:4]) or is_elsewhere(one[2], one[5])


#: For a tensor that a forward put in a parameter's place, by dictionary and name: its memory, the sum of its values,
#: and whether the forward computed it, maybe from its input, which is reconstructed only up to rounding.
Placed = dict[tuple[int, str], tuple[int, torch.Tensor, bool]]


def placed_by_forward(constant: Sequence[Constant], modules: Sequence[nn.Module], since: int) -> Placed:
    """After a forward: the tensors that it put in the place of parameters. ``since``: autograd's sequence number when
    it began."""
    placed: Placed = {}
    for slots, name, now, _ in _placed(constant, modules):
        made = now.grad_fn is not None and now.grad_fn._sequence_nr() >= since
        placed[id(slots), name] = memory_of(now), _sum_of(now), made
    return placed


def misplaced(constant: Sequence[Constant], modules: Sequence[nn.Module], placed: Placed) -> str | None:
    """After a recompute: an error if it put another tensor in a parameter's place than the forward did, else None. In
    the same memory it counts as the same (so does a sharded one, which returns there); one computed anew is allowed."""
    for slots, name, now, memory in _placed(constant, modules):
        then, total, made = placed.get((id(slots), name), (memory, None, False))
        if is_elsewhere(now, then) and (total is None or _is_other(total, now, made)):
            return (
                f"{name} is put in its place by the branch's own forward, and is another tensor now than it was then "
                f"(as fast weights are that have been updated since): set activations='store'"
            )
    return None


def _is_other(total: torch.Tensor, now: torch.Tensor, made: bool) -> bool:
    if now.is_meta:
        return False
    if now.is_cuda and torch.cuda.is_current_stream_capturing():  # cannot compare here: trust computed ones
        return not made
    again = _sum_of(now)
    if torch.equal(total, again):
        return False
    slack = math.sqrt(torch.finfo(now.dtype).eps) * _sum_of(now, torch.abs).nan_to_num().item() if made else 0.0
    return not torch.isclose(total, again, rtol=0, atol=slack, equal_nan=True)


def _placed(constant: Sequence[Constant], modules: Sequence[nn.Module]) -> list[tuple[Any, str, Any, int]]:
    """Parameters replaced by another tensor: the dictionary, name, new tensor, and the parameter's memory."""
    found = [
        (slots, name, slots.get(name), memory)
        for slots, name, tensor, _, _, memory in constant
        if slots.get(name) is not tensor
    ]
    found = [one for one in found if type(one[2]) in PLAIN]
    buffers = {id(module._buffers) for module in modules} if found else ()  # those are rewound where necessary
    return [one for one in found if id(one[0]) not in buffers]


def _sum_of(tensor: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_nested:
        return torch.zeros(())
    if tensor.is_quantized or tensor.is_mkldnn:
        tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
    values = of(tensor)
    return values.sum(dtype=torch.complex128 if values.is_complex() else torch.float64)


def was_written(slot: Slot) -> bool:
    """Whether its version has changed, or another tensor has replaced it."""
    slots, name, tensor, version = slot
    return version_of(tensor) != version or slots.get(name) is not tensor
