# SPDX-License-Identifier: Apache-2.0
"""Running a branch with its norms and activations fused: which layers these are, and when they may be.

A `torch.nn.Sequential` is taken apart as far as it is made of known layers: a norm and the activation behind it become
one kernel, everything else is called as it is. A layer is left alone if anything else has a hand in it (hooks,
parametrisations, sharded parameters), and so is a whole call where torch has to see its own operators (torch.compile,
torch.func, forward-mode differentiation). Results are the same either way, up to rounding.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

from revkernels import backends, eager
from revkernels.autograd.coupling import in_usual_order
from revkernels.autograd.half_step import HalfStep
from revkernels.autograd.made_again import Outputs
from revkernels.autograd.norm_act import ACTIVATIONS, Call, making_again, norm_act
from revkernels.autograd.ownership import PLAIN
from revkernels.norm import Norm, Statistics

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Ambient(threading.local):
    """What a chain tells the norms inside its branches, in the thread that runs them.

    Attributes:
        kernels: the chain's backend; None outside any chain.
        tape: the batch statistics of the half-step under way; None outside a chain that rebuilds its activations.
    """

    kernels: Any = None
    tape: Tape | None = None


ambient = Ambient()


class Tape:
    """The batch statistics of one run of a branch: noted in the forward, used again in the recompute.

    So the recompute needs no pass for statistics, gives the forward's bits, and counts no batch twice. ``outputs``:
    where to note what can be made again; None if nobody asks.
    """

    __slots__ = ("at", "entries", "outputs", "replaying")

    def __init__(
        self, entries: list[tuple[nn.Module, Statistics]], replaying: bool, outputs: Outputs | None = None
    ) -> None:
        self.entries, self.replaying, self.outputs, self.at = entries, replaying, outputs, 0

    def next(self, norm: nn.Module) -> Statistics | None:
        """The statistics that ``norm`` had at this place of the forward; None if it ran otherwise then."""
        if self.at < len(self.entries) and self.entries[self.at][0] is norm:
            self.at += 1
            return self.entries[self.at - 1][1]
        return None


def outputs_alone() -> Tape | None:
    """A tape for what stores its activations: what can be made again, if somebody around it wants to know."""
    tape = ambient.tape
    return None if tape is None or tape.outputs is None else Tape([], False, tape.outputs)


class Fusable(NamedTuple):
    """A norm, the activation behind it ("none" if there is none), and how many layers these are."""

    norm: nn.Module
    activation: str
    layers: int


# ---- which layers


def _relu(layer: Any) -> str:
    return "relu"


def _gelu(layer: Any) -> str:
    return "gelu" if layer.approximate == "none" else "gelu_tanh"


def _silu(layer: Any) -> str:
    return "silu"


#: Exact types: a subclass, which may do anything, is called as it is. (A parametrised module is a subclass.)
ACTIVATION_LAYERS: dict[type, Callable[[Any], str]] = {nn.ReLU: _relu, nn.GELU: _gelu, nn.SiLU: _silu}


#: Of these, the ones whose gradient is made of their input.
_READ_THEIR_INPUT = (nn.GELU, nn.SiLU)

#: The norms that the kernels know, by exact type too, and the dimension of their channels. `nn.branches` adds its own.
NORM_LAYERS: dict[type, tuple[str, int]] = {
    nn.BatchNorm1d: ("batch", 1),
    nn.BatchNorm2d: ("batch", 1),
    nn.BatchNorm3d: ("batch", 1),
    nn.LayerNorm: ("layer", -1),
    nn.RMSNorm: ("rms", -1),
    nn.GroupNorm: ("group", 1),
}
_RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


def narrows(layer: nn.Module) -> bool:
    """Whether autocast makes the layer's input narrow: what feeds it is then written narrow at once, without a cast."""
    if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
        return True
    return getattr(layer, "narrows_input", False)


def fusable_at(layers: Sequence[nn.Module], index: int) -> Fusable | str:
    """Return the norm (and activation) that begins at ``layers[index]``, or why it cannot be fused."""
    norm = layers[index]
    if type(norm) not in NORM_LAYERS:
        return f"{type(norm).__name__} is no norm that the kernels know"
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
    """Return why the layer has to be called as a module, or None."""
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
    return type(branch).forward is nn.Sequential.forward or passes_keywords(branch)


def passes_keywords(branch: Any) -> bool:
    """Whether it is a `revkernels.nn.FusedSequential`, which is marked."""
    return getattr(type(branch).forward, "passes_keywords", False)


def has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks of its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooked(branch: nn.Module) -> bool:
    """Whether calling the branch as a module would fire hooks."""
    return has_hooks(branch) or bool(
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    )


# ---- when


def kernels_for(x: Any) -> Any:
    """The backend that fuses here, or None where the layers have to run as they are."""
    if type(x) not in PLAIN or x.dtype not in _FLOATS or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    kernels = ambient.kernels
    if kernels is eager or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return None
    if torch.autograd.forward_ad._current_level >= 0 or not in_usual_order(x) or x.numel() == 0:
        return None
    if kernels is None:
        kernels = backends.select(x)
        if kernels is eager:
            return None
    everywhere = _torch_module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return None  # hooks on every module expect to see each layer
    return kernels


def call_of(fusable: Fusable, x: torch.Tensor, kernels: Any, narrow: bool) -> Call | None:
    """Prepare the norm for x; None if the layer itself has to run (and to raise what it raises).

    ``narrow``: the next layer is one whose input autocast makes narrow.
    """
    layer: Any = fusable.norm
    parameters, buffers = layer._parameters, layer._buffers
    kind, axis = NORM_LAYERS[type(layer)]
    if not _fits(layer, kind, axis, x):
        return None
    given, constant, running, source = None, False, _NOT_RUNNING, None
    eps: float = layer.eps
    if kind == "batch":
        running_mean = _held(buffers, "running_mean", layer)
        if layer.training or running_mean is None:
            if x.numel() == x.shape[1]:
                return None  # one value a channel has no variance: torch's own words for that
            tape = ambient.tape
            if tape is not None and tape.replaying:
                given = tape.next(layer)
                if given is None:
                    return None
            elif layer.training and running_mean is not None:
                momentum = _count(layer, _held(buffers, "num_batches_tracked", layer))
                running = running_mean, _held(buffers, "running_var", layer), momentum
        else:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            rstd = (layer.running_var.to(wide) + layer.eps).rsqrt_()
            # A copy for the backward: a forward in training may write the buffer before that, where no version tells.
            source = running_mean if torch.is_grad_enabled() else None
            given, constant = Statistics(running_mean.to(wide, copy=source is not None), rstd), True
    elif eps is None:  # torch's default for an RMS norm
        eps = torch.finfo(x.dtype).eps
    bias = None if kind == "rms" else _held(parameters, "bias", layer)
    groups = layer.num_groups if kind == "group" else 1
    norm = Norm(kind, _held(parameters, "weight", layer), bias, eps, fusable.activation, groups, axis, *running)
    call = Call(kernels, norm, _dtype(kind, x, narrow), given, constant)
    call.source = source
    return call


def _fits(layer: Any, kind: str, axis: int, x: torch.Tensor) -> bool:
    if kind == "batch":
        return x.dim() in _RANKS[type(layer)] and x.shape[1] == layer.num_features
    if x.dim() < 2:
        return False
    if axis == 1:
        return x.shape[1] == (layer.num_channels if kind == "group" else layer.channels)
    return x.shape[-1] == layer.normalized_shape[0] and x.is_contiguous()


_NOT_RUNNING: tuple[Any, Any, float] = (None, None, 0.0)


def _held(table: Mapping[str, Any], name: str, layer: Any) -> Any:
    """A parameter or buffer. Asking the module costs ten times as much, and is right where the table lacks the name."""
    return table[name] if name in table else getattr(layer, name)


def _count(layer: Any, batches: Any) -> float:
    """Count the batch. Returns the momentum of its statistics."""
    momentum = layer.momentum
    if batches is not None:
        batches.add_(1)
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(batches)
    return 0.0 if momentum is None else momentum


def _dtype(kind: str, x: torch.Tensor, narrow: bool) -> torch.dtype:
    """What the layers themselves would give under autocast, or what the layer behind them would make of it."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        if narrow:
            return torch.get_autocast_dtype(device)
        if kind != "batch" and device == "cuda":
            return torch.float32
    return x.dtype


def record(fusable: Fusable, call: Call) -> None:
    """After the norm has run: note its batch statistics for the recompute."""
    tape = ambient.tape
    if tape is not None and not tape.replaying and call.norm.kind == "batch" and not call.constant:
        tape.entries.append((fusable.norm, call.statistics))  # type: ignore[arg-type]


def note(call: Call, s: torch.Tensor, h: torch.Tensor) -> None:
    """After the norm has run: note how h can be made again, if somebody wants to know."""
    tape = ambient.tape
    if tape is not None and tape.outputs is not None:
        make, of = making_again(call, s, h)
        tape.outputs.note(h, make, *of)


def _activated(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)`` of an activation whose gradient reads x, so that its output can be made again."""
    h: torch.Tensor = layer(x)
    tape = ambient.tape
    if tape is None or tape.outputs is None or type(x) not in PLAIN:
        return h
    if not hooked(layer) and untouchable(layer) is None and not getattr(layer, "inplace", False):
        at = x.detach()  # with its graph, who holds the output would hold what holds it
        tape.outputs.note(h, ACTIVATIONS[ACTIVATION_LAYERS[type(layer)](layer)], at)
    return h


# ---- running a branch


def run(layers: Sequence[nn.Module], x: Any, normed: Any = None, kwargs: Mapping[str, Any] | None = None) -> Any:
    """Run the layers one after the other, fused. ``normed``: what the norm that they begin with made of x.

    ``kwargs`` go to the layers whose ``forward`` names them.
    """
    index, count, fuses = 0, len(layers), not torch.compiler.is_compiling()
    while index < count:
        layer = layers[index]
        if fuses and type(layer) in NORM_LAYERS:
            fusable = fusable_at(layers, index)
            if isinstance(fusable, Fusable):
                behind = index + fusable.layers
                if normed is not None:
                    x, normed, index = normed, None, behind
                    continue
                h = fused(fusable, x, behind < count and narrows(layers[behind]))
                if h is not None:
                    x, index = h, behind
                    continue
        if kwargs:
            x = layer(x, **{name: value for name, value in kwargs.items() if name in keywords_of(layer)})
        elif type(layer) in _READ_THEIR_INPUT:
            x = _activated(layer, x)
        elif is_sequential(layer) and not hooked(layer):
            x = run(list(layer._modules.values()), x)  # type: ignore[arg-type]
        else:
            x = layer(x)
        index += 1
    return x


def fused(fusable: Fusable, x: Any, narrow: bool) -> torch.Tensor | None:
    """activation(norm(x)) in one kernel, or None where the layers have to run as they are."""
    kernels = kernels_for(x)
    call = None if kernels is None else call_of(fusable, x, kernels, narrow)
    if call is None:
        return None
    h: torch.Tensor = norm_act(x, call.norm.weight, call.norm.bias, call)
    record(fusable, call)
    note(call, x, h)
    return h


def keywords_of(layer: nn.Module) -> frozenset[str]:
    """The keywords that the layer's ``forward`` names, besides its input."""
    return _keywords(type(layer).forward)


@functools.cache
def _keywords(forward: Any) -> frozenset[str]:
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return frozenset(p.name for p in list(inspect.signature(forward).parameters.values())[2:] if p.kind in kinds)


class Within:
    """``with Within(kernels, tape)``: what `ambient` says there, in this thread."""

    __slots__ = ("before", "now")

    def __init__(self, kernels: Any, tape: Tape | None) -> None:
        self.now = kernels, tape

    def __enter__(self) -> None:
        self.before = ambient.kernels, ambient.tape
        ambient.kernels, ambient.tape = self.now

    def __exit__(self, *_: object) -> None:
        ambient.kernels, ambient.tape = self.before


def call_branch(step: HalfStep, x: Any, kernels: Any, normed: Any = None) -> Any:
    """Return ``branch(x, *args, **kwargs)``. ``normed``: what the norm that it begins with made of x."""
    branch: Any = step.branch
    if kernels is not eager and may_be_taken_apart(step):
        return run(list(branch._modules.values()), x, normed, step.kwargs)
    return branch(x, *step.args, **step.kwargs)


def may_be_taken_apart(step: HalfStep) -> bool:
    """Whether the branch's layers may be run one by one: it is a Sequential, and nobody would notice."""
    branch: Any = step.branch
    if step.args or not is_sequential(branch) or hooked(branch):
        return False
    return not step.kwargs or passes_keywords(branch)
