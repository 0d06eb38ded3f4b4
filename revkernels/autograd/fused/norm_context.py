# SPDX-License-Identifier: Apache-2.0
"""What a chain passes to the norms inside its branches: the kernels that run them, and the forward's statistics."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from revkernels.autograd.planning.rematerialize import Outputs
from revkernels.norm import Statistics

#: A batch norm, the statistics of its batch, and copies of its running ones after it if code may read them.
Noted = tuple[nn.Module, Statistics, dict[str, torch.Tensor] | None]


class Ambient(threading.local):
    """What a chain passes to the norms inside its branches, in the thread that runs them.

    Attributes:
        kernels: the chain's backend; None outside any chain.
        tape: the batch statistics of the current half-step; None outside a chain that recomputes its activations.
    """

    kernels: Any = None
    tape: Tape | None = None


ambient = Ambient()


class Tape:
    """The batch statistics of one run of a branch: recorded in the forward, used again in the recompute.

    So the recompute needs no pass for statistics, gives the forward's bits, and counts no batch twice. ``ways`` records
    how layers were run: hooks may be added or removed before the recompute, which would then save other tensors.
    ``outputs``: where to register outputs that can be recomputed; None if nothing asks.
    """

    __slots__ = ("at", "entries", "is_read", "outputs", "replaying", "way", "ways")

    def __init__(
        self,
        entries: list[Noted],
        ways: list[tuple[nn.Module, Any]],
        replaying: bool,
        outputs: Outputs | None = None,
        is_read: bool = False,
    ) -> None:
        self.entries, self.ways, self.replaying, self.outputs = entries, ways, replaying, outputs
        self.is_read = is_read  # code of the branch may read running statistics
        self.at = self.way = 0  # the recompute's position in each list

    def next(self, norm: nn.Module) -> Statistics | None:
        """The statistics of ``norm`` at this point of the forward; None if another norm ran there."""
        if self.at < len(self.entries) and self.entries[self.at][0] is norm:
            self.at += 1
            _, statistics, running = self.entries[self.at - 1]
            put_running(norm, running)
            return statistics
        return None

    def taken(self, layer: nn.Module) -> Any:
        """How ``layer`` was run at this point of the forward; None if that is not known."""
        if self.replaying and self.way < len(self.ways) and self.ways[self.way][0] is layer:
            self.way += 1
            return self.ways[self.way - 1][1]
        return None

    def took(self, layer: nn.Module, way: Any) -> None:
        """Record how ``layer`` is run."""
        if not self.replaying:
            self.ways.append((layer, way))


def outputs_alone() -> Tape | None:
    """A tape for a run that stores its activations: registers outputs that can be recomputed, if an outer tape asks."""
    tape = ambient.tape
    return None if tape is None or tape.outputs is None else Tape([], [], False, tape.outputs)


def running_of(norm: nn.Module) -> dict[str, torch.Tensor] | None:
    """Copies of the norm's current buffers, if code of the branch may read them."""
    if ambient.tape is None or not ambient.tape.is_read:
        return None
    return {name: buffer.clone() for name, buffer in norm._buffers.items() if buffer is not None}


def put_running(norm: nn.Module, running: dict[str, torch.Tensor] | None) -> None:
    """In a recompute, which counts no batch: set the throw-away buffers to their values after the norm."""
    for name, value in (running or {}).items():
        norm._buffers[name].copy_(value)  # type: ignore[union-attr]


class Within:
    """``with Within(kernels, tape)``: sets `ambient` in this thread."""

    __slots__ = ("before", "now")

    def __init__(self, kernels: Any, tape: Tape | None) -> None:
        self.now = kernels, tape

    def __enter__(self) -> None:
        self.before = ambient.kernels, ambient.tape
        ambient.kernels, ambient.tape = self.now

    def __exit__(self, *_: object) -> None:
        ambient.kernels, ambient.tape = self.before
