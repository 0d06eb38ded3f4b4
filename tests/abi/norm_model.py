# SPDX-License-Identifier: Apache-2.0
"""What the header says that a norm's call must be refused for. Rules and words are those of `abi.model`."""

import math

from abi import structs
from abi.model import apart, apart_from_itself, read, require, same_shape, wide_of

#: What of a norm is written where its statistics are computed, and what is only ever read.
STATISTICS, PARAMETERS, RUNNING = ("mean", "rstd"), ("weight", "bias"), ("running_mean", "running_var")


def _in_range(fields, **most):
    for name, largest in most.items():
        require(0 <= fields[name] <= largest, f"{name} is {fields[name]}")


def _groups(fields, channels):
    if structs.KINDS[fields["kind"]] == "group":
        require(fields["groups"] >= 1 and channels % fields["groups"] == 0, "groups divide the channels")
        return
    require(fields["groups"] == 0, "groups of another norm")


class NormArrays:
    """A norm's fields, and its arrays by name: those that the call reads and those that it writes."""

    def __init__(self, judge, given, x, wide):
        self.fields = fields = read("norm", given)
        _in_range(fields, kind=3, activation=4, parameter_dtype=3, running_dtype=3, statistics_given=1, reserved=0)
        require(fields["eps"] >= 0 and math.isfinite(fields["eps"]), "eps")
        require(math.isfinite(fields["momentum"]), "momentum")
        _groups(fields, x.sizes[1])
        self.kind, self.wide = structs.KINDS[fields["kind"]], wide
        self.read, self.written = {}, {}
        outer, channels, inner = x.sizes
        self._arrays(judge, PARAMETERS, structs.DTYPES[fields["parameter_dtype"]], self.read, [channels], [1])
        sizes, strides = [channels], [1]
        if self.kind == "group":
            sizes, strides = [outer, fields["groups"]], [fields["groups"], 1]
        elif self.kind != "batch":
            sizes = [outer, inner]
            strides = [fields["statistics_outer_stride"], fields["statistics_inner_stride"]]
            require(min(strides) >= 0, "a statistics stride is negative")
        require(self.kind != "rms" or fields["mean"] is None, "the mean of an RMS norm")
        kept = self.read if fields["statistics_given"] else self.written
        for name in STATISTICS if self.kind != "rms" else ("rstd",):
            require(fields[name] is not None or 0 in sizes, f"{name} is NULL")
            self._arrays(judge, [name], wide, kept, sizes, strides)
        have = [fields[name] is not None for name in RUNNING]
        require(all(have) or not any(have), "one of running_mean and running_var")
        require(not any(have) or self.kind == "batch", "running statistics of another norm")
        unused = {}
        kept = unused if fields["statistics_given"] else self.written
        self._arrays(judge, RUNNING, structs.DTYPES[fields["running_dtype"]], kept, [channels], [1])

    def _arrays(self, judge, names, dtype, into, sizes, strides):
        for name in names:
            if self.fields[name] is not None:
                into[name] = judge.array(name, self.fields[name], dtype, sizes, strides)

    def apart_from_one_another(self):
        written = list(self.written.values())
        for i, array in enumerate(written):
            apart_from_itself(array)
            for other in (*written[:i], *self.read.values()):
                apart(array, other)

    def apart_from_written(self, view):
        for array in (*self.read.values(), *self.written.values()):
            apart(view, array)

    def written_apart_from(self, view):
        for array in self.written.values():
            apart(array, view)


def normalised(judge, h, s, norm):
    """What norm_act asks, s being its x."""
    same_shape(h, s)
    apart_from_itself(h)
    apart(h, s)
    arrays = NormArrays(judge, norm, s, wide_of(s))
    arrays.apart_from_written(h)
    arrays.apart_from_one_another()
    arrays.written_apart_from(s)
    return arrays


def coupled_and_normalised(judge, h, s, x, f, norm):
    """What couple_norm_act and uncouple_norm_act ask: s is written, x + f or x - f."""
    wide = wide_of(x, f)
    require(s.dtype != "float64" or wide == "float64", "a float64 stream of float32 arithmetic")
    same_shape(h, s, x, f)
    apart_from_itself(h)
    apart_from_itself(s)
    if not s.is_exactly(x):
        apart(s, x)
    apart(s, f)
    for other in (s, x, f):
        apart(h, other)
    arrays = NormArrays(judge, norm, s, wide)
    for view in (h, s):
        arrays.apart_from_written(view)
    arrays.apart_from_one_another()
    for view in (x, f):
        arrays.written_apart_from(view)
    return arrays


def differentiated(judge, call):
    """What norm_act_backward asks. Returns (dx, base, dh, x, arrays, the gradient's fields)."""
    x, dh = judge.view(call["x"], "x"), judge.view(call["dh"], "dh")
    same_shape(dh, x)
    wide = wide_of(x)
    arrays = NormArrays(judge, call["norm"], x, wide)
    require(arrays.fields["statistics_given"] == 1, "statistics_given")
    gradient = read("gradient", call["gradient"])
    _in_range(gradient, sums=2, constant=1, reserved=0)
    sums, batch = structs.ENUMS["revk_norm_sums"][gradient["sums"]], arrays.kind == "batch"
    require(batch or (sums == "SUMS_COMPUTED" and gradient["constant"] == 0), "sums or constant of another norm")
    require(gradient["count"] >= 0, "count")
    for name in ("dweight", "dbias"):
        require(gradient[name] is not None or not batch or x.sizes[1] == 0, f"{name} is NULL")
        if gradient[name] is not None:
            made = judge.array(name, gradient[name], wide, [x.sizes[1]], [1])
            (arrays.read if sums == "SUMS_GIVEN" else arrays.written)[name] = made
    arrays.apart_from_one_another()
    arrays.written_apart_from(x)
    arrays.written_apart_from(dh)
    if sums == "SUMS_ONLY":
        require(call["dx"] is None and call["base"] is None, "dx of sums alone")
        return None, None, dh, x, arrays, gradient
    dx = judge.view(call["dx"], "dx")
    same_shape(dx, x)
    apart_from_itself(dx)
    apart(dx, x)
    if not (batch and dx.is_exactly(dh)):
        apart(dx, dh)
    arrays.apart_from_written(dx)
    base = None
    if call["base"] is not None:
        base = judge.view(call["base"], "base")
        same_shape(base, x)
        if not dx.is_exactly(base):
            apart(dx, base)
        arrays.written_apart_from(base)
    return dx, base, dh, x, arrays, gradient


def asked_for_a_workspace(judge, call):
    x = judge.view(call["x"], "x")
    fields = read("norm", call["norm"])
    _in_range(fields, kind=3)
    if structs.KINDS[fields["kind"]] == "group":
        _groups(fields, x.sizes[1])
