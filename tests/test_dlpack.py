# SPDX-License-Identifier: Apache-2.0
"""DLPack in host memory: what is read, what is refused with which words, and whose capsule is given back when."""

import gc

import numpy as np
import pytest
from dlpack_producer import (
    CODES,
    COPIED,
    CUDA_HOST,
    READ_ONLY,
    Exporter,
    Own,
    Producer,
    as_bfloat16,
    from_bfloat16,
)

import revkernels as rk
from revkernels import native, ops
from revkernels.arrays import dtype_name, itemsize_of, kind_of, seen

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)


def floats():
    return np.arange(1, 7, dtype="f4")


LAYOUTS = {
    "scalar": lambda m: m[0, 0, 0],
    "dense": lambda m: m,
    "transposed": lambda m: m.transpose(2, 0, 1),
    "half": lambda m: m[:, 2:],
    "every second": lambda m: m[::2, :, ::2],
    "one": lambda m: m[1:2, :1, :],
    "empty": lambda m: m[:, :0],
}


@pytest.mark.parametrize("versioned", [True, False], ids=["1.0", "0.x"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, versioned):
    """In place, in the producer's own memory, and nowhere beside the view."""
    memory = np.arange(4 * 4 * 6, dtype=dtype).reshape(4, 4, 6)
    expected, view = memory.copy(), LAYOUTS[layout](memory[...])
    view = view if isinstance(view, np.ndarray) else memory[0, 0, 0:1].reshape(())
    at = LAYOUTS[layout](np.arange(memory.size).reshape(memory.shape))
    expected.reshape(-1)[at] += 2
    x = Producer(view, versioned=versioned)
    assert ops.couple_(x, np.full(view.shape, 2, dtype)) is x
    np.testing.assert_array_equal(memory, expected)
    assert len(x.calls) == 1  # one export a call: nothing asks twice
    x.assert_protocol()


def test_null_strides_are_dense_and_an_offset_counts_bytes():
    memory = np.arange(12, dtype="f4")
    x = Producer(memory, shape=(2, 3), strides=None, byte_offset=8)
    ops.uncouple_(x, np.ones((2, 3), "f4"))
    np.testing.assert_array_equal(memory, [0, 1, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11])


def test_the_stride_of_one_element_is_free():
    memory = np.zeros(3, "f4")
    ops.couple_(Producer(memory, shape=(1, 3, 1), strides=(-7, 1, 2**62)), np.ones((1, 3, 1), "f4"))
    assert memory.tolist() == [1, 1, 1]


def test_bfloat16_and_int16():
    bits = as_bfloat16([1.0, 2.5, -3.0])
    x = Producer(bits, dtype="bfloat16")
    ops.couple_(x, np.array([1, 1, 1], "f4"))
    assert from_bfloat16(bits).tolist() == [2.0, 3.5, -2.0]
    q, value = np.array([10, -20], "i2"), np.zeros(2, "f4")
    checksum = np.zeros(1, "u8")
    grid = rk.Coupling(grid_exponent=2, checksum=Producer(checksum), value=Producer(value))
    ops.couple_(Producer(q), np.array([0.5, 0.25], "f4"), coupling=grid)
    assert q.tolist() == [12, -19] and value.tolist() == [3.0, -4.75]
    assert checksum[0] == 12 + 3 * (2**16 - 19)


def test_libraries_mix_on_the_host():
    """NumPy, DLPack and buffers in one call."""
    y, f, dy, df = (np.full(5, v, "f4") for v in (5, 1, 2, 3))
    ops.reverse_step_(Producer(y), memoryview(f), dy, Producer(df))
    assert y.tolist() == [4] * 5 and dy.tolist() == [5] * 5


def test_every_kernel_takes_exporters():
    """Lists, scales, norms, statistics and running statistics, against the same calls on NumPy arrays."""
    rng = np.random.default_rng(0)

    def run(wrap):
        x, f, w, b, mean, var, scale, dh = (
            rng.standard_normal(shape).astype("f4") for shape in ((6, 5), (6, 5), (5,), (5,), (5,), (5,), (5,), (6, 5))
        )
        amax = np.zeros((), "f4")
        ops.couple_(wrap(x), wrap(f), coupling=rk.Coupling(channel_scale=wrap(scale), amax=wrap(amax)))
        ops.accumulate_([wrap(x), wrap(f)], [wrap(dh), wrap(dh)])
        norm = rk.Norm("batch", wrap(w), wrap(b), running_mean=wrap(mean), running_var=wrap(var), activation="relu")
        h, statistics = ops.norm_act(wrap(x), norm)
        y, h2, _ = ops.couple_norm_act(wrap(x), wrap(f), norm)
        back = ops.uncouple_norm_act_(wrap(x), wrap(f), norm, statistics=statistics)
        dx, dweight, dbias = ops.norm_act_backward_(wrap(f), wrap(dh), wrap(x), norm, statistics)
        for result in (h, y, h2, statistics.mean, back[1], dweight, dbias):
            assert type(result) is np.ndarray
        assert type(dx) is type(wrap(f))
        return [x, f, mean, var, amax, h, y, h2, back[1], dweight, dbias]

    plain = run(lambda a: a)
    rng = np.random.default_rng(0)
    for mine, right in zip(run(Exporter), plain, strict=True):
        np.testing.assert_array_equal(mine, right)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_torch_behind_dlpack(dtype):
    """A real producer, with the dtype that NumPy has not."""
    torch = pytest.importorskip("torch")
    x, f = torch.randn(4, 6).to(getattr(torch, dtype)), torch.randn(4, 6)
    right = (x.double() + f.double()).to(x.dtype) if dtype == "float64" else (x.float() + f).to(x.dtype)
    assert ops.couple_(Exporter(x), Exporter(f)) is not x
    assert torch.equal(x, right)


def test_results_beside_a_plain_exporter_are_numpy_in_its_memory_order():
    x = np.arange(24, dtype="f4").reshape(2, 3, 4).transpose(2, 0, 1)
    y = ops.couple(Exporter(x), Exporter(x))
    assert type(y) is np.ndarray and y.strides == x.strides
    np.testing.assert_array_equal(y, 2 * x)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = Producer(as_bfloat16([1.0, 2.0]), dtype="bfloat16")
    y = ops.couple(bits, bits)
    assert y.dtype == ml_dtypes.bfloat16 and y.tolist() == [2.0, 4.0]


def test_bfloat16_results_need_ml_dtypes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    bits = Producer(as_bfloat16([1.0]), dtype="bfloat16")
    with pytest.raises(TypeError, match="x is bfloat16, for which NumPy needs ml_dtypes"):
        ops.couple(bits, bits)


def test_results_are_of_the_exporters_library_if_it_has_a_namespace():
    x = Own(np.arange(6, dtype="f4").reshape(2, 3))
    y = ops.couple(x, x)
    assert type(y) is Own and y.array.tolist() == [[0, 2, 4], [6, 8, 10]]
    h, statistics = ops.norm_act(x, rk.Norm("layer"), dtype=np.dtype("f8"))
    assert type(h) is Own and h.array.dtype == "f8" and type(statistics.mean) is Own
    assert statistics.mean.array.tolist() == [1, 4]


def test_a_namespace_may_be_numpys():
    """NumPy's scalars have it, and so may any exporter."""
    assert ops.couple(np.float32(1), np.float32(2)) == 3
    methods = {"__array_namespace__": lambda self: np, "__array__": lambda self, *_, **__: self.array}
    borrowing = type("Borrowing", (Own,), methods)(np.ones(3, "f4"))
    y = ops.couple(borrowing, borrowing)
    assert type(y) is np.ndarray and y.tolist() == [2, 2, 2]


def test_a_library_of_the_array_api():
    """A real namespace."""
    library = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")
    x = library.asarray([[1.0, 2.0, 6.0], [0.0, 3.0, 3.0]], dtype=library.float32)
    y = ops.couple(x, x)
    assert type(y) is type(x) and library.all(y == 2 * x)
    h, statistics = ops.norm_act(x, rk.Norm("layer"))
    assert type(h) is type(x) and statistics.mean.shape == (2,)
    assert library.all(statistics.mean == library.asarray([3.0, 2.0]))
    assert ops.couple_(x, x + 1) is x and float(x[0, 2]) == 13


@pytest.mark.parametrize("fields", [{"flags": READ_ONLY}, {"flags": COPIED}, {"has_deleter": False}, {"flags": 4}])
def test_what_is_only_read_may_be(fields):
    memory = floats()
    f = Producer(memory, **fields)
    assert ops.couple(np.ones(6, "f4"), f).tolist() == [2, 3, 4, 5, 6, 7]
    f.assert_protocol()


def test_pinned_memory_is_host_memory():
    memory = floats()
    ops.couple_(Producer(memory, at=(CUDA_HOST, 0)), np.ones(6, "f4"))
    assert memory.tolist() == [2, 3, 4, 5, 6, 7]


def test_producers_from_before_version_1():
    """Asked again without max_version."""
    x = Producer(floats(), takes=("stream",), versioned=False)
    ops.couple_(x, np.ones(6, "f4"))
    assert x.calls == [{"max_version": (1, 0)}, {}]
    assert x.memory.tolist() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("versioned", [True, False])
def test_real_capsules_leak_nothing(versioned):
    """NumPy's own capsules keep a reference to the array until the deleter runs."""
    import sys

    array = np.ones(6, "f4")

    class Old(Exporter):
        def __dlpack__(self, **keywords):
            if not versioned and "max_version" in keywords:
                raise TypeError("max_version")
            return self.array.__dlpack__(**keywords)

    before = sys.getrefcount(array)
    x = Old(array)
    ops.couple_(x, np.ones(6, "f4"))
    with pytest.raises(ValueError, match="f has shape"):
        ops.couple_(x, np.ones(5, "f4"))
    with pytest.raises(TypeError, match="f is a list"):
        ops.couple_(x, [1.0])
    del x
    gc.collect()
    assert sys.getrefcount(array) == before


@pytest.mark.parametrize("dtype", CODES)
def test_what_python_sees_of_an_export(dtype):
    """The description that checks in Python are made with."""
    size = CODES[dtype][1] // 8
    if dtype == "uint8":
        with pytest.raises(TypeError, match="x is uint8; it must be"):
            seen("x", Producer(np.zeros(4, "u1")))
        return
    memory = np.zeros(64, "u1")
    x = Producer(memory, dtype, shape=(2, 3), strides=(1, 2), byte_offset=8, flags=READ_ONLY)
    look = seen("x", x)
    assert look.address == memory.ctypes.data + 8 and (look.shape, look.strides) == ((2, 3), (1, 2))
    assert dtype_name(look) == dtype.removeprefix("u") and itemsize_of(look) == size
    assert (look.device, look.frozen) == ("cpu", " is read-only")
    x.assert_protocol()


def test_kinds():
    """The order: torch, NumPy (subclasses too), DLPack, buffer."""
    assert kind_of(np.ones(1).view(np.matrix)) == "numpy"
    assert kind_of(Exporter(np.ones(1))) == "dlpack"
    assert kind_of(memoryview(b"")) == "buffer"
    assert kind_of([1.0]) is None and kind_of("text") is None and kind_of(None) is None
    half = type("Half", (), {"__dlpack__": lambda self: None})
    assert kind_of(half()) is None  # no device
