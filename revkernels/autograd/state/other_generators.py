# SPDX-License-Identifier: Apache-2.0
"""Python's and NumPy's random generators, with the methods of a `torch.Generator`."""

from __future__ import annotations

import marshal
import pickle
import random
import types
from collections.abc import Callable
from typing import Any

import numpy
import torch

__all__ = ["KINDS", "NUMPYS", "PYTHONS", "OtherGenerator", "as_torchs", "shared_by"]

#: The classes of such generators. Those derived from them may have no state, as `random.SystemRandom` has none.
KINDS = frozenset((random.Random, numpy.random.Generator, numpy.random.RandomState))


class OtherGenerator:
    """A generator whose state is a tensor of bytes, as that of a `torch.Generator` is."""

    __slots__ = ("_read", "_write")

    def __init__(self, read: Callable[[], bytes], write: Callable[[bytes], Any]) -> None:
        self._read, self._write = read, write

    def get_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self._read()), dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> None:
        self._write(state.numpy().tobytes())


def as_torchs(generator: Any) -> OtherGenerator:
    """A generator of one of the `KINDS` with the methods of torch's."""
    if type(generator) is random.Random:
        # Twice as fast as pickle. Later formats of marshal depend on reference counts.
        return OtherGenerator(
            lambda: marshal.dumps(generator.getstate(), 2), lambda state: generator.setstate(marshal.loads(state))
        )
    if type(generator) is numpy.random.RandomState:
        return OtherGenerator(
            lambda: pickle.dumps(generator.get_state(legacy=False)),
            lambda state: generator.set_state(pickle.loads(state)),
        )
    bits = generator.bit_generator
    return OtherGenerator(lambda: pickle.dumps(bits.state), lambda state: setattr(bits, "state", pickle.loads(state)))


#: The generators behind the functions of the modules ``random`` and ``numpy.random``.
_pythons, _numpys = random.random.__self__, numpy.random.rand.__self__  # type: ignore[attr-defined]
PYTHONS, NUMPYS = as_torchs(_pythons), as_torchs(_numpys)
_BEHIND = {id(_pythons): PYTHONS, id(_numpys): NUMPYS}
_METHODS = (types.MethodType, types.BuiltinMethodType)


def shared_by(value: Any, names: frozenset[str]) -> OtherGenerator | None:
    """The one of these two that code draws from which has ``value`` for a global and names ``names``: it is one of the
    two modules, NumPy, of which the code names ``random``, or a function of one of the two."""
    if issubclass(type(value), types.ModuleType):  # not isinstance: a proxy may raise anything when asked for its class
        if value is random:
            return PYTHONS
        return NUMPYS if value is numpy.random or (value is numpy and "random" in names) else None
    return _BEHIND.get(id(value.__self__)) if issubclass(type(value), _METHODS) else None
