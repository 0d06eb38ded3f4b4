# SPDX-License-Identifier: Apache-2.0
"""What torch must know of a call: versions of written tensors, gradients that a write would cut off, and tracing."""

from __future__ import annotations

import sys
from typing import Any

from revkernels.arrays import kind_of


def tracks_versions(names: str, arrays: tuple[Any, ...]) -> bool:
    """Reject what autograd would reject or lose. Returns whether the arrays have version counters.

    The names are separated by spaces; an array may be None.
    """
    if kind_of(arrays[0]) != "torch":
        return False
    refuse_tangents(names, arrays)
    if sys.modules["torch"].is_grad_enabled():
        for position, array in enumerate(arrays):
            if getattr(array, "requires_grad", False):
                raise ValueError(
                    f"{names.split()[position]} requires grad, and a write in place would cut it from its graph: call "
                    f"it under torch.no_grad(), or use the out-of-place function"
                )
    return True


def refuse_grad(names: str, arrays: tuple[Any, ...]) -> None:
    """Reject tensors that require grad with an int16 stream. Called in grad mode; names and arrays as above."""
    for position, array in enumerate(arrays):
        if getattr(array, "requires_grad", False):
            raise ValueError(
                f"{names.split()[position]} requires grad, and an int16 stream carries no gradient: call it under "
                f"torch.no_grad(), or detach it"
            )


def refuse_tangents(names: str, arrays: tuple[Any, ...]) -> None:
    """Reject forward-mode derivatives, which a kernel would silently lose, and the transforms of torch.func.

    Names and arrays as in `tracks_versions`.

    Raises:
        NotImplementedError: as torch does for operators without forward mode.
    """
    refuse_transforms(arrays[0])
    forward_ad = sys.modules["torch"].autograd.forward_ad
    if forward_ad._current_level < 0:
        return
    for position, array in enumerate(arrays):
        if kind_of(array) == "torch" and forward_ad.unpack_dual(array).tangent is not None:
            raise NotImplementedError(
                f"{names.split()[position]} has a tangent, and the kernels have no forward-mode derivative: "
                f"differentiate backward, or write it in torch"
            )


def refuse_transforms(array: Any) -> None:
    """Reject transforms of torch.func: their tensors have no memory for a kernel. ``array``: one of the call's."""
    if kind_of(array) == "torch" and sys.modules["torch"]._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "the kernels know no transform of torch.func (grad, vmap, jvp and the like): differentiate with "
            "torch.autograd, or write it in torch"
        )


def met_compiler() -> Any:
    """The module `revkernels.autograd.compiling`, imported when torch.compile meets a chain; else None."""
    module = sys.modules.get("revkernels.autograd.compiling")
    return module if hasattr(module, "whole") else None  # another thread may be importing it


def wrote(tensor: Any) -> None:
    """Bump the tensor's version, so that a backward that saved the tensor notices the write."""
    if not tensor.is_inference():
        sys.modules["torch"].autograd.graph.increment_version(tensor)


def is_tensor(array: Any) -> bool:
    """Whether it is a tensor, or a list that begins with one."""
    if type(array) in (list, tuple):
        return len(array) > 0 and is_tensor(array[0])
    return isinstance(array, sys.modules["torch"].Tensor)


def _compiling_if_torch() -> bool:
    """Stands in for `torch.compiler.is_dynamo_compiling` (30 ns per call) until torch is imported."""
    global compiling
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    if not torch.compiler.is_dynamo_compiling():
        compiling = torch.compiler.is_dynamo_compiling
        return False
    return True


#: Whether torch.compile is tracing. Call as ``tracking.compiling()``: it is replaced once torch is imported.
compiling: Any = (
    _compiling_if_torch if sys.modules.get("torch") is None else sys.modules["torch"].compiler.is_dynamo_compiling
)
