# SPDX-License-Identifier: Apache-2.0
"""The four fused norm kernels against the torch calls they replace, beyond the cache and in it.

What is equal on both sides of a trial:

- Results: h (and y, x or dx) agree within rounding. ``test_bench_passes`` compares them for every case.
- Memory: what plain torch writes in place (the subtraction, the ReLU, the sum into dx) is in place on both sides, and
  what it allocates (h, the coupled y, statistics) both allocate, from memory that the process keeps. What torch
  allocates in addition, a masked gradient and one to be added, is the price of separate calls and stays on its side.
- Running statistics: both update them in `norm_act` and `couple_norm_act`, which belong to a forward. In the recompute
  neither does.
- Statistics of the recompute: `uncouple_norm_act_` gets those of the forward, because reading kept statistics is its
  purpose; torch's batch norm recomputes them, as in every recompute in training mode. The contender "..., computed"
  computes them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from revkernels import ops
from revkernels.backends import BACKENDS
from revkernels.bench.clocks import last_level_cache
from revkernels.bench.coupling import Setup
from revkernels.bench.harness import Goal, Suite, Trial, rotation
from revkernels.norm import ActivationName, Norm, NormKind, Statistics

__all__ = ["SUITE", "Case", "PassSetup", "copying"]

SUITE = Suite("passes")
EPS, MOMENTUM = 1e-3, 0.01  # the RevNets' own
_SAMPLE = {"channels-last": (64, 32, 32), "NCHW": (64, 32, 32), "rows": (197, 384)}  # of a tensor beyond the cache
_GPU_SAMPLE = {"channels-last": (256, 56, 56), "NCHW": (256, 56, 56), "rows": (197, 768)}  # RevNet-104, ViT-B
_IN_CACHE = {
    "channels-last": (100, 32, 16, 16),
    "NCHW": (100, 32, 16, 16),
    "rows": (16, 197, 192),
}  # RevNet-110, ViT-Ti
_CALLS = 10  # per sample, for tensors in the cache
_IN_CACHE_GOAL = 1.0
_ALL = [True, True, True]  # gradients of x, of weight and of bias
_LAYOUTS: tuple[tuple[NormKind, ActivationName, str], ...] = (
    ("batch", "relu", "channels-last"),
    ("batch", "relu", "NCHW"),
    ("layer", "none", "rows"),
    ("layer", "gelu", "rows"),
)


@dataclass(frozen=True)
class Case:
    """A trial's setting; its text is the case of a result line.

    Attributes:
        norm, activation: "batch" and "relu" on images, "layer" and "none" or "gelu" on rows of tokens.
        layout: "channels-last", "NCHW" or "rows".
        dtype: of x, f and h; parameters and statistics are float32.
        in_cache: whether it has the shape of a network's stage, which fits in the last-level cache.
    """

    norm: NormKind
    activation: ActivationName
    layout: str
    dtype: str
    in_cache: bool

    def __str__(self) -> str:
        place = "in cache" if self.in_cache else "past cache"
        return f"{self.norm}+{self.activation} {self.layout} {self.dtype} {place}"


_DTYPES = ("float32", "bfloat16")
_CASES = {str(c): c for c in (Case(*k, d, i) for i in (False, True) for k in _LAYOUTS for d in _DTYPES)}


@dataclass(frozen=True)
class PassSetup(Setup):
    """`Setup` with norms: ``megabytes`` are those of x, in the cases beyond the cache."""

    def backends(self) -> list[str]:
        """Return the fused backends that run on the device and have the norm kernels."""
        return [name for name in super().backends() if hasattr(BACKENDS[name].load(), "norm_act")]

    def shape(self, case: Case) -> tuple[int, ...]:
        """Return x's shape."""
        if case.in_cache:
            return _IN_CACHE[case.layout]
        sample = (_SAMPLE if self.device == "cpu" else _GPU_SAMPLE)[case.layout]
        return (max(1, (self.megabytes << 20) // (math.prod(sample) * getattr(torch, case.dtype).itemsize)), *sample)

    def tensor(self, case: Case) -> Tensor:
        """Return random numbers in the case's shape, memory order and dtype."""
        made = torch.randn(self.shape(case), device=self.device).to(getattr(torch, case.dtype))
        return made.to(memory_format=torch.channels_last) if case.layout == "channels-last" else made

    def norm(self, case: Case, running: bool) -> Norm:
        """Return the norm with random parameters; ``running``: with statistics to update, if it is a batch norm."""
        channels = self.shape(case)[-1 if case.layout == "rows" else 1]
        weight, bias = (torch.randn(channels, device=self.device) for _ in range(2))
        options: dict[str, Any] = {}
        if running and case.norm == "batch":
            zeros, ones = (make(channels, device=self.device) for make in (torch.zeros, torch.ones))
            options = {"running_mean": zeros, "running_var": ones, "momentum": MOMENTUM}
        return Norm(case.norm, weight, bias, EPS, case.activation, **options)

    def passes(
        self,
        case: Case,
        operands: Callable[[], tuple[Any, ...]],
        contenders: Mapping[str, Callable[..., Any]],
        traffic: int,
        past_goal: float,
    ) -> Trial:
        """Return the trial of torch and every fused backend, with ``traffic`` reads and writes of x's size per call.

        Goals apply to the processor: ``past_goal`` if x alone exceeds the cache, 1.0 if everything fits in it.
        """
        first = operands()
        size = sum(t.nbytes for t in first)
        cache = last_level_cache(self.device)
        count = 1 if case.in_cache else rotation(size, cache)
        fused = {f"{name}{rest}": _bind(f, name) for rest, f in _fused(contenders) for name in self.backends()}
        goal = None
        if self.device == "cpu" and (size < cache if case.in_cache else first[0].nbytes > cache):
            goal = Goal("ratio", _IN_CACHE_GOAL if case.in_cache else past_goal)
        return Trial(
            "torch",
            {"torch": contenders["torch"], **fused},
            [first, *(operands() for _ in range(count - 1))],
            traffic * first[0].nbytes,
            {} if goal is None else {name: goal for name in fused if name in self.backends()},
            _CALLS if case.in_cache else 1,
        )


def copying(setup: PassSetup) -> Trial:
    """A copy of ``megabytes``, which measures the memory bandwidth: the upper bound for a pass."""
    operands = [tuple(setup.random((setup.megabytes << 20) // 4, "float32") for _ in range(2)) for _ in range(2)]
    return Trial("torch", {"torch": lambda x, y: x.copy_(y)}, operands, 2 * operands[0][0].nbytes)


def _fused(contenders: Mapping[str, Callable[..., Any]]) -> Sequence[tuple[str, Callable[..., Any]]]:
    return [(name.removeprefix("ours"), function) for name, function in contenders.items() if name != "torch"]


def _bind(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return lambda *operands: function(*operands, backend=backend)


def _parameters(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    """In x's dtype on a GPU, whose layer norm rejects mixed dtypes."""
    return (norm.weight, norm.bias) if x.is_cpu else (norm.weight.to(x.dtype), norm.bias.to(x.dtype))


def _torch_norm(norm: Norm) -> Callable[[Tensor], Tensor]:
    """The torch calls for a norm in training and the following activation."""

    def batch(x: Tensor) -> Tensor:
        running = (norm.running_mean, norm.running_var)
        return functional.batch_norm(x, *running, norm.weight, norm.bias, True, norm.momentum, norm.eps).relu_()

    def layer(x: Tensor) -> Tensor:
        h = functional.layer_norm(x, norm.weight.shape, *_parameters(norm, x), norm.eps)
        return functional.gelu(h) if norm.activation == "gelu" else h

    return batch if norm.kind == "batch" else layer


@SUITE.benchmark(cases=_CASES)
def norm_act(setup: PassSetup, text: str) -> Trial:
    """h = activation(norm(x)) inside a branch, with computed statistics."""
    case = _CASES[text]
    norm = setup.norm(case, running=True)
    by_torch = _torch_norm(norm)
    contenders: dict[str, Any] = {"torch": by_torch}
    contenders["ours"] = lambda x, backend: ops.norm_act(x, norm, backend=backend)
    # A batch norm must read x twice, the second time with known statistics.
    traffic = 3 if case.norm == "batch" else 2
    return setup.passes(case, lambda: (setup.tensor(case),), contenders, traffic, 0.70)


@SUITE.benchmark(cases=_CASES)
def uncouple_norm_act_(setup: PassSetup, text: str) -> Trial:
    """x <- y - f, h = activation(norm(x)) of the recompute."""
    case = _CASES[text]
    norm = setup.norm(case, running=False)
    normed = _torch_norm(norm)
    operands = [(setup.tensor(case), setup.tensor(case))]
    y, f = operands[0]
    statistics = ops.norm_act(y - f, norm, backend="eager")[1]

    def given(y: Tensor, f: Tensor, backend: str) -> Any:
        return ops.uncouple_norm_act_(y, f, norm, statistics=statistics, backend=backend)

    def computed(y: Tensor, f: Tensor, backend: str) -> Any:
        return ops.uncouple_norm_act_(y, f, norm, backend=backend)

    contenders: dict[str, Any] = {"torch": lambda y, f: normed(y.sub_(f)), "ours": given, "ours, computed": computed}
    return setup.passes(case, lambda: operands.pop() if operands else _pair(setup, case), contenders, 4, 0.60)


@SUITE.benchmark(cases=_CASES)
def norm_act_backward_(setup: PassSetup, text: str) -> Trial:
    """dx <- dx + the gradient of x, dh that of h; the parameters' gradients."""
    case = _CASES[text]
    norm = setup.norm(case, running=False)

    # What torch saves of the forward besides x: ReLU its output, GELU its input.
    kept = replace(norm, activation="none") if norm.activation == "gelu" else norm

    def operands() -> tuple[Any, ...]:
        x = setup.tensor(case)
        h, statistics = ops.norm_act(x, kept, backend="eager")
        return setup.tensor(case), setup.tensor(case), x, h, *statistics

    def ours(dx: Tensor, dh: Tensor, x: Tensor, kept: Tensor, mean: Tensor, rstd: Tensor, backend: str) -> Any:
        return ops.norm_act_backward_(dx, dh, x, norm, Statistics(mean, rstd), backend=backend)

    by_torch = _torch_batch_backward(norm) if case.norm == "batch" else _torch_layer_backward(norm)
    # dh and x, twice for a batch norm; dx read and written.
    traffic = 6 if case.norm == "batch" else 4
    return setup.passes(case, operands, {"torch": by_torch, "ours": ours}, traffic, 0.65)


@SUITE.benchmark(cases=_CASES)
def couple_norm_act(setup: PassSetup, text: str) -> Trial:
    """y = x + f, h = activation(norm(y)) of the next branch, with computed statistics."""
    case = _CASES[text]
    norm = setup.norm(case, running=True)
    normed = _torch_norm(norm)

    def by_torch(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.add(x, f)
        return y, normed(y)

    contenders: dict[str, Any] = {"torch": by_torch}
    contenders["ours"] = lambda x, f, backend: ops.couple_norm_act(x, f, norm, backend=backend)
    traffic = 5 if case.norm == "batch" else 4
    return setup.passes(case, lambda: _pair(setup, case), contenders, traffic, 0.75)


def _pair(setup: PassSetup, case: Case) -> tuple[Tensor, Tensor]:
    return setup.tensor(case), setup.tensor(case)


def _torch_batch_backward(norm: Norm) -> Callable[..., Any]:
    def backward(dx: Tensor, dh: Tensor, x: Tensor, kept: Tensor, mean: Tensor, rstd: Tensor) -> Any:
        dz = torch.ops.aten.threshold_backward(dh, kept, 0)
        saved = (None, None, mean, rstd, True, norm.eps, _ALL)
        one, dweight, dbias = torch.ops.aten.native_batch_norm_backward(dz, x, norm.weight, *saved)
        return dx.add_(one), dweight, dbias

    return backward


def _torch_layer_backward(norm: Norm) -> Callable[..., Any]:
    def backward(dx: Tensor, dh: Tensor, x: Tensor, kept: Tensor, mean: Tensor, rstd: Tensor) -> Any:
        dz = torch.ops.aten.gelu_backward(dh, kept) if norm.activation == "gelu" else dh
        saved = (norm.weight.shape, mean[..., None], rstd[..., None], *_parameters(norm, x), _ALL)
        one, dweight, dbias = torch.ops.aten.native_layer_norm_backward(dz, x, *saved)
        return dx.add_(one), dweight, dbias

    return backward
