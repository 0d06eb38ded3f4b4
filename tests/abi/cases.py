# SPDX-License-Identifier: Apache-2.0
"""Random calls for Hypothesis: ones that are right, and then up to three things made wrong, or only strange."""

import ctypes

import numpy as np
from hypothesis import strategies as st

from abi import structs
from abi.calls import ARENA, struct, struct_type, view
from abi.model import FIRST
from abi.oracle import NUMPY

FLOATS = structs.DTYPES[:4]
SHAPES = [(1, 1, 300), (300, 1, 1), (2, 130, 1), (40, 17, 1), (3, 5, 17), (1, 64, 4)]
_sizes = st.one_of(
    st.tuples(*[st.sampled_from([0, 1, 2, 3, 4, 5, 7])] * 3),
    st.tuples(*[st.sampled_from([1, 2, 3, 4, 6])] * 3),
    st.sampled_from(SHAPES),
)
_orders = st.permutations(range(3))
_few = st.integers(0, 3)
_seldom = st.sampled_from([False, False, False, True])
_often = st.sampled_from([True, True, True, False])
_floats = st.sampled_from(FLOATS)

_ODD_INTEGERS = [-1, 0, 1, 2, 3, 5, 126, 127, -126, -127, 2**31 - 1, -(2**31)]
_HUGE_INTEGERS = [2**31, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, -(2**63)]
_VALUES = {
    ctypes.c_int32: st.sampled_from(_ODD_INTEGERS),
    ctypes.c_int64: st.sampled_from(_ODD_INTEGERS + _HUGE_INTEGERS) | st.integers(-8, 64),
    ctypes.c_void_p: st.none()
    | st.integers(0, ARENA)
    | st.sampled_from(["0x1", "0x40", "0x7ffffff0", "0xffffffffffffffc0", "0xfffffffffffffff9"]),
    ctypes.c_double: st.sampled_from(
        [float("nan"), float("inf"), float("-inf"), -1.0, -1e-300, 0.0, -0.0, 1e-5, 0.5, 1.0, 1e300]
    ),
}


class Case:
    """A call, and what its arena holds."""

    def __init__(self, call, filled, numbers, seed):
        self.call, self.filled, self.numbers, self.seed = call, filled, numbers, seed

    def __repr__(self):
        return f"Case({self.call!r}, {self.filled!r}, numbers={self.numbers}, seed={self.seed})"

    def content(self):
        """Random bits; of numbers, with some of about one where the call's arrays are."""
        random = np.random.default_rng(self.seed)
        memory = np.frombuffer(random.bytes(ARENA), np.uint8).copy()
        for offset, count, dtype in self.filled if self.numbers else ():
            values = random.normal(0.25, 1.0, count) * (100 if dtype == "int16" else 1)
            memory[offset : offset + count * structs.ITEM[dtype]] = values.astype(NUMPY[dtype]).view(np.uint8)
        return memory.tobytes()


class Builder:
    """Draws what a call is made of; arrays lie one after another in the arena."""

    def __init__(self, draw):
        self.draw, self.end, self.filled = draw, 0, []
        self.sizes = draw(_sizes)

    def place(self, count, dtype):
        item = structs.ITEM[dtype]
        offset = -(-self.end // item) * item + self.draw(_few) * item
        if offset + count * item > ARENA:
            offset = 0  # on top of others: the model sees it
        self.end = offset + count * item
        self.filled.append((offset, count, dtype))
        return offset

    def array(self, count, dtype):
        return self.place(count, dtype)

    def view(self, dtype, spread=False, sizes=None):
        """Dense, or with gaps, in any order of dimensions; ``spread``: one that is read may repeat elements."""
        sizes = sizes or self.sizes
        strides, step = [0, 0, 0], 1 + (self.draw(_few) == 3)
        for k in self.draw(_orders):
            strides[k] = step
            step = step * max(sizes[k], 1) + (self.draw(_few) == 3)
        if spread and self.draw(_seldom):
            strides[self.draw(st.integers(0, 2))] = 0
        last = sum((max(n, 1) - 1) * s for n, s in zip(sizes, strides, strict=True))
        return view(dtype, self.place(last + 1, dtype), sizes, strides)

    def dtype(self, other=None):
        return other if other is not None and self.draw(_often) else self.draw(_floats)

    def where(self):
        return struct("where", device=-1, threads=self.draw(st.sampled_from([1, 0, 2, 2**31 - 1])))

    def stream(self, dtype):
        """(out, x): one array, or two."""
        x = self.view(dtype, spread=True)
        if self.draw(_often):
            return dict(x), x
        return self.view(dtype if dtype == "int16" else self.dtype(dtype)), x

    def coupling(self, stream, f, outputs):
        fixed = stream == "int16"
        if not fixed and self.draw(_seldom):
            return None
        wide = "float64" if "float64" in (stream, f) else "float32"
        outer, channels, _ = self.sizes
        made = struct("coupling", grid_exponent=self.draw(st.sampled_from([0, 4, -3, 10, 126, -126])))
        if not fixed and self.draw(_often):
            made["grid_exponent"] = structs.NO_GRID
        if self.draw(_seldom):
            made["channel_scale"] = self.array(channels, wide)
        if self.draw(_seldom):
            made["rows_per_sample"] = self.draw(st.sampled_from([0, 1, max(outer, 1)]))
            made["sample_scale"] = self.array(outer // max(made["rows_per_sample"], 1), wide)
        if self.draw(_seldom):
            made["checksum"] = self.array(1, "float64")
        if self.draw(_seldom):
            made["amax"] = self.array(1, "float32")
        if fixed and self.draw(_seldom):
            made["value"] = self.view(self.draw(_floats))
        return made

    def norm(self, wide, given):
        outer, channels, inner = self.sizes
        kind = self.draw(st.sampled_from(structs.KINDS))
        parameters, running = self.dtype("float32"), self.dtype("float32")
        made = struct(
            "norm",
            kind=structs.KINDS.index(kind),
            activation=self.draw(st.integers(0, 4)),
            eps=self.draw(st.sampled_from([1e-5, 0.0, 0.1])),
            parameter_dtype=structs.DTYPES.index(parameters),
            running_dtype=structs.DTYPES.index(running),
            statistics_given=int(given),
            momentum=self.draw(st.sampled_from([0.1, 0.0, 1.0])),
        )
        for name in ("weight", "bias"):
            if self.draw(_often):
                made[name] = self.array(channels, parameters)
        count = channels
        if kind == "group":
            made["groups"] = self.draw(st.sampled_from([n for n in (1, 2, 3, max(channels, 1)) if channels % n == 0]))
            count = outer * made["groups"]
        elif kind != "batch":
            count = outer * inner
            made["statistics_outer_stride"], made["statistics_inner_stride"] = inner, 1
        for name in ("mean", "rstd") if kind != "rms" else ("rstd",):
            made[name] = self.array(count, wide)
        if kind == "batch" and self.draw(st.booleans()):
            made["running_mean"], made["running_var"] = self.array(channels, running), self.array(channels, running)
        return made


def _couple(b, entry):
    dtype = b.draw(st.sampled_from(structs.DTYPES))
    out, x = b.stream(dtype)
    f = b.view(b.dtype("float32" if dtype == "int16" else dtype), spread=True)
    names = ("y", "x") if entry == "revk_couple" else ("x", "y")
    coupling = b.coupling(dtype, structs.DTYPES[f["dtype"]], [out])
    return {names[0]: out, names[1]: x, "f": f, "coupling": coupling}


def _reverse_step(b, _):
    dtype = b.draw(st.sampled_from(structs.DTYPES))
    f_dtype, d_dtype = b.dtype("float32" if dtype == "int16" else dtype), b.dtype("float32")
    made = {"y": b.view(dtype), "f": b.view(f_dtype, spread=True), "dy": b.view(d_dtype)}
    made["df"] = b.view(b.dtype(d_dtype), spread=True)
    return {**made, "coupling": b.coupling(dtype, f_dtype, [made["y"], made["dy"]])}


def _accumulate(b, _):
    totals, parts = [], []
    for _ in range(b.draw(_few)):
        b.sizes = b.draw(_sizes)
        totals.append(b.view(b.draw(_floats)))
        parts.append(b.view(b.draw(_floats), spread=True))
    return {"totals": totals or None, "parts": parts or None, "count": len(totals)}


def _norm_act(b, _):
    dtype = b.draw(_floats)
    made = {"x": b.view(dtype, spread=True), "h": b.view(b.dtype(dtype))}
    return {**made, "norm": b.norm("float64" if dtype == "float64" else "float32", b.draw(st.booleans()))}


def _coupled_norm_act(b, entry):
    dtype = b.draw(_floats)
    out, x = b.stream(dtype)
    f, h = b.view(b.dtype(dtype), spread=True), b.view(b.dtype(dtype))
    wide = "float64" if "float64" in (dtype, structs.DTYPES[f["dtype"]]) else "float32"
    names = ("y", "x") if entry == "revk_couple_norm_act" else ("x", "y")
    return {"h": h, names[0]: out, names[1]: x, "f": f, "norm": b.norm(wide, b.draw(st.booleans()))}


def _norm_act_backward(b, _):
    dtype = b.draw(_floats)
    wide = "float64" if dtype == "float64" else "float32"
    made = {"x": b.view(dtype, spread=True), "dh": b.view(b.dtype(dtype)), "norm": b.norm(wide, True)}
    batch = made["norm"]["kind"] == 0
    sums = b.draw(st.integers(0, 2)) if batch else 0
    gradient = made["gradient"] = struct("gradient", sums=sums, constant=int(batch and b.draw(_seldom)))
    gradient["count"] = b.draw(st.sampled_from([0, 0, 12345]))
    for name in ("dweight", "dbias"):
        if batch or b.draw(_often):
            gradient[name] = b.array(b.sizes[1], wide)
    made["dx"] = made["base"] = None
    if sums != 1:
        made["dx"] = dict(made["dh"]) if batch and b.draw(_seldom) else b.view(b.dtype(dtype))
        if b.draw(st.booleans()):
            made["base"] = dict(made["dx"]) if b.draw(_often) else b.view(b.dtype(dtype))
    return made


def _norm_workspace(b, _):
    return {"x": b.view(b.draw(_floats)), "norm": b.norm("float32", False)}


def _synchronize(b, _):
    return {}


ENTRIES = {
    "revk_couple": _couple,
    "revk_uncouple": _couple,
    "revk_reverse_step": _reverse_step,
    "revk_accumulate": _accumulate,
    "revk_norm_act": _norm_act,
    "revk_couple_norm_act": _coupled_norm_act,
    "revk_uncouple_norm_act": _coupled_norm_act,
    "revk_norm_act_backward": _norm_act_backward,
    "revk_norm_workspace": _norm_workspace,
    "revk_synchronize": _synchronize,
}


def _structs(call):
    """(argument, where it is kept, its key there) of every struct that is not NULL."""
    found = [(name, call, name) for name, given in call.items() if isinstance(given, dict)]
    for name, given in call.items():
        if isinstance(given, list):
            found += [(name, given, i) for i in range(len(given))]
        elif isinstance(given, dict) and isinstance(given.get("value"), dict):
            found.append(("view", given, "value"))
    return found


def _one_struct(draw, call):
    """One of the views as often as the norm."""
    found = _structs(call)
    kind = draw(st.sampled_from(sorted({struct_type(argument).__name__ for argument, *_ in found})))
    return draw(st.sampled_from([one for one in found if struct_type(one[0]).__name__ == kind]))


def _field(draw, call):
    """One field of one struct is something else."""
    argument, kept, key = _one_struct(draw, call)
    kind = struct_type(argument)
    name, type_ = draw(st.sampled_from([(name, type_) for name, type_ in kind._fields_ if name != "value"]))
    if name == "struct_size":
        first, full = FIRST[kind.__name__], ctypes.sizeof(kind)
        sizes = [0, 4, -1, first - 1, first, first + 1, full - 4, full - 1, full + 1, full + 8, 1024, 1025]
        kept[key][name] = draw(st.sampled_from([*sizes, 2**31 - 1, -(2**31)]))
    else:
        kept[key][name] = draw(_VALUES[type_])


def _null(draw, call):
    """A struct is not there."""
    found = [(kept, key) for _, kept, key in _structs(call) if isinstance(kept, dict)]
    kept, key = draw(st.sampled_from(found + [(call, name) for name, given in call.items() if isinstance(given, list)]))
    kept[key] = None


def _newer(draw, call):
    """A struct is larger than the header's, and sets a field of its own, or not."""
    argument, kept, key = _one_struct(draw, call)
    full = ctypes.sizeof(struct_type(argument))
    kept[key]["struct_size"] = full + 8
    kept[key]["tail"] = {full + draw(st.sampled_from([0, 7, 8])): draw(st.sampled_from([0, 1, 255]))}


def _views(call):
    return [kept[key] for argument, kept, key in _structs(call) if struct_type(argument) is structs.View]


def _resized(draw, call):
    """Every view has one dimension, or two, of another size."""
    for _ in range(draw(st.integers(1, 2))):
        name, size = draw(st.sampled_from(["outer", "channels", "inner"])), draw(_VALUES[ctypes.c_int64])
        for given in _views(call):
            given[name] = size


def _aliased(draw, call):
    """A view lies where another does, or some bytes beside, with its strides or not."""
    views = _views(call)
    if len(views) < 2:
        return
    one, other = draw(st.sampled_from(views)), draw(st.sampled_from(views))
    keys = [key for key in one if key != "tail"] if draw(st.booleans()) else ["data"]
    one.update({key: other[key] for key in keys})
    if isinstance(one["data"], int):
        one["data"] = min(max(one["data"] + draw(st.sampled_from([0, 0, 1, 2, 4, 8, -8, 64])), 0), ARENA)


def _pointed(draw, call):
    """A plain array lies where a view does, or another such array, or some bytes beside; or it is not there."""
    pointers = [
        (kept[key], name)
        for argument, kept, key in _structs(call)
        if struct_type(argument) is not structs.View
        for name, type_ in struct_type(argument)._fields_
        if type_ is ctypes.c_void_p and name not in ("stream", "workspace")
    ]
    if pointers:
        given, name = draw(st.sampled_from(pointers))
        places = [one["data"] for one in _views(call)] + [struct_[field] for struct_, field in pointers]
        place = draw(st.sampled_from([None, *(place for place in places if isinstance(place, int))]))
        given[name] = place if place is None else min(place + draw(st.sampled_from([0, 0, 1, 4, 8])), ARENA)


def _count(draw, call):
    if "count" in call:
        call["count"] = draw(_VALUES[ctypes.c_int64])


_CHANGES = [*[_field] * 6, _null, _newer, _resized, _aliased, _aliased, _pointed, _pointed, _count]


@st.composite
def cases(draw):
    entry = draw(st.sampled_from(list(ENTRIES)))
    builder = Builder(draw)
    call = {"entry": entry, **ENTRIES[entry](builder, entry), "where": builder.where()}
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 1, 2]))):
        if _structs(call):
            draw(st.sampled_from(_CHANGES))(draw, call)
    return Case(call, builder.filled, draw(st.booleans()), draw(st.integers(0, 2**32 - 1)))
