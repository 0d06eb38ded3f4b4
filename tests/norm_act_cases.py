# SPDX-License-Identifier: Apache-2.0
"""Random norms with activations: shapes, layouts, dtypes and values, what is right in float64, and how exactly.

The bounds follow the roundings of the contract, element by element, in units u of the compute type: a mean is off by
its own rounding and by what sums of deviations lose, a variance by what it loses where the mean is large against it
(condition number kappa, once and not squared: that is what a one-pass sum of squares would fail), and all else follows
to first order. Gradients are autograd's, of formulas written here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from torch.nn import functional as tf  # noqa: E402

from revkernels import Norm  # noqa: E402

WIDE = torch.float64
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": tf.relu,
    "gelu": tf.gelu,
    "gelu_tanh": lambda z: tf.gelu(z, approximate="tanh"),
    "silu": tf.silu,
}
LAYOUTS = ["dense", "moved", "half", "half of moved", "misaligned", "gaps"]
SUMS = 64  # roundings that a careful sum of some thousand terms may come to


# ---- cases


@dataclass(frozen=True)
class Case:
    kind: str
    activation: str
    shape: tuple[int, ...]
    axis: int  # of the channels
    groups: int
    layouts: tuple[str, ...]  # of x, f, dh, dx
    dtypes: tuple[torch.dtype, ...]  # of x, f, dh, dx
    h_dtype: torch.dtype | None
    parameters: torch.dtype
    affine: tuple[bool, bool]
    running: torch.dtype | None
    eps: float
    offset: float
    spread: float
    constant: bool  # one channel has no variance
    seed: int

    @property
    def channels(self):
        return self.shape[self.axis]

    def generator(self, number):
        return torch.Generator().manual_seed(self.seed * 1000 + number)

    def values(self, number):
        """Values of operand ``number``: x and f have offsets, gradients none."""
        generator = self.generator(number)
        values = torch.randn(self.shape, generator=generator, dtype=WIDE)
        if number > 1:
            return values
        values = values.movedim(self.axis, -1) * self.spread
        values += self.offset * torch.randn(self.channels, generator=generator, dtype=WIDE).clamp(-2, 2)
        if self.constant:
            values[..., 0] = self.offset
        return values.movedim(-1, self.axis)

    def operand(self, number):
        return Operand(self.values(number), self.dtypes[number], self.layouts[number], self.axis)

    def norm(self):
        weight, bias = (
            torch.randn(self.channels, generator=self.generator(10 + i), dtype=WIDE).to(self.parameters) if on else None
            for i, on in enumerate(self.affine)
        )
        running = None
        if self.running is not None:
            running = [torch.rand(self.channels, generator=self.generator(20 + i)).to(self.running) for i in (0, 1)]
        return Norm(
            self.kind,
            weight,
            None if self.kind == "rms" and self.seed % 2 else bias,
            self.eps,
            self.activation,
            self.groups,
            self.axis,
            *(running or (None, None)),
            momentum=0.25,
        )


class Operand:
    """A view, in one of the layouts, of memory whose rest must not change."""

    def __init__(self, values, dtype, layout, axis):
        shape = values.shape
        to = -1 if axis != len(shape) - 1 else min(1, len(shape) - 1)  # channels last, or where images have them
        at = axis
        if layout.endswith("moved"):
            shape, at = values.movedim(axis, to).shape, to % len(shape)
        if layout.startswith("half"):
            shape = (*shape[:at], 2 * shape[at], *shape[at + 1 :])
        elif layout == "gaps":
            shape = (2 * shape[0], *shape[1:])

        def view(memory):
            array = memory[3:].view(shape)
            if layout.startswith("half"):
                array = array.narrow(at, shape[at] // 2, shape[at] // 2)
            elif layout == "gaps":
                array = array[::2]
            return array.movedim(to, axis) if layout.endswith("moved") else array

        # 3 elements in front, so that nothing is aligned for vectors, but for "dense"
        front = 0 if layout == "dense" else 3
        self.memory = torch.full((3 + math.prod(shape),), 7.0, dtype=dtype)
        if not front:
            self.memory = torch.cat((self.memory[3:], self.memory[:3]))
        self._view = view if front else lambda memory: memory[: math.prod(shape)].view(shape)
        self.array = self._view(self.memory)
        limit = torch.finfo(dtype).max
        self.array.copy_(values.clamp(-limit, limit))
        assert self.array.shape == values.shape

    def rest_is_untouched(self):
        inside = torch.zeros(self.memory.shape, dtype=torch.bool)
        self._view(inside)[...] = True
        return bool((self.memory[~inside] == 7.0).all())


@st.composite
def cases(draw, kinds=("batch", "layer", "rms", "group"), floats=FLOATS, sizes=(1, 2, 3, 5, 7, 16)):
    kind = draw(st.sampled_from(kinds))
    rank = draw(st.integers(1 if kind in ("layer", "rms") else 2, 5))
    axis = draw(st.sampled_from([1, rank - 1])) if rank > 1 else 0
    shape = [draw(st.sampled_from(sizes)) for _ in range(rank)]
    shape[axis] = draw(st.sampled_from([1, 2, 3, 8, 16, 17, 33, 64, 100]))
    if rank < 4 and axis != rank - 1:
        shape[-1] = draw(st.sampled_from([1, 4, 31, 257]))
    groups = 1
    if kind == "group":
        groups = draw(st.sampled_from([g for g in range(1, shape[axis] + 1) if shape[axis] % g == 0]))
    one = st.sampled_from(floats)
    x = draw(one)
    return Case(
        kind=kind,
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        shape=tuple(shape),
        axis=axis,
        groups=groups,
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        dtypes=(x, draw(one), draw(one), draw(one)),
        h_dtype=draw(st.none() | one),
        parameters=draw(st.sampled_from([torch.float32, torch.float64, x])),
        affine=(draw(st.booleans()), draw(st.booleans())),
        running=draw(st.none() | st.sampled_from([torch.float32, torch.float64])) if kind == "batch" else None,
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.1, 1e-12])),
        offset=draw(st.sampled_from([0.0, 1.0, -30.0, 1e4])),
        spread=draw(st.sampled_from([1.0, 1e-3, 100.0])),
        constant=draw(st.integers(0, 4)) == 0,
        seed=draw(st.integers(0, 999)),
    )


# ---- what is right, and how exactly


class Oracle:
    """The norm of x in float64, everything seen as (samples, groups, channels of one, rest), and the bounds."""

    def __init__(self, case, norm, x, wide, statistics=None):
        self.case, self.u = case, torch.finfo(wide).eps / 2
        self.x = self.see(x.double()).requires_grad_()
        self.shared = {"batch": (0, 3), "group": (2, 3)}.get(case.kind, (1, 2))
        x, u = self.x, self.u
        if statistics is None:
            center = 0.0 if case.kind == "rms" else self.mean(x)
            variance = self.mean((x - center).square())
            rstd = (variance + case.eps).rsqrt()
            deviation, kappa = variance.sqrt(), torch.as_tensor(center).abs() * rstd
            self.mean_bound = 0.0 if case.kind == "rms" else 4 * u * center.abs() + SUMS * u * deviation
            self.rstd_bound = (SUMS * u + 4 * u * kappa) * rstd
            self.variance = variance.detach()
        else:
            center, rstd = (self.statistic(s.double()) for s in statistics)
            self.mean_bound = self.rstd_bound = torch.zeros_like(center)
        self.center, self.rstd = torch.as_tensor(center, dtype=WIDE), rstd
        self.weight, self.bias = (
            torch.full((1, 1, 1, 1), start, dtype=WIDE) if p is None else self.parameter(p.double())
            for p, start in ((norm.weight, 1.0), (norm.bias, 0.0))
        )
        self.xhat = (x - center) * rstd
        z = self.xhat * self.weight + self.bias
        self.h = ACTIVATIONS[case.activation](z)
        self.z = z.detach()
        xhat, w = self.xhat.detach(), self.weight.detach()
        self.xhat_bound = (
            rstd * (self.mean_bound + u * (x - center).abs()) + xhat.abs() * self.rstd_bound / rstd
        ).detach()
        self.xhat_bound += 4 * u * xhat.abs()
        self.z_bound = w.abs() * self.xhat_bound + 4 * u * ((w * xhat).abs() + self.bias.detach().abs())

    def see(self, array):
        """(samples, groups, channels of one, rest)"""
        array = array[None] if array.dim() == 1 else array.movedim(self.case.axis, 1)
        groups = self.case.groups
        return array.reshape(array.shape[0], groups, array.shape[1] // groups, -1).detach()

    def unsee(self, array):
        shape = self.case.shape
        if len(shape) == 1:
            return array.reshape(shape)
        a = self.case.axis
        return array.reshape(shape[0], shape[a], *shape[1:a], *shape[a + 1 :]).movedim(1, a)

    def mean(self, array):
        return array.mean(self.shared, keepdim=True)

    def total(self, array):
        return array.sum((0, 3)).flatten()

    def parameter(self, p):
        return p.reshape(1, self.case.groups, -1, 1).detach().requires_grad_()

    def statistic(self, s):
        if self.case.kind == "batch":
            return s.reshape(1, 1, -1, 1)
        if self.case.kind == "group":
            return s.reshape(*s.shape, 1, 1)
        n = self.x.shape[0]
        return s.reshape(n, 1, 1, -1)

    def check_forward(self, h, statistics):
        if self.case.kind == "rms":
            assert statistics.mean is None
        else:
            within(self.statistic(statistics.mean.double()), self.center, self.mean_bound, "mean")
        within(self.statistic(statistics.rstd.double()), self.rstd, self.rstd_bound + 2 * self.u * self.rstd, "rstd")
        bound = 1.2 * self.z_bound + 16 * self.u * self.z.abs()  # no activation is steeper than 1.13
        within(self.see(h.double()), self.h, bound + stored(self.h, bound, h.dtype), "h")

    def unclear(self):
        """Where it is not clear on which side of a ReLU's corner z lies."""
        return self.z.abs() <= self.z_bound

    def check_backward(self, dh, base, dx, dweight, dbias, constant=False):
        """dx is base + autograd's gradient; the bounds follow the contract's formula for it."""
        u, dh, base = self.u, self.see(dh.double()), self.see(base.double())
        leaves = [self.x, *(p for p in (self.weight, self.bias) if p.requires_grad)]
        gradient, *_ = torch.autograd.grad(self.h, leaves, dh, retain_graph=True)
        z = self.z.clone().requires_grad_()
        (dz,) = torch.autograd.grad(ACTIVATIONS[self.case.activation](z), z, dh)
        curved = self.case.activation not in ("none", "relu")
        dz_bound = dh.abs() * (self.z_bound + 16 * u) * curved + 2 * u * dz.abs()
        xhat, rstd, w = self.xhat.detach().abs(), self.rstd.detach(), self.weight.detach().abs()
        sums = (dz.abs() * xhat, dz_bound * xhat + dz.abs() * self.xhat_bound)
        within(dweight.double(), self.total(dz * self.xhat), self.total(SUMS * u * sums[0] + sums[1]), "dweight")
        within(dbias.double(), self.total(dz), self.total(SUMS * u * dz.abs() + dz_bound), "dbias")
        g, g_bound = w * dz.abs(), w * dz_bound
        size, bound = g, g_bound + 8 * u * g
        if not constant:
            m, m_bound = self.mean(g), self.mean(g_bound + SUMS * u * g)
            slope, slope_bound = self.mean(g * xhat), self.mean(w * (sums[1] + SUMS * u * sums[0]))
            size = size + m + xhat * slope
            bound = bound + m_bound + xhat * slope_bound + self.xhat_bound * slope + 8 * u * size
        rstd_bound = torch.as_tensor(self.rstd_bound).detach()
        bound = (rstd + rstd_bound) * bound + rstd_bound * size + 2 * u * (base + gradient).abs()
        total = base + gradient
        within(self.see(dx.double()), total, bound + stored(total, bound, dx.dtype), "dx")


def stored(value, bound, dtype):
    """What the last rounding may do to a value that is off by ``bound`` before it: all, where the dtype has no such."""
    unit, size = torch.finfo(dtype), value.detach().abs() + bound
    rounding = unit.eps / 2 * size + unit.smallest_normal * unit.eps
    return torch.where(size + rounding >= unit.max, math.inf, rounding)


def within(got, expected, bound, what):
    got, expected = got.detach(), expected.detach()
    bound = torch.as_tensor(bound, dtype=WIDE).detach().expand(expected.shape)
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert not got.isnan().any(), f"{what} is NaN"
    worst = torch.where(bound.isinf(), 0.0, (got - expected).abs() / (bound + 1e-300)).flatten()
    if worst.numel():
        k = int(worst.argmax())
        assert worst[k] <= 1, (
            f"{what}: {got.flatten()[k]:.9g} for {expected.flatten()[k]:.9g}, {worst[k]:.3g} times the bound"
        )


def compute_dtype(*arrays):
    return WIDE if WIDE in [a.dtype for a in arrays] else torch.float32


def same_bits(got, expected, what):
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    got, expected = got.double(), expected.double()
    same = (got == expected) & (got.signbit() == expected.signbit()) | (got.isnan() & expected.isnan())
    assert same.all(), f"{what}: {(~same).sum()} of {same.numel()} differ, {got[~same][0]} for {expected[~same][0]}"


def rounds_twice(backend, wide, *dtypes):
    """Torch converts float64 to a half type by way of float32; so does "eager", which is torch's own calls."""
    return backend == "eager" and wide == WIDE and any(d in (torch.bfloat16, torch.float16) for d in dtypes)
