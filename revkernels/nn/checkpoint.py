# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the parts between reversible chains, or for a network without chains.

`checkpoint` recomputes everything from the inputs, `selective_checkpoint` only what is cheap to recompute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from revkernels.autograd.checkpoint import Checkpoint
from revkernels.autograd.fused.fusion import is_recorded
from revkernels.autograd.recomputing import is_within_a_branch
from revkernels.autograd.selective import Selective
from revkernels.errors import ReconstructionError

__all__ = ["checkpoint", "selective_checkpoint"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def checkpoint(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Return ``function(*args, **kwargs)``, and run it again in the backward instead of keeping what it saves.

    For the parts of a network that are not reversible: its stem, the transitions between stages. From the forward to
    the backward only the inputs are kept (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost), at the cost
    of one more forward of the function.

    As in a reversible chain, and unlike `torch.utils.checkpoint`, running statistics of batch norms are updated once,
    fused norms are recomputed with the forward's statistics, and a parameter, buffer or input that changed in between
    is an error. Random numbers and autocast are those of the forward. Without grad mode, and in torch.export,
    torch.jit.trace and make_fx, it is the plain call; while torch.compile traces, it is torch's own checkpoint, which
    the compiler supports; a function that breaks the graph is run uncompiled.

    Args:
        function: a module, or any callable. It must do the same when called twice.
        *args, **kwargs: of the call. Tensors in them, also in nested lists, tuples and dicts, are the kept inputs.

    Raises:
        TypeError: ``function`` is not callable.
        ReconstructionError: in the backward, an input, a parameter or a buffer has changed, or the function did not do
            the same twice.
    """
    _check(function)
    if torch.compiler.is_dynamo_compiling():
        from revkernels.autograd.compiling import checkpointed

        return checkpointed(checkpoint, function, args, kwargs)
    if not torch.is_grad_enabled() or is_recorded():
        return function(*args, **kwargs)
    if torch._C._are_functorch_transforms_active():
        raise ReconstructionError(
            "torch.func transforms cannot run a checkpointed call again: call the function itself for them"
        )
    return Checkpoint(function, args, kwargs).run(*args, **kwargs)


def selective_checkpoint(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Return ``function(*args, **kwargs)``, and keep what its backward needs except outputs of norms and activations.

    The output h of a fused norm and activation, which the following layer saves, is recomputed in the backward, in one
    pass from the norm's input and statistics, which are kept anyway; likewise the output of a GELU or SiLU in a
    Sequential, from its input. In a network of convolutions with norms between them this halves the memory. The
    function runs once: its random numbers, counters and side effects do not matter. (Korthikanti et al. 2022, Reducing
    Activation Recomputation in Large Transformer Models, section 5, call it selective recomputation.)

        y = selective_checkpoint(model, x)

    It applies to norms in a `FusedSequential`, a `NormAct`, the library's own branches, and chains that store their
    activations; chains that reconstruct, or have a budget, are not affected. Without grad mode, inside a branch of such
    a chain, in torch.func transforms and while torch.compile traces (which decides by itself what to recompute) it is
    the plain call.

    A write into such an output through ``.data`` or NumPy, which no version counter shows, is lost in the recompute.

    Args:
        function: a module, or any callable.
        *args, **kwargs: of the call.

    Raises:
        TypeError: ``function`` is not callable.
        ReconstructionError: in the backward, a kept tensor was changed in place.
    """
    _check(function)
    if (
        is_recorded()
        or not torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or is_within_a_branch()
    ):
        return function(*args, **kwargs)
    return Selective().run(function, args, kwargs)


def _check(function: Any) -> None:
    if not callable(function):
        raise TypeError(f"function is a {type(function).__name__}; it must be an nn.Module or another callable")
