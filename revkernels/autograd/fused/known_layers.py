# SPDX-License-Identifier: Apache-2.0
"""The known layers: norms and activations that can be one kernel, and what prevents that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

from revkernels.autograd.fused.keywords import passes_keywords
from revkernels.autograd.ownership import PLAIN
from revkernels.norm import ActivationName, NormKind


class Fusable(NamedTuple):
    """A norm, the activation behind it ("none" if there is none), and the number of these layers."""

    norm: nn.Module
    activation: ActivationName
    layers: int


def _relu(layer: Any) -> ActivationName:
    return "relu"


def _gelu(layer: Any) -> ActivationName:
    return "gelu" if layer.approximate == "none" else "gelu_tanh"


def _silu(layer: Any) -> ActivationName:
    return "silu"


#: Exact types: a subclass may do anything, so it is called unchanged. (A parametrised module is a subclass.)
ACTIVATION_LAYERS: dict[type, Callable[[Any], ActivationName]] = {nn.ReLU: _relu, nn.GELU: _gelu, nn.SiLU: _silu}


#: Of these, the ones whose gradient is computed from their input.
READ_THEIR_INPUT = (nn.GELU, nn.SiLU)

#: The norms that the kernels know, also by exact type, and their channel dimension. `nn.branches` adds its own.
NORM_LAYERS: dict[type, tuple[NormKind, int]] = {
    nn.BatchNorm1d: ("batch", 1),
    nn.BatchNorm2d: ("batch", 1),
    nn.BatchNorm3d: ("batch", 1),
    nn.LayerNorm: ("layer", -1),
    nn.RMSNorm: ("rms", -1),
    nn.GroupNorm: ("group", 1),
}
RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
#: Forwards whose only operation is a matrix product or a convolution of their input.
_NARROWING = frozenset(
    kind.forward
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
)


#: Older ones compile nothing of a bare nn.Sequential in place: its layers are run one by one then, some of them fused.
_COMPILES_SEQUENTIAL = torch.torch_version.TorchVersion(torch.__version__) >= "2.14"
#: A tuple: dynamo of torch 2.6 knows no unions.
_PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)


def narrows(layer: nn.Module) -> bool:
    """Whether autocast makes the layer's input narrow: the output before it is then written narrow, without a cast."""
    if isinstance(layer, _PRODUCTS):
        # A custom forward may keep its input wide; hooks must see the same input as in torch.
        return type(layer).forward in _NARROWING and "forward" not in layer.__dict__ and not hooked(layer)
    return getattr(layer, "narrows_input", False)


def fusable_at(layers: Sequence[nn.Module], index: int) -> Fusable | str:
    """Return the norm (and activation) that begins at ``layers[index]``, or why it cannot be fused."""
    norm = layers[index]
    if type(norm) not in NORM_LAYERS:
        return f"{type(norm).__name__} is not a norm that the kernels support"
    reason = untouchable(norm)
    if reason is not None:
        return reason
    if type(norm) in (nn.LayerNorm, nn.RMSNorm) and len(norm.normalized_shape) != 1:  # type: ignore[arg-type]
        return f"{type(norm).__name__} normalises {len(norm.normalized_shape)} dimensions; the kernels take one"  # type: ignore[arg-type]
    if index + 1 < len(layers):
        behind = layers[index + 1]
        read = ACTIVATION_LAYERS.get(type(behind))
        if read is not None and untouchable(behind) is None:
            return Fusable(norm, read(behind), 2)
    return Fusable(norm, "none", 1)


def untouchable(layer: nn.Module) -> str | None:
    """Return why the layer must be called as a module, or None."""
    if has_hooks(layer):
        return f"{type(layer).__name__} has hooks"
    for name, parameter in layer._parameters.items():
        if parameter is not None and type(parameter) not in PLAIN:
            return f"{type(layer).__name__}.{name} is a {type(parameter).__name__}"
    if "forward" in layer.__dict__:
        return f"{type(layer).__name__} has a forward of its own"
    return None


def is_sequential(branch: Any) -> bool:
    """Whether the branch is a Sequential that runs its layers one after the other, and nothing more."""
    if not isinstance(branch, nn.Sequential) or "forward" in branch.__dict__:
        return False
    kind: Any = type(branch)
    if kind.__call__ is not nn.Module.__call__ or kind.__iter__ is not nn.Sequential.__iter__:
        return False
    return kind.forward is nn.Sequential.forward or passes_keywords(branch)


def has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks of its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooked(branch: nn.Module) -> bool:
    """Whether calling the branch as a module would fire hooks, or run what its ``compile()`` has made."""
    return has_hooks(branch) or has_global_hooks() or _is_compiled(branch)


def _is_compiled(module: nn.Module) -> bool:
    if module._compiled_call_impl is None:
        return False
    return _COMPILES_SEQUENTIAL or type(module).forward is not nn.Sequential.forward


def has_global_hooks() -> bool:
    """Whether there are hooks on all modules."""
    return bool(
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    )


def all_dense(*tensors: torch.Tensor | None) -> bool:
    """Whether a norm's tensors have the layout that the kernels take. torch.func.functional_call may pass others."""
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)


def is_momentum(momentum: Any) -> bool:
    """Whether it is a number that the kernels take, or torch's None for a cumulative average."""
    return momentum is None or (isinstance(momentum, float | int) and momentum >= 0)


def number_of(value: Any) -> float | None:
    """The number that it represents, also of NumPy or torch types; None if the kernels do not take it."""
    if value is None or isinstance(value, str | bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0.0 <= number < inf else None


def fits(layer: Any, kind: str, axis: int, x: torch.Tensor) -> bool:
    """Whether x has the shape, and for norms of rows the layout, that the norm's kernels take."""
    if kind == "batch":
        return x.dim() in RANKS[type(layer)] and x.shape[1] == layer.num_features
    if x.dim() < 2:
        return False
    if axis == 1:
        return x.shape[1] == (layer.num_channels if kind == "group" else layer.channels)
    return x.shape[-1] == layer.normalized_shape[0] and x.is_contiguous()
