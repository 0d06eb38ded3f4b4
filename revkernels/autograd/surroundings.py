# SPDX-License-Identifier: Apache-2.0
"""What a branch's result depends on outside the branch: random numbers, autocast and side inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from revkernels.autograd.snapshot import version_of

#: Generators, their states, and the states' bytes for comparing (three times faster than torch.equal).
States = list[tuple[torch.Generator, torch.Tensor, bytes]]
#: Generators that a branch drew from, with their states before it; empty if it drew nothing.
Drawn = list[tuple[torch.Generator, torch.Tensor]]


class Surroundings:
    """Recorded for one call of a chain, in the forward; put back round each recompute.

    Watched are torch's default generators of the CPU and of the streams' device, and generators that a module holds as
    an attribute. Python's and NumPy's generators are not (nor are they by ``torch.utils.checkpoint``).
    """

    def __init__(self, device: torch.device, side_inputs: dict[str, Any]) -> None:
        self.side_inputs = [(name, t, t._version) for name, t in _tensors(side_inputs) if version_of(t) >= 0]
        kinds = [kind for kind in dict.fromkeys(("cpu", device.type)) if torch.amp.is_autocast_available(kind)]
        self.autocast = [(kind, *_autocast_state(kind)) for kind in kinds]
        self.shared = [torch.default_generator]
        if device.type == "cuda":
            self.shared.append(torch.cuda.default_generators[device.index])

    def states(self) -> States:
        """The shared generators' states as they are now."""
        return states_of(self.shared)

    def problem(self) -> str | None:
        """Return which side input is not as it was in the forward, or None."""
        for name, tensor, version in self.side_inputs:
            if tensor._version != version:
                return (
                    f"the side input {name} was changed in place between the forward and the backward (version "
                    f"{version}, now {tensor._version}), so the branch cannot be run again as it was"
                )
        return None

    def restore(self, drawn: Drawn) -> ExitStack | None:
        """Put autocast and the generators back to what they were; closing the result puts back what is now."""
        stack = None
        for kind, enabled, dtype, cache in self.autocast:
            now = _autocast_state(kind)
            if enabled != now[0] or (enabled and dtype != now[1]):
                stack = stack or ExitStack()
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
        for generator, state in drawn:
            stack = stack or ExitStack()
            stack.callback(generator.set_state, generator.get_state())
            generator.set_state(state)
        return stack


def own_generators(modules: Sequence[nn.Module]) -> list[torch.Generator]:
    """The generators that the modules hold as attributes. (torch's own modules hold none.)"""
    return [
        value
        for module in modules
        if not type(module).__module__.startswith("torch.")
        for value in module.__dict__.values()
        if type(value) is torch.Generator
    ]


def states_of(generators: Sequence[torch.Generator]) -> States:
    """Copies of the generators' states: 5 KB for a CPU generator, 16 bytes for a CUDA one."""
    states = [(generator, generator.get_state()) for generator in generators]
    return [(generator, state, state.numpy().tobytes()) for generator, state in states]


def drawn(before: States, after: States) -> Drawn:
    """Those of ``before`` whose generator was drawn from."""
    return [(a[0], a[1]) for a, b in zip(before, after, strict=True) if a[2] != b[2]]


def _autocast_state(kind: str) -> tuple[bool, torch.dtype, bool]:
    enabled = torch.is_autocast_enabled(kind)
    return enabled, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested lists, tuples and dicts, each with its path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}[{index}]")
