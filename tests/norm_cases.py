# SPDX-License-Identifier: Apache-2.0
"""Arrays, norms and the oracle for the kernels that normalise: what their tests share."""

import numpy as np
import pytest
from operands import Transposable, as_float64

from revkernels import reference
from revkernels.norm import Norm, Statistics

torch = pytest.importorskip("torch")

# A layout is (shape of the memory, how to view it, the channels' dimension); it serves torch and NumPy alike.
LAYOUTS = {
    "one element": ((1, 1), lambda a: a, 1),
    "empty": ((0, 4, 3), lambda a: a, 1),
    "empty inside": ((3, 4, 0), lambda a: a, 1),
    "one channel": ((5, 1, 7), lambda a: a, 1),
    "rows": ((9, 34), lambda a: a, 1),
    "half of rows": ((9, 34), lambda a: a[:, 17:], 1),
    "tokens": ((3, 5, 24), lambda a: a, 2),
    "half of tokens": ((3, 5, 26), lambda a: a[:, :, 13:], 2),
    "image": ((2, 6, 5, 7), lambda a: a, 1),
    "channels last": ((2, 5, 7, 6), lambda a: a.transpose(2, 3).transpose(1, 2), 1),
    "half of an image": ((2, 12, 5, 7), lambda a: a[:, 6:], 1),
    "half of channels last": ((2, 5, 7, 12), lambda a: a.transpose(2, 3).transpose(1, 2)[:, :6], 1),
    "channels first of all": ((6, 11, 3), lambda a: a.transpose(0, 1), 1),
    "five dimensions": ((2, 3, 4, 5, 3), lambda a: a, 1),
    "short planes": ((6, 5, 2, 3), lambda a: a, 1),
    "half of short planes": ((6, 8, 2, 3), lambda a: a[:, 4:], 1),
    "wide rows": ((3, 1030), lambda a: a, 1),
    "many short planes": ((4, 130, 3, 3), lambda a: a, 1),
}
SMALL = [name for name in LAYOUTS if name not in ("wide rows", "many short planes")]
KINDS = ("batch", "layer", "rms", "group")
SMOOTH = ("gelu", "gelu_tanh", "silu")
EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # half a last place of 1


class Operand:
    """One array, laid out in a larger memory whose rest must not change."""

    def __init__(self, layout, dtype, values, library="torch"):
        """``values(shape)`` makes them in the shape of the memory."""
        shape, self.view, self.axis = LAYOUTS[layout]
        memory = reference.round_to(values(shape), dtype)
        if library == "torch":
            self.memory = torch.from_numpy(memory).to(getattr(torch, dtype))
            self.array = self.view(self.memory)
        else:
            self.memory = memory.astype(dtype)
            self.array = self.view(Transposable(self.memory))
            self.array = getattr(self.array, "array", self.array)
        self.before = as_float64(self.memory)

    @property
    def values(self):
        return as_float64(self.array)

    def outside(self):
        """The memory as it is now and as it was, where the view does not reach."""
        marked = np.zeros(self.before.shape, bool)
        reached = self.view(Transposable(marked))
        getattr(reached, "array", reached)[...] = True
        return as_float64(self.memory)[~marked], self.before[~marked]


def normal(seed, mean=0.0, deviation=1.0):
    return lambda shape: np.random.default_rng(seed).normal(mean, deviation, shape)


def lattice(seed, largest=4, step=1.0):
    """Small whole multiples of a power of two: sums and products of a few of them are exact in any type."""
    return lambda shape: np.random.default_rng(seed).integers(-largest, largest + 1, shape) * step


def wide_of(*dtypes):
    return "float64" if "float64" in dtypes else "float32"


def vector(size, dtype, values, library="torch"):
    made = reference.round_to(values(size), dtype)
    return torch.from_numpy(made).to(getattr(torch, dtype)) if library == "torch" else made.astype(dtype)


def groups_of(channels):
    return next((n for n in (3, 2) if channels % n == 0), 1)


def norm_for(kind, x, axis, activation="none", dtype="float32", values=normal, library="torch", **options):
    """A norm with a weight and a bias for such an x."""
    channels = x.shape[axis]
    return Norm(
        kind,
        vector((channels,), dtype, values(101), library),
        vector((channels,), dtype, values(102), library),
        activation=activation,
        groups=groups_of(channels) if kind == "group" else 1,
        channel_dim=axis,
        **options,
    )


def some_statistics(norm, x, wide, values=normal, library="torch"):
    """Statistics that are not those of x, to be given."""
    shape = norm.statistics_shape(tuple(x.shape))
    rstd = vector(shape, wide, lambda size: 2.0 ** np.random.default_rng(9).integers(-2, 2, size), library)
    if values is normal:
        rstd = vector(shape, wide, lambda size: np.random.default_rng(9).uniform(0.3, 3, size), library)
    return Statistics(None if norm.kind == "rms" else vector(shape, wide, values(8), library), rstd)


class Oracle:
    """`revkernels.reference` under the names of the call."""

    def __init__(self, norm, shape, wide):
        axis = norm.channel_axis(len(shape))
        self.norm, self.of = norm, reference.owners(tuple(shape), norm.kind, axis, norm.groups)
        self.wide = getattr(np, wide)

    def _shared(self, statistics):
        arrays = (*statistics, self.norm.weight, self.norm.bias)
        return *(None if a is None else as_float64(a).ravel() for a in arrays), self.norm.activation, self.wide

    def h(self, x, statistics, dtype):
        return reference.norm_act(x, self.of, *self._shared(statistics), dtype)

    def statistics(self, x):
        return reference.statistics_of(x, self.of, self.norm.eps, self.wide, center=self.norm.kind != "rms")

    def gradients(self, base, dh, x, statistics, dtype, **options):
        shared = self._shared(statistics)
        return reference.norm_act_backward(base, dh, x, self.of, *shared, dtype, kind=self.norm.kind, **options)
