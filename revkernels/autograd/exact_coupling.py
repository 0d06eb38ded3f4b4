# SPDX-License-Identifier: Apache-2.0
"""The exact coupling of one call of a chain: streams on the grid of multiples of 2^-k, verified by checksums.

Each value of a stream has two cells, filled by the kernel that writes it: a checksum, which shows whether the same bits
were reconstructed, and the largest |s|, which must stay in the range where sums do not round (`revkernels.Exact` has
the lemma). On the CPU the cells are read after every kernel; on a device, to avoid synchronizing, at the end of the
forward and of the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from revkernels.autograd.coupling import couple, walkable
from revkernels.coupling import Coupling
from revkernels.errors import ReconstructionError
from revkernels.exact import exponent_for, limit


class Grid:
    """The grid of one call.

    Args:
        k: the grid's exponent.
        storage: of the streams, see `revkernels.Exact`.
        streams: how many there are.
        couplings: how many half-steps will follow.
        kernels: the backend.
        device: of the streams.
        rebuilds: whether a backward will reconstruct the streams.
        name: turns a half-step's number into words.
        advice: says what to do about streams beyond the range, given the k that they need.
    """

    fixed = False

    def __init__(
        self,
        k: int,
        storage: str,
        streams: int,
        couplings: int,
        kernels: Any,
        device: torch.device,
        rebuilds: bool,
        name: Callable[[int], str],
        advice: Callable[[int], str],
    ) -> None:
        self.k, self.storage, self.kernels, self.name, self.advice = k, storage, kernels, name, advice
        self.limit = limit(storage, k)
        self._narrow: dict[int, torch.dtype | None] = {}
        count = streams + couplings
        self._streams, self._at_once = streams, device.type == "cpu"
        self._tops = torch.zeros(count, dtype=torch.float32, device=device)
        self._sums = torch.zeros(count, dtype=torch.int64, device=device) if rebuilds else None
        self._tops_now = self._tops.numpy() if self._at_once else None
        self._cells = list(range(streams))  # of the current streams
        self._before: list[int] = []  # for each half-step, its target's cell before it
        self._found: torch.Tensor | None = None
        self._rebuilt: list[int] = []

    # ---- forward

    def enter(self, stream: torch.Tensor, index: int) -> torch.Tensor:
        """Stream ``index`` of the input, in float32 and on the grid."""
        entered: torch.Tensor = enter(stream, self, index)
        self._check(index)
        return entered

    def coupling(self, index: int) -> Coupling:
        """The options of the next half-step, which writes stream ``index``; call `written` afterwards."""
        cell = self._streams + len(self._before)
        self._before.append(self._cells[index])
        self._cells[index] = cell
        return self._options(cell)

    def couple(self, stream: torch.Tensor, f: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream ``index`` with f added, and its twin for the next branch to read."""
        coupled: tuple[torch.Tensor, torch.Tensor] = couple(stream, f, self.kernels, self.coupling(index))
        self.written()
        return coupled

    def values(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """The streams' values, for code outside the chain."""
        return streams

    def adopt(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """The streams that have these `values`."""
        return values

    def kept(self, stream: torch.Tensor, index: int) -> torch.Tensor:
        """The tensor that stores stream ``index``."""
        return stream.detach()

    def written(self) -> None:
        """The half-step's kernel has run."""
        self._check(self._streams + len(self._before) - 1)

    def finish(self) -> None:
        """The forward is over."""
        if not self._at_once:
            self._tops_now = self._tops.cpu().numpy()
            for cell in range(self._streams + len(self._before)):
                self._judge(cell)

    def narrow(self, branch: Any) -> torch.dtype | None:
        """`half_type_of` the branch, cached for the call."""
        if id(branch) not in self._narrow:
            self._narrow[id(branch)] = half_type_of(branch)
        return self._narrow[id(branch)]

    @property
    def largest(self) -> float:
        """The largest |s| of all streams so far, once the forward is over."""
        return float(self._tops_now.max())  # type: ignore[union-attr]

    def _options(self, cell: int) -> Coupling:
        sums = None if self._sums is None else self._sums[cell : cell + 1]
        return Coupling(None, None, 1, self.k, sums, self._tops[cell : cell + 1])

    def _check(self, cell: int) -> None:
        if self._at_once:
            self._judge(cell)

    def _judge(self, cell: int) -> None:
        top = float(self._tops_now[cell])  # type: ignore[index]
        if top < self.limit:
            return
        what = "the input" if cell < self._streams else self.name(cell - self._streams)
        if not top <= torch.finfo(torch.float32).max:
            become = f"infinite, or too large for k={self.k}" if top > 0 else "NaN"
            raise ReconstructionError(f"{what}: the stream has become {become}, which an exact coupling cannot undo")
        if exponent_for(self.storage, top, 1) >= self.k:
            raise ReconstructionError(
                f"{what}: the stream has reached {top:g}, which no grid of {self.storage} streams can hold"
            )
        raise ReconstructionError(
            f"{what}: the stream has reached {top:g}; with k={self.k} it must stay below {self.limit:g} to be "
            f"reconstructed bit for bit. {self.advice(exponent_for(self.storage, top, 1))}"
        )

    # ---- backward

    def begin(self) -> None:
        """A backward starts from the outputs."""
        self._rebuilt = []
        self._found = torch.zeros(len(self._before), dtype=torch.int64, device=self._tops.device)

    def stored(self, stream: torch.Tensor) -> torch.Tensor:
        """The tensor that stores an output while the backward reconstructs from it."""
        return stream.detach()

    def value(self, stored: torch.Tensor) -> torch.Tensor:
        """A reconstructed stream's values."""
        return stored

    def uncouple(self, k: int, out: torch.Tensor, target: torch.Tensor, f: torch.Tensor) -> None:
        """Undo half-step k, which added f: ``out`` becomes what ``target`` was before."""
        coupling = Coupling(None, None, 1, self.k, self._found_at(k))
        self.kernels.uncouple(out, walkable(target, out), walkable(f, out), coupling)
        self.rebuilt(k)

    def _found_at(self, k: int) -> torch.Tensor:
        return self._found[k : k + 1]  # type: ignore[index]

    def rebuilt(self, k: int) -> None:
        """The kernel that undid half-step ``k`` has run."""
        if self._at_once:
            if self._found[k] != self._sums[self._before[k]]:  # type: ignore[index]
                self._differs(k)
        else:
            self._rebuilt.append(k)

    def end(self) -> None:
        """The backward is over."""
        steps, self._rebuilt = self._rebuilt, []
        if steps:
            cells = [self._before[k] for k in steps]
            for k, same in zip(steps, (self._found[steps] == self._sums[cells]).tolist(), strict=True):  # type: ignore[index]
                if not same:
                    self._differs(k)

    def _differs(self, k: int) -> None:
        raise ReconstructionError(
            f"{self.name(k)}: the stream that it adds to was not reconstructed bit for bit, so the branch did not "
            f"return the same twice, or what it reads was changed between forward and backward (through .data, NumPy "
            f"or a plain attribute, which no version counts). Does it draw from a generator that torch does not know, "
            f"run a nondeterministic kernel (torch.use_deterministic_algorithms), or count its calls?"
        )


class Enter(torch.autograd.Function):
    """x -> float32, rounded to the grid. The gradient of rounding is the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, grid: Grid, index: int) -> torch.Tensor:
        # 0 + rint(x * 2^k) * 2^-k, so that -0 becomes 0.
        out = torch.zeros_like(x, dtype=torch.float32)
        grid.kernels.couple(out, out, x.detach(), grid._options(index))
        return out

    @staticmethod
    def backward(ctx: Any, dx: Any) -> Any:
        return dx, None, None


enter: Any = super(torch.autograd.Function, Enter).apply


def to_grid(x: torch.Tensor, k: int, kernels: Any, storage: str = "float32") -> torch.Tensor:
    """rint(x * 2^k) * 2^-k as a float32 tensor without -0, differentiable as the identity. It must be in the range of
    ``storage``."""

    def words(_: int) -> str:
        return ""

    entered: torch.Tensor = Grid(k, storage, 1, 0, kernels, x.device, False, words, words).enter(x, 0)
    return entered


def half_type_of(branch: Any) -> torch.dtype | None:
    """The dtype in which an exact chain passes a branch its input, if that is not the streams' float32.

    A branch with half-precision parameters gets their dtype: it would reject another.
    """
    if not isinstance(branch, nn.Module):
        return None
    return next((p.dtype for p in branch.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)


def check_streams(streams: Sequence[torch.Tensor], name: str = "x") -> None:
    """TypeError for a dtype that the grid cannot hold, and for tensors without values of their own."""
    fake = hasattr(streams[0], "fake_mode")  # a FakeTensor, whose class would have to be imported
    if fake or streams[0].is_meta:
        raise TypeError(
            f"{name} is {'a FakeTensor' if fake else 'on meta'}: an exact coupling looks at its streams' values, of "
            f"which there are none there; set coupling='float'"
        )
    if is_traceable_wrapper_subclass(streams[0]):
        raise TypeError(
            f"{name} is a {type(streams[0]).__name__}, whose values are in other tensors: an exact coupling needs a "
            f"tensor with memory of its own; set coupling='float'"
        )
    if streams[0].dtype == torch.float64:
        raise TypeError(
            f"{name} is torch.float64; an exact coupling keeps float32 streams (bfloat16 and float16 are widened): "
            f"hand it {name}.float(), or set coupling='float'"
        )
