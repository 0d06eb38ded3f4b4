# SPDX-License-Identifier: Apache-2.0
"""An exporter of DLPack made of ctypes, every field of which a test may bend, and a wrapper of real exporters."""

import ctypes

import numpy as np

CPU, CUDA, CUDA_HOST, METAL, ROCM, CUDA_MANAGED = 1, 2, 3, 8, 10, 13
INT, UINT, FLOAT, BFLOAT, COMPLEX, BOOL = 0, 1, 2, 4, 5, 6
READ_ONLY, COPIED = 1, 2
CODES = {
    "float64": (FLOAT, 64),
    "float32": (FLOAT, 32),
    "float16": (FLOAT, 16),
    "bfloat16": (BFLOAT, 16),
    "int16": (INT, 16),
    "int64": (INT, 64),
    "uint64": (UINT, 64),
    "uint8": (UINT, 8),
}


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


# Functions of our own: those that are attributes of pythonapi are everybody's, and JAX gives them other arguments.
new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))


class Producer:
    """Exports ``memory``, a NumPy array, and keeps account of the capsules that it hands out.

    Everything but the memory may be set to anything: what the tensor says of itself (``shape``, ``strides`` in
    elements or None, ``code``, ``bits``, ``lanes``, ``at``, ``byte_offset``, ``data``, ``ndim``), what the export
    says (``versioned``, ``version``, ``flags``, ``name``, ``has_deleter``), and what the object says (``declared``, its
    device). ``takes``: the keywords of its ``__dlpack__``. ``answer`` stands in for the capsule.
    """

    def __init__(self, memory, dtype=None, **fields):
        self.memory = memory
        self.code, self.bits = CODES[dtype or memory.dtype.name]
        self.lanes, self.at, self.byte_offset, self.declared = 1, (CPU, 0), 0, None
        self.shape, self.strides = memory.shape, tuple(s // memory.itemsize for s in memory.strides)
        self.data, self.ndim = memory.ctypes.data, None
        self.versioned, self.version, self.flags, self.name, self.has_deleter = True, (1, 0), 0, None, True
        self.takes, self.answer = ("stream", "max_version"), None
        for name, value in fields.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        self.calls, self.capsules, self.deleted, self._kept = [], [], [], []

    def __dlpack_device__(self):
        return self.at if self.declared is None else self.declared

    def __dlpack__(self, **keywords):
        self.calls.append(keywords)
        if not set(keywords) <= set(self.takes):
            raise TypeError(f"unexpected keywords {sorted(keywords)}")
        return self.capsule() if self.answer is None else self.answer(self)

    def capsule(self):
        """A new capsule."""
        tensor = self.tensor()
        if self.versioned:
            managed = ManagedVersioned(*self.version, None, self._deleter(), self.flags, tensor)
        else:
            managed = Managed(tensor, None, self._deleter())
        right = b"dltensor_versioned" if self.versioned else b"dltensor"
        name = right if self.name is None else self.name or None
        self._kept += [managed, name]  # a capsule keeps its name's address alone
        made = new_capsule(ctypes.addressof(managed), name, None)
        self.capsules.append(made)
        return made

    def tensor(self):
        numbers = [ctypes.c_int64 * max(1, len(n)) if n is not None else None for n in (self.shape, self.strides)]
        shape, strides = (
            None if kind is None else kind(*values)
            for kind, values in zip(numbers, (self.shape, self.strides), strict=True)
        )
        self._kept += [shape, strides]
        pointers = [None if a is None else ctypes.cast(a, ctypes.POINTER(ctypes.c_int64)) for a in (shape, strides)]
        ndim = len(self.shape or ()) if self.ndim is None else self.ndim
        kind = (ndim, self.code, self.bits, self.lanes)
        return Tensor(self.data, *self.at, *kind, *pointers, self.byte_offset)

    def _deleter(self):
        if not self.has_deleter:
            return None
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.deleted.append)
        self._kept.append(function)
        return ctypes.cast(function, ctypes.c_void_p).value

    def assert_protocol(self):
        """A capsule that was taken is renamed and its deleter was called, once; one that was not is untouched."""
        taken = 0
        for made in self.capsules:
            name = capsule_name(made) or b""
            taken += name.startswith(b"used_") and self.name is None
            right = b"dltensor_versioned" if self.versioned else b"dltensor"
            assert name in ((self.name,) if self.name is not None else (right, b"used_" + right)), name
        assert len(self.deleted) == (taken if self.has_deleter else 0), (len(self.deleted), taken)
        assert len(set(self.deleted)) == len(self.deleted)


class Exporter:
    """A real library's array behind nothing but the two methods of DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Capsules:
    """Answers with the same capsule every time."""

    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **_):
        return self.capsule

    def __dlpack_device__(self):
        return (CPU, 0)


class Namespace:
    """The little of an array namespace that results need. Its arrays export DLPack and nothing else."""

    float32, float64, uint8 = np.dtype("f4"), np.dtype("f8"), np.dtype("u1")

    @staticmethod
    def empty_like(x, dtype=None):
        return Own(np.empty_like(x.array, dtype))

    @staticmethod
    def empty(shape, dtype, device):
        assert device == "here"
        return Own(np.empty(shape, dtype))


class Own(Exporter):
    device = "here"

    def __array_namespace__(self):
        return Namespace


def as_bfloat16(values):
    """The bits of float32 values that bfloat16 holds, as a uint16 array."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    """The values behind these bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
