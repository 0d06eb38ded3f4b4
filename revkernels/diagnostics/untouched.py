# SPDX-License-Identifier: Apache-2.0
"""Runs a network for a measurement, and restores it afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from revkernels.autograd.state.reachable import beside
from revkernels.nn import PerBlock

_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Undo everything that the ``with`` block does to ``net`` by running it.

    Parameters have no ``.grad`` inside, and get their previous one back. Inside, the modules write to copies of their
    buffers. Attributes that a forward sets on a module (a counter, a cached activation) are restored; changes within an
    attribute, such as a list's items, are not. The random numbers of torch, of Python and of the modules' own
    generators continue as if nothing had been drawn (NumPy's are not covered). Parameters are not copied: the block
    must not step an optimizer. Hooks that run when a gradient is ready (such as those that step an optimizer inside the
    backward) are off, and so is a `DriftMonitor`.

    Raises:
        ValueError: a parameter of a lazy module has no shape yet.
    """
    modules = list(net.modules())
    check_shapes(net)
    gradients = [(parameter, parameter.grad) for parameter in net.parameters()]
    attributes = [dict(module.__dict__) for module in modules]
    tables = [[dict(module.__dict__[table]) for table in _TABLES] for module in modules]
    own = beside(modules).generators
    states = [generator.get_state() for generator in own]
    stepping = [(hooks, dict(hooks)) for hooks in map(_hooks_behind, net.parameters()) if hooks]
    drawn = random.getstate()
    devices = sorted({t.device.index for t in (*net.parameters(), *net.buffers()) if t.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            for hooks, _ in stepping:
                hooks.clear()
            for module in modules:
                module.__dict__.pop("witness", None)
            _hang_copies(modules)
            yield
        finally:
            for module, before, contents in zip(modules, attributes, tables, strict=True):
                module.__dict__.clear()
                module.__dict__.update(before)
                for table, content in zip(_TABLES, contents, strict=True):
                    module.__dict__[table].clear()
                    module.__dict__[table].update(content)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for hooks, before in stepping:
                hooks.update(before)
            for generator, state in zip(own, states, strict=True):
                generator.set_state(state)
            random.setstate(drawn)


def _hooks_behind(parameter: nn.Parameter) -> Any:
    """Its ``register_post_accumulate_grad_hook``s."""
    return getattr(parameter, "_post_accumulate_grad_hooks", None)


def check_shapes(net: nn.Module) -> None:
    """Raise ValueError for a lazy module that was never called."""
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if isinstance(tensor, UninitializedTensorMixin):
            raise ValueError(f"{name} has no shape yet: call the network once before it is measured")


def _hang_copies(modules: list[nn.Module]) -> None:
    copies: dict[int, torch.Tensor] = {}  # a buffer may be in two modules
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())


@contextmanager
def outside_autocast(device: str) -> Iterator[None]:
    """Leave the current autocast for a backward: contexts nested inside count as outermost."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        yield
        return
    depth = 1
    while torch.autocast_decrement_nesting() > 0:
        depth += 1
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, True)
        for _ in range(depth):
            torch.autocast_increment_nesting()


def detached(value: Any) -> Any:
    """The same nested value, with tensors on the same memory but without a graph or ``.grad``."""
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, PerBlock):
        return PerBlock([detached(item) for item in value.values])
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(detached(item) for item in value)
    return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples (named or not), dicts and `PerBlock`."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, PerBlock):
        yield from tensors_in(value.values)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def loss_from(given: Any) -> Any:
    """The function ``given`` that makes a scalar of an output; `default_loss` for None.

    Raises:
        TypeError: it is not callable.
    """
    if given is not None and not callable(given):
        raise TypeError(f"loss is a {type(given).__name__}; it must be a function that makes a scalar of the output")
    return default_loss if given is None else given


def default_loss(outputs: Any) -> torch.Tensor:
    """The sum over the floating-point outputs of their mean square: a scalar.

    Raises:
        ValueError: no output is a floating-point tensor.
    """
    parts = [
        y.float() if y.dtype in (torch.bfloat16, torch.float16) else y
        for y in tensors_in(outputs)
        if y.is_floating_point()
    ]
    if not parts:
        raise ValueError("no output is a floating-point tensor: give a loss of your own (loss=...)")
    total = parts[0].square().mean()
    for part in parts[1:]:
        total = total + part.square().mean().to(total.dtype)
    return total
