# SPDX-License-Identifier: Apache-2.0
"""A norm's call against `revkernels.reference`.

Bits are compared wherever the operations are fixed: h given the statistics that the call left, and a batch norm's dx
given its sums, unless the activation is an approximated function. Everything else has a coarse bound, a multiple of
n eps times the largest terms that can occur: how near it really comes is what `test_norm_act.py` and
`test_norm_act_backward.py` are about, here a wrong element or a wrong option must be seen. Where numbers are so large
that they overflow on their way, or are not finite, only fixed operations are compared.
"""

import numpy as np

from abi import norm_model, structs
from revkernels import reference

EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST = {"float64": 2.0**-1022, "float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}
MODERATE = 1e3  # of larger numbers no bound is given


def _largest(values):
    """The largest magnitude; infinite if it is not moderate, so that bounds made of it are void. NaN counts as such."""
    most = float(np.max(np.abs(values), initial=0.0))
    return most if most < MODERATE else np.inf


class Norm:
    """The reference's arguments for a norm, from the arena as the call left it."""

    def __init__(self, arrays, sizes, outcome):
        self.arrays, self.fields, self.outcome, self.sizes = arrays, arrays.fields, outcome, sizes
        self.activation = structs.ACTIVATIONS[self.fields["activation"]]
        self.fixed = self.activation in ("none", "relu")
        self.of = reference.owners(sizes, arrays.kind, 1, max(self.fields["groups"], 1))
        self.wide = getattr(np, arrays.wide)
        self.count = int(np.prod(sizes)) // self.of.statistics  # elements behind one
        self.epsilon = 4 * (int(np.prod(sizes)) + 64) * EPSILON[arrays.wide]
        both = {**arrays.read, **arrays.written}
        self.mean, self.rstd = (outcome.now(both[n]).ravel() if n in both else None for n in norm_model.STATISTICS)
        self.weight, self.bias = (outcome.was(both[n]) if n in both else None for n in norm_model.PARAMETERS)

    @property
    def shared(self):
        return self.of, self.mean, self.rstd, self.weight, self.bias, self.activation, self.wide

    def check_statistics(self, s):
        """mean, rstd, running_mean and running_var of the values ``s``."""
        if self.fields["statistics_given"]:
            return
        written, eps, reach = self.arrays.written, self.fields["eps"], _largest(s)
        center = self.arrays.kind != "rms"
        mean, rstd, variance = reference.statistics_of(s, self.of, eps, self.wide, center=center)
        with np.errstate(all="ignore"):
            relative = self.epsilon * (1 + reach**2 / (variance + eps))
            relative = np.where(variance + eps > 1e-25, relative, np.inf)  # squares of less are no numbers in float32
            unbiased = variance * (self.count / max(self.count - 1, 1))
            bounds = {"mean": np.full(mean.shape, self.epsilon * reach), "rstd": relative * rstd}
        for name, expected in {"mean": mean, "rstd": rstd}.items():
            if name in written:
                sizes = written[name].sizes
                self.outcome.near(written[name], expected.reshape(sizes), bounds[name].reshape(sizes))
        m = self.fields["momentum"]
        for name, batch in (("running_mean", mean), ("running_var", unbiased)):
            if name in written:
                before, dtype = self.outcome.was(written[name]), written[name].dtype
                terms = abs(1 - m) * _largest(before) + abs(m) * (reach + reach**2)
                terms = terms if terms < MODERATE else np.inf
                bound = (self.epsilon + 4 * EPSILON[dtype]) * terms + SMALLEST[dtype]
                with np.errstate(all="ignore"):
                    self.outcome.near(written[name], (1 - m) * before + m * batch, bound)

    def check_h(self, h, s):
        expected = reference.norm_act(s, *self.shared, h.dtype)
        if self.fixed:
            return self.outcome.equals(h, expected)
        z = reference.norm_act(s, *self.shared[:5], "none", self.wide)
        reach = _largest(z)
        relative = EPSILON[self.arrays.wide] * (16 + 8 * reach**2 + 4 * reach**3) + 2 * EPSILON[h.dtype]
        with np.errstate(all="ignore"):
            smallest = max(SMALLEST[h.dtype], SMALLEST[self.arrays.wide])
            return self.outcome.near(h, expected, relative * np.abs(expected) + smallest)


def check_forward(facts, outcome, s):
    """``s`` are the values that are normalised."""
    if facts.s.empty:
        return _check_nothing(facts.norm, outcome)
    norm = Norm(facts.norm, facts.s.sizes, outcome)
    norm.check_statistics(s)
    return norm.check_h(facts.h, s)


def _check_nothing(arrays, outcome):
    """Statistics and sums of no elements at all: sums of nothing. Running statistics learn nothing from them."""
    with np.errstate(all="ignore"):
        rstd = getattr(np, arrays.wide)(1 / np.sqrt(np.float64(arrays.fields["eps"])))
    expected = {"mean": 0.0, "rstd": rstd, "dweight": 0.0, "dbias": 0.0}
    for name in expected.keys() & arrays.written.keys():
        outcome.equals(arrays.written[name], expected[name])


def check_backward(facts, outcome):
    if facts.x.empty:
        _check_nothing(facts.norm, outcome)
        return
    norm, dx, gradient = Norm(facts.norm, facts.x.sizes, outcome), facts.dx, facts.gradient
    batch, wide = facts.norm.kind == "batch", facts.norm.wide
    both = {**facts.norm.read, **facts.norm.written}
    x, dh = outcome.was(facts.x), outcome.was(facts.dh)
    base = None if facts.base is None else outcome.was(facts.base)
    operands = (base, dh, x, *norm.shared, "float64" if dx is None else dx.dtype)
    options = {"kind": facts.norm.kind, "count": gradient["count"], "constant": bool(gradient["constant"])}
    expected, *sums = reference.norm_act_backward(*operands, **options)

    # The largest term of any sum: dh * activation'(z) * xhat, a derivative being below 1.2.
    with np.errstate(all="ignore"):
        xhat = reference.norm_act(x, norm.of, norm.mean, norm.rstd, wide=norm.wide)
        z = reference.norm_act(x, *norm.shared[:5], "none", norm.wide)
        weight = 1.0 if norm.weight is None else _largest(norm.weight)
        reach = 1 + _largest(xhat)
        # An error of z shows in activation'(z), whose own derivative is below 1.2, and in the functions' accuracy.
        term = 2 * _largest(dh) * reach * (1 + weight) * (1 + _largest(z)) ** 3
        bound = norm.epsilon * term * max(facts.x.sizes[0] * facts.x.sizes[2], 1)
    for name, total in zip(("dweight", "dbias"), sums, strict=True):
        if name in facts.norm.written:
            outcome.near(facts.norm.written[name], total, bound)
    if dx is None:
        return
    added = 0.0 if base is None else _largest(base)
    if batch:
        left = tuple(outcome.now(both[name]) for name in ("dweight", "dbias"))
        expected = reference.norm_act_backward(*operands, **options, sums=left)[0]
        if norm.fixed:
            outcome.equals(dx, expected)
            return
        term = term + _largest(left)
    with np.errstate(all="ignore"):
        bound = norm.epsilon * term * max(facts.x.sizes[0] * facts.x.sizes[2], 1)
        bound = bound * reach * (1 + weight) * _largest(norm.rstd) + EPSILON[wide] * added
        bound = bound + 4 * EPSILON[dx.dtype] * np.abs(expected) + max(SMALLEST[dx.dtype], SMALLEST[wide])
        bound = np.where(np.abs(expected) < MODERATE, bound, np.inf)
    outcome.near(dx, expected, bound)
