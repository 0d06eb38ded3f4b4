# SPDX-License-Identifier: Apache-2.0
"""Random exporters of DLPack, right and wrong, against the calls that read them: ``dlpack_fuzz.py SECONDS LOG [SEED]``.

Run by tests/test_dlpack_fuzz.py in a process of its own. Each case is written to LOG before it is tried, so that a
crash leaves it there. A case is a right export with up to four things changed. For each it is known beforehand, from
the protocol alone, whether it has to be refused:

- a refusal is a TypeError or ValueError with text, and the memory is as before;
- an accepted in-place call did what NumPy does, and touched nothing beside the view;
- a capsule that was taken was renamed, and its deleter was called once; otherwise it was left alone.

An export that lies about memory that exists cannot be told from a true one, so what reaches beyond the buffer is tried
only where it reaches beyond every address.
"""

import itertools
import json
import random
import sys
import time
from collections import Counter
from functools import partial

import numpy as np
from dlpack_producer import Producer
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

import revkernels as rk
from revkernels import native, ops

BYTES, START = 4096, 1024  # of the buffer; where a right export begins
FLOATS = {(2, 64): "f8", (2, 32): "f4", (2, 16): "f2", (4, 16): None}  # None: NumPy has no such type
BIG = [2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**59, 2**61, 2**62, 2**63 - 1]
ERRORS = [BufferError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, MemoryError, KeyboardInterrupt]

sizes = st.sampled_from([0, 1, 2, 3, 4, 5])
odd_numbers = st.one_of(st.sampled_from([*BIG, *(-n for n in BIG), -(2**63)]), st.integers(-9, 9))


def right(call, random):
    """Fields of an export that the call has to accept."""
    _, takes, shape, _ = CALLS[call]
    while shape is None or np.prod([max(1, n) for n in shape]) > 150:  # stride 2, 8 bytes: the rest of the buffer
        shape = random.choices([0, 1, 2, 3, 4, 5], k=random.randint(call == "norm_act x", 4))
    strides, step = [0] * len(shape), 1 if CALLS[call][2] else random.randint(1, 2)
    for k in random.sample(range(len(shape)), len(shape)):
        strides[k] = step
        step *= max(1, shape[k])
    if call == "norm_act x":  # its dimensions have to merge
        strides = [1] * len(shape)
        for k in reversed(range(len(shape) - 1)):
            strides[k] = strides[k + 1] * max(1, shape[k + 1])
    return {
        "shape": shape,
        "strides": random.choice([strides, None]),
        "type": random.choice(list(takes)),
        "lanes": 1,
        "at": (random.choice([1, 3]), random.randint(0, 3)),
        "declared": None,
        "byte_offset": 8 * random.randint(0, 4),
        "null": False,
        "ndim": None,
        "versioned": random.random() < 0.7,
        "version": (1, random.randint(0, 9)),
        "flags": random.choice([0, 0, 4, 2**40]),
        "name": None,
        "has_deleter": random.random() < 0.8,
        "takes": random.choice([("stream", "max_version"), ("stream",)]),
        "answer": "capsule",
        "shift": 0,
    }


CHANGES = {
    "shape": st.lists(st.one_of(sizes, odd_numbers), max_size=66),
    "strides": st.lists(odd_numbers, max_size=66),
    "type": st.tuples(st.integers(0, 20), st.sampled_from([0, 1, 4, 8, 16, 32, 64, 128, 255])),
    "lanes": st.sampled_from([0, 2, 4, 65535]),
    "at": st.tuples(st.one_of(st.integers(-1, 20), st.sampled_from([2**31 - 1, -(2**31)])), st.integers(-2, 2)),
    "declared": st.sampled_from(
        [(3, 9), (2, 0), (13, 1), (8, 0), (1,), (), 1, "cpu", (1, 2, 3), ("a", "b"), (1.5, 0), (1, 2**70), [1, 0]]
    ),
    "byte_offset": st.one_of(st.integers(0, 64), st.sampled_from([2**63, 2**64 - 1, 2**64 - 64])),
    "null": st.just(True),
    "ndim": st.one_of(st.integers(-3, 70), st.sampled_from([2**31 - 1, -(2**31)])),
    "version": st.tuples(st.sampled_from([0, 1, 2, 3, 2**32 - 1]), st.integers(0, 2**32 - 1)),
    "flags": st.one_of(st.integers(0, 7), st.integers(0, 2**64 - 1)),
    "name": st.sampled_from([b"dltensor ", b"", b"tensor", b"used_dltensor", b"used_dltensor_versioned", b"DLTENSOR"]),
    "answer": st.sampled_from(["None", "int", "object", *(error.__name__ for error in ERRORS)]),
    "shift": st.integers(1, 15),
}


@st.composite
def cases(draw):
    """A call, the fields of the export, and whether they are as they were made: right."""
    call = draw(st.sampled_from(sorted(CALLS)))
    fields = right(call, random.Random(draw(st.integers(0, 2**32 - 1))))
    count = draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3, 4]))
    for _ in range(count):
        name = draw(st.sampled_from(sorted(CHANGES)))
        fields[name] = draw(CHANGES[name])
    return call, fields, count == 0


# ---- what the protocol says of a case


def rank(case):
    return len(case["shape"]) if case["ndim"] is None else case["ndim"]


def counted(case):
    """Sizes and strides as far as ndim tells; arrays are longer than that where it lies, and filled up with ones."""
    shape = (case["shape"] + [1] * 70)[: rank(case)]
    if case["strides"] is None:
        strides = [*itertools.accumulate([1, *[max(1, n) for n in shape[:0:-1]]], lambda a, b: a * b)][::-1]
        return shape, strides[-len(shape) :] if shape else []
    return shape, (case["strides"] + [1] * 70)[: rank(case)]


def item(case):
    return max(1, case["type"][1] // 8)


def addresses(case, base):
    """First and last byte, in exact numbers."""
    shape, strides = counted(case)
    first = base + START + case["shift"] + case["byte_offset"]
    reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True) if n > 1)
    return first, first + (reach + 1) * item(case)


def is_wrong(case, written, takes, base):
    """Whether the protocol, or the place that the argument has in the call, rules the export out."""
    if case["answer"] != "capsule" or case["name"] is not None:
        return True
    if case["versioned"] and (case["version"][0] != 1 or (written and case["flags"] & 3)):
        return True
    if case["type"] not in takes or case["lanes"] != 1:
        return True
    declared = case["at"] if case["declared"] is None else case["declared"]
    if (
        not isinstance(declared, tuple)
        or len(declared) != 2
        or declared[0] not in (1, 3)
        or case["at"][0] not in (1, 3)
    ):
        return True
    if not -(2**31) <= declared[1] < 2**31 or not 0 <= rank(case) <= 64:
        return True
    shape, strides = counted(case)
    if min(shape, default=0) < 0 or int(np.prod([max(1, n) for n in shape], dtype=object)) > (2**63 - 1) // 16:
        return True
    if any(n > 1 and stride < 0 for n, stride in zip(shape, strides, strict=True)):
        return True
    if 0 in shape:
        return False
    first, last = addresses(case, base)
    return case["null"] or first % item(case) != 0 or last > 2**64 or last - first > 2**61


def overlaps_itself(case):
    """By listing every element, of an export that was accepted to be written: so it lies within the buffer."""
    if 0 in counted(case)[0]:
        return False
    offsets = np.zeros(1, int)
    for n, stride in zip(*counted(case), strict=True):
        offsets = np.add.outer(offsets, np.arange(n) * stride if n > 1 else np.zeros(n, int)).ravel()
    return len(np.unique(offsets)) < len(offsets)


def can_be_tried(case, base):
    """Whether it lies within the buffer, or beyond every address, or has to be refused before its memory counts."""
    if not 0 <= rank(case) <= 64 or case["null"] or case["name"] is not None or case["answer"] != "capsule":
        return True
    shape, strides = counted(case)
    if min(shape, default=0) < 0 or 0 in shape or any(s < 0 < n - 1 for n, s in zip(shape, strides, strict=True)):
        return True
    first, last = addresses(case, base)
    return (base <= first and last <= base + BYTES) or last > 2**64 or last - first > 2**61


# ---- the calls, each with the exporter in one place


def partner(case):
    """A NumPy array of the exporter's shape where that is one."""
    shape, _ = counted(case) if 0 <= rank(case) <= 64 else ([3], None)
    fits = min(shape, default=0) >= 0 and int(np.prod(shape, dtype=object)) <= 1000
    return np.ones(shape if fits and len(shape) <= 32 else [3], "f4")


WORDS = {(0, 64): "i8", (1, 64): "u8"}
FLOAT32 = {(2, 32): "f4"}
# A call: whether the exporter is written, the types that it may have, its shape if that is given, and the function.
CALLS = {
    "couple_ x": (True, FLOATS, None, lambda e, case: ops.couple_(e, partner(case))),
    "uncouple_ y": (True, FLOATS, None, lambda e, case: ops.uncouple_(e, partner(case))),
    "couple_ f": (False, FLOATS, None, lambda e, case: ops.couple_(partner(case), e)),
    "couple x": (False, FLOATS, None, lambda e, case: ops.couple(e, partner(case))),
    "reverse_step_ dy": (True, FLOATS, None, lambda e, case: reverse(e, *(partner(case) for _ in range(3)))),
    "accumulate_ total": (True, FLOATS, None, lambda e, case: accumulate(e, partner(case))),
    "accumulate_ part": (False, FLOATS, None, lambda e, case: accumulate(partner(case), e)),
    "norm_act x": (False, FLOATS, None, lambda e, case: ops.norm_act(e, rk.Norm("rms"))),
    "norm_act weight": (False, FLOATS, [3], lambda e, case: ops.norm_act(ones(2, 3), rk.Norm("layer", weight=e))),
    "channel_scale": (False, FLOAT32, [3], lambda e, case: couple(channel_scale=e, channel_dim=0)),
    "amax": (True, FLOAT32, [1], lambda e, case: couple(amax=e)),
    "checksum": (True, WORDS, [1, 1], lambda e, case: couple(checksum=e)),
}
IN_PLACE = {"couple_ x": 1, "uncouple_ y": -1, "reverse_step_ dy": 1, "accumulate_ total": 1}


def ones(*shape):
    return np.ones(shape, "f4")


def couple(**options):
    return ops.couple_(ones(3, 2), ones(3, 2), coupling=rk.Coupling(**options))


def accumulate(total, part):
    return ops.accumulate_([ones(2), total], [ones(2), part])


def reverse(dy, *others):
    y, f, df = others
    return ops.reverse_step_(y, f, dy, df)


def buffer():
    """Bytes whose float values are ordinary numbers in every type, aligned to 64."""
    memory = np.zeros(BYTES + 64, "u1")
    at = -memory.ctypes.data % 64
    memory = memory[at : at + BYTES]
    memory.view("u2")[...] = 0x3C00 + np.arange(BYTES // 2) % 64
    return memory


def answer_of(kind, _):
    made = {"None": None, "int": 7, "object": object()}
    if kind in made:
        return made[kind]
    raise {error.__name__: error for error in ERRORS}[kind]("no export")


def exporter(case, memory):
    fields = {name: case[name] for name in ("lanes", "at", "byte_offset", "ndim", "versioned", "version", "flags")}
    fields |= {name: case[name] for name in ("name", "has_deleter", "takes", "declared")}
    code, bits = case["type"]
    shape = case["shape"] + [1] * 70 if case["ndim"] is not None else case["shape"]
    strides = None if case["strides"] is None else case["strides"] + [1] * 70
    made = Producer(memory, "uint8", code=code, bits=bits, shape=shape, strides=strides, **fields)
    made.ndim = rank(case)
    made.data = None if case["null"] else memory.ctypes.data + START + case["shift"]
    if case["answer"] != "capsule":
        made.answer = partial(answer_of, case["answer"])
    return made


def expected(case, call, memory):
    """The buffer after the call, by NumPy; None where it has no such type."""
    dtype = FLOATS.get(case["type"])
    if dtype is None:
        return None
    shape, strides = counted(case)
    after, at = memory.copy(), START + case["shift"] + case["byte_offset"]
    if 0 not in shape:
        steps = [stride * item(case) if n > 1 else 0 for n, stride in zip(shape, strides, strict=True)]
        view = np.lib.stride_tricks.as_strided(after[at:].view("u1")[: item(case)].view(dtype), shape, steps)
        view[...] = view + np.float32(IN_PLACE[call])
    return after


tally = Counter()


def attempt(log, case):
    call, fields, right = case
    memory = buffer()
    base = memory.ctypes.data
    assume(can_be_tried(fields, base))
    log.seek(0)
    log.truncate()
    log.write(repr(case))
    log.flush()
    written, takes, _, function = CALLS[call]
    made, before = exporter(fields, memory), memory.copy()
    wrong = is_wrong(fields, written, takes, base)
    try:
        function(made, fields)
    except (TypeError, ValueError) as error:
        assert str(error), "a refusal without text"
        assert not right, f"a right export was refused: {error}"
        tally["refused"] += 1
        np.testing.assert_array_equal(memory, before)
    except (MemoryError, KeyboardInterrupt) as error:
        # The exporter's own, or NumPy's for a result of the shape of an export that repeats one element a lot.
        huge = call in ("couple x", "norm_act x") and int(np.prod(fields["shape"], dtype=object)) > 2**30
        assert fields["answer"] == type(error).__name__ or (huge and isinstance(error, MemoryError)), repr(error)
        np.testing.assert_array_equal(memory, before)
    else:
        tally["right" if right else "accepted"] += 1
        assert not wrong, "accepted, and it had to be refused"
        assert not (written and overlaps_itself(fields)), "written, and elements share memory"
        if call in IN_PLACE:
            after = expected(fields, call, before)
            if after is not None:
                np.testing.assert_array_equal(memory, after)
        elif not written:
            np.testing.assert_array_equal(memory, before)
    made.assert_protocol()


def main(seconds, path, first_seed):
    reason = native.missing("cuda")
    assert reason is not None, (
        "where CUDA runs, an export that claims host memory for the device's would be launched on"
    )
    options = settings(
        max_examples=500,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    end = time.monotonic() + seconds
    with open(path, "w") as log:

        @options
        @given(cases())
        def anything(case):
            attempt(log, case)

        for number in itertools.count(first_seed):
            seed(number)(anything)()
            if time.monotonic() > end:
                break
    print(json.dumps(tally | {"seeds": number + 1 - first_seed}))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
