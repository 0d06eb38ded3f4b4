# SPDX-License-Identifier: Apache-2.0
"""Monitors the drift of reconstructed activations while a network trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from revkernels.autograd.state.versions import version_of
from revkernels.diagnostics.chains import chains_of
from revkernels.diagnostics.errors import relative_errors
from revkernels.diagnostics.untouched import untouched
from revkernels.errors import ReconstructionError
from revkernels.integers import as_int
from revkernels.measure import angle

__all__ = ["AngleRecord", "DriftMonitor", "DriftRecord"]

OnDrift = Literal["warn", "raise"] | Callable[["DriftRecord"], None]


@dataclass(frozen=True)
class DriftRecord:
    """The error of one chain's input as reconstructed in one backward.

    Attributes:
        step: index of the chain's call, from 0, counting calls that record a backward since the monitor was first
            attached.
        chain: its dotted name in the network; "" for the network itself.
        max_error, rms_error: relative, see `revkernels.diagnostics.relative_errors`.
    """

    step: int
    chain: str
    max_error: float
    rms_error: float


@dataclass(frozen=True)
class AngleRecord:
    """One `DriftMonitor.compare`: the index of its call, from 0, and the angle between the two gradients."""

    step: int
    degrees: float


class DriftMonitor:
    """Compares, while a network trains, each reversible chain's input with what its backward reconstructed.

        with DriftMonitor(net, every=10, threshold=1e-2) as monitor:
            for x, target in batches:
                loss_of(net(x), target).backward()      # nothing else changes
                ...
        print(monitor.last)

    The true value costs no forward: on monitored steps the chain's input is held until its backward, and one more
    subtraction is needed. Other steps cost one call per chain. The input is not copied: if the caller changes it in
    place after the chain has run, that backward is skipped, with a warning.

    ``net.state_dict()``, a pickle and a copy of the network do not contain the monitor.

    Args:
        net: a module that contains `ReversibleSequential`s or `ReversibleBlock`s, or one of these; those inside a
            chain's branches are not monitored.
        every: monitor each chain's calls 0, every, 2 every, ... that record a backward.
        threshold: of the rms error; None for none. NaN is above any threshold.
        on_drift: above the threshold "warn" (once per chain), "raise" `ReconstructionError` from the backward, or call
            a function with the `DriftRecord`.
        angle_every: `compare` works on its calls 0, angle_every, ...; None: never.

    Attributes:
        history: `DriftRecord`s, in the order of the backwards.
        angles: `AngleRecord`s.

    Raises:
        TypeError: ``net`` is not a module.
        ValueError: it has no reversible chain, or another argument does not fit.
    """

    def __init__(
        self,
        net: nn.Module,
        every: int = 1,
        *,
        threshold: float | None = None,
        on_drift: OnDrift = "warn",
        angle_every: int | None = None,
    ) -> None:
        self._chains: dict[str, Any] = chains_of(net)
        every, angle_every = as_int(every), as_int(angle_every)
        for name, number in (("every", every), ("angle_every", 1 if angle_every is None else angle_every)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} is {number!r}; it must be a whole number of steps, from 1 on")
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold is {threshold!r}; it must be a relative error, 0 or more")
        if on_drift not in ("warn", "raise") and not callable(on_drift):
            raise ValueError(f"on_drift is {on_drift!r}; it must be 'warn', 'raise' or a function")
        self.net, self.every, self.threshold = net, every, threshold
        self.on_drift, self.angle_every = on_drift, angle_every
        self.history: list[DriftRecord] = []
        self.angles: list[AngleRecord] = []
        self._steps = dict.fromkeys(self._chains, 0)
        self._comparisons = 0
        self._warned: set[str] = set()

    # ---- attaching

    def attach(self) -> DriftMonitor:
        """Start monitoring. Returns itself.

        Raises:
            RuntimeError: another monitor (or this one) is attached to the network already.
        """
        for name, chain in self._chains.items():
            if getattr(chain, "witness", None) is not None:
                raise RuntimeError(
                    f"chain {name or type(chain).__name__!r} is watched already: detach that monitor first"
                )
        for name, chain in self._chains.items():
            chain.__dict__["witness"] = _Witness(self, name)
        return self

    def detach(self) -> None:
        """Stop monitoring; the records stay. Does nothing if not attached."""
        for chain in self._chains.values():
            witness = chain.__dict__.get("witness")
            if isinstance(witness, _Witness) and witness.monitor is self:
                del chain.__dict__["witness"]

    def __enter__(self) -> DriftMonitor:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    # ---- results

    @property
    def last(self) -> DriftRecord | None:
        """The latest record; None before the first backward."""
        return self.history[-1] if self.history else None

    def as_dicts(self) -> list[dict[str, Any]]:
        """The history as dictionaries."""
        return [asdict(record) for record in self.history]

    def plot(self, path: str | Path) -> None:
        """Draw the errors, one line per chain, and the angles if there are any, against the steps.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there are no records yet.
        """
        from revkernels.diagnostics.plots import by_step

        if not self.history and not self.angles:
            raise ValueError("there is nothing to draw: no backward was watched yet")
        by_step(Path(path), self.history, self.angles)

    # ---- the gradient angle

    def compare(self, closure: Callable[[], Any]) -> float | None:
        """Return the angle in degrees between the gradients with reconstructed and with stored activations.

        ``closure()`` runs a forward and a backward of the loop's own loss on the loop's own batch. It is called twice,
        with the same random numbers: with the network unchanged, and with every chain's ``activations="store"``. Then
        ``.grad``, buffers, random numbers and options are restored: call it next to the step, before
        ``optimizer.step()``.

        Costs two steps on the calls that ``angle_every`` selects; other calls return None at once, as does a comparison
        whose gradients have no direction (zero, or not finite).
        """
        step = self._comparisons
        self._comparisons += 1
        if self.angle_every is None or step % self.angle_every:
            return None
        ours = self._gradients(closure)
        before = [(chain, chain.activations) for chain in self._chains.values()]
        try:
            for chain, _ in before:
                chain.activations = "store"
            theirs = self._gradients(closure)
        finally:
            for chain, activations in before:
                chain.activations = activations
        try:
            degrees = angle(ours, theirs)
        except ValueError:
            return None
        self.angles.append(AngleRecord(step, degrees))
        return degrees

    def _gradients(self, closure: Callable[[], Any]) -> list[torch.Tensor]:
        with untouched(self.net), torch.enable_grad():  # and unmonitored
            closure()
            return [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.net.parameters()]

    # ---- frameworks

    def lightning_callback(self) -> Any:
        """A callback for PyTorch Lightning: monitors during ``fit``, and logs ``drift``, a batch's largest rms error.

        Raises:
            ImportError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
        """
        from revkernels.diagnostics.lightning import callback

        return callback(self)

    # ---- called by a chain

    def _begin(self, chain: str, streams: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], None] | None:
        step = self._steps[chain]
        self._steps[chain] = step + 1
        if step % self.every:
            return None
        true = [stream.detach() for stream in streams]  # the same memory and version counter
        versions = [version_of(stream) for stream in true]

        def end(rebuilt: list[torch.Tensor]) -> None:
            if [version_of(stream) for stream in true] != versions:
                self._warn(f"the input of {chain or 'the chain'} was changed in place after it had run: not compared")
                return
            self._record(DriftRecord(step, chain, *relative_errors(rebuilt, true)))

        return end

    def _record(self, record: DriftRecord) -> None:
        self.history.append(record)
        if self.threshold is None or record.rms_error <= self.threshold:
            return
        words = (
            f"the input of {record.chain or 'the chain'} was reconstructed with a relative error of "
            f"{record.rms_error:.2g} (rms) at step {record.step}; the threshold is {self.threshold:.2g}. Keep the "
            f"streams in a wider dtype, or the chain shorter, or its activations stored"
        )
        if callable(self.on_drift):
            self.on_drift(record)
        elif self.on_drift == "raise":
            raise ReconstructionError(words)
        elif record.chain not in self._warned:
            self._warned.add(record.chain)
            self._warn(words)

    def _warn(self, words: str) -> None:
        warnings.warn(words, RuntimeWarning, stacklevel=2)


class _Witness:
    """The monitor's attribute on a chain. A copy or a pickle of the network has none."""

    def __init__(self, monitor: DriftMonitor, chain: str) -> None:
        self.monitor, self.chain = monitor, chain

    def __call__(self, streams: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], None] | None:
        return self.monitor._begin(self.chain, streams)

    def __reduce__(self) -> Any:
        return _nobody, ()


def _nobody() -> None:
    return None
