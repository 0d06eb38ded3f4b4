# SPDX-License-Identifier: Apache-2.0
"""A call of the C interface as plain data, which prints, pickles and shrinks; and how it is made.

A call is a dict: "entry" is the function's name, and every argument has its own. A struct is a dict of its fields, and
"tail" besides, the bytes behind those of the header ({position: byte}). A list of structs is a list; NULL is None.
Everything that the structs point to lies in one memory, the arena. A pointer is an offset in it, None for NULL, or a
string in hexadecimal for an address at large. Needs the standard library alone.
"""

import ctypes

from abi import structs

#: Bytes of the arena; it begins at a multiple of 64.
ARENA = 32 * 1024
#: Room for a struct of any size that the library may read, and for what it must not.
_ROOM = 2048

ARGUMENTS = {name: list(arguments) for name, (_, arguments) in structs.FUNCTIONS.items()}
_TYPES = {
    "coupling": structs.Coupling,
    "norm": structs.Norm,
    "gradient": structs.NormGradient,
    "where": structs.Where,
}


def struct_type(argument):
    return _TYPES.get(argument, structs.View)


def struct(argument, **fields):
    """The struct of an argument as data: all fields, zero or NULL unless given."""
    kind = struct_type(argument)
    pointers = {name for name, type_ in kind._fields_ if type_ is ctypes.c_void_p or name == "value"}
    plain = {name: None if name in pointers else 0 for name, _ in kind._fields_}
    return {**plain, "struct_size": ctypes.sizeof(kind), "tail": {}, **fields}


def view(dtype, data, sizes, strides, **fields):
    """A view as data. ``dtype`` is a name or a number, ``strides`` count elements."""
    number = structs.DTYPES.index(dtype) if isinstance(dtype, str) else dtype
    names = ("outer", "channels", "inner")
    shape = dict(zip(names, sizes, strict=True))
    steps = {f"{name.removesuffix('s')}_stride": s for name, s in zip(names, strides, strict=True)}
    return struct("view", dtype=number, data=data, **shape, **steps, **fields)


class Memory:
    """The arena, and the structs of one call."""

    def __init__(self):
        self._storage = ctypes.create_string_buffer(ARENA + 64)
        self.address = (ctypes.addressof(self._storage) + 63) // 64 * 64
        self._kept = []

    def write(self, content):
        assert len(content) == ARENA
        ctypes.memmove(self.address, content, ARENA)

    def read(self):
        return ctypes.string_at(self.address, ARENA)

    def pointer(self, given):
        if isinstance(given, str):
            return int(given, 16)
        return None if given is None else self.address + given

    def _fill(self, at, argument, given):
        kind = struct_type(argument)
        fields = {}
        for name, type_ in kind._fields_:
            value = given[name]
            if name == "value" and argument == "coupling":
                value = self.struct("view", value) if isinstance(value, dict) else self.pointer(value)
                value = ctypes.cast(value, ctypes.POINTER(structs.View))
            elif type_ is ctypes.c_void_p:
                value = self.pointer(value)
            fields[name] = value
        made = kind(**fields)
        ctypes.memmove(at, ctypes.byref(made), ctypes.sizeof(made))
        for position, byte in given["tail"].items():
            ctypes.memset(at + position, byte, 1)

    def struct(self, argument, given):
        """The address of a struct, or of several that lie as far apart as the first says; None for NULL."""
        if given is None:
            return None
        listed = given if isinstance(given, list) else [given]
        step = listed[0]["struct_size"] if listed else 0
        step = step if 0 < step <= 1024 else ctypes.sizeof(structs.View)
        buffer = ctypes.create_string_buffer(len(listed) * step + _ROOM)
        self._kept.append(buffer)
        for i, one in enumerate(listed):
            self._fill(ctypes.addressof(buffer) + i * step, argument, one)
        return ctypes.addressof(buffer)

    def call(self, library, call):
        """Make the call; return what the function returns, and the thread's last failure."""
        arguments = []
        for name in ARGUMENTS[call["entry"]]:
            given = call[name]
            if not isinstance(given, int | float):
                given = ctypes.cast(self.struct(name, given), ctypes.POINTER(struct_type(name)))
            arguments.append(given)
        result = getattr(library, call["entry"])(*arguments)
        self._kept.clear()
        return result, library.revk_last_error().decode()
