# SPDX-License-Identifier: Apache-2.0
"""The calls of `check`: kernels x element types x layouts, on NumPy arrays and torch tensors.

Bits are compared where the contract fixes them. Where a backend chooses the order of a sum or an approximation, results
are compared within rounding: statistics, the sums of a norm's backward, GELU and SiLU.

Every operand is a view of its own buffer. After a call whole buffers are compared, so that a write outside the view, or
to a read-only operand, is a mismatch too.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from revkernels import ops
from revkernels.arrays import FLOATS, INT16, compute_dtype, dtype_name, kind_of
from revkernels.coupling import Coupling
from revkernels.norm import KINDS, ActivationName, Norm, NormKind, Statistics

__all__ = ["KERNELS", "Call", "calls", "differences", "left_out"]

#: Kernel to its operands; those named after the stream have its dtype, f, df, part and dh the branch's.
KERNELS = {
    "couple": ("x", "f"),
    "uncouple_": ("y", "f"),
    "reverse_step_": ("y", "f", "dy", "df"),
    "accumulate_": ("total", "part"),
    "norm_act": ("x",),
    "couple_norm_act": ("x", "f"),
    "uncouple_norm_act_": ("y", "f"),
    "norm_act_backward_": ("dx", "dh", "x"),
}
_OF_BRANCH = ("f", "df", "part", "dh")
_COUPLINGS = ("couple", "uncouple_", "reverse_step_")
_NORMS = ("norm_act", "couple_norm_act", "uncouple_norm_act_", "norm_act_backward_")

_SMALL = (3, 5, 4, 7)  # odd sizes: no vector width divides a row, so every tail runs
_LARGE = (2, 6, 64, 65)  # 49,920 elements: too many for one thread
# A backward's sums have the same bits on every backend if they are exact: small multiples of powers of two, a power of
# two of them. Statistics, with a root and a quotient, are given for the same reason.
_SMALL_EXACT, _LARGE_EXACT = (2, 8, 4, 8), (2, 8, 64, 64)
_SPECIAL = (np.inf, -np.inf, np.nan, -0.0, 0.0, 1e-40, -3e-7, 65504.0)  # 1e-40, -3e-7: subnormal in bf16, in fp16
_BITS = {8: "uint64", 4: "uint32", 2: "uint16"}
#: Of calls that compute: each with one norm, so that the backends run all of them.
_ACTIVATIONS: dict[NormKind, ActivationName] = {"batch": "gelu", "layer": "gelu_tanh", "rms": "silu", "group": "relu"}
_ROUNDINGS = 64  # what a careful sum of some ten thousand terms may come to, in units of the largest


@dataclass(frozen=True)
class Call:
    """One call of one kernel on data determined by its fields."""

    kernel: str
    library: str  # "numpy" or "torch"
    stream: str  # dtype of x, y, dy, total; "int16" with options, and a value
    branch: str  # dtype of f, df, part, dh, and of norm_act's h; with int16, of dy
    layout: str  # "dense", "NCHW half", "channels-last half"
    shape: tuple[int, ...] = _SMALL
    options: bool = False  # scales, grid, checksum and amax at once
    norm: NormKind | Literal[""] = ""  # for a kernel that has one
    computes: bool = False  # statistics, sums and smooth activations on any values: compared within rounding

    def __str__(self) -> str:
        dtypes = self.stream if self.stream == self.branch else f"{self.stream} with {self.branch}"
        shape = "x".join(map(str, self.shape))
        norm = f"{self.norm} norm, " if self.norm else ""
        computes = ", statistics computed" if self.computes else ""
        options = ", options" if self.options else ""
        return f"{self.library}, {norm}{dtypes}, {self.layout} {shape}{options}{computes}"

    def run(self, backend: str, device: str = "cpu") -> list[np.ndarray]:
        """Make the call. Returns the values of everything it may have touched, one array per buffer."""
        random = np.random.default_rng(20170714)
        buffers, views = [], []
        for position, name in enumerate(KERNELS[self.kernel]):
            of_branch = name in _OF_BRANCH or (name == "dy" and self.stream == INT16)
            buffer, view = self._operand(random, self.branch if of_branch else self.stream, position, device)
            buffers.append(buffer)
            views.append(view)
        if self.norm:
            return [_to_numpy(array) for array in [*buffers, *self._normalise(views, backend, device)]]
        coupling = self._coupling(views, device) if self.options else None
        if coupling is not None and self.stream == INT16:
            buffer, view = self._operand(random, "float16", len(views), device)  # shows that it is rounded once
            buffers.append(buffer)
            coupling = replace(coupling, value=view)
        extra = {} if self.kernel == "accumulate_" else {"coupling": coupling}
        result = getattr(ops, self.kernel)(*views, **extra, backend=backend)
        touched = [*buffers, result] if self.kernel == "couple" else buffers
        if coupling is not None:
            touched += [coupling.checksum, coupling.amax]
        return [_to_numpy(array) for array in touched]

    def _operand(self, random: Any, dtype: str, position: int, device: str) -> tuple[Any, Any]:
        n, c, h, w = self.shape
        channels = slice(None) if self.layout == "dense" else slice(c, None) if position % 2 else slice(c)
        width = c if self.layout == "dense" else 2 * c
        size = (n, h, w, width) if self.layout == "channels-last half" else (n, width, h, w)
        values = random.standard_normal(size) * 2.0 ** random.integers(-6, 7, size)
        if dtype == INT16:
            values = random.integers(-(2**15), 2**15, size).astype(np.float64)
        elif self.computes:
            values = 0.5 + random.standard_normal(size)
        elif self.kernel == "norm_act_backward_":
            values = random.integers(-3, 4, size) / 2
        elif not self.options:  # a checksum is undefined for NaN, whose bits differ between processors
            places = random.choice(values.size, len(_SPECIAL), replace=False)
            values.reshape(-1)[places] = _SPECIAL
        buffer = _from_numpy(values, dtype, self.library, device)
        if self.layout == "channels-last half":
            view = buffer.transpose(0, 3, 1, 2) if self.library == "numpy" else buffer.permute(0, 3, 1, 2)
        else:
            view = buffer
        return buffer, view[:, channels]

    def _normalise(self, views: list[Any], backend: str, device: str) -> list[Any]:
        """Call a kernel with a norm, along dimension 1. Returns the results that are new arrays."""
        random, shape, channels = np.random.default_rng(20170714), self.shape, self.shape[1]
        wide = compute_dtype(*views[-1:] if self.kernel == "norm_act_backward_" else views)

        def made(size: Any, dtype: str, low: int, scale: bool = False) -> Any:
            values = random.integers(low, 4, size)
            return _from_numpy(2.0**values if scale else values / 1.0, dtype, self.library, device)

        groups = (2 if channels % 2 == 0 else channels) if self.norm == "group" else 1
        parameters = (made(channels, self.branch, -3), made(channels, self.branch, -3))
        kind = self.norm or "batch"
        activation: ActivationName = _ACTIVATIONS[kind] if self.computes else "relu"
        norm = Norm(kind, *parameters, activation=activation, groups=groups, channel_dim=1)
        size = norm.statistics_shape(shape)
        if self.computes and self.kernel in ("norm_act", "couple_norm_act"):
            running = [made(channels, wide, -3), made(channels, wide, -3)] if kind == "batch" else [None, None]
            norm = replace(norm, running_mean=running[0], running_var=running[1])
            *new, found = getattr(ops, self.kernel)(*views, norm, backend=backend)
            return [array for array in (*new, *found, *running) if array is not None]
        statistics = Statistics(None if self.norm == "rms" else made(size, wide, -3), made(size, wide, -2, scale=True))
        if self.kernel == "norm_act_backward_":
            dx, dh, x = views
            return list(ops.norm_act_backward_(dx, dh, x, norm, statistics, backend=backend)[1:])
        dtype = None
        if self.kernel == "norm_act":
            dtype = _dtype(self.branch, self.library)
        results = getattr(ops, self.kernel)(*views, norm, statistics=statistics, dtype=dtype, backend=backend)
        return list(results[1:-1] if self.kernel == "uncouple_norm_act_" else results[:-1])

    def _coupling(self, views: list[Any], device: str) -> Coupling:
        n, c = self.shape[:2]
        scale = compute_dtype(views[0], views[1])
        return Coupling(
            channel_scale=_from_numpy(np.linspace(0.3, 1.7, c), scale, self.library, device),
            sample_scale=_from_numpy(np.linspace(0.0, 1.1, n), scale, self.library, device),
            grid_exponent=9,
            checksum=_from_numpy(np.zeros(1), "int64", self.library, device),
            amax=_from_numpy(np.zeros(1), "float32", self.library, device),
        )


def calls() -> Iterator[Call]:
    """Yield every call that this installation can make."""
    for library in _libraries():
        dtypes = [dtype for dtype in FLOATS if library == "torch" or dtype != "bfloat16" or _has("ml_dtypes")]
        for kernel, stream in itertools.product(KERNELS, dtypes):
            if kernel in _NORMS:
                yield from _norm_calls(kernel, library, stream, dtypes)
            else:
                same = Call(kernel, library, stream, stream, "dense")
                yield same
                yield replace(same, layout="NCHW half")
                yield replace(same, layout="NCHW half", shape=_LARGE)
                yield replace(same, layout="channels-last half")
                if kernel in _COUPLINGS:
                    yield replace(same, options=True)
                for branch in dtypes:
                    if branch != stream:
                        yield replace(same, branch=branch)
        for kernel, branch in itertools.product(_COUPLINGS, dtypes):
            fixed = Call(kernel, library, INT16, branch, "dense", options=True)
            yield fixed
            if branch == "float32":
                yield replace(fixed, layout="NCHW half")
                yield replace(fixed, layout="NCHW half", shape=_LARGE)
                yield replace(fixed, layout="channels-last half")


def _norm_calls(kernel: str, library: str, stream: str, dtypes: list[str]) -> Iterator[Call]:
    small, large = (_SMALL_EXACT, _LARGE_EXACT) if kernel == "norm_act_backward_" else (_SMALL, _LARGE)
    for kind in KINDS:
        same = Call(kernel, library, stream, stream, "dense", small, norm=kind)
        yield same
        yield replace(same, layout="NCHW half")
        yield replace(same, layout="channels-last half")
        if kind in ("batch", "layer"):  # the two ways to walk memory
            yield replace(same, layout="NCHW half", shape=large)
            yield replace(same, layout="channels-last half", shape=large)
        yield replace(same, computes=True)
        yield replace(same, layout="NCHW half", shape=large, computes=True)
        yield replace(same, layout="channels-last half", shape=large, computes=True)
    for branch in dtypes:
        if branch != stream:
            yield replace(same, branch=branch, norm="batch")
            yield replace(same, branch=branch, norm="batch", computes=True)


def left_out() -> list[str]:
    """Return what `calls` skips here, and why."""
    reasons = []
    if not _has("torch"):
        reasons.append("torch tensors: torch is not installed (pip install 'revkernels[torch]')")
    if not _has("ml_dtypes"):
        reasons.append("NumPy bfloat16 arrays: ml_dtypes is not installed (pip install ml_dtypes)")
    return reasons


def differences(call: Call, got: list[np.ndarray], expected: list[np.ndarray]) -> int:
    """Count the elements that differ: in any bit, where two NaN are equal; or by more than rounding, in a call that
    computes statistics or sums."""
    same = functools.partial(_close, call) if call.computes else _same
    return sum(int(np.count_nonzero(~same(a, b))) for a, b in zip(got, expected, strict=True))


def _close(call: Call, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether the elements differ by no more than `_ROUNDINGS` of the compute type and one of the narrowest. A sum's
    are those of its terms, of which the largest has the size of the largest element elsewhere, about 10."""
    narrow = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
    added = call.branch if "f" in KERNELS[call.kernel] else call.stream
    wide = min(narrow["float32"], narrow[call.stream], narrow[added])
    last = max(narrow[call.stream], narrow[call.branch])
    terms = np.prod(call.shape) / call.shape[1] if b.ndim == 1 else 1  # of a channel
    size = max(10.0, float(np.abs(b).max(initial=0)))
    return np.abs(a.astype(np.float64) - b) <= _ROUNDINGS * wide * (size + 10 * terms) + 2 * last * np.abs(b)


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # A bfloat16 tensor is converted to float32 (exactly), so the bits of the widened values are compared.
    same = a.view(_BITS[a.itemsize]) == b.view(_BITS[b.itemsize])
    return same if a.dtype.kind == "i" else same | (np.isnan(a) & np.isnan(b))


def _libraries() -> tuple[str, ...]:
    return ("numpy", "torch") if _has("torch") else ("numpy",)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _from_numpy(values: np.ndarray, dtype: str, library: str, device: str) -> Any:
    with np.errstate(over="ignore"):  # 65504 * 2^k and the specials overflow narrow types on purpose
        if library == "torch":
            import torch

            return torch.from_numpy(values).to(_dtype(dtype, library)).to(device)
        return values.astype(_dtype(dtype, library))


def _dtype(name: str, library: str) -> Any:
    if library == "torch":
        return getattr(sys.modules["torch"], name)
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return name


def _to_numpy(array: Any) -> np.ndarray:
    if kind_of(array) == "torch":
        array = array.detach().cpu()
        array = (array.float() if dtype_name(array) == "bfloat16" else array).numpy()
    elif dtype_name(array) == "bfloat16":
        array = array.astype(np.float32)
    return np.ascontiguousarray(array)
