# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels refuse, by name and before anything is written."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revkernels import native
from revkernels.coupling import Coupling

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)


def refuse(error, match, kernel, *arrays):
    before = [np.array(a) if isinstance(a, np.ndarray) else None for a in arrays]
    with pytest.raises(error, match=match):
        kernel(*arrays)
    for array, copy in zip(arrays, before, strict=True):
        if copy is not None:
            assert np.array_equal(array, copy), "written before the refusal"


def f4(*shape):
    return np.arange(np.prod(shape), dtype="f4").reshape(shape) + 1


def read_only(array):
    array.flags.writeable = False
    return array


REFUSED = {
    "int": (TypeError, "f is int64", lambda: (f4(3), np.ones(3, "i8"))),
    "complex": (TypeError, "x is complex64", lambda: (np.ones(3, "c8"), f4(3))),
    "object": (TypeError, "f is object", lambda: (f4(3), np.ones(3, object))),
    "list": (TypeError, "f is a list", lambda: (f4(3), [1.0, 2.0, 3.0])),
    "none": (TypeError, "f is a NoneType", lambda: (f4(3), None)),
    "swapped": (TypeError, "f is byte-swapped", lambda: (f4(3), np.ones(3, ">f4"))),
    "shape": (ValueError, r"f has shape \(4,\), x has \(3,\)", lambda: (f4(3), f4(4))),
    "rank": (ValueError, r"f has shape \(3, 1\)", lambda: (f4(3), f4(3, 1))),
    "read_only": (ValueError, "x is read-only", lambda: (read_only(f4(3)), f4(3))),
    "backwards": (ValueError, "f has a negative stride", lambda: (f4(3), f4(3)[::-1])),
    "expanded": (ValueError, "x is read-only|x has several", lambda: (np.broadcast_to(f4(1), (3,)), f4(3))),
    "aliased": (
        ValueError,
        "x has several",
        lambda: (np.lib.stride_tricks.as_strided(f4(9), (3, 3), (4, 4)), f4(3, 3)),
    ),
    "unaligned": (ValueError, "f is not aligned", lambda: (f4(3), np.frombuffer(bytes(13), "f4", 3, 1))),
    "odd_stride": (ValueError, "f is not aligned", lambda: (f4(2), np.zeros(2, [("a", "f4"), ("b", "i2")])["a"])),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    error, match, make = REFUSED[case]
    x, f = make()
    refuse(error, match, lambda a, b: native.couple(a, a, b, None), x, f)


def test_overlap():
    base = f4(4, 8)
    native.couple(base[:, :4], base[:, :4], base[:, 4:], None)  # interleaved halves share nothing
    native.couple(base[:, ::2], base[:, ::2], base[:, 1::2], None)
    flat = f4(10)
    refuse(ValueError, "x and f overlap", lambda a, b: native.couple(a, a, b, None), flat[:5], flat[4:9])
    refuse(ValueError, "x and f overlap", lambda a, b: native.couple(a, a, b, None), flat, flat)
    refuse(ValueError, "out and x overlap", lambda a, b: native.couple(a, b, f4(5), None), flat[:5], flat[1:6])
    refuse(ValueError, "out and f overlap", lambda a, b: native.uncouple(a, f4(10), b, None), flat, flat)
    refuse(ValueError, "y and f overlap", lambda a, b: native.uncouple(a, a, b, None), flat[:4], flat[:8:2])
    x = f4(5)
    view = x[:]
    native.couple(view, x, f4(5), None)  # exactly in place, by way of another object
    assert np.array_equal(x, 2 * f4(5))
    for names, arrays in {
        "y and dy": lambda a: (a, f4(5), a, f4(5)),
        "y and df": lambda a: (a, f4(5), f4(5), a),
        "dy and f": lambda a: (f4(5), a, a, f4(5)),
        "dy and df": lambda a: (f4(5), f4(5), a, a),
    }.items():
        refuse(ValueError, f"{names} overlap", native.reverse_step, *arrays(f4(5)))
    native.reverse_step(f4(5), x, f4(5), x, None)  # what is only read may be shared
    refuse(ValueError, "overlap", lambda a, b: native.accumulate([a, b], [f4(5), f4(5)]), flat[:5], flat[3:8])
    refuse(ValueError, "overlap", lambda a, b: native.accumulate([a, f4(5)], [f4(5), b]), flat[:5], flat[3:8])


strided = st.tuples(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=3), st.integers(0, 20)
)


@settings(max_examples=300, deadline=None)
@given(strided, strided)
def test_overlap_is_exact(x_spec, f_spec):
    """Against NumPy's exact solver, on views that a bounding range could not tell apart."""
    rank = min(len(x_spec[0]), len(f_spec[0]))
    sizes = [size for size, _ in x_spec[0][:rank]]
    memory = np.zeros(400, "f4")

    def view(spec):
        strides = [4 * stride for _, stride in spec[0][:rank]]
        return np.lib.stride_tricks.as_strided(memory[spec[1] :], sizes, strides)

    x, f = view(x_spec), view(f_spec)
    offsets = [sum(i * s for i, s in zip(index, x.strides, strict=True)) for index in np.ndindex(*sizes)]
    own = len(set(offsets)) == len(offsets)
    if own and not np.shares_memory(x, f):
        native.couple(x, x, f, None)
    else:
        with pytest.raises(ValueError, match="x"):
            native.couple(x, x, f, None)


OPTIONS_REFUSED = {
    "channel_dtype": (TypeError, "channel_scale is float64", {"channel_scale": np.ones(3)}),
    "channel_shape": (ValueError, r"channel_scale has shape \(4,\)", {"channel_scale": f4(4)}),
    "channel_stride": (ValueError, "channel_scale has stride 2", {"channel_scale": f4(6)[::2]}),
    "channel_dim": (ValueError, "channel_dim is 2", {"channel_scale": f4(3), "channel_dim": 2}),
    "both_on_one": (
        ValueError,
        "channel_dim is 0",
        {"channel_scale": f4(2), "sample_scale": f4(2), "channel_dim": 0},
    ),
    "sample_shape": (ValueError, r"sample_scale has shape \(3,\)", {"sample_scale": f4(3)}),
    "grid": (ValueError, "grid_exponent is 127", {"grid_exponent": 127}),
    "checksum_dtype": (TypeError, "checksum is float32", {"checksum": f4(1)}),
    "checksum_size": (ValueError, r"checksum has shape \(2,\)", {"checksum": np.zeros(2, "u8")}),
    "amax_dtype": (TypeError, "amax is float64", {"amax": np.zeros(1)}),
    "amax_read_only": (ValueError, "amax is read-only", {"amax": read_only(f4(1))}),
}


@pytest.mark.parametrize("case", OPTIONS_REFUSED)
def test_option_refusals(case):
    error, match, options = OPTIONS_REFUSED[case]
    refuse(error, match, lambda x, f: native.couple(x, x, f, Coupling(**options)), f4(2, 3), f4(2, 3))


def test_torch_refusals():
    torch = pytest.importorskip("torch")
    x, freed = torch.zeros(3), torch.zeros(3)
    freed.untyped_storage().resize_(0)
    for f, error, match in [
        (torch.zeros(3, dtype=torch.int64), TypeError, "f is torch.int64"),
        (torch.zeros(3).to_sparse(), TypeError, "f has layout torch.sparse_coo"),
        (torch.zeros(3, device="meta"), ValueError, "f is on meta"),
        (torch.ones(3, dtype=torch.complex64).conj().imag, ValueError, "f is a negated view"),
        (torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)), TypeError, "f is torch.complex64"),
        (torch.zeros(3, dtype=torch.bool), TypeError, "f is torch.bool"),
        (torch.zeros(3, 3).to_sparse_csr(), TypeError, "f has layout torch.sparse_csr"),
        (torch.zeros(3, 3).to_mkldnn(), TypeError, "f has layout torch._mkldnn"),
        (torch.nested.nested_tensor([torch.zeros(3)]), RuntimeError, "NestedTensorImpl"),
        (freed, ValueError, r"f has shape \(3,\) and no memory"),
        (np.zeros(3, "f4"), TypeError, "one library"),
        (torch.zeros(4), ValueError, "f has shape"),
    ]:
        with pytest.raises(error, match=match):
            native.couple(x, x, f, None)
    with pytest.raises(ValueError, match=r"x has shape \(3,\) and no memory"):
        native.couple(freed, freed, x, None)  # the C function that writes to it would call it y
    with pytest.raises(ValueError, match="x has several"):
        expanded = torch.zeros(1).expand(3)
        native.couple(expanded, expanded, torch.zeros(3), None)
    for wrapped in (torch.func.vmap, torch.func.grad):
        with pytest.raises(RuntimeError, match="doesn't have storage"):
            wrapped(lambda f: native.couple(x, x, f, None))(torch.zeros(3, 3))
    assert not x.any()
