# SPDX-License-Identifier: Apache-2.0
"""Reversible chains on NumPy and CuPy arrays, with hand-written derivatives: Algorithm 1 of Gomez et al. 2017.

    forward    y1 = x1 + F(x2)         y2 = x2 + G(y1)                        (eq. 6)

    backward   g, dG = G.vjp(y1)       y2 <- y2 - g      dy1 <- dy1 + dG(dy2)
               f, dF = F.vjp(y2)       y1 <- y1 - f      dy2 <- dy2 + dF(dy1)

Each backward line is one pass over memory (`revkernels.ops.reverse_step_`): y1, y2 become x1, x2 and dy1, dy2 become
dx1, dx2, in the same memory. A chain keeps only its two outputs from the forward, at any depth. The cost is one more
forward per branch, which `Residual.vjp` shares with the derivative.

Arrays are those of `revkernels.ops`; the four arrays of a call come from libraries that go together: NumPy, CuPy,
exporters of DLPack or a buffer. Torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from revkernels import checks, ops
from revkernels.allocation import empty, empty_like
from revkernels.arrays import FLOATS, device_name, dtype_name, family_of, kind_of, memory_order, seen
from revkernels.backends import require
from revkernels.coupling import GRID_EXPONENTS, Coupling
from revkernels.errors import ReconstructionError

__all__ = ["Checksums", "Residual", "ReversibleChain"]

Pair = tuple[Any, Any]


class Residual(Protocol):
    """A residual function with its derivative.

    Its output has the shape of the stream that it is added to, and any floating-point dtype. It must give the same
    output twice, and must not write to its input: NumPy arrays are passed read-only.
    """

    def __call__(self, x: Any) -> Any:
        """Return f."""

    def vjp(self, x: Any) -> tuple[Any, Callable[[Any], Pair]]:
        """Return f and its pullback, which maps df to (dx, dw): the gradients of x and of the parameters.

        dx has x's shape; dw is whatever the caller wants in the list of gradients. An array in dw, or in tuples, lists
        and dictionaries within it, is copied if it lies in memory that the chain will write (df itself as the gradient
        of a bias, or a part of x); any other container must own its arrays.
        """


class Checksums:
    """What a chain with a grid records in a forward, so that its backward can verify the reconstructed bits.

    Per stream one 64-bit sum, weighted by position (`revkernels.Coupling`), and the largest magnitude. Created empty,
    filled by `ReversibleChain.forward`, compared by `ReversibleChain.backward_`; serves one forward at a time.
    """

    def __init__(self) -> None:
        self.sums: Any = None
        self.sizes: Any = None
        self.orders: list[tuple[int, ...]] = []


class ReversibleChain:
    """Blocks (F, G), each a pair of `Residual`, run in turn.

    Args:
        blocks: the pairs; the objects are kept, not copied.
        coupling: None, or a `revkernels.Coupling` with only a ``grid_exponent`` k. Then the streams, float32 or
            float64, are rounded to multiples of 2^-k on entry, and branch outputs before they are added; `backward_`
            reconstructs every bit, as long as no stream reaches 2^(24-k), in float64 2^(53-k), and the branches repeat
            their outputs bit for bit. The gradient of rounding is taken as the identity.
        backend: as in `revkernels.ops`.

    Raises:
        TypeError, ValueError: a block is not a pair of residual functions, or the coupling has other options.
        BackendError: the backend does not exist or cannot run here.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[Residual, Residual]],
        *,
        coupling: Coupling | None = None,
        backend: str | None = None,
    ) -> None:
        self.blocks = [_checked_block(number, block) for number, block in enumerate(blocks)]
        if not self.blocks:
            raise ValueError("blocks is empty; it must hold at least one pair (F, G)")
        _check_grid(coupling)
        if backend is not None:
            require(backend)
        self.coupling, self.backend = coupling, backend

    def forward(self, x1: Any, x2: Any, *, checksums: Checksums | None = None) -> Pair:
        """Return (y1, y2), two new arrays; x1 and x2 are not changed (eq. 6).

        ``checksums`` is for chains with a grid; give the same object to `backward_`.

        Raises:
            TypeError, ValueError: the inputs, or what a branch returned; the message names the branch.
            ReconstructionError: with checksums, a stream is too large to be exact on the grid.
        """
        record = self._record(checksums, x1)
        if self.coupling is None:
            streams = [x1, x2]
        else:
            _check_exact("x1", x1)
            _check_exact("x2", x2)
            streams = [self._on_grid(name, x, record, k) for k, (name, x) in enumerate((("x1", x1), ("x2", x2)))]
        for k, (name, branch) in enumerate(self._half_steps()):
            target, source = k % 2, 1 - k % 2
            f = _call(name, branch, _lent(streams[source]))
            _check_output(name, f, streams[target], TypeError, ValueError)
            if self.coupling is None and k < 2:  # the caller's arrays are not written
                streams[target] = ops.couple(streams[target], f, backend=self.backend)
            else:
                ops.couple_(streams[target], f, coupling=self._options(record, k + 2), backend=self.backend)
        if checksums is not None:
            looks = [seen(name, y) for name, y in zip(("x1", "x2"), streams, strict=True)]
            checksums.orders = [_order(look) for look in looks]
            self._check_sizes(checksums, [dtype_name(look) for look in looks])
        return streams[0], streams[1]

    def inverse_(self, y1: Any, y2: Any) -> Pair:
        """Turn outputs into inputs, in place (eq. 7). Returns (x1, x2), which are y1 and y2 themselves.

        Raises:
            TypeError, ValueError: y1 or y2; then nothing was written.
            ReconstructionError: a branch returned something else than in the forward.
        """
        _check_written(y1=y1, y2=y2)
        streams = [y1, y2]
        for k, (name, branch) in reversed(list(enumerate(self._half_steps()))):
            target, source = k % 2, 1 - k % 2
            f = _call(name, branch, _lent(streams[source]))
            _check_output(name, f, streams[target])
            ops.uncouple_(streams[target], f, coupling=self.coupling, backend=self.backend)
        return y1, y2

    def backward_(
        self, y1: Any, y2: Any, dy1: Any, dy2: Any, *, checksums: Checksums | None = None
    ) -> tuple[Pair, Pair, list[Pair]]:
        """Turn outputs into inputs and output gradients into input gradients, in place (Algorithm 1).

        Returns ((x1, x2), (dx1, dx2), gradients): the same four arrays, and one pair (dw of F, dw of G) per block, in
        the order of the blocks.

        Raises:
            TypeError, ValueError: one of the four arrays; then nothing was written.
            ReconstructionError: a branch returned something else than in the forward, or ``checksums`` show that a
                stream was not reconstructed bit for bit. Then the contents of the four arrays are meaningless.
        """
        _check_written(y1=y1, y2=y2, dy1=dy1, dy2=dy2)
        written = [seen(name, a) for name, a in (("y1", y1), ("y2", y2), ("dy1", dy1), ("dy2", dy2))]
        checks.check_same_shape(y1=written[0], dy1=written[2])
        checks.check_same_shape(y2=written[1], dy2=written[3])
        alike = tuple(written[0].shape) == tuple(written[1].shape)
        if isinstance(checksums, Checksums) and (
            checksums.sums is None or tuple(seen("checksums", checksums.sums).shape) != (2 * len(self.blocks) + 2,)
        ):
            what = "empty" if checksums.sums is None else "of a chain of another length"
            raise ValueError(f"checksums is {what}; it must come from this chain's forward")
        if isinstance(checksums, Checksums):
            _check_orders(checksums, written)
        record = self._record(None if checksums is None else Checksums(), y1)
        streams, gradients = [y1, y2], [dy1, dy2]
        parameters: list[Any] = []
        for k, (name, branch) in reversed(list(enumerate(self._half_steps()))):
            target, source = k % 2, 1 - k % 2
            f, pullback = _vjp(name, branch, _lent(streams[source]))
            _check_output(name, f, streams[target])
            dx, dw = _pull(name, pullback, _lent(gradients[target]))
            _check_output(f"the pullback of {name}", dx, gradients[source])
            # f is added to the target, so its gradient is the target's; dx belongs to the source.
            dw, coupling = _own(dw, written), self._options(record, k)
            if alike:
                ops.reverse_step_(streams[target], f, gradients[source], dx, coupling=coupling, backend=self.backend)
            else:  # streams of different shapes
                ops.uncouple_(streams[target], f, coupling=coupling, backend=self.backend)
                ops.accumulate_(gradients[source], dx, backend=self.backend)
            parameters.append(dw)
            del f, pullback, dx, dw
        if checksums is not None and record is not None:
            self._check_sums(checksums, record)
        parameters.reverse()
        return (y1, y2), (dy1, dy2), list(zip(parameters[::2], parameters[1::2], strict=True))

    def _half_steps(self) -> list[tuple[str, Residual]]:
        steps = []
        for number, (F, G) in enumerate(self.blocks):
            steps += [(f"F of block {number}", F), (f"G of block {number}", G)]
        return steps

    # ---- the grid

    def _record(self, checksums: Checksums | None, like: Any) -> Checksums | None:
        """Allocate zeroed sums, one per stream: the inputs, and the output of each half-step."""
        if checksums is None:
            return None
        if not isinstance(checksums, Checksums):
            raise TypeError(f"checksums is a {type(checksums).__name__}; it must be a Checksums or None")
        if self.coupling is None:
            raise ValueError("checksums is given; it must be None for a chain without a grid_exponent")
        count = 2 * len(self.blocks) + 2
        checksums.sums, checksums.sizes = empty((count,), "x1", like, "int64"), empty((count,), "x1", like, "float32")
        checksums.orders = []
        checksums.sums[...] = 0
        checksums.sizes[...] = 0
        return checksums

    def _options(self, record: Checksums | None, k: int) -> Coupling | None:
        """The coupling that computes stream k and reports into the record."""
        if record is None or self.coupling is None:
            return self.coupling
        cell = slice(k, k + 1)
        return Coupling(grid_exponent=self.coupling.grid_exponent, checksum=record.sums[cell], amax=record.sizes[cell])

    def _on_grid(self, name: str, x: Any, record: Checksums | None, k: int) -> Any:
        new = empty_like(name, x)
        new[...] = 0
        return ops.couple_(new, x, coupling=self._options(record, k), backend=self.backend)

    def _check_sizes(self, record: Checksums, dtypes: Sequence[str]) -> None:
        exponent = self.coupling.grid_exponent if self.coupling is not None else None
        for k in range(2 * len(self.blocks) + 2):
            dtype = dtypes[k % 2]
            limit = 2.0 ** ((53 if dtype == "float64" else 24) - (exponent or 0))
            size = float(record.sizes[k])
            if not size < limit:
                raise ReconstructionError(
                    f"{self._stream(k)} reaches {size:.3g}; on a grid of 2^-{exponent} a {dtype} stream is exact below "
                    f"{limit:g}: take a smaller grid_exponent"
                )

    def _check_sums(self, forward: Checksums, backward: Checksums) -> None:
        names = [name for name, _ in self._half_steps()]
        for k in reversed(range(len(names))):
            if int(forward.sums[k]) != int(backward.sums[k]):
                raise ReconstructionError(
                    f"{names[k]} did not return what it returned in the forward: {self._stream(k)} was reconstructed "
                    f"with other bits. It must repeat its output bit for bit and not write to its input"
                )

    def _stream(self, k: int) -> str:
        return f"x{k + 1}" if k < 2 else f"the stream that {self._half_steps()[k - 2][0]} is added to"


# ---- checks


def _checked_block(number: int, block: Any) -> tuple[Residual, Residual]:
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise TypeError(f"blocks[{number}] is a {type(block).__name__}; it must be a pair (F, G)")
    for name, branch in zip("FG", block, strict=True):
        if not callable(branch) or not callable(getattr(branch, "vjp", None)):
            raise TypeError(
                f"{name} of block {number} is a {type(branch).__name__}; it must be callable and have a method vjp"
            )
    return block[0], block[1]


def _check_grid(coupling: Any) -> None:
    if coupling is None:
        return
    if not isinstance(coupling, Coupling):
        raise TypeError(f"coupling is a {type(coupling).__name__}; it must be a revkernels.Coupling or None")
    for name in checks.arrays_of(coupling):
        raise ValueError(
            f"{name} is given; it must be None in a chain's coupling: a branch scales its output itself, and the "
            f"chain makes checksums of its own"
        )
    checks.check_int("grid_exponent", coupling.grid_exponent, "an int in a chain's coupling")
    if coupling.grid_exponent not in GRID_EXPONENTS:
        raise ValueError(
            f"grid_exponent is {coupling.grid_exponent}; it must be {GRID_EXPONENTS[0]} to {GRID_EXPONENTS[-1]}"
        )


def _check_exact(name: str, x: Any) -> None:
    checks.check_arrays(**{name: x})
    dtype = dtype_name(seen(name, x))
    if dtype not in ("float32", "float64"):
        raise TypeError(f"{name} is {dtype}; it must be float32 or float64 for a chain with a grid_exponent")


def _check_written(**arrays: Any) -> None:
    checks.check_arrays(**arrays)
    looks = {name: seen(name, array) for name, array in arrays.items()}
    checks.check_float(**looks)
    checks.check_same_device(**looks)
    checks.check_layout(**looks)
    checks.check_writable(**looks)
    checks.check_disjoint(looks, {})


def _order(look: Any) -> tuple[int, ...]:  # only of dimensions whose stride matters
    return () if 0 in look.shape else tuple(d for d in memory_order(look) if look.shape[d] > 1)


def _check_orders(forward: Checksums, written: Sequence[Any]) -> None:
    for name, order, look in zip(("y1", "y2"), forward.orders, written, strict=False):
        if _order(look) != order:  # the sums would differ, and the error would blame a branch
            raise ValueError(
                f"{name} has its dimensions {_order(look)} from the outermost in memory to the innermost, the "
                f"forward's had {order}; with checksums it must keep them, as .copy(order='K') does"
            )


def _check_output(
    name: str,
    f: Any,
    like: Any,
    wrong_type: type[Exception] = ReconstructionError,
    wrong_shape: type[Exception] = ReconstructionError,
) -> None:
    if family_of(f) != family_of(like) or family_of(f) is None:
        raise wrong_type(f"{name} returned a {type(f).__name__}; it must return an array like its stream's")
    look, stream = seen("its output", f), seen("its stream", like)
    if dtype_name(look) not in FLOATS:
        raise wrong_type(f"{name} returned {dtype_name(look)}; it must return one of {', '.join(FLOATS)}")
    if tuple(look.shape) != tuple(stream.shape):
        raise wrong_shape(f"{name} returned shape {tuple(look.shape)}; it must return {tuple(stream.shape)}")
    if device_name(look) != device_name(stream):
        raise wrong_shape(
            f"{name} returned an array on {device_name(look)}; it must return one on {device_name(stream)}"
        )
    try:
        checks.check_layout(array=look)
    except ValueError as error:
        raise wrong_shape(f"{name} returned an array that cannot be read in place: {error}") from None


# ---- branches


def _lent(array: Any) -> Any:
    """A branch's input, which it must not write to: for NumPy a read-only view."""
    if kind_of(array) != "numpy":
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def _call(name: str, function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"raised in {name}")
        raise


def _vjp(name: str, branch: Residual, x: Any) -> tuple[Any, Callable[[Any], Pair]]:
    answer = _call(name, branch.vjp, x)
    if not isinstance(answer, tuple) or len(answer) != 2 or not callable(answer[1]):
        raise ReconstructionError(
            f"the vjp of {name} returned {_words(answer)}; it must return a tuple (f, pullback), the latter callable"
        )
    return answer


def _pull(name: str, pullback: Callable[[Any], Pair], df: Any) -> Pair:
    answer = _call(f"the pullback of {name}", pullback, df)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ReconstructionError(f"the pullback of {name} returned {_words(answer)}; it must return a tuple (dx, dw)")
    return answer


def _own(tree: Any, written: Sequence[Any]) -> Any:
    """The same tree, with copies of the arrays that share memory with ``written`` (as `seen` shows them)."""
    if isinstance(tree, tuple | list | dict):
        items = tree.values() if isinstance(tree, dict) else tree
        owned = [_own(item, written) for item in items]
        if all(new is item for new, item in zip(owned, items, strict=True)):
            return tree
        if isinstance(tree, dict):
            return dict(zip(tree, owned, strict=True))
        return tree._make(owned) if hasattr(tree, "_make") else type(tree)(owned)
    kind = kind_of(tree)
    if kind is None or family_of(tree) != family_of(written[0]):
        return tree
    look = seen("dw", tree)
    if not any(checks.share_memory(look, array) for array in written):
        return tree
    if kind == "torch":
        return tree.clone()
    if kind in ("numpy", "cupy"):
        return tree.copy()
    own = empty_like("dw", tree)
    own[...] = 0
    return ops.couple_(own, tree)


def _words(answer: Any) -> str:
    kind = f"a {type(answer).__name__}"
    return f"{kind} of {len(answer)}" if isinstance(answer, tuple) else kind
