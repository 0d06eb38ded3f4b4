# SPDX-License-Identifier: Apache-2.0
"""Whether a tensor's memory may be overwritten: only if nobody else can see it.

A hook, a user's list, a queued engine task or ``.grad`` may hold the tensor, or another tensor on its memory. torch's
engine makes the same check before it accumulates gradients in place.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

#: Plain tensor types. Subclasses are excluded: they may be sharded, or stand for something else.
PLAIN = (torch.Tensor, nn.Parameter)

Counts = tuple[int, int, int]

_storage_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
_tensor_use_count: Any = getattr(torch.Tensor, "_use_count", None)
#: False where torch does not expose the counts: then nothing is ever overwritten.
COUNTABLE = _storage_use_count is not None and _tensor_use_count is not None


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether it is a plain strided tensor: no subclass, not sparse."""
    return type(tensor) in PLAIN and tensor.layout is torch.strided


def memory_of(tensor: torch.Tensor) -> int:
    """The id of its storage, which stays the same when the memory is freed and allocated again, as FSDP2 does. 0 for a
    tensor without one, or with attributes, which other ways to shard set: what they move is not checked."""
    if not has_memory(tensor) or tensor.__dict__:
        return 0
    number: int = tensor.untyped_storage()._cdata
    return number


def blocks_of(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """The tensor's storages: of a sparse tensor, those of its indices and values."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:  # other libraries' layouts
        parts = []
    return [part.untyped_storage() for part in parts]


def is_batched(gradient: torch.Tensor) -> bool:
    """Whether it is a gradient under ``is_grads_batched=True``, a wrapper that no kernel can take."""
    return type(gradient) is torch.Tensor and not torch._C._has_storage(gradient)


def memory_is_free(tensor: torch.Tensor) -> bool:
    """Whether no other tensor uses its storage, and it uses all of it. (Others may hold ``tensor`` itself.)"""
    if not COUNTABLE:
        return False
    storage = tensor.untyped_storage()
    # two users: the tensor, and the variable above
    return _storage_use_count(storage._cdata) <= 2 and storage.nbytes() == tensor.numel() * tensor.element_size()


def holders(tensor: torch.Tensor) -> Counts:
    """Return the numbers of Python references, of C++ references and of users of the storage.

    A thousand is added to the last, so that it never counts as free, for a part of a larger storage or an expanded
    scalar."""
    storage = tensor.untyped_storage()
    part = 0 if storage.nbytes() == tensor.numel() * tensor.element_size() else 1000
    return sys.getrefcount(tensor), _tensor_use_count(tensor), _storage_use_count(storage._cdata) + part


def way_of_calling() -> int:
    """Distinguish the ways in which Python calls functions, which differ in how many references a call holds.

    A process has one, until torch.compile installs its own, which may stay installed (after an error in a trace).
    """
    return _references(object())


def _references(thing: object) -> int:
    return sys.getrefcount(thing)


def both_tensors(a: Any, b: torch.Tensor) -> bool:
    """Whether a is a tensor at all."""
    return isinstance(a, torch.Tensor)


def same_memory(a: Any, b: torch.Tensor) -> bool:
    """Whether a is b, or a tensor that torch has wrapped around the same memory."""
    return isinstance(a, torch.Tensor) and (a.data_ptr(), a.dtype, a.shape, a.stride()) == (
        b.data_ptr(),
        b.dtype,
        b.shape,
        b.stride(),
    )
