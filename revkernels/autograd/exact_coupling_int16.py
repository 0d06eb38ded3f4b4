# SPDX-License-Identifier: Apache-2.0
"""The exact coupling with streams in 16-bit fixed point: q stands for q * 2^-k, half the bytes of float32.

Integers carry no gradient, so a stream has two parts here: the integers, held by the grid, and in the graph a carrier,
a float32 tensor of the stream's shape on one element's memory, which nobody reads. Branches read the value q * 2^-k,
which the coupling's kernel also writes. Within the range (see `revkernels.Exact`) integer sums are exact; beyond it
they wrap, which is detected and refused.
"""

from __future__ import annotations

from typing import Any

import torch

from revkernels.autograd.accumulate import gather
from revkernels.autograd.coupling import walkable
from revkernels.autograd.exact_coupling import Grid
from revkernels.coupling import Coupling


class FixedGrid(Grid):
    """A `Grid` whose streams are int16."""

    fixed = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.integers: dict[int, torch.Tensor] = {}  # the current streams
        self._seen: dict[int, torch.Tensor] = {}
        self._value: tuple[torch.Tensor, torch.Tensor] | None = None  # a reconstructed stream, and its value

    # ---- forward

    def enter(self, stream: torch.Tensor, index: int) -> torch.Tensor:
        entered: torch.Tensor = _enter(stream, self, index)
        self._check(index)
        return entered

    def couple(self, carrier: torch.Tensor, f: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        coupled: tuple[torch.Tensor, torch.Tensor] = _couple(carrier, f, self, index, self.coupling(index))
        self.written()
        return coupled

    def read(self, carrier: torch.Tensor, index: int, seen: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The carrier again, and the value as a branch's input; their gradients are accumulated.

        ``seen``: the next `values` must return this same tensor.
        """
        if seen and index in self._seen:  # another branch has read it
            return carrier, self._seen[index]
        both: tuple[torch.Tensor, torch.Tensor] = _read(carrier, self, index)
        if seen:
            self._seen[index] = both[1]
        return both

    def values(self, carriers: list[torch.Tensor]) -> list[torch.Tensor]:
        seen, self._seen = self._seen, {}
        return [seen[k] if k in seen else self.read(carrier, k)[1] for k, carrier in enumerate(carriers)]

    def adopt(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        return [_carry(value) for value in values]

    def kept(self, carrier: torch.Tensor, index: int) -> torch.Tensor:
        return self.integers[index]

    # ---- backward

    def stored(self, stream: torch.Tensor) -> torch.Tensor:
        return self._quantised(stream, Coupling(grid_exponent=self.k))

    def value(self, stored: torch.Tensor) -> torch.Tensor:
        """q * 2^-k."""
        if self._value is not None and self._value[0] is stored:
            value, self._value = self._value[1], None
            return value
        return stored.float().mul_(2.0**-self.k)

    def uncouple(self, k: int, out: torch.Tensor, target: torch.Tensor, f: torch.Tensor) -> None:
        value = torch.empty_like(out, dtype=torch.float32)
        coupling = Coupling(grid_exponent=self.k, checksum=self._found_at(k), value=value)
        self.kernels.uncouple(out, walkable(target, out), walkable(f, out), coupling)
        self.rebuilt(k)
        self._value = out, value

    def end(self) -> None:
        self._value = None
        super().end()

    def _quantised(self, x: torch.Tensor, coupling: Coupling) -> torch.Tensor:
        integers = torch.zeros_like(x, dtype=torch.int16)
        self.kernels.couple(integers, integers, x.detach(), coupling)
        return integers


def _carrier(like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros((), dtype=torch.float32).expand(like.shape)


class Enter(torch.autograd.Function):
    """x -> carrier of x on the grid. The gradient of rounding is the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, grid: FixedGrid, index: int) -> torch.Tensor:
        grid.integers[index] = grid._quantised(x, grid._options(index))
        return _carrier(x)

    @staticmethod
    def backward(ctx: Any, dx: Any) -> Any:
        return dx, None, None


class Couple(torch.autograd.Function):
    """(carrier, f) -> (carrier, value) of the stream with f added."""

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, f: torch.Tensor, grid: FixedGrid, index: int, options: Coupling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.kernels = grid.kernels
        ctx.set_materialize_grads(False)
        before = grid.integers[index]
        out, value = torch.empty_like(before), torch.empty_like(before, dtype=torch.float32)
        coupling = Coupling(None, None, 1, options.grid_exponent, options.checksum, options.amax, value)
        grid.kernels.couple(out, before, walkable(f.detach(), out), coupling)
        grid.integers[index] = out
        return _carrier(value), value

    @staticmethod
    def backward(ctx: Any, ds: Any, dh: Any) -> Any:
        total = gather(ds, dh, ctx.kernels)
        return total, total, None, None, None


class Read(torch.autograd.Function):
    """carrier -> (carrier, value): where a branch reads a stream that was not coupled just before."""

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor, grid: FixedGrid, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.kernels = grid.kernels
        ctx.set_materialize_grads(False)
        return s.detach(), grid.integers[index].float().mul_(2.0**-grid.k)

    @staticmethod
    def backward(ctx: Any, ds: Any, dh: Any) -> Any:
        return gather(ds, dh, ctx.kernels), None, None


class Carry(torch.autograd.Function):
    """value -> carrier: a stream that went through a block's hooks."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return _carrier(value)

    @staticmethod
    def backward(ctx: Any, ds: Any) -> Any:
        return ds


#: `Function.apply` without its torch.func handling, which is not needed here.
_enter: Any = super(torch.autograd.Function, Enter).apply
_couple: Any = super(torch.autograd.Function, Couple).apply
_read: Any = super(torch.autograd.Function, Read).apply
_carry: Any = super(torch.autograd.Function, Carry).apply
