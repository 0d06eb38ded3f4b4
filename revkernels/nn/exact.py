# SPDX-License-Identifier: Apache-2.0
"""The grid of a chain's exact coupling: given by the user, or chosen from the first batches and stored in a buffer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from revkernels.autograd.exact_coupling import Grid, check_streams
from revkernels.autograd.exact_coupling_int16 import FixedGrid
from revkernels.autograd.recomputing import recomputes
from revkernels.autograd.state.rewinding import will_write
from revkernels.errors import ReconstructionError
from revkernels.exact import EXPONENTS, Exact, exponent_for
from revkernels.options import CouplingOption

BUFFER = "grid"  # the name of the buffer, int64: the fields of `Choice`, and `_MARK`
#: Distinguishes a choice from memory that was never written (``to_empty``) or was averaged (a moving average of a state
#: dict): then there is no choice, and it is made anew. float32 cannot hold the mark.
_MARK = 0x67726964
_UNSET = -(2**31)
_BATCHES = 16  # number of batches from which k is chosen

#: Bits between the largest |s| seen and the range: when only the input has been seen, when whole batches have, and the
#: minimum tolerated afterwards.
_BITS = {"float32": (8, 4, 2), "int16": (5, 2, 1)}


#: A module's buffer as last read, with its version. Not on the module: a copy's buffer starts a new version count.
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[torch.Tensor, int | None, Choice]] = weakref.WeakKeyDictionary()


class Choice(NamedTuple):
    """The exponent, the number of training batches it comes from, and the exponent from the next batch on."""

    k: int = _UNSET
    batches: int = 0
    coming: int = _UNSET


def exact_of(coupling: Any) -> Exact | None:
    """The options of ``coupling``: None for "float"."""
    if coupling == "float":
        return None
    return Exact() if coupling == "exact" else coupling


class KeepsGrid(nn.Module):
    """A module with the option ``coupling`` whose grid, if chosen rather than given, is part of its state dict.

    State dicts of chains with and without the grid load into each other.
    """

    #: For `revkernels.diagnostics`: called with the input streams, returns what is called with the reconstructed ones.
    witness: Any = None

    @property
    def coupling(self) -> CouplingOption:
        """The option. Setting an exact one creates the buffer at once, because an enclosing chain looks at it."""
        return self._coupling

    @coupling.setter
    def coupling(self, value: CouplingOption) -> None:
        self._coupling = value
        if value == "exact" or isinstance(value, Exact):
            self.make_grid()

    def make_grid(self) -> None:
        """Create the buffer if the coupling needs one."""
        exact = exact_of(self._coupling)
        if exact is not None and exact.k is None and BUFFER not in self._buffers:
            device = next((parameter.device for parameter in self.parameters()), None)
            self.register_buffer(BUFFER, _as_tensor(Choice(), device))
        if BUFFER in self._buffers:
            will_write(self, BUFFER)

    def reset_parameters(self) -> None:
        """Forget the chosen exponent, as after ``to_empty``. (Layers have parameters of their own.)"""
        if BUFFER in self._buffers:
            with torch.no_grad():
                self._buffers[BUFFER].copy_(_as_tensor(Choice()))  # type: ignore[union-attr]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        key = prefix + BUFFER
        ours, theirs = BUFFER in self._buffers, key in state_dict
        if theirs and not ours:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing = rest[2]
        if ours and not theirs and key in missing:
            missing.remove(key)


class Exponents:
    """The exponent of one call, and what the call contributes to later choices.

    Args:
        owner: the chain; a `KeepsGrid`, or plain options, which remember nothing.
        exact: its options.
    """

    def __init__(self, owner: Any, exact: Exact) -> None:
        self.owner, self.exact = owner, exact
        self.learns = isinstance(owner, KeepsGrid) and exact.k is None
        if self.learns:
            owner.make_grid()

    def begin(self, streams: Sequence[torch.Tensor], adapting: bool = True) -> int:
        """The exponent for a forward from these streams; if it was chosen and not ``adapting``, the present one."""
        if self.exact.k is not None:
            return self.exact.k
        choice = self._read() if self.learns else Choice()
        if choice.k == _UNSET:
            largest = max((float(s.detach().abs().max()) for s in streams if s.numel()), default=0.0)
            if not largest <= torch.finfo(torch.float32).max:
                what = "infinite" if largest > 0 else "NaN"
                raise ReconstructionError(f"the input is {what} somewhere, which an exact coupling cannot undo")
            k = exponent_for(self.exact.storage, largest, _BITS[self.exact.storage][0])
            choice = Choice(k, 0, k)
            if self.learns:
                self._write(choice)
        elif adapting and choice.coming != choice.k and self._adapts():
            choice = choice._replace(k=choice.coming)
            self._write(choice)
        return choice.k

    def known(self) -> int | None:
        """The last exponent used, or None."""
        if self.exact.k is not None or not self.learns:
            return self.exact.k
        k = self._read().k
        return None if k == _UNSET else k

    def end(self, largest: float) -> None:
        """End a forward whose streams reached at most ``largest``."""
        if not self.learns or not self._adapts():
            return
        choice = self._read()
        _, spare, least = _BITS[self.exact.storage]
        wanted = exponent_for(self.exact.storage, largest, spare)
        if choice.batches < _BATCHES:
            coming = wanted if choice.batches == 0 else min(choice.coming, wanted)
            self._write(Choice(choice.k, choice.batches + 1, coming))
        elif exponent_for(self.exact.storage, largest, least) < choice.coming:
            self._write(choice._replace(coming=wanted))

    def advice(self, k: int) -> str:
        """What to do about streams that need exponent ``k``."""
        smaller = "keep the streams smaller: a norm in front of each branch, smaller weights at its end"
        if not self.learns:
            return f"Set coupling=rk.Exact(k={k}) or less, or {smaller}"
        if not self._adapts():
            return (
                f"This k was chosen from training batches, and stays as it is in evaluation and without grad mode: "
                f"keep such an input away, or set coupling=rk.Exact(k={k}) or less"
            )
        # Chosen anew from the coming batches: this batch may have been an outlier.
        self._write(Choice(k, 0, k))
        return (
            f"This k was chosen from earlier batches; for the next call it is {k}, and from there on chosen anew (or "
            f"set coupling=rk.Exact(k=...))"
        )

    def _adapts(self) -> bool:
        """In training, but not where a checkpoint around the chain runs it again: that must repeat the forward."""
        again = torch._C._current_graph_task_id() != -1 and not recomputes()
        return self.owner.training and torch.is_grad_enabled() and not again

    def _read(self) -> Choice:
        buffer = self.owner._buffers[BUFFER]
        version = None if buffer.is_inference() else buffer._version
        seen = _seen.get(self.owner)
        if seen is None or seen[0] is not buffer or seen[1] != version or version is None:
            seen = (
                buffer,
                version,
                self._valid(buffer.tolist()),
            )  # waits for a device: once, and whenever it has changed
            _seen[self.owner] = seen
        return seen[2]

    def _write(self, choice: Choice) -> None:
        self.owner._buffers[BUFFER].copy_(_as_tensor(choice))

    def _valid(self, values: list[int]) -> Choice:
        choice, allowed = Choice(*values[:-1]), EXPONENTS[self.exact.storage]
        whole = choice.k in allowed and choice.coming in allowed and 0 <= choice.batches <= _BATCHES
        return choice if values[-1] == _MARK and whole else Choice()


def _as_tensor(choice: Choice, device: torch.device | str | None = "cpu") -> torch.Tensor:
    """What the buffer holds; on the host, wherever new tensors go otherwise: on "meta" it would have no values."""
    return torch.tensor((*choice, _MARK), dtype=torch.int64, device=device)


def grid_for(
    owner: Any,
    streams: Sequence[torch.Tensor],
    couplings: int,
    kernels: Any,
    rebuilds: bool,
    name: Callable[[int], str],
) -> tuple[Grid | None, Exponents | None]:
    """The grid for a forward of ``owner`` on these streams; (None, None) if its coupling is "float"."""
    exact = exact_of(owner.coupling)
    if exact is None:
        return None, None
    check_streams(streams)
    device = streams[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ReconstructionError(
            "an exact coupling looks at its exponent and its checksums on the host, which the capture of a CUDA graph "
            "forbids: set coupling='float' there"
        )
    exponents = Exponents(owner, exact)
    k = exponents.begin(streams)
    make = FixedGrid if exact.storage == "int16" else Grid
    grid = make(k, exact.storage, len(streams), couplings, kernels, device, rebuilds, name, exponents.advice)
    return grid, exponents


def known_exponent(owner: Any) -> int | None:
    """The exponent that ``owner`` last used; None for "float".

    Raises:
        ReconstructionError: it has not used one yet.
    """
    exact = exact_of(owner.coupling)
    if exact is None:
        return None
    k = Exponents(owner, exact).known()
    if k is None:
        raise ReconstructionError(
            "the grid's exponent is not known yet, since it is chosen in the forward: run that first, load a state "
            "dict, or set coupling=rk.Exact(k=...)"
        )
    return k
