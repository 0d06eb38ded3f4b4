# SPDX-License-Identifier: Apache-2.0
"""Whether a branch's first recomputes return what its forwards returned.

A counter, numbers from Python's or NumPy's generators or a cache in a plain object change what a branch returns and
leave no trace that could be rewound: its gradients would be wrong without a word. So a few elements of what a branch
with code of its own returns are kept, for its first three recomputes, and compared. The check is coarse, since a
reconstructed stream differs by rounding. Exact couplings need none: their checksums tell at any time.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

import numpy as np
import torch
from numpy.linalg import norm
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from revkernels.autograd.coupling import in_usual_order
from revkernels.autograd.ownership import has_memory
from revkernels.autograd.state.rng_and_autocast import tensors_in

TIMES = 3  # recomputes of a branch that are compared
_ELEMENTS = 256
#: How far apart they may be, of the larger norm: rounding may turn a decision that a branch takes.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 0.1}
_HALF = 0.25
_NOISE = 1e-4  # of the stream that it is added to: a branch may return next to nothing

_compared: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class OutputSample:
    """A few elements of what a branch returned, and of the stream that it was added to."""

    __slots__ = ("_key", "_stream", "_values")

    def __init__(self, key: Any, outputs: list[torch.Tensor], stream: torch.Tensor | None) -> None:
        self._key = key
        self._values = [(output.stride(), _elements(output)) for output in outputs]
        self._stream = 0.0 if stream is None else float(norm(_elements(stream)))

    def difference(self, result: Any) -> str | None:
        """Say how far what the recompute returned is from it; None if it is near, or nobody can tell."""
        outputs = _readable(result)
        if [output.stride() for output in outputs] != [stride for stride, _ in self._values]:
            return None  # laid out otherwise, as by torch.compile, or captured: other elements, or none
        for (_, then), output in zip(self._values, outputs, strict=True):
            now = _elements(output)
            if now.shape != then.shape:
                return "the recompute returned a tensor of another shape than the forward"
            size, apart = norm(then), norm(now - then)
            if np.isfinite(size) and not apart <= _TOLERANCE.get(output.dtype, _HALF) * size + _NOISE * self._stream:
                return (
                    f"the recompute returned other values than the forward (they differ by "
                    f"{100 * apart / max(size, norm(now)):.0f} % in {len(now)} elements that were compared)"
                )
        _compared[self._key] = _compared.get(self._key, 0) + 1
        return None


def sample_of(branch: Any, result: Any, stream: torch.Tensor | None = None) -> OutputSample | None:
    """Note what a branch returned, if it is one whose recompute is to be compared.

    ``stream``: what that is added to. Where it is of half precision nothing is compared: it drifts far.
    """
    key = _key_of(branch)
    if key is None or _compared.get(key, 0) >= TIMES:
        return None
    outputs = _readable(result)
    if not outputs or (stream is not None and not (has_memory(stream) and stream.dtype in _TOLERANCE)):
        return None
    return OutputSample(key, outputs, stream)


def _key_of(branch: Any) -> Any:
    """What stands for a branch in the count: of functions, which may be made anew for every call, their code."""
    if isinstance(branch, nn.Module):
        return branch
    if isinstance(branch, types.MethodType):
        return branch.__self__ if isinstance(branch.__self__, nn.Module) else getattr(branch.__func__, "__code__", None)
    return getattr(branch, "__code__", type(branch))


def _readable(result: Any) -> list[torch.Tensor]:
    """Those of its tensors that have floating-point values, and are not just captured."""
    found = (tensor for _, tensor in tensors_in(result) if has_memory(tensor) and tensor.is_floating_point())
    return [t for t in found if not t.is_meta and not (t.is_cuda and torch.cuda.is_current_stream_capturing())]


def _elements(tensor: torch.Tensor) -> Any:
    """As an array outside of torch's memory, which is counted. A device is waited for."""
    with torch.no_grad(), _disable_current_modes():
        tensor = tensor.detach()
        size = tensor.numel()
        # In the order of the memory, without a copy; an odd step, so as not to meet the same channel every time.
        flat = tensor.as_strided((size,), (1,)) if in_usual_order(tensor) else tensor.reshape(-1)
        return np.array(flat[:: size // _ELEMENTS | 1].tolist(), np.float64)
