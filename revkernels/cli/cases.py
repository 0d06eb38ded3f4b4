# SPDX-License-Identifier: Apache-2.0
"""The calls that `check` makes: kernels x element types x layouts, on NumPy arrays and torch tensors.

Every operand is a view of a buffer of its own. After a call whole buffers are compared, so that a write outside the
view, or to an operand that is only read, is a mismatch too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from revkernels import ops
from revkernels.arrays import FLOATS, compute_dtype, dtype_name
from revkernels.coupling import Coupling

__all__ = ["KERNELS", "Call", "calls", "differences", "left_out"]

#: Kernel to the operands it takes; those named after the stream have its dtype, f, df and part the branch's.
KERNELS = {
    "couple": ("x", "f"),
    "uncouple_": ("y", "f"),
    "reverse_step_": ("y", "f", "dy", "df"),
    "accumulate_": ("total", "part"),
}
_OF_BRANCH = ("f", "df", "part")

_SMALL = (3, 5, 4, 7)  # odd sizes: no vector width divides a row, so every tail is run
_LARGE = (2, 6, 64, 65)  # 49,920 elements: above what one thread takes alone
_SPECIAL = (np.inf, -np.inf, np.nan, -0.0, 0.0, 1e-40, -3e-7, 65504.0)  # 1e-40, -3e-7: subnormal in bf16, in fp16
_BITS = {8: "uint64", 4: "uint32", 2: "uint16"}


@dataclass(frozen=True)
class Call:
    """One call of one kernel on data that its fields determine."""

    kernel: str
    library: str  # "numpy" or "torch"
    stream: str  # dtype of x, y, dy, total
    branch: str  # dtype of f, df, part
    layout: str  # "dense", "NCHW half", "channels-last half"
    shape: tuple[int, ...] = _SMALL
    options: bool = False  # scales, grid, checksum and amax at once

    def __str__(self) -> str:
        dtypes = self.stream if self.stream == self.branch else f"{self.stream} with {self.branch}"
        shape = "x".join(map(str, self.shape))
        return f"{self.library}, {dtypes}, {self.layout} {shape}{', options' if self.options else ''}"

    def run(self, backend: str, device: str = "cpu") -> list[np.ndarray]:
        """Make the call. Returns the values of everything it may have touched, one array a buffer."""
        random = np.random.default_rng(20170714)
        buffers, views = [], []
        for position, name in enumerate(KERNELS[self.kernel]):
            buffer, view = self._operand(random, self.branch if name in _OF_BRANCH else self.stream, position, device)
            buffers.append(buffer)
            views.append(view)
        coupling = self._coupling(views, device) if self.options else None
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
        if not self.options:  # a checksum has no defined value for NaN, whose bits differ between processors
            places = random.choice(values.size, len(_SPECIAL), replace=False)
            values.reshape(-1)[places] = _SPECIAL
        buffer = _from_numpy(values, dtype, self.library, device)
        if self.layout == "channels-last half":
            view = buffer.transpose(0, 3, 1, 2) if self.library == "numpy" else buffer.permute(0, 3, 1, 2)
        else:
            view = buffer
        return buffer, view[:, channels]

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
        for kernel in KERNELS:
            for stream in dtypes:
                same = Call(kernel, library, stream, stream, "dense")
                yield same
                yield replace(same, layout="NCHW half")
                yield replace(same, layout="NCHW half", shape=_LARGE)
                yield replace(same, layout="channels-last half")
                if kernel != "accumulate_":
                    yield replace(same, options=True)
                for branch in dtypes:
                    if branch != stream:
                        yield replace(same, branch=branch)


def left_out() -> list[str]:
    """Return what `calls` does not make here, and why."""
    reasons = []
    if not _has("torch"):
        reasons.append("torch tensors: torch is not installed (pip install revkernels[torch])")
    if not _has("ml_dtypes"):
        reasons.append("NumPy bfloat16 arrays: ml_dtypes is not installed (pip install ml_dtypes)")
    return reasons


def differences(got: list[np.ndarray], expected: list[np.ndarray]) -> int:
    """Count the elements whose bits differ; two NaN are equal."""
    return sum(int(np.count_nonzero(~_same(a, b))) for a, b in zip(got, expected, strict=True))


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # A bfloat16 tensor comes back as float32 (exactly), so the bits of the widened values are compared.
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

            return torch.from_numpy(values).to(getattr(torch, dtype)).to(device)
        if dtype == "bfloat16":
            import ml_dtypes

            return values.astype(ml_dtypes.bfloat16)
        return values.astype(dtype)


def _to_numpy(array: Any) -> np.ndarray:
    if "torch" in sys.modules and isinstance(array, sys.modules["torch"].Tensor):
        array = array.detach().cpu()
        array = (array.float() if dtype_name(array) == "bfloat16" else array).numpy()
    elif dtype_name(array) == "bfloat16":
        array = array.astype(np.float32)
    return np.ascontiguousarray(array)
