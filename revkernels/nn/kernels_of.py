# SPDX-License-Identifier: Apache-2.0
"""The kernels of a chain: its backend's, or plain torch where torch must see into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from revkernels import backends, eager
from revkernels.autograd.half_step import HalfStep
from revkernels.autograd.ownership import PLAIN
from revkernels.errors import ReconstructionError
from revkernels.nn.streams import is_store


def rebuilds(owner: Any) -> bool:
    """Whether a call now would reconstruct activations in its backward."""
    return torch.is_grad_enabled() and not is_store(owner.activations)


def kernels_of(owner: Any, streams: Sequence[torch.Tensor], half_steps: Sequence[HalfStep] = ()) -> Any:
    """The backend for a chain with the options of ``owner``.

    Raises:
        ReconstructionError, NotImplementedError: a torch transform does not support the options of ``owner``.
    """
    # Tensor subclasses, and tensors inside torch.func, have no memory for a kernel. A transform may be of the
    # parameters only, with plain streams.
    if torch._C._are_functorch_transforms_active():
        _refuse(owner, "torch.func transforms", rebuilds(owner))
        return eager
    if owner.backend is None and type(streams[0]) not in PLAIN:
        return eager
    kernels = backends.select(streams[0], owner.backend)
    if torch.autograd.forward_ad._current_level < 0 or not _have_tangents(streams, half_steps):
        return kernels
    _refuse(owner, "forward-mode derivatives", rebuilds(owner))
    if owner.backend is not None and kernels is not eager:
        raise NotImplementedError(
            f"backend {owner.backend!r} has no forward-mode derivatives: set backend=None or 'eager'"
        )
    return eager


def _refuse(owner: Any, what: str, rebuilding: bool) -> None:
    if owner.coupling != "float":
        raise ReconstructionError(f"{what} cannot look through an exact coupling: set coupling='float'")
    if rebuilding:
        raise ReconstructionError(
            f"{what} cannot run a reversible backward: set activations='store' for them, or call them under "
            f"torch.no_grad() (torch.func.functional_call alone needs nothing)"
        )


def _have_tangents(streams: Sequence[torch.Tensor], half_steps: Sequence[HalfStep]) -> bool:
    held: list[Any] = list(streams)
    for step in half_steps:
        held += [*step.args, *step.kwargs.values()]
        held += step.branch.parameters() if isinstance(step.branch, nn.Module) else ()
    tangent_of = torch.autograd.forward_ad.unpack_dual
    return any(isinstance(value, torch.Tensor) and tangent_of(value).tangent is not None for value in held)
