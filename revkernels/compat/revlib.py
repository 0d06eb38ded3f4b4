# SPDX-License-Identifier: Apache-2.0
"""RevLib 1.7.2 on this package's driver: `ReversibleSequential`, `MemoryModes` and the MomentumNet built of them.

The names, the signatures and the names in a ``state_dict`` are RevLib's. Differences: every memory mode works on every
branch; running statistics are updated once; branches run under autocast in the backward too; the input need not require
grad; ``autograd.grad`` and double backward work and leave ``.grad`` alone; a parameter changed between forward and
backward raises; ``layerwise_args_kwargs`` reaches the modules, which RevLib drops.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from revkernels.compat import UnsupportedError
from revkernels.compat._chains import together
from revkernels.nn.chain import HalfStep, run
from revkernels.nn.streams import check_options, streams_of

__all__ = [
    "MemoryModes",
    "ReversibleModule",
    "ReversibleSequential",
    "ReversibleWrapper",
    "additive_coupling_forward",
    "additive_coupling_inverse",
    "momentum_net",
]

Couplings = Sequence[Callable[..., Any] | None] | None
Call = tuple[Sequence[Any], dict[str, Any]]
Pair = tuple[torch.Tensor, torch.Tensor]


class MemoryModes(enum.IntEnum):
    """``no_savings`` stores activations; each of the others reconstructs them."""

    no_savings = 0
    checkpoint = 1
    autograd_graph = 2
    autograd_function = 3


def additive_coupling_forward(other_stream: torch.Tensor, fn_out: torch.Tensor) -> torch.Tensor:
    """other_stream + fn_out: the only coupling supported as ``coupling_forward``."""
    return other_stream + fn_out


def additive_coupling_inverse(output: torch.Tensor, fn_out: torch.Tensor) -> torch.Tensor:
    """output - fn_out: the only coupling supported as ``coupling_inverse``."""
    return output - fn_out


class ReversibleWrapper(nn.Module):
    """Holds a branch under RevLib's name for it, ``wrapped_module``."""

    def __init__(self, wrapped_module: nn.Module) -> None:
        super().__init__()
        self.wrapped_module = wrapped_module


class ReversibleModule(nn.Module):
    """One half-step: (x0, x1) -> (x1, x0 + wrapped_module(x1)).

    The branch is ``wrapped_module.wrapped_module``, as in RevLib. A module with its own hooks is a separate chain
    inside a `ReversibleSequential`, which keeps one more pair of streams for it: put hooks on the branch instead.

    Args:
        wrapped_module: a module that preserves the shape of its input.
        coupling_forward, coupling_inverse, target_device, fused_optimizer: see `ReversibleSequential`.
        memory_savings: reconstruct activations instead of storing them.
        cache: accepted, not needed.
    """

    def __init__(
        self,
        wrapped_module: nn.Module,
        coupling_forward: Callable[..., Any] | None = None,
        coupling_inverse: Callable[..., Any] | None = None,
        memory_savings: bool = True,
        cache: Any = None,
        target_device: str = "",
        fused_optimizer: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(wrapped_module, nn.Module):
            raise TypeError(f"wrapped_module is a {type(wrapped_module).__name__}; it must be an nn.Module")
        _check_refused((coupling_forward,), (coupling_inverse,), target_device, fused_optimizer)
        self.wrapped_module = ReversibleWrapper(wrapped_module)
        self.memory_savings = memory_savings

    def forward(self, inp: Pair, *args: Any, **kwargs: Any) -> Pair:
        return _run([("wrapped_module", self, (args, kwargs))], inp, self.memory_savings)


class ReversibleSequential(nn.Sequential):
    """A chain of half-steps, whose activation memory does not grow with its depth.

    Module i maps the streams (x0, x1) to (x1, x0 + module(x1)), so an odd number of modules leaves them swapped. Every
    module is called with the arguments that follow the input.

    Args:
        *modules: modules that preserve the shape of their input, or `ReversibleModule`s.
        split_dim: the dimension along which the input is halved. (RevLib's None fails in its own forward.)
        coupling_forward, coupling_inverse: None, or lists of None and of the additive coupling, this module's or
            RevLib's.
        memory_mode: `MemoryModes`.
        target_device: the empty string.
        fused_optimizer: None. For an optimizer that steps inside the backward use torch's
            ``parameter.register_post_accumulate_grad_hook``.

    Raises:
        TypeError: a module is not an nn.Module; split_dim is not an int.
        UnsupportedError: another coupling, a target_device, a fused_optimizer.
    """

    def __init__(
        self,
        *modules: nn.Module,
        split_dim: int = 1,
        coupling_forward: Couplings = None,
        coupling_inverse: Couplings = None,
        memory_mode: MemoryModes = MemoryModes.autograd_function,
        target_device: str = "",
        fused_optimizer: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        check_options(split_dim, "store", "float", None)
        _check_refused(coupling_forward or (), coupling_inverse or (), target_device, fused_optimizer)
        self.m = MemoryModes(memory_mode)
        self.split_dim = split_dim
        for i, module in enumerate(modules):
            if not isinstance(module, ReversibleModule):
                module = ReversibleModule(module, memory_savings=self.m != MemoryModes.no_savings)
            self.add_module(f"{i // 2}-{i % 2}", module)

    def forward(  # type: ignore[override]  # nn.Sequential takes the input alone
        self, inp: torch.Tensor, *args: Any, layerwise_args_kwargs: Sequence[Call] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Run the chain. ``layerwise_args_kwargs`` has further arguments per module, as pairs (args, kwargs)."""
        own = [((), {})] * len(self) if layerwise_args_kwargs is None else layerwise_args_kwargs
        if len(own) != len(self):
            raise ValueError(
                f"layerwise_args_kwargs has {len(own)} pairs; it needs one for each of the {len(self)} modules"
            )
        halves, _ = streams_of(inp, self.split_dim, 2, "inp")
        pair: Pair = (halves[0], halves[1])
        steps = [
            (name, module, ((*args, *own_args), {**kwargs, **own_kwargs}))
            for (name, module), (own_args, own_kwargs) in zip(self._modules.items(), own, strict=True)
        ]
        for name, module in self._modules.items():
            if not isinstance(module, ReversibleModule):  # appended, or set in place of one
                raise TypeError(f"module {name} is a {type(module).__name__}; it must be wrapped in a ReversibleModule")
        for alone, part in together(list(self), alike=lambda module: module.memory_savings):
            if alone:
                _, module, (its_args, its_kwargs) = steps[part[0][0]]
                pair = module(pair, *its_args, **its_kwargs)
            else:
                pair = _run([steps[index] for index, _ in part], pair, part[0][1].memory_savings)
        return torch.cat(pair, self.split_dim)


def _run(steps: Sequence[tuple[str, Any, Call]], pair: Pair, savings: bool) -> Pair:
    """The pair after these modules, given with their names and further arguments."""
    half_steps = [
        HalfStep(module.wrapped_module.wrapped_module, i % 2, (1 - i % 2,), tuple(args), kwargs)
        for i, (_, module, (args, kwargs)) in enumerate(steps)
    ]
    activations = "reconstruct" if savings else "store"
    x0, x1 = run(half_steps, pair, name=lambda k: f"module {steps[k][0]}", activations=activations)
    if isinstance(x1, list):
        raise TypeError("a module returned (tensor, other outputs); in a ReversibleSequential it must return a tensor")
    return (x1, x0) if len(steps) % 2 else (x0, x1)


class MomentumNetSide(nn.Module):
    """alpha x: adds the residual stream to the velocity."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, inp: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return inp * self.alpha


class MomentumNetStem(nn.Module):
    """wrapped_module(gamma x)."""

    def __init__(self, wrapped_module: nn.Module, gamma: float) -> None:
        super().__init__()
        self.wrapped_module = wrapped_module
        self.gamma = gamma

    def forward(self, inp: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped_module(inp * self.gamma, *args, **kwargs)


def momentum_net(
    *modules: nn.Module,
    split_dim: int = 1,
    coupling_forward: Couplings = None,
    coupling_inverse: Couplings = None,
    memory_mode: MemoryModes = MemoryModes.autograd_function,
    target_device: str = "",
    fused_optimizer: Callable[..., Any] | None = None,
    beta: float = 0.9,
) -> ReversibleSequential:
    """A MomentumNet (Sander et al., ICML 2021) as the additive chain that RevLib's ``utils.momentum_net`` builds.

    Module i reads beta^i x1 and adds to x0; then (1 - beta) / beta^(i+1) of x0 is added to x1.
    """
    half_steps: list[nn.Module] = []
    for i, module in enumerate(modules):
        half_steps += [MomentumNetStem(module, beta**i), MomentumNetSide((1 - beta) / beta ** (i + 1))]
    return ReversibleSequential(
        *half_steps,
        split_dim=split_dim,
        coupling_forward=coupling_forward,
        coupling_inverse=coupling_inverse,
        memory_mode=memory_mode,
        target_device=target_device,
        fused_optimizer=fused_optimizer,
    )


def _name_of(coupling: Any) -> str:
    named = coupling if hasattr(coupling, "__name__") else type(coupling)
    return f"{named.__module__}.{named.__name__}"


def _check_refused(forward: Sequence[Any], inverse: Sequence[Any], target_device: str, fused_optimizer: Any) -> None:
    for what, given, additive in (
        ("coupling_forward", forward, additive_coupling_forward),
        ("coupling_inverse", inverse, additive_coupling_inverse),
    ):
        for coupling in given:
            # RevLib's own is the same function: code may have changed only one of its imports.
            taken = (_name_of(additive), f"revlib.core.{additive.__name__}")
            if coupling is not None and _name_of(coupling) not in taken:
                raise UnsupportedError(
                    f"{what} has {_name_of(coupling)}; it must be None or {taken[0]}: the additive coupling is the "
                    f"only one here (momentum_net builds a MomentumNet of it)"
                )
    if target_device:
        raise UnsupportedError(f"target_device is {target_device!r}; it must be '': parameters stay where they are")
    if fused_optimizer is not None:
        raise UnsupportedError(
            "fused_optimizer is given; it must be None: step an optimizer inside the backward with "
            "parameter.register_post_accumulate_grad_hook"
        )
