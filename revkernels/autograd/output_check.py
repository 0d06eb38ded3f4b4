# SPDX-License-Identifier: Apache-2.0
"""Compares what a branch's first recomputes return with what its forwards returned.

Python counters, caches in plain objects and generators out of sight are not rewound, so a recompute may return other
values and gradients would silently be wrong. For the first three recomputes of a branch with code of its own, some 256
elements of its outputs are kept and compared. The check is coarse, because a reconstructed stream differs by rounding.
Exact couplings skip it: their checksums find whatever changes a stream, at any time.
"""

from __future__ import annotations

import functools
import math
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.linalg import norm
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from revkernels.autograd.coupling import in_usual_order
from revkernels.autograd.ownership import has_memory
from revkernels.autograd.state.rng_and_autocast import autocast_dtype, tensors_in

TIMES = 3  # recomputes compared per branch
_LITTLE = 0.1  # of a comparison: outputs near zero, as of a zero-initialized layer, prove little
_ELEMENTS = 256  # about as many: the step between them is odd
#: Allowed distance relative to the forward's norm; rounding may flip discrete decisions inside a branch.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 0.1}
_HALF = 0.25
_READ = frozenset((*_TOLERANCE, torch.float16, torch.bfloat16))  # tolist() fails for smaller dtypes
_NOISE = 1e-4  # relative to the stream: allowed besides, for outputs near zero

_compared: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


class OutputSample:
    """Sampled elements of a branch's outputs, and the norm of the stream that f is added to."""

    __slots__ = ("_key", "_stream", "_values")

    def __init__(self, key: Any, outputs: list[torch.Tensor], stream: torch.Tensor | None) -> None:
        self._key = key
        self._values = [(output.stride(), _tolerance(output), _elements(output)) for output in outputs]
        self._stream: float | None = None
        if stream is not None:
            size = _norm(_elements(stream))
            self._stream = size if math.isfinite(size) else 0.0

    def difference(self, result: Any, given: Any) -> str | None:
        """Describe how the recompute's outputs differ; None if they are close or cannot be compared.

        ``given``: the recompute's input.
        """
        outputs = _readable(result, self._stream is not None)
        if [output.stride() for output in outputs] != [stride for stride, *_ in self._values]:
            return None  # another layout, as from torch.compile, samples other elements; during capture, none
        tells = False
        for (_, tolerance, then), output in zip(self._values, outputs, strict=True):
            now = _elements(output)
            if now.shape != then.shape:
                return "the recompute returned a tensor of another shape than the forward"
            size = _norm(then)
            if not math.isfinite(size):
                continue
            with np.errstate(all="ignore"):
                apart = _norm(now - then)
            noise = _NOISE * (self._stream or 0.0)
            tells = tells or size > 10 * noise
            # After an overflow the reconstructed input is not finite, and neither are the gradients.
            if not apart <= tolerance * size + noise and _is_finite(given):
                return (
                    f"the recompute returned other values than the forward (they differ by "
                    f"{100 * apart / max(size, _norm(now)):.0f} % in {len(now)} elements that were compared)"
                )
        _compared[self._key] = _compared.get(self._key, 0) + (1 if tells else _LITTLE)
        return None


def sample_of(branch: Any, result: Any, stream: torch.Tensor | None = None) -> OutputSample | None:
    """Sample a branch's outputs if its next recompute is to be compared, else return None.

    ``stream``: the stream that f is added to. Half-precision streams are not compared: they drift too far.
    """
    key = key_if_new(branch)
    if key is None:
        return None
    outputs = _readable(result, stream is not None)
    if not outputs or (stream is not None and not (has_memory(stream) and stream.dtype in _TOLERANCE)):
        return None
    return OutputSample(key, outputs, stream)


def key_if_new(branch: Any) -> Any:
    """What the branch is counted by, if fewer of its recomputes were compared than are to be; else None."""
    key = _key_of(branch)
    return key if key is not None and _compared.get(key, 0) < TIMES else None


def _key_of(branch: Any) -> Any:
    """The key that counts a branch's comparisons. For functions, which may be created per call, it is the code object
    of the function inside partials and decorators."""
    while not isinstance(branch, nn.Module):
        if isinstance(branch, functools.partial):
            branch = branch.func
        elif isinstance(branch, types.MethodType):
            branch = branch.__self__ if isinstance(branch.__self__, nn.Module) else branch.__func__
        elif isinstance(branch, types.FunctionType):
            inner = branch.__dict__.get("__wrapped__")
            if inner is None or inner is branch:
                return branch.__code__
            branch = inner
        else:
            return type(branch)
    return branch


def _readable(result: Any, added: bool) -> list[torch.Tensor]:
    """The tensors that can be compared: f, which is ``added`` to a stream, and others that require grad. They hold
    floating-point values and are not being captured in a CUDA graph."""
    f = result[0] if added and type(result) is tuple and result else result
    found = [tensor for tensor in _tensors(result) if tensor is f or tensor.requires_grad]
    found = [t for t in found if has_memory(t) and t.dtype in _READ and not t.is_nested and not t.is_meta]
    return [t for t in found if not (t.is_cuda and torch.cuda.is_current_stream_capturing())]


def _tensors(value: Any, depth: int = 6) -> Iterator[torch.Tensor]:
    """The tensors in nested containers. (`tensors_in` also builds names, which calls repr of keys.)"""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)


def _tolerance(output: torch.Tensor) -> float:
    """The tolerance for an output. Under autocast a float32 output was computed in half precision."""
    tolerance = _TOLERANCE.get(output.dtype, _HALF)
    return tolerance if autocast_dtype(output.device.type) is None else max(tolerance, _HALF)


def _elements(tensor: torch.Tensor) -> Any:
    """Sampled elements as a NumPy array, outside torch's memory accounting. Synchronises with the device."""
    # The caller's modes must see only what the branch does.
    with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        tensor = tensor.detach()
        size = tensor.numel()
        # In memory order, with an odd step so that samples do not all fall on one channel.
        places = range(0, size, size // _ELEMENTS | 1)
        if in_usual_order(tensor):
            values = tensor.as_strided((size,), (1,))[:: places.step]
        else:  # reshape(-1) would copy the whole tensor
            values = tensor[tuple(map(torch.from_numpy, np.unravel_index(places, tensor.shape)))]
        return np.array(values.tolist(), np.float64)


def _norm(values: Any) -> float:
    """NumPy's norm without its overflow warnings."""
    with np.errstate(all="ignore"):
        return float(norm(values))


def _is_finite(given: Any) -> bool:
    with torch.no_grad(), _disable_current_modes():
        return all(bool(t.isfinite().all()) for _, t in tensors_in(given) if has_memory(t) and not t.is_meta)
