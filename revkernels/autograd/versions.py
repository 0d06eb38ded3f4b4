# SPDX-License-Identifier: Apache-2.0
"""Versions: how often autograd counts that a tensor was written."""

from __future__ import annotations

import weakref

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]


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
