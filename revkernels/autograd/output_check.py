# SPDX-License-Identifier: Apache-2.0
"""Whether a branch's first recomputes return what its forwards returned.

A counter, numbers from Python's or NumPy's generators or a cache in a plain object change what a branch returns and
leave no trace that could be rewound: its gradients would be wrong without a word. So a few elements of what a branch
with code of its own returns are kept, for its first three recomputes, and compared. The check is coarse, since a
reconstructed stream differs by rounding. Exact couplings need none: their checksums tell at any time.
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

TIMES = 3  # recomputes of a branch that are compared
_LITTLE = 0.1  # of one: a comparison of next to nothing, such as of a zero-initialized layer, which tells nothing
_ELEMENTS = 256
#: How far apart they may be, of the forward's norm: rounding may turn a decision that a branch takes.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 0.1}
_HALF = 0.25
_READ = frozenset((*_TOLERANCE, torch.float16, torch.bfloat16))  # torch reads no element of some that are smaller
_NOISE = 1e-4  # of the stream that it is added to: a branch may return next to nothing

_compared: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


class OutputSample:
    """A few elements of what a branch returned, and of the stream that it was added to."""

    __slots__ = ("_key", "_stream", "_values")

    def __init__(self, key: Any, outputs: list[torch.Tensor], stream: torch.Tensor | None) -> None:
        self._key = key
        self._values = [(output.stride(), _tolerance(output), _elements(output)) for output in outputs]
        self._stream: float | None = None
        if stream is not None:
            size = _norm(_elements(stream))
            self._stream = size if math.isfinite(size) else 0.0

    def difference(self, result: Any, given: Any) -> str | None:
        """Say how far what the recompute returned for what it was given is from it; None if it is near, or nobody can
        tell."""
        outputs = _readable(result, self._stream is not None)
        if [output.stride() for output in outputs] != [stride for stride, *_ in self._values]:
            return None  # laid out otherwise, as by torch.compile, or captured: other elements, or none
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
            # Once a later branch, or one sample, has overflowed, streams come back without values, and so do gradients.
            if not apart <= tolerance * size + noise and _is_finite(given):
                return (
                    f"the recompute returned other values than the forward (they differ by "
                    f"{100 * apart / max(size, _norm(now)):.0f} % in {len(now)} elements that were compared)"
                )
        _compared[self._key] = _compared.get(self._key, 0) + (1 if tells else _LITTLE)
        return None


def sample_of(branch: Any, result: Any, stream: torch.Tensor | None = None) -> OutputSample | None:
    """Note what a branch returned, if it is one whose recompute is to be compared.

    ``stream``: what that is added to. Where it is of half precision nothing is compared: it drifts far.
    """
    key = _key_of(branch)
    if key is None or _compared.get(key, 0) >= TIMES:
        return None
    outputs = _readable(result, stream is not None)
    if not outputs or (stream is not None and not (has_memory(stream) and stream.dtype in _TOLERANCE)):
        return None
    return OutputSample(key, outputs, stream)


def _key_of(branch: Any) -> Any:
    """What stands for a branch in the count: of functions, which may be made anew for every call, their code; not that
    of a decorator, such as torch.compile, which others have too."""
    while not isinstance(branch, nn.Module):
        if isinstance(branch, functools.partial):
            branch = branch.func
        elif isinstance(branch, types.MethodType):
            branch = branch.__self__ if isinstance(branch.__self__, nn.Module) else branch.__func__
        elif isinstance(branch, types.FunctionType):
            if "__wrapped__" not in branch.__dict__:
                return branch.__code__
            branch = branch.__dict__["__wrapped__"]
        else:
            return type(branch)
    return branch


def _readable(result: Any, added: bool) -> list[torch.Tensor]:
    """Those of its tensors that can be compared: what is ``added`` to a stream, and what else a gradient goes through.
    They have floating-point values, and are not just captured."""
    f = result[0] if added and type(result) is tuple and result else result
    found = [tensor for tensor in _tensors(result) if tensor is f or tensor.requires_grad]
    found = [t for t in found if has_memory(t) and t.dtype in _READ and not t.is_nested and not t.is_meta]
    return [t for t in found if not (t.is_cuda and torch.cuda.is_current_stream_capturing())]


def _tensors(value: Any, depth: int = 6) -> Iterator[torch.Tensor]:
    """Those in it, without their names, whose making calls the repr of keys."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)


def _tolerance(output: torch.Tensor) -> float:
    """Of the forward, for its dtype; under autocast what is float32 has come through half precision."""
    tolerance = _TOLERANCE.get(output.dtype, _HALF)
    return tolerance if autocast_dtype(output.device.type) is None else max(tolerance, _HALF)


def _elements(tensor: torch.Tensor) -> Any:
    """As an array outside of torch's memory, which is counted. A device is waited for."""
    # A mode of the caller's, for all functions of torch, is to see what the branch does.
    with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        tensor = tensor.detach()
        size = tensor.numel()
        # In the order of the memory; an odd step, so as not to meet the same channel every time.
        places = range(0, size, size // _ELEMENTS | 1)
        if in_usual_order(tensor):
            values = tensor.as_strided((size,), (1,))[:: places.step]
        else:  # a copy of it would be as large as a stream
            values = tensor[tuple(map(torch.from_numpy, np.unravel_index(places, tensor.shape)))]
        return np.array(values.tolist(), np.float64)


def _norm(values: Any) -> float:
    """Not numpy's, which warns of what overflows."""
    with np.errstate(all="ignore"):
        return float(norm(values))


def _is_finite(given: Any) -> bool:
    with torch.no_grad(), _disable_current_modes():
        return all(bool(t.isfinite().all()) for _, t in tensors_in(given) if has_memory(t) and not t.is_meta)
