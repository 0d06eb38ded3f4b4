# SPDX-License-Identifier: Apache-2.0
"""Outputs of norms and activations that need not be kept, since what they are made of is.

The convolution behind a norm saves the norm's output h; the norm saves its input and statistics, and one pass makes h
again from these. A half-step that keeps everything but such outputs is not run again either, and in a convolutional
network takes half of the memory. GELU and SiLU, whose backward reads their input, are likewise. (ReLU alone saves its
output, and nothing would be won.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

from revkernels.autograd.ownership import PLAIN
from revkernels.autograd.planning.offload import OffloadedTensor, OffloadGroup
from revkernels.autograd.state.versions import version_of


class MadeAgain:
    """One output: made when the backward first asks for it, and let go when all that saved it have had it."""

    __slots__ = ("_left", "_make", "_now", "_of", "bytes", "saved")

    def __init__(
        self, make: Callable[..., torch.Tensor], of: Sequence[torch.Tensor | OffloadedTensor | None], size: int
    ) -> None:
        self._make, self.bytes = make, size
        self._of = [(tensor, version_of(tensor) if isinstance(tensor, torch.Tensor) else 0) for tensor in of]
        self.saved = self._left = 0  # by how many it is saved, and how many of them are still to have it
        self._now: torch.Tensor | None = None

    def make(self) -> torch.Tensor:
        """The output, new memory."""
        with torch.no_grad():
            return self._make(
                *(tensor.here() if isinstance(tensor, OffloadedTensor) else tensor for tensor, _ in self._of)
            )

    def leave(self, offloaded: OffloadGroup) -> None:
        """Have what it is made of in host memory."""
        self._of = [(offloaded.send(of) if isinstance(of, torch.Tensor) else of, version) for of, version in self._of]

    @property
    def awaited(self) -> bool:
        """Whether it is held for more that saved it."""
        return self._now is not None

    def changed(self) -> bool:
        """Whether something that it is made of was written to since, or is gone: a sharded parameter's memory is freed
        without a word, and a kernel would take the norm to have none. (Not noticed of what is in host memory.)"""
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
        """One that saved it is gone, and has not asked."""
        self.saved -= 1
        self._served()

    def _served(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self._now = None

    def let_go(self) -> None:
        """Nobody is expected to ask. (Who does has it made once more.)"""
        self._now = None


class SavedView:
    """A saved tensor on the memory of an output that is made again: the output itself, or a view of it."""

    __slots__ = ("_asked", "layout", "output")

    def __init__(self, output: MadeAgain, tensor: torch.Tensor) -> None:
        self.output, self._asked = output, False
        self.layout = tensor.shape, tensor.stride(), tensor.storage_offset()

    def here(self) -> torch.Tensor:
        """The tensor."""
        self._asked = True
        return self.on(self.output.here())

    def on(self, made: torch.Tensor) -> torch.Tensor:
        """The tensor, given the output."""
        shape, stride, offset = self.layout
        return made if made.shape == shape and made.stride() == stride else made.as_strided(shape, stride, offset)

    def __del__(self) -> None:
        if not self._asked:
            self.output.forgo()


class AtHand:
    """The outputs that were made again in a backward and are awaited by more that saved them: few at a time, for some
    of these may never ask."""

    def __init__(self) -> None:
        self._made: dict[MadeAgain, None] = {}  # in the order of their making
        self._group = -1

    def get(self, view: SavedView, group: int = -1) -> torch.Tensor:
        """The saved tensor. With one of another ``group`` those of the last are let go."""
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
        """The backward is over, or with this group."""
        for output in self._made:
            output.let_go()
        self._made.clear()


class Outputs:
    """The outputs that can be made again, of one run of a branch."""

    __slots__ = ("_noted", "views")

    def __init__(self) -> None:
        self._noted: dict[int, tuple[weakref.ref[torch.Tensor], int, MadeAgain]] = {}
        self.views: list[tuple[SavedView, int]] = []  # for who measures: what was found, and a number of its own

    def note(self, h: torch.Tensor, make: Callable[..., torch.Tensor], *of: torch.Tensor | None) -> None:
        """h has just been made of ``of``, which the backward needs anyway, and ``make(*of)`` makes it again, on memory
        of the same layout."""
        storage = h.untyped_storage()
        if h.requires_grad and not h.storage_offset():  # else nothing of it is saved for sure
            output = MadeAgain(make, of, storage.nbytes())
            self._noted[storage.data_ptr()] = weakref.ref(h), version_of(h), output

    def find(self, tensor: torch.Tensor) -> SavedView | None:
        """What stands for ``tensor``, which somebody saves; None if it has to be kept."""
        if type(tensor) not in PLAIN or tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
            return None
        ref, version, output = self._noted.get(tensor.untyped_storage().data_ptr(), _NOTHING)
        h = ref()
        # Its address means h only as long as h is there, and its values are h's if nobody has written to it.
        if h is None or output is None or h.dtype != tensor.dtype or version_of(tensor) != version or output.changed():
            return None
        output.saved += 1
        return SavedView(output, tensor)


_AWAITED = 8
_NOTHING: tuple[Callable[[], None], int, None] = (lambda: None, -1, None)
