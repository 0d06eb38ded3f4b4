# SPDX-License-Identifier: Apache-2.0
"""What the C interface refuses, in which words; structs of other versions; and sizes that only just fit into memory."""

import ctypes
import mmap
import sys

import numpy as np
import pytest
from abi import structs
from abi.calls import Memory, struct_type
from abi.fuzzer import Fuzzer
from abi.model import FIRST
from abi.samples import case, found, sample
from native_oracle import ISAS
from programs import need_extension, run

from revkernels import native

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)


@pytest.fixture(scope="module")
def library():
    return structs.load(native.library())


@pytest.fixture(scope="module")
def fuzzer():
    if native.missing("cuda") is None:
        pytest.skip("the model is of a machine without CUDA")
    made = Fuzzer(native.library(), isas=ISAS)
    yield made
    made.close()


def make(library, call):
    """Make a call in this process, on random numbers; return (result, last error, whether memory has changed)."""
    memory, before = Memory(), case(call).content()
    memory.write(before)
    result, said = memory.call(library, call)
    return result, said, memory.read() != before


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("entry", [name for name, (_, arguments) in structs.FUNCTIONS.items() if arguments])
def test_samples_are_right(entry, dtype, fuzzer):
    """Every entry and dtype, against the oracle; the tests below change these calls."""
    fuzzer.judge(case(sample(entry, dtype), numbers=dtype == "float32"))
    assert fuzzer.seen[entry, "right"] > 0


@pytest.mark.parametrize("what, call", list(found()), ids=lambda given: given if isinstance(given, str) else "")
def test_what_was_wrong_once(what, call, fuzzer):
    """`test_sanitizers.py` makes the same calls with sanitizers."""
    fuzzer.judge(case(call))


# ---- words

REFUSED = {
    "y is NULL, a revk_view is needed": ("revk_couple", {"y": None}),
    "where is NULL, a revk_where is needed": ("revk_couple", {"where": None}),
    "norm is NULL, a revk_norm is needed": ("revk_norm_act", {"norm": None}),
    "gradient is NULL, a revk_norm_gradient is needed": ("revk_norm_act_backward", {"gradient": None}),
    "totals is NULL, an array of revk_view is needed": ("revk_accumulate", {"totals": None}),
    "count is -1, 0 or more is needed": ("revk_accumulate", {"count": -1}),
    "f: data is NULL, but shape (2, 3, 4) has elements": ("revk_uncouple", {"f.data": None}),
    "f: data is not aligned to its dtype, float32": ("revk_uncouple", {"f.data": 1}),
    "y: size (2, -3, 4) is negative": ("revk_reverse_step", {"y.channels": -3}),
    "y: stride -1 is negative; copy the array to dense memory": ("revk_couple", {"y.inner_stride": -1}),
    "f: shape is (2, 3, 2147483648), but y has (2, 3, 4)": ("revk_couple", {"f.inner": 2**31, "f.inner_stride": 0}),
    "y: shape (2, 4611686018427387904, 4) with its strides reaches past": ("revk_couple", {"y.channels": 2**62}),
    "y: shape (9223372036854775807, 3, 4) with its strides reaches past": ("revk_couple", {"y.outer": 2**63 - 1}),
    "f: shape (4294967296, 3, 4294967296) has more elements than can be counted": (
        "revk_couple",
        {"f.outer": 2**32, "f.outer_stride": 0, "f.inner": 2**32, "f.inner_stride": 0},
    ),
    "x: dtype is 5, a revk_dtype (0..4) is needed": ("revk_couple", {"x.dtype": 5}),
    "f: dtype is 7, a revk_dtype (0..3) is needed": ("revk_couple", {"f.dtype": 7}),
    "f: dtype is int16, a floating-point revk_dtype (0..3) is needed": ("revk_couple", {"f.dtype": 4}),
    "y: is written and overlaps f; they need separate memory": ("revk_couple", {"y.data": 512, "x.data": 512}),
    "y: is written, but several of its indices share one element": ("revk_couple", {"y.inner_stride": 0}),
    "coupling: grid_exponent is 127, -126..126 or REVK_NO_GRID": ("revk_couple", {"coupling.grid_exponent": 127}),
    "coupling: rows_per_sample is -1": ("revk_couple", {"coupling.rows_per_sample": -1}),
    "coupling: amax is not aligned to its element": ("revk_couple", {"coupling.amax": 2}),
    "coupling: amax is written and overlaps f; they need": ("revk_couple", {"coupling.amax": 512}),
    "norm: kind is 4, 0..3 is needed": ("revk_norm_act", {"norm.kind": 4}),
    "norm: eps is nan, a finite number of 0 or more": ("revk_norm_act", {"norm.eps": float("nan")}),
    "norm: groups is 2, 0 is needed for a layer norm": ("revk_norm_act", {"norm.groups": 2}),
    "norm: rstd is NULL; a layer norm needs it": ("revk_norm_act", {"norm.rstd": None}),
    "norm: mean is written and overlaps rstd": ("revk_norm_act", {"norm.rstd": 512}),
    "norm: statistics_given is 0, 1 is needed": ("revk_norm_act_backward", {"norm.statistics_given": 0}),
    "gradient: count is -2147483648, 0 or more": ("revk_norm_act_backward", {"gradient.count": -(2**31)}),
    "where: device is -2, -1 (the host) or a CUDA device's": ("revk_couple", {"where.device": -2}),
    "where: threads is -2147483648, 0 or more is needed": ("revk_accumulate", {"where.threads": -(2**31)}),
}


def change(call, changes):
    for name, value in changes.items():
        argument, _, field = name.partition(".")
        (call[argument] if field else call).update({field or argument: value})
    return call


@pytest.mark.parametrize("words", REFUSED)
def test_a_refusal_says_what_it_got_and_what_it_needs(words, library):
    entry, changes = REFUSED[words]
    status, said, changed = make(library, change(sample(entry), changes))
    assert status == structs.INVALID_ARGUMENT and said.startswith(words), said
    assert not changed


def test_a_device_that_is_not_there(library):
    if native.missing("cuda") is None:
        pytest.skip("this machine has one")
    status, said, changed = make(library, change(sample("revk_couple"), {"where.device": 0}))
    assert (status, changed) == (structs.UNSUPPORTED, False)
    assert said == f"CUDA cannot run here: {native.missing('cuda')}"


# ---- versions of structs

HOLDERS = {
    "f": "revk_couple",
    "where": "revk_couple",
    "coupling": "revk_couple",
    "norm": "revk_norm_act_backward",
    "gradient": "revk_norm_act_backward",
}


def sized(argument, size, **tail):
    call = sample(HOLDERS[argument])
    call[argument].update(struct_size=size, **tail)
    return call


@pytest.mark.parametrize("argument", HOLDERS)
def test_a_newer_struct(argument, library):
    """Its unknown fields must be zero, at any size; the padding behind it is its own business."""
    full = ctypes.sizeof(struct_type(argument))
    for size in (full + 8, 1024):
        assert make(library, sized(argument, size, tail={size: 1}))[0] == structs.OK
        for at in (full, size - 1):
            status, said, changed = make(library, sized(argument, size, tail={at: 1}))
            assert (status, changed) == (structs.UNSUPPORTED, False)
            assert said.startswith(
                f"{argument}: sets a field that revkernels {native.version()} does not know (byte {at} "
            )


@pytest.mark.parametrize("argument", HOLDERS)
def test_an_older_struct(argument, library):
    """The first version's size is enough; less is refused, and so is what no struct has."""
    first = FIRST[struct_type(argument).__name__]
    assert make(library, sized(argument, first))[0] == structs.OK
    for size in (first - 1, 4, 0, -1, 1025, 2**31 - 1, -(2**31)):
        status, said, changed = make(library, sized(argument, size))
        assert (status, changed) == (structs.INVALID_ARGUMENT, False)
        assert said.startswith(f"{argument}: struct_size is {size}, at least {first} and at most 1024 is needed")


def test_a_list_of_newer_structs(library):
    """A list is stepped through by the size that its first struct says; all of them say the same."""
    call = sample("revk_accumulate")
    for one in call["totals"]:
        one["struct_size"] = 88
    assert make(library, call)[0] == structs.OK
    call["totals"][1]["struct_size"] = 80
    status, said, changed = make(library, call)
    assert (status, changed) == (structs.INVALID_ARGUMENT, False)
    assert said == "totals[1]: struct_size is 80, totals[0] has 88; equal sizes are needed"


# ---- sizes and offsets past 32 bits


class Reserved:
    """Memory that is reserved, not there until it is touched; ``at`` is its address."""

    def __init__(self, size):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            self._map = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            pytest.skip(f"{size >> 30} GiB cannot be reserved: {error}")
        self.at = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def floats(self, index, count=1):
        return (ctypes.c_float * count).from_address(self.at + 4 * index)


def test_strides_past_32_bits(library):
    """Three rows of four numbers, each 2^31 + 2 elements behind the one before."""
    stride, rows, where = 2**31 + 2, np.arange(12, dtype="f4").reshape(3, 4), structs.host()
    memory = [Reserved(4 * (2 * stride + 4)) for _ in range(2)]
    x, h = (
        structs.View(dtype=1, data=one.at, outer=3, channels=4, inner=1, outer_stride=stride, channel_stride=1)
        for one in memory
    )
    f = structs.View(dtype=1, data=rows.ctypes.data, outer=3, channels=4, inner=1, outer_stride=4, channel_stride=1)
    for k in range(3):
        memory[0].floats(k * stride, 4)[:] = [10, 20, 30, 40]
    assert library.revk_couple(x, x, f, None, where) == structs.OK
    for k in range(3):
        assert list(memory[0].floats(k * stride, 4)) == [10 + 4 * k, 21 + 4 * k, 32 + 4 * k, 43 + 4 * k]
    mean, rstd = np.zeros(4, "f4"), np.zeros(4, "f4")
    norm = structs.Norm(kind=0, mean=mean.ctypes.data, rstd=rstd.ctypes.data, parameter_dtype=1, running_dtype=1)
    assert library.revk_norm_act(h, x, norm, where) == structs.OK
    assert mean.tolist() == [14, 25, 36, 47]
    assert [memory[1].floats(k * stride)[0] for k in range(3)] == [-4 * rstd[0], 0, 4 * rstd[0]]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_more_than_2_to_the_31_elements(threads, library):
    """y += 0.5, whose one element is read 2^31 + 5 times."""
    count = 2**31 + 5
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if free < 8 << 20:
        pytest.skip(f"{free >> 20} GiB of memory are free, 8 are needed")
    memory, half = Reserved(2 * count), np.array([0.5], "f2")
    y = structs.View(dtype=3, data=memory.at, outer=1, channels=1, inner=count, inner_stride=1)
    f = structs.View(dtype=3, data=half.ctypes.data, outer=1, channels=1, inner=count)
    checksum = ctypes.c_uint64(0)
    coupling = structs.Coupling(grid_exponent=structs.NO_GRID, checksum=ctypes.addressof(checksum))
    assert library.revk_couple(y, y, f, coupling, structs.host(threads)) == structs.OK
    found = np.frombuffer((ctypes.c_char * (2 * count)).from_address(memory.at), "f2")
    assert (found[[0, 1, 2**31 - 1, 2**31, -1]] == 0.5).all()
    assert checksum.value == int(half.view("u2")[0]) * count**2 % 2**64  # the sum of 2i + 1 is count^2
    assert all((found[at : at + (1 << 26)] == 0.5).all() for at in range(0, count, 1 << 26))


def test_as_many_threads_as_can_be_said():
    """libgomp ends a process that asks for more threads than the system gives."""
    need_extension()
    code = f"""
import numpy as np
from abi import structs
library, where = structs.load({native.library()!r}), structs.host(threads=2**31 - 1)
x, f = np.zeros(1 << 22, "f4"), np.ones(1, "f4")
shape = dict(dtype=1, outer=1 << 11, channels=1 << 11, inner=1)
y = structs.View(data=x.ctypes.data, outer_stride=1 << 11, channel_stride=1, **shape)
one = structs.View(data=f.ctypes.data, **shape)
print(library.revk_couple(y, y, one, None, where), x.min(), x.max())
mean, rstd = np.ones(1 << 11, "f4"), np.ones(1 << 11, "f4")
norm = structs.Norm(eps=1, parameter_dtype=1, running_dtype=1, mean=mean.ctypes.data, rstd=rstd.ctypes.data)
h = np.empty_like(x)
to = structs.View(data=h.ctypes.data, outer_stride=1 << 11, channel_stride=1, **shape)
print(library.revk_norm_act(to, y, norm, where), mean.min(), abs(h).max())
"""
    said = run(sys.executable, "-c", code, variables={"PYTHONPATH": str(__file__).rpartition("/")[0]})
    assert said == "0 1.0 1.0\n0 1.0 0.0\n"
