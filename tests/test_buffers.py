# SPDX-License-Identifier: Apache-2.0
"""Python's buffer protocol: what is read and written through it, and what is refused."""

import array
import ctypes
import mmap
import struct

import numpy as np
import pytest

import revkernels as rk
from revkernels import native, ops

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)


def mapped():
    memory = mmap.mmap(-1, 16)
    memory[:] = struct.pack("4f", 1, 2, 3, 4)
    return memory


BUFFERS = {
    "array.array": lambda: array.array("f", [1, 2, 3, 4]),
    "bytearray": lambda: memoryview(bytearray(struct.pack("4f", 1, 2, 3, 4))).cast("f"),
    "mmap": lambda: memoryview(mapped()).cast("f"),
    "ctypes": lambda: (ctypes.c_float * 4)(1, 2, 3, 4),
    "doubles": lambda: array.array("d", [1, 2, 3, 4]),
    "half": lambda: memoryview(np.array([1, 2, 3, 4], "f2")),
    "strided": lambda: memoryview(np.array([1, 9, 2, 9, 3, 9, 4, 9], "f4"))[::2],
}


@pytest.mark.parametrize("case", BUFFERS)
def test_in_place(case):
    x = BUFFERS[case]()
    assert ops.couple_(x, np.arange(4, dtype="f4")) is x
    assert np.asarray(x).tolist() == [1, 3, 5, 7]


def test_shapes_and_results():
    """Several dimensions; a new result is a NumPy array."""
    x = memoryview(np.arange(6, dtype="f4").reshape(3, 2)).cast("B").cast("f", (2, 3))
    y = ops.couple(x, x)
    assert type(y) is np.ndarray and y.tolist() == [[0, 2, 4], [6, 8, 10]]
    h, statistics = ops.norm_act(x, rk.Norm("rms", weight=array.array("f", [1, 2, 3])))
    assert h.shape == (2, 3) and statistics.rstd.shape == (2,)
    zero = ctypes.c_float(2)  # no dimension
    assert ops.couple(zero, np.float32(3)) == 5


def test_cells_of_a_coupling():
    checksum, amax, q = array.array("Q", [0]), array.array("f", [0]), array.array("h", [5, 6])
    coupling = rk.Coupling(grid_exponent=0, checksum=checksum, amax=amax)
    ops.couple_(q, array.array("f", [1, 1]), coupling=coupling)
    assert list(q) == [6, 7] and checksum[0] == 6 + 3 * 7 and amax[0] == 7
    signed = array.array("q", [0])
    ops.uncouple_(q, array.array("f", [1, 1]), coupling=rk.Coupling(grid_exponent=0, checksum=signed))
    assert signed[0] == 5 + 3 * 6


def closed():
    memory = mapped()
    memory.close()
    return memory


def released():
    view = memoryview(bytearray(16)).cast("f")
    view.release()
    return view


class Record(ctypes.Structure):
    _fields_ = (("a", ctypes.c_float), ("b", ctypes.c_float))


REFUSED = {
    "bytes": (TypeError, "x is a buffer of format 'B'; it must be float64, float32", lambda: b"12345678"),
    "integers": (TypeError, "x is a buffer of format 'i'", lambda: array.array("i", [1, 2])),
    "long doubles": (TypeError, "x is a buffer of format 'g'|format '<g'", lambda: (ctypes.c_longdouble * 2)()),
    "complex": (TypeError, "x is a buffer of format 'Zf'", lambda: memoryview(np.ones(2, "c8"))),
    "int16 without a grid": (TypeError, "x is int16; it must be float64", lambda: array.array("h", [1, 2])),
    "records": (TypeError, "x is a buffer of format 'T{", lambda: (Record * 2)()),
    "swapped": (TypeError, "x is byte-swapped .format '>f'.", lambda: memoryview(np.ones(2, ">f4"))),
    "read-only": (ValueError, "x is read-only", lambda: memoryview(struct.pack("2f", 1, 2)).cast("f")),
    "backwards": (ValueError, "x has a negative stride", lambda: memoryview(np.ones(2, "f4"))[::-1]),
    "misaligned": (ValueError, "x is not aligned", lambda: memoryview(bytearray(9))[1:].cast("f")),
    "closed": (ValueError, "x is a mmap.mmap whose buffer failed: ValueError: mmap closed", closed),
    "released": (ValueError, "x is a memoryview whose buffer failed: ValueError: .*released", released),
    "str": (TypeError, "x is a str; it must be a torch.Tensor or a numpy.ndarray, or export", lambda: "1234"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    error, words, make = REFUSED[case]
    with pytest.raises(error, match=words):
        ops.couple_(make(), np.ones(2, "f4"))


def test_read_only_is_read():
    f = memoryview(struct.pack("2f", 1, 2)).cast("f")
    assert ops.couple(np.ones(2, "f4"), f).tolist() == [2, 3]
    with pytest.raises(ValueError, match="dy is read-only"):
        ops.reverse_step_(np.ones(2, "f4"), np.ones(2, "f4"), f, np.ones(2, "f4"))


def test_the_buffer_is_given_back():
    """Held during the call alone: a bytearray with a buffer out cannot be resized."""
    memory = bytearray(8)
    with memoryview(memory).cast("f") as view:
        ops.couple_(view, np.ones(2, "f4"))
        with pytest.raises(ValueError, match="f has shape"):
            ops.couple_(view, np.ones(3, "f4"))
    memory.append(0)


def test_overlap():
    memory = bytearray(32)
    whole = memoryview(memory).cast("f")
    with pytest.raises(ValueError, match="x and f overlap"):
        ops.couple_(whole[:5], np.frombuffer(memory, "f4", 5, 12))
    ops.couple_(whole[:4], whole[4:])
