# SPDX-License-Identifier: Apache-2.0
"""A training step of a chain of blocks under JAX: stored, checkpointed, reconstructed; time, memory, compile time.

The contenders have the same branches, in jax.numpy; they differ in how streams and activations are kept. The memory is
what XLA plans for the step besides arguments and results (``temp_size_in_bytes`` of its memory analysis).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from revkernels.adapters import jax as adapter
from revkernels.bench.clocks import HostClock
from revkernels.bench.harness import Measurement, Trial, measure
from revkernels.exact import Exact

__all__ = ["BRANCHES", "WAYS", "Case", "run"]

BASELINE = "plain"
WAYS = (BASELINE, "checkpoint", "reversible, xla", "reversible, kernels", "exact, kernels")
_EXACT = Exact(k=14)


@dataclass(frozen=True)
class Case:
    """A chain.

    Attributes:
        branch: a key of `BRANCHES`.
        depth: number of branches, two per block.
        batch, side, width: a stream is (batch, side, side, width), or (batch * side * side, width) for an MLP.
        scan: whether the blocks run in a `jax.lax.scan` instead of unrolled.
        device: "cpu" or "cuda".
    """

    branch: str = "conv"
    depth: int = 32
    batch: int = 32
    side: int = 16
    width: int = 32
    scan: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        loop = ", scan" if self.scan else ""
        return f"{self.branch}, depth {self.depth}{loop}, {'x'.join(map(str, self.shape))}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a stream."""
        if self.branch == "conv":
            return (self.batch, self.side, self.side, self.width)
        return (self.batch * self.side**2, self.width)


def _conv(p: Any, x: Array) -> Array:
    """A basic block's residual function, pre-activation: norm, ReLU, 3x3 convolution, twice."""
    for w in p:
        center = x.mean((0, 1, 2))
        h = (x - center) * lax.rsqrt(((x - center) ** 2).mean((0, 1, 2)) + 1e-5)
        x = lax.conv_general_dilated(jax.nn.relu(h), w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x


def _mlp(p: Any, x: Array) -> Array:
    """A transformer's MLP: layer norm, a layer four times as wide, GELU, and back."""
    center = x.mean(-1, keepdims=True)
    h = (x - center) * lax.rsqrt(((x - center) ** 2).mean(-1, keepdims=True) + 1e-5)
    return jax.nn.gelu(h @ p[0]) @ p[1]


BRANCHES: dict[str, Callable[[Any, Array], Array]] = {"conv": _conv, "mlp": _mlp}


def run(case: Case, rounds: int, begin: Callable[[str], None] = lambda step: None) -> Iterator[Measurement]:
    """Measure one step in every way; ``begin`` is called for ``rounds`` + len(WAYS) + 1 steps of the work.

    ``more`` has ``temp_bytes``, its ratio to the baseline's ``temp_ratio``, ``compile_s``, and ``jax``, its version.
    """
    (device, *_) = jax.devices(case.device)
    with jax.default_device(device):
        operands = _operands(case)
        compiled, seconds = {}, {}
        for way in WAYS:
            begin(f"compile {way}")
            start = time.perf_counter()
            compiled[way] = jax.jit(jax.value_and_grad(_loss(case, way), (0, 1, 2, 3))).lower(*operands).compile()
            seconds[way] = time.perf_counter() - start
        steps = {way: _waited_for(program) for way, program in compiled.items()}
        memory = {way: _temporary_bytes(program) for way, program in compiled.items()}
        trial = Trial(BASELINE, steps, operands=[operands])
        for found in measure("jax", str(case), trial, HostClock(), rounds, warmup=1, begin=begin):
            found.more |= {
                "temp_bytes": memory[found.variant],
                "temp_ratio": memory[found.variant] / memory[BASELINE],
                "compile_s": seconds[found.variant],
                "jax": jax.__version__,
            }
            yield found


def _temporary_bytes(program: Any) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


def _waited_for(program: Callable[..., Any]) -> Callable[..., None]:
    def step(*operands: Any) -> None:
        jax.block_until_ready(program(*operands))

    return step


def _operands(case: Case) -> tuple[Any, Any, Array, Array]:
    """Parameters of all F and of all G, stacked for a scan, and two streams."""
    width = case.width
    shapes = [(3, 3, width, width)] * 2 if case.branch == "conv" else [(width, 4 * width), (4 * width, width)]
    keys = jax.random.split(jax.random.key(0), case.depth + 1)
    params = [
        [
            jax.random.normal(key, shape) * math.sqrt(2 / math.prod(shape[:-1]))
            for key, shape in zip(jax.random.split(pair), shapes, strict=True)
        ]
        for pair in keys[:-1]
    ]
    x1, x2 = jax.random.normal(keys[-1], (2, *case.shape))
    f, g = params[::2], params[1::2]
    if case.scan:
        f, g = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for each in (f, g))
    return f, g, x1, x2


def _loss(case: Case, way: str) -> Callable[..., Array]:
    branch, blocks = BRANCHES[case.branch], case.depth // 2

    def block(x1: Array, x2: Array, p: Any, q: Any) -> tuple[Array, Array]:
        x1 = x1 + branch(p, x2)
        return x1, x2 + branch(q, x1)

    one = jax.checkpoint(block) if way == "checkpoint" else block

    def unrolled(f: Any, g: Any, x1: Array, x2: Array) -> tuple[Array, Array]:
        for p, q in zip(f, g, strict=True):
            x1, x2 = one(x1, x2, p, q)
        return x1, x2

    def scanned(f: Any, g: Any, x1: Array, x2: Array) -> tuple[Array, Array]:
        return lax.scan(lambda streams, of_block: (one(*streams, *of_block), None), (x1, x2), (f, g))[0]

    apply: Callable[..., Any]
    if way in (BASELINE, "checkpoint"):
        apply = scanned if case.scan else unrolled
    else:
        coupling = _EXACT if way.startswith("exact") else "float"
        backend = way.rpartition(", ")[2]
        if case.scan:
            apply = adapter.reversible_scan(branch, branch, coupling=coupling, backend=backend)
        else:
            apply = adapter.reversible([branch] * blocks, [branch] * blocks, coupling=coupling, backend=backend)

    def loss(f: Any, g: Any, x1: Array, x2: Array) -> Array:
        y1, y2 = apply(f, g, x1, x2)
        return (y1**2).mean() + (y2**2).mean()

    return loss
