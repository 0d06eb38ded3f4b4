# SPDX-License-Identifier: Apache-2.0
"""How a chain keeps its two streams: as they are, or on a grid, from which they are reconstructed bit for bit.

On a grid every coupling reports the largest |stream| and a checksum of its bits. A stream that leaves the range makes
the chain's outputs NaN, and one reconstructed with other bits makes all gradients NaN: nothing can be raised while XLA
runs, and a slightly wrong gradient is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from revkernels.adapters.jax import plain
from revkernels.adapters.jax.calls import Reports
from revkernels.adapters.jax.ops import couple_arrays, reverse_step_arrays
from revkernels.adapters.jax.trees import split
from revkernels.exact import Exact, limit

__all__ = ["Exactly", "Floating", "kept_as"]

#: A stream's reports, or None if it has none.
Report = Reports | None


@dataclass(frozen=True)
class Floating:
    """Streams of the inputs' dtype; reconstruction differs by rounding."""

    kernels: bool

    def guard(self, tree: Any) -> Any:
        """The tree, unchanged: derivatives are supported."""
        return tree

    def enter(self, x: Array) -> tuple[Array, Report]:
        """A stream, and its report."""
        return x, None

    def couple(self, stream: Array, f: Array) -> tuple[Array, Report]:
        """stream + f, in the stream's memory."""
        return couple_arrays(stream, f, False, None, True, self.kernels), None

    def uncouple(self, stream: Array, f: Array) -> Array:
        """stream - f, in the stream's memory."""
        return couple_arrays(stream, f, True, None, True, self.kernels)

    def reverse_step(
        self, stream: Array, f: Array, d: Array, df: Array, after: list[Array]
    ) -> tuple[Array, Array, Report]:
        """stream - f and d + df, in their memory, after the arrays ``after`` are computed."""
        if _runs_calls_side_by_side():
            stream, f, total = _apart(stream, f, d, df, after)
            return *lax.optimization_barrier((self.uncouple(stream, f), total)), None
        return *reverse_step_arrays(stream, f, d, df, None, self.kernels, after=after), None

    def value(self, stream: Array) -> Array:
        """The numbers that the stream represents."""
        return stream

    def in_range(self, reports: Any) -> None:
        """Whether no stream has left its range; None, as there is no range."""
        return

    def unchanged(self, reports: Any, expected: Any) -> None:
        """Whether streams were reconstructed bit for bit; None, as that is unknown."""
        return


@dataclass(frozen=True)
class Exactly:
    """Streams of multiples of 2^-k: float32, or int16 in fixed point."""

    kernels: bool
    storage: str
    k: int

    def guard(self, tree: Any) -> Any:
        """The tree; int16 streams would hide dependencies on it, so a derivative by it raises."""
        if self.storage != "int16":
            return tree
        leaves = split(tree)
        return leaves.tree(_refusing(leaves.floating), leaves.others)

    def enter(self, x: Array) -> tuple[Array, Report]:
        """x rounded to the grid; -0 becomes 0."""
        return self.couple(jnp.zeros_like(x, self.storage), x)

    def couple(self, stream: Array, f: Array) -> tuple[Array, Report]:
        """stream + f', in the stream's memory."""
        return couple_arrays(stream, f, False, self.k, True, self.kernels, reports=True)

    def uncouple(self, stream: Array, f: Array) -> Array:
        """stream - f', in the stream's memory."""
        return couple_arrays(stream, f, True, self.k, True, self.kernels)

    def reverse_step(
        self, stream: Array, f: Array, d: Array, df: Array, after: list[Array]
    ) -> tuple[Array, Array, Report]:
        """stream - f' and d + df, in their memory, after the arrays ``after`` are computed."""
        if _runs_calls_side_by_side():
            stream, f, total = _apart(stream, f, d, df, after)
            x, report = couple_arrays(stream, f, True, self.k, True, self.kernels, reports=True)
            return *lax.optimization_barrier((x, total)), report
        x, dx, report = reverse_step_arrays(stream, f, d, df, self.k, self.kernels, reports=True, after=after)
        return x, dx, report

    def value(self, stream: Array) -> Array:
        """The numbers that the stream represents, float32."""
        return stream.astype(jnp.float32) * 2.0**-self.k if stream.dtype == jnp.int16 else stream

    def in_range(self, reports: Any) -> Array:
        """Whether no stream has left its range."""
        top = limit(self.storage, self.k)
        found = [(report.amax < top).all() for report in _each(reports)]
        return jnp.stack(found).all()

    def unchanged(self, reports: Any, expected: Any) -> Array:
        """Whether streams were reconstructed bit for bit."""
        pairs = zip(_each(reports), _each(expected), strict=True)
        same = [(found.checksum == before.checksum).all() for found, before in pairs]
        return jnp.stack(same).all() if same else jnp.asarray(True)  # a chain without blocks reconstructs nothing


def kept_as(coupling: Any, kernels: bool) -> Floating | Exactly:
    """The streams of ``coupling``: "float" or a `revkernels.Exact` with a k."""
    if coupling == "float":
        return Floating(kernels)
    if not isinstance(coupling, Exact) and coupling != "exact":
        raise ValueError(f"coupling is {coupling!r}; it must be 'float' or a revkernels.Exact(k=...)")
    if not isinstance(coupling, Exact) or coupling.k is None:
        raise ValueError(
            f"coupling is {coupling!r}; under JAX an exact coupling needs its k, for nothing can be measured while a "
            "function is traced: float32 streams stay exact below 2^(24 - k), so Exact(k=14) serves up to 1024"
        )
    return Exactly(kernels, coupling.storage, coupling.k)


def _runs_calls_side_by_side() -> bool:
    """Whether XLA runs independent calls in parallel on threads, as on a CPU.

    One call for a stream and its gradient would then delay what needs only the stream. Elsewhere one call is one pass.
    """
    return jax.default_backend() == "cpu"


def _apart(stream: Array, f: Array, d: Array, df: Array, after: list[Array]) -> tuple[Array, Array, Array]:
    """(stream, f, d + df), usable once the arrays ``after`` are computed. XLA fuses the sum into the pass for df.

    Not earlier: a stream reconstructed long before its gradient exists would have to be kept until then.
    """
    stream, f, d, df, *_ = lax.optimization_barrier((stream, f, d, df, *after))
    return stream, f, plain.accumulate(d, df)


@jax.custom_jvp
def _refusing(arrays: list[Array]) -> list[Array]:
    return arrays


@_refusing.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "int16 streams carry no gradient: a chain that keeps them has first derivatives in reverse mode, and its "
        "inverse has none. Use revkernels.Exact(storage='float32', k=...)"
    )


def _each(reports: Any) -> list[Reports]:
    return jax.tree.leaves(reports, is_leaf=lambda node: isinstance(node, Reports))
