# SPDX-License-Identifier: Apache-2.0
"""May this tensor's memory be written over? Only if nobody else can see it.

A hook, a user's list, a queued engine task or ``.grad`` may hold the tensor, or another tensor on its memory. torch's
own engine asks the same question before it adds gradients in place.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

Counts = tuple[int, int, int]

_storage_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
_tensor_use_count: Any = getattr(torch.Tensor, "_use_count", None)
#: False where torch cannot tell: then nothing is ever written over.
COUNTABLE = _storage_use_count is not None and _tensor_use_count is not None


def memory_is_free(tensor: torch.Tensor) -> bool:
    """Whether no tensor but ``tensor`` uses its memory, and it uses all of it. (Others may hold ``tensor`` itself.)"""
    if not COUNTABLE:
        return False
    storage = tensor.untyped_storage()
    # two users: the tensor, and the variable above
    return _storage_use_count(storage._cdata) <= 2 and storage.nbytes() == tensor.numel() * tensor.element_size()


def holders(tensor: torch.Tensor) -> Counts:
    """Return the numbers of Python references, of C++ references and of users of the memory."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(tensor), _tensor_use_count(tensor), _storage_use_count(storage._cdata)
