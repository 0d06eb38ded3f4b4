# SPDX-License-Identifier: Apache-2.0
"""What the header says that a call on the host must be refused for: a second reading of it, which enumerates bytes."""

import ctypes
import math

import numpy as np

from abi import structs
from abi.calls import ARENA, struct_type

#: The size of each struct in the first version of the header that had it.
FIRST = {"View": 64, "Where": 20, "Coupling": 48, "Norm": 128, "NormGradient": 40}
LARGEST = 1024
FLOATS = structs.DTYPES[:4]


class RefusedError(Exception):
    """The call is wrong, and nothing else about it matters."""


class UnknownError(Exception):
    """A call about memory that is not the arena's. Nobody can see that from outside, and it may end in a crash."""


class Array:
    """Elements in memory: where each begins, in bytes of the arena, or that some lie outside of it."""

    def __init__(self, name, pointer, dtype, sizes, strides):
        self.name, self.pointer, self.dtype, self.sizes, self.strides = name, pointer, dtype, sizes, strides
        self.item = structs.ITEM[dtype]
        self.empty = 0 in sizes
        self.bytes = 0
        if not self.empty:
            self.bytes = (sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1) * self.item
        self.address = None if not isinstance(pointer, str) else int(pointer, 16)
        offset = pointer if isinstance(pointer, int) else 0
        self.aligned = (self.address if self.address is not None else offset) % self.item == 0
        self.impossible = self.bytes > (2**63 - 1) // 4 or (self.address or 0) + self.bytes > 2**64
        self.inside = self.empty or (isinstance(pointer, int) and offset >= 0 and offset + self.bytes <= ARENA)

    def starts(self):
        """The first byte of each element, in the shape of the array."""
        starts = np.array(self.pointer, np.int64)
        for size, stride in zip(self.sizes, self.strides, strict=True):
            starts = starts[..., None] + np.arange(size, dtype=np.int64) * (stride * self.item if size > 1 else 0)
        return starts

    def mask(self):
        """Which bytes of the arena it has."""
        mask = np.zeros(ARENA, bool)
        if self.empty or self.pointer is None:
            return mask
        starts = np.array([self.pointer], np.int64)
        for size, stride in zip(self.sizes, self.strides, strict=True):
            if stride > 0 and size > 1:
                starts = np.unique(starts[:, None] + np.arange(size, dtype=np.int64) * (stride * self.item))
        for byte in range(self.item):
            mask[starts + byte] = True
        return mask

    def shares(self, other):
        if not (self.inside and other.inside):
            return False  # unknown, and so is the call
        return bool((self.mask() & other.mask()).any())

    def shares_with_itself(self):
        if self.empty:
            return False
        if any(n > 1 and s == 0 for n, s in zip(self.sizes, self.strides, strict=True)):
            return True
        return self.inside and int(self.mask().sum()) != math.prod(self.sizes) * self.item

    def is_exactly(self, other):
        if (self.pointer, self.dtype, self.sizes) != (other.pointer, other.dtype, other.sizes):
            return False
        steps = zip(self.sizes, self.strides, other.strides, strict=True)
        return all(a == b for n, a, b in steps if n > 1)


def require(condition, reason):
    if not condition:
        raise RefusedError(reason)


def read(argument, given, name=None):
    """The fields of a struct as the library takes them."""
    name = name or argument
    require(given is not None, f"{name} is NULL")
    kind = struct_type(argument)
    size, full = given["struct_size"], ctypes.sizeof(kind)
    require(FIRST[kind.__name__] <= size <= LARGEST, f"struct_size of {name}")
    require(not any(byte and full <= at < size for at, byte in given["tail"].items()), f"{name} sets unknown fields")
    fields = {}
    for field, _ in kind._fields_:
        place = getattr(kind, field)
        absent = place.offset + place.size > size
        fields[field] = (None if isinstance(given[field], (dict, str, type(None))) else 0) if absent else given[field]
    return fields


class Judge:
    """Reads the structs of one call. ``arrays`` are all that it has met."""

    def __init__(self):
        self.arrays = []

    def array(self, name, pointer, dtype, sizes, strides, wraps=True):
        made = Array(name, pointer, dtype, tuple(sizes), tuple(strides))
        require(not (wraps and made.impossible), f"{name} reaches past the address space")
        if made.empty and not made.aligned:
            raise UnknownError  # the header does not say, and no element is there
        require(made.aligned, f"{name} is not aligned")
        self.arrays.append(made)
        return made

    def view(self, given, name, stream=False):
        fields = read("view", given, name)
        dtype = fields["dtype"]
        require(0 <= dtype < len(structs.DTYPES), f"dtype of {name}")
        require(stream or structs.DTYPES[dtype] in FLOATS, f"{name} is int16")
        sizes = [fields[key] for key in ("outer", "channels", "inner")]
        strides = [fields[key] for key in ("outer_stride", "channel_stride", "inner_stride")]
        require(min(sizes + strides) >= 0, f"{name} has a negative size or stride")
        require(math.prod(sizes) < 2**57, f"{name} has more elements than can be counted")
        require(0 in sizes or fields["data"] is not None, f"data of {name} is NULL")
        return self.array(name, fields["data"], structs.DTYPES[dtype], sizes, strides)

    def where(self, given):
        fields = read("where", given)
        require(fields["device"] == -1, "device")  # asked of a machine without one
        require(fields["threads"] >= 0, "threads")
        return fields

    def finish(self):
        if not all(array.inside for array in self.arrays):
            raise UnknownError


def wide_of(*arrays):
    return "float64" if any(array.dtype == "float64" for array in arrays) else "float32"


def same_shape(*arrays):
    for array in arrays[1:]:
        require(array.sizes == arrays[0].sizes, f"{array.name} and {arrays[0].name} have different shapes")


def apart(written, other):
    require(not written.shares(other), f"{written.name} shares memory with {other.name}")


def apart_from_itself(array):
    require(not array.shares_with_itself(), f"{array.name} shares memory with itself")


def given_coupling(judge, given, written, others, wide):
    """The fields of a coupling, with its arrays in place of their pointers; None for the plain one."""
    out = written[0]
    fixed = out.dtype == "int16"
    if given is None:
        require(not fixed, "an int16 stream without a coupling")
        return None
    fields = read("coupling", given)
    k, rows = fields["grid_exponent"], max(fields["rows_per_sample"], 1)
    require(k == structs.NO_GRID or -126 <= k <= 126, "grid_exponent")
    require(not fixed or k != structs.NO_GRID, "an int16 stream without a grid")
    require(fields["rows_per_sample"] >= 0, "rows_per_sample")
    require(fields["sample_scale"] is None or out.sizes[0] % rows == 0, "rows_per_sample divides outer")
    if fields["value"] is not None:
        require(fixed, "value of a floating-point stream")
        value = fields["value"] = judge.view(fields["value"], "value")
        same_shape(value, out)
        apart_from_itself(value)
        for array in (*written, *others):
            apart(value, array)
        written = [*written, value]
    counts = {"channel_scale": out.sizes[1], "sample_scale": out.sizes[0] // rows, "checksum": 1, "amax": 1}
    dtypes = {"channel_scale": wide, "sample_scale": wide, "checksum": "float64", "amax": "float32"}
    for name, count in counts.items():
        if fields[name] is not None:
            fields[name] = judge.array(name, fields[name], dtypes[name], [count], [1], wraps=False)
    met = [fields[name] for name in counts if fields[name] is not None]
    for array in met:
        for view in written:
            apart(view, array)
    for reported in (array for array in met if array.name in ("checksum", "amax")):
        for array in (*others, *(other for other in met if other is not reported)):
            apart(reported, array)
    return fields


def coupled(judge, out, x, f, coupling):
    """What couple and uncouple ask."""
    same_shape(out, x, f)
    require((out.dtype == "int16") == (x.dtype == "int16"), "int16 for one of two")
    apart_from_itself(out)
    if not out.is_exactly(x):
        apart(out, x)
    apart(out, f)
    return given_coupling(judge, coupling, [out], [x, f], wide_of(x, f))


def reversed_step(judge, y, f, dy, df, coupling):
    same_shape(y, f, dy, df)
    apart_from_itself(y)
    apart_from_itself(dy)
    for other in (f, dy, df):
        apart(y, other)
    for other in (f, df):
        apart(dy, other)
    return given_coupling(judge, coupling, [y, dy], [f, df], wide_of(y, f))


def listed(judge, given, name, count):
    require(given is not None, f"{name} is NULL")
    views = []
    for i in range(count):
        require(i < len(given), f"{name} ends before count")  # behind it lie zeros
        require(given[i]["struct_size"] == given[0]["struct_size"], f"struct_size of {name}[{i}]")
        views.append(judge.view(given[i], f"{name}[{i}]"))
    return views


def accumulated(judge, call):
    require(call["count"] >= 0, "count")
    if call["count"] == 0:
        return [], []
    totals = listed(judge, call["totals"], "totals", call["count"])
    parts = listed(judge, call["parts"], "parts", call["count"])
    for i, (total, part) in enumerate(zip(totals, parts, strict=True)):
        same_shape(total, part)
        apart_from_itself(total)
        for other in (*totals[:i], *parts):
            apart(total, other)
    return totals, parts
