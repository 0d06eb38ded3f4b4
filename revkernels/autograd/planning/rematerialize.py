# SPDX-License-Identifier: Apache-2.0
"""Recomputes outputs of norms and activations instead of keeping them, since their inputs are kept.

The convolution behind a norm saves the norm's output h; the norm saves its input and statistics, from which one pass
recomputes h. A half-step that keeps everything except such outputs needs no recompute of its branch either, and in a
convolutional network takes half of the memory. The same holds for GELU and SiLU, whose backward reads their input.
(ReLU saves only its output, so nothing would be gained.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from revkernels.autograd.ownership import PLAIN
from revkernels.autograd.planning.offload import OffloadedTensor, OffloadGroup
from revkernels.autograd.state.versions import version_of


class MadeAgain:
    """One output: recomputed when the backward first unpacks it, and freed when all that saved it have unpacked it."""

    __slots__ = ("_left", "_make", "_now", "_of", "bytes", "saved")

    def __init__(
        self, make: Callable[..., torch.Tensor], of: Sequence[torch.Tensor | OffloadedTensor | None], size: int
    ) -> None:
        self._make, self.bytes = make, size
        self._of = [(tensor, version_of(tensor) if isinstance(tensor, torch.Tensor) else 0) for tensor in of]
        self.saved = self._left = 0  # the number that saved it, and that have yet to unpack it
        self._now: torch.Tensor | None = None

    def make(self) -> torch.Tensor:
        """Recompute the output, in new memory."""
        with torch.no_grad():
            return self._make(
                *(tensor.here() if isinstance(tensor, OffloadedTensor) else tensor for tensor, _ in self._of)
            )

    def leave(self, offloaded: OffloadGroup) -> None:
        """Move its inputs to host memory."""
        self._of = [(offloaded.send(of) if isinstance(of, torch.Tensor) else of, version) for of, version in self._of]

    @property
    def awaited(self) -> bool:
        """Whether it is held for others that saved it."""
        return self._now is not None

    def changed(self) -> bool:
        """Whether one of its inputs was written to since, or was freed: a sharded parameter's memory is freed without a
        new version, and a kernel would treat the norm as having none. (Not detected for inputs in host memory.)"""
        return any(
            version_of(tensor) != version or (tensor.numel() > 0 and not tensor.untyped_storage().nbytes())
            for tensor, version in self._of
            if isinstance(tensor, torch.Tensor)
        )

    def here(self) -> torch.Tensor:
        """The output, the same for all that saved it."""
        if self._now is None:
            self._now, self._left = self.make(), self.saved
        made = self._now
        self._served()
        return made

    def forgo(self) -> None:
        """One that saved it was freed without unpacking it."""
        self.saved -= 1
        self._served()

    def _served(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self._now = None

    def let_go(self) -> None:
        """Free it. (If it is unpacked again, it is recomputed again.)"""
        self._now = None


class SavedView:
    """A saved tensor on the memory of an output to recompute: the output itself, or a view of it."""

    __slots__ = ("_asked", "layout", "output")

    def __init__(self, output: MadeAgain, tensor: torch.Tensor) -> None:
        self.output, self._asked = output, False
        self.layout = tensor.shape, tensor.stride(), tensor.storage_offset()

    def here(self) -> torch.Tensor:
        """The tensor, with the output recomputed if necessary."""
        self._asked = True
        return self.on(self.output.here())

    def on(self, made: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of the output ``made``."""
        shape, stride, offset = self.layout
        return made if made.shape == shape and made.stride() == stride else made.as_strided(shape, stride, offset)

    def __del__(self) -> None:
        if not self._asked:
            self.output.forgo()


class AtHand:
    """The outputs recomputed in a backward that others which saved them have yet to unpack: few at a time, since some
    may never unpack them."""

    def __init__(self) -> None:
        self._made: dict[MadeAgain, None] = {}  # in the order of their recompute
        self._group = -1

    def get(self, view: SavedView, group: int = -1) -> torch.Tensor:
        """The saved tensor. When the ``group`` changes, the outputs of the previous one are freed."""
        if group != self._group:
            self.clear()
            self._group = group
        tensor = view.here()
        self._made.pop(view.output, None)
        if view.output.awaited:
            self._made[view.output] = None
            if len(self._made) > _AWAITED:
                oldest = next(iter(self._made))
                oldest.let_go()
                del self._made[oldest]
        return tensor

    def clear(self) -> None:
        """Free all: the backward is over, or its work on this group."""
        for output in self._made:
            output.let_go()
        self._made.clear()


class Outputs:
    """The outputs of one run of a branch that can be recomputed."""

    __slots__ = ("_noted", "views")

    def __init__(self) -> None:
        self._noted: dict[int, tuple[weakref.ref[torch.Tensor], int, MadeAgain]] = {}
        self.views: list[tuple[SavedView, int]] = []  # for the meter: views found, and their frame index

    def note(self, h: torch.Tensor, make: Callable[..., torch.Tensor], *of: torch.Tensor | None) -> None:
        """h was just computed from ``of``, which the backward needs anyway, and ``make(*of)`` recomputes it, in memory
        of the same layout."""
        storage = h.untyped_storage()
        if h.requires_grad and not h.storage_offset():  # else it may not be saved
            output = MadeAgain(make, of, storage.nbytes())
            self._noted[storage.data_ptr()] = weakref.ref(h), version_of(h), output

    def find(self, tensor: torch.Tensor) -> SavedView | None:
        """What replaces the saved ``tensor``; None if the tensor must be kept."""
        if type(tensor) not in PLAIN or tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
            return None
        ref, version, output = self._noted.get(tensor.untyped_storage().data_ptr(), _NOTHING)
        h = ref()
        # The address identifies h only while h exists, and the values are h's only if nobody has written to it.
        if h is None or output is None or h.dtype != tensor.dtype or version_of(tensor) != version or output.changed():
            return None
        output.saved += 1
        return SavedView(output, tensor)


_AWAITED = 8
_NOTHING: tuple[Callable[[], None], int, None] = (lambda: None, -1, None)
