# SPDX-License-Identifier: Apache-2.0
"""Calls on a CUDA device that is stood in for by the host (tests/csrc/device_stand_in.c), a function a case.

Run by tests/test_device_streams.py in a process with the stand-in preloaded; prints what became of each case.
"""

import ctypes
import json
import sys
import traceback
import types

import numpy as np
from dlpack_producer import CUDA, CUDA_MANAGED, Exporter, Producer

import revkernels as rk
from revkernels import ops
from revkernels.adapters.numpy import ReversibleChain

STREAM = 0xBEE0


# ---- a library that looks like CuPy, whose device memory is NumPy's


class Device:
    current = 0

    def __init__(self, index):
        self.id = index

    def __enter__(self):
        self.before, Device.current = Device.current, self.id

    def __exit__(self, *_):
        Device.current = self.before


class Ndarray:
    """What is read of a cupy.ndarray."""

    def __init__(self, array, device=0):
        self.array, self.device = array, Device(device)
        self.shape, self.strides, self.dtype, self.itemsize = array.shape, array.strides, array.dtype, array.itemsize
        self.data = types.SimpleNamespace(ptr=array.ctypes.data)
        self.ndim = array.ndim

    def __getitem__(self, key):
        return Ndarray(self.array[key], self.device.id)

    def __setitem__(self, key, value):
        self.array[key] = value

    def __dlpack__(self, **_):
        raise AssertionError("CuPy's arrays are read by their attributes")

    def __dlpack_device__(self):
        return (CUDA, self.device.id)


def like_cupy():
    """The module; stream 0xBEE0 is current on device 0, and 0xBEE1 on device 1."""
    made = types.ModuleType("cupy")
    made.ndarray, made.uint8 = Ndarray, np.uint8
    made.empty = lambda shape, dtype: Ndarray(np.empty(shape, dtype), Device.current)
    made.empty_like = lambda x, dtype=None: Ndarray(np.empty_like(x.array, dtype), Device.current)  # as CuPy does
    made.cuda = types.SimpleNamespace(
        Device=Device,
        get_current_stream=lambda: types.SimpleNamespace(ptr=STREAM + Device.current),
        runtime=types.SimpleNamespace(is_hip=False),
    )
    return made


sys.modules["cupy"] = like_cupy()


def cupy(values, dtype="f4", device=0):
    return Ndarray(np.asarray(values, dtype), device)


def dlpack(values, dtype="f4", **fields):
    return Producer(np.asarray(values, dtype), **{"at": (CUDA, 0)} | fields)


# ---- the stand-in's journal

_stand_in = ctypes.CDLL(None).stand_in_journal
_stand_in.restype = ctypes.c_char_p


def journal():
    """(kernel, device, stream, address of the workspace) of each call since the last question."""
    lines = [line.split() for line in _stand_in().decode().splitlines()]
    return [(name, *map(int, numbers)) for name, *numbers in lines]


def refused(error, words, call):
    try:
        call()
    except error as raised:
        assert words in str(raised), raised
        assert not journal()
    else:
        raise AssertionError(f"not refused: {words}")


# ---- cases


def case_dlpack_goes_on_the_legacy_default_stream_and_is_waited_for():
    y, f, dy, df = dlpack([5, 5]), dlpack([1, 2]), dlpack([1, 1]), dlpack([3, 4])
    ops.reverse_step_(y, f, dy, df)
    assert y.memory.tolist() == [4, 3] and dy.memory.tolist() == [4, 5]
    for producer in (y, f, dy, df):
        assert producer.calls == [{"max_version": (1, 0), "stream": 1}]
        producer.assert_protocol()
    assert journal() == [("reverse_step", 0, 0, 0), ("synchronize", 0, 0, 0)]


def case_dlpack_on_the_second_device():
    x, f = (dlpack([1.0], at=(CUDA_MANAGED, 1)) for _ in range(2))
    ops.couple_(x, f)
    assert journal() == [("couple", 1, 0, 0), ("synchronize", 1, 0, 0)]


def case_producers_from_before_version_1_are_given_the_stream_too():
    x = dlpack([1.0], versioned=False, takes=("stream",))
    ops.couple_(x, dlpack([1.0]))
    assert x.calls == [{"max_version": (1, 0), "stream": 1}, {"stream": 1}]
    journal()


def case_the_deleter_waits_for_the_kernels():
    x, f = dlpack([1.0]), dlpack([1.0])
    order = []
    f.deleted = types.SimpleNamespace(append=lambda _: order.extend(name for name, *_ in journal()))
    f._deleter = lambda: deleter(f)
    ops.couple_(x, f)
    assert order == ["couple", "synchronize"], order


def deleter(producer):
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: producer.deleted.append(0))
    producer._kept.append(function)
    return ctypes.cast(function, ctypes.c_void_p).value


def case_lists_are_waited_for_once():
    totals, parts = [dlpack([1.0]), dlpack([2.0, 3.0])], [dlpack([1.0]), dlpack([1.0, 1.0])]
    ops.accumulate_(totals, parts)
    assert [t.memory.tolist() for t in totals] == [[2], [3, 4]]
    assert [name for name, *_ in journal()] == ["accumulate", "synchronize"]


def case_cupy_goes_on_its_current_stream_and_is_not_waited_for():
    for device in (0, 1):
        x = cupy([1, 2], device=device)
        assert ops.couple_(x, cupy([1, 1], device=device)) is x
        assert x.array.tolist() == [2, 3]
        assert journal() == [("couple", device, STREAM + device, 0)]
    assert Device.current == 0


def case_cupy_results_are_cupys():
    x = Ndarray(np.arange(6, dtype="f2").reshape(2, 3).T)
    y = ops.couple(x, cupy(np.ones((3, 2)), "f4"))
    assert type(y) is Ndarray and y.dtype == "f2" and y.strides == x.strides
    np.testing.assert_array_equal(y.array, x.array + 1)
    assert [entry[:3] for entry in journal()] == [("couple", 0, STREAM)]
    y = ops.couple(cupy([1, 2], device=1), cupy([1, 1], device=1))  # beside x, whichever device is current
    assert y.device.id == 1 and y.array.tolist() == [2, 3]
    assert [entry[:3] for entry in journal()] == [("couple", 1, STREAM + 1)]


def case_coupling_options_on_cupy():
    x, f, scale = cupy([[1, 2]]), cupy([[1, 1]]), cupy([2, 3])
    checksum, amax = cupy([0], "i8"), cupy([0])
    ops.couple_(x, f, coupling=rk.Coupling(channel_scale=scale, grid_exponent=2, checksum=checksum, amax=amax))
    assert x.array.tolist() == [[3, 5]] and amax.array[0] == 5 and checksum.array[0] != 0
    journal()
    own = rk.Coupling(channel_scale=scale, channel_dim=0)
    refused(ValueError, "x and channel_scale overlap", lambda: ops.couple_(scale, cupy([1, 2]), coupling=own))
    other = rk.Coupling(channel_scale=cupy([1, 1], device=1))
    refused(ValueError, "channel_scale is on cuda:1, x is on cuda:0", lambda: ops.couple_(x, f, coupling=other))


def norms(wrap, **options):
    """Every norm on 4 rows of 3, in arrays that ``wrap`` makes: the results, and the arrays that hold them."""
    rng = np.random.default_rng(0)
    x, f, dh, w, b = (wrap(rng.standard_normal(shape)) for shape in ((4, 3), (4, 3), (4, 3), (3,), (3,)))
    norm = rk.Norm("batch", w, b, activation="silu")
    h, statistics = ops.norm_act(x, norm, **options)
    y, h2, more = ops.couple_norm_act(x, f, norm, **options)
    z, h3, _ = ops.uncouple_norm_act_(y, f, norm, statistics=statistics, **options)
    dx, dweight, dbias = ops.norm_act_backward_(f, dh, x, norm, statistics, **options)
    assert z is y and dx is f
    return [h, *statistics, y, h2, *more, h3, dx, dweight, dbias]


ONE_PASS = "uncouple_norm_act"  # the call of these whose statistics are given: it has no partial results


def case_norms_of_cupy_use_its_memory_for_partial_results():
    made = []
    module = sys.modules["cupy"]
    plain, module.empty = module.empty, lambda shape, dtype: made.append(plain(shape, dtype)) or made[-1]
    try:
        results = norms(lambda values: cupy(values, device=1))
    finally:
        module.empty = plain
    spaces = {a.data.ptr for a in made if a.dtype == np.uint8}
    calls = journal()
    assert [call[0] for call in calls] == ["norm_act", "couple_norm_act", "uncouple_norm_act", "norm_act_backward"]
    assert all(device == 1 and stream == STREAM + 1 for _, device, stream, _ in calls)
    assert all(space in spaces if name != ONE_PASS else not space for name, *_, space in calls)
    for result, right in zip(results, norms(lambda values: values.astype("f4")), strict=True):
        assert type(result) is Ndarray and result.device.id == 1
        np.testing.assert_array_equal(result.array, right)


class Library:
    """An array namespace on device 0."""

    float32, float64, uint8 = np.dtype("f4"), np.dtype("f8"), np.dtype("u1")

    @staticmethod
    def empty_like(x, dtype=None):
        return Own(np.empty_like(x.memory, dtype))

    @staticmethod
    def empty(shape, dtype, device):
        assert device == "cuda:0"
        return Own(np.empty(shape, dtype))


class Own(Producer):
    device = "cuda:0"

    def __init__(self, memory):
        super().__init__(memory, at=(CUDA, 0))

    def __array_namespace__(self):
        return Library

    def __setitem__(self, key, value):
        self.memory[key] = value


def case_norms_of_a_namespace_use_its_memory_and_are_waited_for():
    results = norms(lambda values: Own(values.astype("f4")))
    calls = journal()
    assert [call[0] for call in calls[::2]] == ["norm_act", "couple_norm_act", "uncouple_norm_act", "norm_act_backward"]
    assert all(call == ("synchronize", 0, 0, 0) for call in calls[1::2])
    assert all(bool(space) == (name != ONE_PASS) for name, *_, space in calls[::2])
    for result, right in zip(results, norms(lambda values: values.astype("f4")), strict=True):
        assert type(result) is Own
        np.testing.assert_array_equal(result.memory, right)


def case_plain_exporters_on_a_device_have_no_new_arrays():
    x = dlpack([[1.0, 2.0]])
    refused(ValueError, "x is a Producer on cuda:0, and its library offers no way", lambda: ops.couple(x, x))
    norm = rk.Norm("layer")
    statistics = rk.Statistics(dlpack([1.5]), dlpack([2.0]))
    refused(
        ValueError,
        "dx is a Producer; for a norm on a CUDA device it must have an array namespace",
        lambda: ops.norm_act_backward_(
            dlpack([[0.0, 0]]), dlpack([[1.0, 1]]), Own(np.ones((1, 2), "f4")), norm, statistics
        ),
    )


def case_empty_arrays_on_a_device():
    """Statistics and sums are filled by the library itself; nothing is launched."""
    for wrap in (lambda v: cupy(v), lambda v: Own(np.asarray(v, "f4"))):
        x = wrap(np.empty((0, 3)))
        h, statistics = ops.norm_act(x, rk.Norm("batch", eps=0.25))
        _, dweight, _ = ops.norm_act_backward_(wrap(np.empty((0, 3))), x, h, rk.Norm("batch"), statistics)
        values = [getattr(a, "array", None) if isinstance(a, Ndarray) else a.memory for a in (*statistics, dweight)]
        assert [v.tolist() for v in values] == [[0, 0, 0], [2, 2, 2], [0, 0, 0]]
        assert not journal()


def case_what_may_not_meet():
    on_cupy, on_device = cupy([1.0]), dlpack([1.0])
    for error, words, x, f in (
        (TypeError, "f is from an exporter of DLPack, x is from cupy: all arrays of a call must", on_cupy, on_device),
        (TypeError, "f is from numpy, x is from cupy", on_cupy, np.ones(1, "f4")),
        (ValueError, "f is on cpu, x is on cuda:0", on_device, np.ones(1, "f4")),
        (ValueError, "f is on cuda:1, x is on cuda:0", on_device, dlpack([1.0], at=(CUDA, 1))),
        (ValueError, "x is read-only", dlpack([1.0], flags=1), on_device),
        (ValueError, "index must be 0 or more", dlpack([1.0], at=(CUDA, -1)), on_device),
        (TypeError, "x is int32", cupy([1], "i4"), on_cupy),
        (ValueError, "f has a negative stride", cupy([1.0, 2.0]), cupy([1.0, 2.0])[::-1]),
    ):
        refused(error, words, lambda x=x, f=f: ops.couple_(x, f))
    words = "it takes torch, numpy, dlpack and buffer arrays, not cupy"
    refused(rk.BackendError, words, lambda: ops.couple_(on_cupy, cupy([1.0]), backend="cpu"))


def case_rocm_is_no_cuda():
    runtime = sys.modules["cupy"].cuda.runtime
    runtime.is_hip = True
    try:
        refused(rk.BackendError, "no backend for cupy arrays on rocm", lambda: ops.couple_(cupy([1.0]), cupy([1.0])))
    finally:
        runtime.is_hip = False


def case_the_host_is_untouched_by_all_this():
    x = np.ones(3, "f4")
    ops.couple_(x, Exporter(x.copy()))
    assert x.tolist() == [2, 2, 2] and not journal()


class Square:
    """A residual function without NumPy's arithmetic on CuPy's arrays."""

    def vjp(self, x):
        values = x.array.copy()
        return cupy(0.5 * values**2), lambda df: (cupy(values * df.array), None)

    def __call__(self, x):
        return self.vjp(x)[0]


def case_the_adapter_runs_on_cupy():
    chain = ReversibleChain([(Square(), Square())] * 3)
    x1, x2 = cupy([0.5, 0.25]), cupy([0.25, -0.5])
    y1, y2 = chain.forward(x1, x2)
    before = y1.array.copy(), y2.array.copy()
    (r1, r2), _, _ = chain.backward_(y1, y2, cupy([1, 1]), cupy([1, 1]))
    assert r1 is y1 and r2 is y2 and not np.array_equal(before[0], r1.array)
    np.testing.assert_allclose(r1.array, x1.array, atol=1e-6)
    np.testing.assert_allclose(r2.array, x2.array, atol=1e-6)
    assert {entry[1:3] for entry in journal()} == {(0, STREAM)}


def main():
    results = {}
    for name, function in list(globals().items()):
        if name.startswith("case_"):
            try:
                journal()
                function()
                results[name] = "ok"
            except Exception:
                results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
