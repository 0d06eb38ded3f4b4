# SPDX-License-Identifier: Apache-2.0
"""The C interface in ctypes: the header's structs, enums and functions, as a host in another language writes them down.

`test_abi.py` holds sizes, offsets, values and signatures against the header. Needs the standard library alone: a
process that only calls the library loads it too.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p

OK, INVALID_ARGUMENT, UNSUPPORTED, CUDA_ERROR, INTERNAL_ERROR = range(5)
NO_GRID = -(2**31)

#: The header's enums, their values in order.
ENUMS = {
    "revk_status": ["OK", "INVALID_ARGUMENT", "UNSUPPORTED", "CUDA_ERROR", "INTERNAL_ERROR"],
    "revk_dtype": ["FLOAT64", "FLOAT32", "BFLOAT16", "FLOAT16", "INT16"],
    "revk_norm_kind": ["BATCH_NORM", "LAYER_NORM", "RMS_NORM", "GROUP_NORM"],
    "revk_activation": ["IDENTITY", "RELU", "GELU", "GELU_TANH", "SILU"],
    "revk_norm_sums": ["SUMS_COMPUTED", "SUMS_ONLY", "SUMS_GIVEN"],
}
DTYPES = [name.lower() for name in ENUMS["revk_dtype"]]
KINDS = [name.lower().removesuffix("_norm") for name in ENUMS["revk_norm_kind"]]
ACTIVATIONS = ["none", *(name.lower() for name in ENUMS["revk_activation"][1:])]
ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int16": 2}


class Struct(ctypes.Structure):
    """A struct whose first field is its size, set unless something else is given."""

    def __init__(self, **fields):
        super().__init__(**{"struct_size": ctypes.sizeof(type(self)), **fields})


class View(Struct):
    _fields_ = [
        ("struct_size", c_int32),
        ("dtype", c_int32),
        ("data", c_void_p),
        ("outer", c_int64),
        ("channels", c_int64),
        ("inner", c_int64),
        ("outer_stride", c_int64),
        ("channel_stride", c_int64),
        ("inner_stride", c_int64),
    ]


class Where(Struct):
    _fields_ = [("struct_size", c_int32), ("device", c_int32), ("stream", c_void_p), ("threads", c_int32)]


class Coupling(Struct):
    _fields_ = [
        ("struct_size", c_int32),
        ("grid_exponent", c_int32),
        ("channel_scale", c_void_p),
        ("sample_scale", c_void_p),
        ("rows_per_sample", c_int64),
        ("checksum", c_void_p),
        ("amax", c_void_p),
        ("value", POINTER(View)),
    ]


class Norm(Struct):
    _fields_ = [
        ("struct_size", c_int32),
        ("kind", c_int32),
        ("activation", c_int32),
        ("groups", c_int32),
        ("eps", c_double),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("mean", c_void_p),
        ("rstd", c_void_p),
        ("statistics_outer_stride", c_int64),
        ("statistics_inner_stride", c_int64),
        ("running_mean", c_void_p),
        ("running_var", c_void_p),
        ("momentum", c_double),
        ("parameter_dtype", c_int32),
        ("running_dtype", c_int32),
        ("statistics_given", c_int32),
        ("reserved", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
    ]


class NormGradient(Struct):
    _fields_ = [
        ("struct_size", c_int32),
        ("sums", c_int32),
        ("dweight", c_void_p),
        ("dbias", c_void_p),
        ("count", c_int64),
        ("constant", c_int32),
        ("reserved", c_int32),
    ]


STRUCTS = {
    "revk_view": View,
    "revk_where": Where,
    "revk_coupling": Coupling,
    "revk_norm": Norm,
    "revk_norm_gradient": NormGradient,
}

_VIEW, _WHERE, _COUPLING, _NORM, _GRADIENT = (POINTER(struct) for struct in STRUCTS.values())
#: A function's result and its arguments by name.
FUNCTIONS = {
    "revk_couple": (c_int32, {"y": _VIEW, "x": _VIEW, "f": _VIEW, "coupling": _COUPLING, "where": _WHERE}),
    "revk_uncouple": (c_int32, {"x": _VIEW, "y": _VIEW, "f": _VIEW, "coupling": _COUPLING, "where": _WHERE}),
    "revk_reverse_step": (
        c_int32,
        {"y": _VIEW, "f": _VIEW, "dy": _VIEW, "df": _VIEW, "coupling": _COUPLING, "where": _WHERE},
    ),
    "revk_accumulate": (c_int32, {"totals": _VIEW, "parts": _VIEW, "count": c_int64, "where": _WHERE}),
    "revk_norm_act": (c_int32, {"h": _VIEW, "x": _VIEW, "norm": _NORM, "where": _WHERE}),
    "revk_couple_norm_act": (
        c_int32,
        {"h": _VIEW, "y": _VIEW, "x": _VIEW, "f": _VIEW, "norm": _NORM, "where": _WHERE},
    ),
    "revk_uncouple_norm_act": (
        c_int32,
        {"h": _VIEW, "x": _VIEW, "y": _VIEW, "f": _VIEW, "norm": _NORM, "where": _WHERE},
    ),
    "revk_norm_act_backward": (
        c_int32,
        {"dx": _VIEW, "base": _VIEW, "dh": _VIEW, "x": _VIEW, "norm": _NORM, "gradient": _GRADIENT, "where": _WHERE},
    ),
    "revk_norm_workspace": (c_int64, {"x": _VIEW, "norm": _NORM, "where": _WHERE}),
    "revk_synchronize": (c_int32, {"where": _WHERE}),
    "revk_last_error": (c_char_p, {}),
    "revk_abi_version": (c_int32, {}),
    "revk_version": (c_char_p, {}),
    "revk_cpu_isa": (c_char_p, {}),
    "revk_cuda_archs": (c_char_p, {}),
    "revk_cuda_missing": (c_char_p, {}),
}
#: What `checksum` and `amax` of a coupling point to.
CHECKSUM, AMAX = c_uint64, c_float


def load(path):
    """The library with every function's signature."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(arguments.values())
    return library


def host(threads=1):
    return Where(device=-1, threads=threads)
