# SPDX-License-Identifier: Apache-2.0
"""One right call of every entry, to be changed; and calls that came out wrong once, by what was wrong."""

from abi import structs
from abi.calls import struct, view
from abi.cases import Case

SIZES = (2, 3, 4)
_STRIDES = (12, 4, 1)
_SLOT = 256  # bytes between arrays in the arena
#: Arguments that are no structs.
_NUMBERS = {("revk_accumulate", "count"): 2}


def sample(entry, dtype="float32"):
    """A right call: dense views of one dtype, a coupling with a grid, a layer norm with an activation."""
    slots = iter(range(0, 64 * _SLOT, _SLOT))

    def one(kind=dtype):
        return view(kind, next(slots), SIZES, _STRIDES)

    fixed = dtype == "int16"
    branch = "float32" if fixed else dtype
    wide = "float64" if dtype == "float64" else "float32"
    call = {"entry": entry}
    for name, kind in structs.FUNCTIONS[entry][1].items():
        if kind is structs.FUNCTIONS["revk_couple"][1]["y"]:
            call[name] = one(branch if name in ("f", "dy", "df") else dtype)
        elif name == "coupling":
            call[name] = struct(name, grid_exponent=4, checksum=next(slots), amax=next(slots))
            if fixed:
                call[name]["value"] = one("float32")
        elif name == "norm":
            parameter = structs.DTYPES.index(wide)
            call[name] = struct(name, kind=1, activation=1, eps=1e-5, mean=next(slots), rstd=next(slots))
            call[name].update(weight=next(slots), bias=next(slots), parameter_dtype=parameter, running_dtype=parameter)
            call[name].update(statistics_outer_stride=4, statistics_inner_stride=1)
            call[name]["statistics_given"] = int(entry == "revk_norm_act_backward")
        elif name == "gradient":
            call[name] = struct(name, dweight=next(slots), dbias=next(slots))
        elif name == "where":
            call[name] = struct(name, device=-1, threads=1)
        else:
            assert (entry, name) in _NUMBERS, f"no {name} for {entry}: add it to _NUMBERS of tests/abi/samples.py"
            call[name] = _NUMBERS[entry, name]
    if entry == "revk_accumulate":
        call.update(totals=[one(), one()], parts=[one(), one()])
    return call


def case(call, numbers=True):
    """The call with numbers of about one in the whole arena, or random bits."""
    return Case(call, [(0, 2048, "float32")], numbers, seed=1)


def _resized(call, **sizes):
    for given in call.values():
        for one in given if isinstance(given, list) else [given]:
            if isinstance(one, dict) and "inner" in one:
                one.update(sizes)
    return call


def _changed(call, argument, **fields):
    call[argument].update(fields)
    return call


def found():
    """(what was wrong, call). Some of it was seen by a sanitizer alone."""
    huge = 2**61
    empty = _resized(sample("revk_accumulate"), outer=0, channels=huge, inner=huge)
    yield "the size of an empty array overflows", empty
    yield "an empty array is refused for its strides", _resized(sample("revk_couple"), outer=huge, channels=5, inner=0)
    empty = _resized(
        sample("revk_norm_act_backward"), outer=huge, channels=0, inner=huge, outer_stride=1, inner_stride=1
    )
    empty["norm"].update(statistics_outer_stride=0, statistics_inner_stride=0)
    yield "the count of an empty array overflows", empty
    yield "empty rows have no end", _resized(sample("revk_norm_act"), outer=2**50, channels=3, inner=0)
    for entry in ("revk_couple", "revk_reverse_step", "revk_accumulate", "revk_norm_act", "revk_norm_act_backward"):
        for name in ("outer", "channel", "inner"):
            size = {"outer": "outer", "channel": "channels", "inner": "inner"}[name]
            call = _resized(sample(entry), **{size: 1, f"{name}_stride": 2**63 - 1})
            yield f"the {name} stride of a single index overflows in {entry}", call
    call = _resized(sample("revk_norm_act"), outer=1)
    yield "a statistic's stride overflows", _changed(call, "norm", statistics_outer_stride=2**62)
    for size in (49, 52, 55):
        call = _changed(sample("revk_couple", "int16"), "coupling", struct_size=size)
        yield f"struct_size {size} ends within a pointer, and half of it is used", call
    yield "amax is written over f", _changed(call := sample("revk_couple"), "coupling", amax=call["f"]["data"])
    yield "checksum is written over x", _changed(call := sample("revk_couple"), "coupling", checksum=call["x"]["data"])
    call = sample("revk_reverse_step")
    yield "amax is written over df", _changed(call, "coupling", amax=call["df"]["data"] + 44)
    call = sample("revk_uncouple")
    yield "amax is written over the checksum", _changed(call, "coupling", amax=call["coupling"]["checksum"] + 4)
    call = _changed(sample("revk_couple"), "coupling", channel_scale=60 * _SLOT, checksum=60 * _SLOT)
    yield "the checksum is written over a scale", call
