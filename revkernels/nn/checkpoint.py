# SPDX-License-Identifier: Apache-2.0
"""Checkpointing for what lies between reversible chains: the inputs are kept, the rest is made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from revkernels.autograd.checkpoint import Checkpoint
from revkernels.errors import ReconstructionError

__all__ = ["checkpoint"]


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``function(*args, **kwargs)``, and run it once more in the backward instead of keeping what it saves.

    For the parts of a network that are not reversible: its stem, the transitions between stages. The memory from the
    forward to the backward is that of the inputs (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost), the
    price one more forward of the function.

    As in a reversible chain, and other than under `torch.utils.checkpoint`, running statistics of batch norms are
    updated once, fused norms run again on the statistics of the forward, and a parameter, buffer or input that was
    changed in between is an error. Random numbers and autocast are those of the forward. Without grad mode it is the
    plain call; while torch.compile traces, it is torch's own checkpoint, which the compiler knows.

    Args:
        function: a module, or any callable. It must do the same when called twice.
        *args, **kwargs: of the call. Tensors in them, also in nested lists, tuples and dicts, are the kept inputs.

    Raises (in the backward):
        ReconstructionError: an input, a parameter or a buffer has changed, or the function did not do the same twice.
    """
    if not callable(function):
        raise TypeError(f"function is a {type(function).__name__}; it must be an nn.Module or another callable")
    if torch.compiler.is_dynamo_compiling():
        from torch.utils.checkpoint import checkpoint as by_torch

        return by_torch(function, *args, use_reentrant=False, **kwargs)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if torch._C._are_functorch_transforms_active():
        raise ReconstructionError(
            "torch.func transforms cannot run a checkpointed call again: call the function itself for them"
        )
    return Checkpoint(function, args, kwargs).run(*args, **kwargs)
