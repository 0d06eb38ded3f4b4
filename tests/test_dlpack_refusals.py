# SPDX-License-Identifier: Apache-2.0
"""What the reader of DLPack refuses, with which words, and that every capsule is given back then too."""

import numpy as np
import pytest
from dlpack_producer import (
    BOOL,
    COMPLEX,
    COPIED,
    CPU,
    CUDA,
    FLOAT,
    INT,
    METAL,
    READ_ONLY,
    ROCM,
    Capsules,
    Exporter,
    Own,
    Producer,
)

import revkernels as rk
from revkernels import native, ops

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)


def floats():
    return np.arange(1, 7, dtype="f4")


def used(producer):
    producer.answer = None
    capsule = producer.__dlpack__()
    np.from_dlpack(Capsules(capsule))
    return capsule


def fail(error):
    def answer(_):
        raise error("no")

    return answer


BIG, HERE = 2**62, {"declared": (CPU, 0)}
REFUSED = {
    "read-only": (ValueError, "x is read-only; it must be writable", {"flags": READ_ONLY}),
    "copied": (ValueError, "x was copied for the call by its library", {"flags": COPIED}),
    "negative stride": (ValueError, "x has a negative stride in dimension 0", {"strides": (-1,), "byte_offset": 20}),
    "expanded": (ValueError, "x has several elements in one place", {"strides": (0,)}),
    "lanes": (TypeError, "x is float32 in vectors of 2; it must be float64", {"lanes": 2}),
    "no lanes": (TypeError, "x is float32 in vectors of 0", {"lanes": 0}),
    "int": (TypeError, "x is int32; it must be float64", {"code": INT, "bits": 32}),
    "complex": (TypeError, "x is complex64; it must be", {"code": COMPLEX, "bits": 64}),
    "bool": (TypeError, "x is bool; it must be", {"code": BOOL, "bits": 8}),
    "float8": (TypeError, "x is DLPack's type 7 of 8 bits; it must be", {"code": 7, "bits": 8}),
    "float128": (TypeError, "x is float128; it must be", {"code": FLOAT, "bits": 128}),
    "int16 without a grid": (TypeError, "x is int16; it must be", {"code": INT, "bits": 16}),
    "misaligned": (ValueError, "x is not aligned to its dtype", {"byte_offset": 2}),
    "no memory": (ValueError, r"x has shape \(6,\) and no memory \(NULL\)", {"data": None}),
    "no shape": (ValueError, r"x has 1 dimensions and no shape \(NULL\)", {"shape": None, "ndim": 1}),
    "negative rank": (ValueError, "x has -1 dimensions", {"ndim": -1}),
    "many dimensions": (ValueError, "x has 65 dimensions; it must have at most 64", {"ndim": 65}),
    "negative size": (ValueError, "x has size -6 in dimension 0", {"shape": (-6,)}),
    "huge": (ValueError, r"x with shape \(.*\) reaches past the end", {"shape": (BIG, 2), "strides": None}),
    "huge product": (ValueError, "reaches past the end", {"shape": (BIG, 2, 2, 2), "strides": (0, 0, 0, 0)}),
    "huge and empty": (ValueError, "reaches past the end", {"shape": (BIG, 8, 0), "strides": None}),
    "huge stride": (ValueError, "reaches past the end", {"shape": (3,), "strides": (2**63 - 1,)}),
    "past the end": (ValueError, "reaches past the end", {"strides": (2**58,), "data": 2**64 - 4096}),
    "offset past the end": (ValueError, "begins 18446744073709551612 bytes behind", {"byte_offset": 2**64 - 4}),
    "version 2": (ValueError, r"x comes in DLPack 2\.3; it must be a version 1", {"version": (2, 3)}),
    "version 0": (ValueError, r"x comes in DLPack 0\.8; it must be a version 1", {"version": (0, 8)}),
    "another name": (TypeError, "returned a capsule named 'tensor'; it must return a new capsule", {"name": b"tensor"}),
    "no name": (TypeError, "returned a capsule named ''", {"name": b""}),
    "used up": (TypeError, r"returned a capsule that is used up \('used_dltensor", {"answer": used}),
    "no capsule": (TypeError, "whose __dlpack__ returned a NoneType", {"answer": lambda _: None}),
    "raises": (ValueError, "x is a Producer whose __dlpack__ failed: BufferError: no", {"answer": fail(BufferError)}),
    "raises TypeError": (ValueError, "__dlpack__ failed: TypeError: no", {"answer": fail(TypeError)}),
    "Metal": (ValueError, "no backend for dlpack arrays on metal", {"at": (METAL, 0)}),
    "ROCm": (ValueError, "no backend for dlpack arrays on rocm", {"at": (ROCM, 0)}),
    "unknown device": (ValueError, "on DLPack's device type 99", {"at": (99, 0)}),
    "two devices": (ValueError, "x says that it is on cpu, and its memory is on cuda:1", {"at": (CUDA, 1)} | HERE),
    "not as declared": (ValueError, "x is on metal:0; it must be on the CPU", {"at": (METAL, 0)} | HERE),
    "device is no pair": (TypeError, "whose __dlpack_device__ returned", {"declared": (1,)}),
    "device is no number": (TypeError, "__dlpack_device__ failed: ValueError", {"declared": ("cpu", 0)}),
    "device is too large": (TypeError, "whose __dlpack_device__ returned", {"declared": (1, 2**40)}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """The words; memory as before; the capsule given back once, or left alone."""
    error, words, fields = REFUSED[case]
    memory = floats()
    x = Producer(memory, **fields)
    with pytest.raises(error, match=words):
        ops.couple_(x, np.ones(6, "f4"))
    assert memory.tolist() == [1, 2, 3, 4, 5, 6]
    if case != "used up":
        x.assert_protocol()


def test_a_capsule_serves_once():
    """An object that hands the same one out again, and a bare capsule."""
    producer = Producer(floats())
    again = Capsules(producer.capsule())
    ops.couple_(again, np.ones(6, "f4"))
    for call in (
        lambda: ops.couple_(again, np.ones(6, "f4")),
        lambda: ops.couple_(np.ones(6, "f4"), again),
    ):
        with pytest.raises(TypeError, match=r"[xf] is a Capsules whose __dlpack__ returned a capsule that is used up"):
            call()
    assert producer.memory.tolist() == [2, 3, 4, 5, 6, 7] and len(producer.deleted) == 1
    same = Producer(floats())
    twice = Capsules(same.capsule())
    with pytest.raises(TypeError, match=r"f is a Capsules .* used up"):
        ops.couple_(twice, twice)
    assert len(same.deleted) == 1
    with pytest.raises(TypeError, match=r"x is a PyCapsule; .*: a capsule serves once, so pass the array"):
        ops.couple_(Producer(floats()).capsule(), np.ones(6, "f4"))


def test_overlaps_are_found_across_libraries():
    memory = np.arange(10, dtype="f4")
    before = memory.copy()
    with pytest.raises(ValueError, match="x and f overlap in memory"):
        ops.couple_(Producer(memory[:6]), memory[4:])
    with pytest.raises(ValueError, match="y and dy overlap in memory"):
        ops.reverse_step_(memory[:5], np.ones(5, "f4"), Producer(memory[4:9]), np.ones(5, "f4"))
    np.testing.assert_array_equal(memory, before)
    ops.couple_(Producer(memory[::2]), Producer(memory[1::2]))  # interleaved: no element in common


def test_all_is_given_back_when_another_argument_is_bad():
    x = [Producer(floats()) for _ in range(4)]
    with pytest.raises(ValueError, match="df has shape"):
        ops.reverse_step_(*x[:3], Producer(np.ones(5, "f4")))
    coupling = rk.Coupling(channel_scale=x[3], channel_dim=0, amax=Producer(np.zeros(2, "f4")))
    with pytest.raises(ValueError, match="amax has shape"):
        ops.couple_(x[0], x[1], coupling=coupling)
    with pytest.raises(TypeError, match="bias is float32; it must be float64 as weight"):
        norm = rk.Norm("layer", weight=Producer(np.ones(6)), bias=x[2])
        native.norm_act(np.empty(6, "f4"), x[0], norm, np.empty((), "f4"), np.empty((), "f4"), False)
    for producer in x:
        producer.assert_protocol()
        assert producer.memory.tolist() == [1, 2, 3, 4, 5, 6]


def test_read_only_numpy_behind_dlpack():
    """The flag of a real producer."""
    array = np.ones(3, "f4")
    array.flags.writeable = False
    with pytest.raises(ValueError, match="x is read-only"):
        ops.couple_(Exporter(array), np.ones(3, "f4"))
    assert ops.couple(np.ones(3, "f4"), Exporter(array)).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("module", "words"),
    [("jaxlib._jax", "JAX array"), ("jax._src.array", "JAX"), ("tensorflow.x", "TensorFlow"), ("pyarrow.lib", "Arrow")],
)
def test_immutable_libraries(module, words):
    """Whose exports do not say read-only: known by name, refused where they would be written, read where not."""
    library = type("Array", (Exporter,), {"__module__": module})
    memory = np.ones(3, "f4")
    with pytest.raises(ValueError, match=rf"x is an? .*{words}.*, and these are immutable; it must be writable"):
        ops.couple_(library(memory), np.ones(3, "f4"))
    with pytest.raises(ValueError, match=r"amax is .* immutable"):
        ops.couple_(np.ones(3, "f4"), memory, coupling=rk.Coupling(amax=library(np.zeros(1, "f4"))))
    assert memory.tolist() == [1, 1, 1]
    assert ops.couple(np.ones(3, "f4"), library(memory)).tolist() == [2, 2, 2]


def test_no_result_can_be_a_new_immutable_array():
    own = type("Array", (Own,), {"__module__": "jaxlib._jax"})
    own.__array_namespace__ = lambda self: type("", (), {"empty_like": lambda x, dtype=None: own(x.array)})
    with pytest.raises(TypeError, match="x is a JAX array, and these are immutable, so that no result can be written"):
        ops.couple(own(floats()), floats())


def test_jax_arrays():
    """The real ones: read, never written."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    f = jax.numpy.arange(3, dtype="float32")
    x = np.ones(3, "f4")
    ops.couple_(x, f)
    assert x.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="x is a JAX array, and these are immutable"):
        ops.couple_(f, x)
    with pytest.raises(TypeError, match="x is a JAX array, and these are immutable, so that no result"):
        ops.couple(f, x)
    assert f.tolist() == [0, 1, 2]


def test_torch_stands_alone():
    torch = pytest.importorskip("torch")
    for x, f in ((torch.ones(3), Exporter(np.ones(3, "f4"))), (Exporter(np.ones(3, "f4")), torch.ones(3))):
        with pytest.raises(TypeError, match="one library"):
            ops.couple_(x, f)


def test_backends_that_are_not_compiled_take_no_exporters():
    x = Exporter(np.ones(3, "f4"))
    with pytest.raises(rk.BackendError, match="it takes torch and numpy arrays, not dlpack"):
        ops.couple_(x, np.ones(3, "f4"), backend="reference")
    with pytest.raises(TypeError, match=r"f is a Exporter; for this backend it must be a torch.Tensor"):
        ops.couple_(np.ones(3, "f4"), x, backend="reference")
    scale = rk.Coupling(channel_scale=x, channel_dim=0)
    with pytest.raises(TypeError, match="channel_scale is a Exporter; for this backend"):
        ops.couple_(np.ones(3, "f4"), np.ones(3, "f4"), coupling=scale, backend="reference")
