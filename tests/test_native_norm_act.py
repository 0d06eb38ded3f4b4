# SPDX-License-Identifier: Apache-2.0
"""The compiled norms: what their binding refuses, and bits that only the compiled loops could change.

Values are judged by the oracle's own tests; here NumPy's float64 stands for them.
"""

import numpy as np
import pytest

from revkernels import native
from revkernels.norm import ACTIVATIONS, KINDS, Norm
from tests.native_oracle import BFLOAT16, each_isa  # noqa: F401

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)


def f4(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def statistics(norm, shape, dtype="f4"):
    own = norm.statistics_shape(shape)
    return None if norm.kind == "rms" else np.empty(own, dtype), np.empty(own, dtype)


def norm_of(kind, channels, activation="relu", **options):
    groups = 2 if kind == "group" and channels % 2 == 0 else 1
    return Norm(kind, f4(channels, seed=1), f4(channels, seed=2), activation=activation, groups=groups, **options)


# What is refused


def call(**changes):
    """Arguments of a norm_act that is right but for the changes; "norm" holds options of the Norm."""
    options = {"kind": "batch", "weight": f4(6), "bias": f4(6)} | changes.pop("norm", {})
    arguments = {"h": np.full((4, 6), 7, "f4"), "x": f4(4, 6), "mean": np.full(6, 7, "f4"), "rstd": np.full(6, 7, "f4")}
    arguments |= changes
    return {"norm": Norm(**options), "given": False} | arguments


def broken(array):
    array.flags.writeable = False
    return array


def x_and_h(x):
    return {"x": x, "h": np.full(x.shape, 7, "f4")}


GROUP = {"kind": "group", "groups": 2}
TWICE, TWO = f4(6), f4(5, 6)
REFUSED = {
    "kind": (ValueError, "kind is 'instance'; it must be one of batch, layer", lambda: call(norm={"kind": "instance"})),
    "activation": (ValueError, "activation is 'tanh'", lambda: call(norm={"activation": "tanh"})),
    "eps": (ValueError, "eps is -1.0", lambda: call(norm={"eps": -1.0})),
    "eps_type": (TypeError, "eps is a str", lambda: call(norm={"eps": "1e-5"})),
    "momentum": (ValueError, "momentum is inf", lambda: call(norm={"momentum": float("inf")})),
    "no_norm": (TypeError, "norm is a dict", lambda: call() | {"norm": {}}),
    "channel_dim": (ValueError, "channel_dim is 2; x has 2", lambda: call(norm={"channel_dim": 2})),
    "channel_dim_type": (TypeError, "channel_dim is a float", lambda: call(norm={"channel_dim": 1.0})),
    "groups": (ValueError, "groups is 4; it must divide x's 6", lambda: call(norm={"kind": "group", "groups": 4})),
    "groups_of_batch": (ValueError, "groups is 2; it must be 1", lambda: call(norm={"groups": 2})),
    "rank": (ValueError, "a batch norm needs 2 dimensions", lambda: call(x=f4(6), h=f4(6))),
    "weight_shape": (ValueError, r"weight has shape \(5,\); it must be \(6,\)", lambda: call(norm={"weight": f4(5)})),
    "weight_stride": (ValueError, "weight has stride 2", lambda: call(norm={"weight": f4(12)[::2]})),
    "weight_dtype": (TypeError, "weight is int64", lambda: call(norm={"weight": np.ones(6, "i8")})),
    "bias_dtype": (TypeError, "bias is float64; it must be float32", lambda: call(norm={"bias": np.ones(6)})),
    "one_running": (ValueError, "must both be arrays", lambda: call(norm={"running_mean": f4(6)})),
    "running_of_layer": (
        ValueError,
        "running_mean is given",
        lambda: call(norm={"kind": "layer", "running_mean": f4(6), "running_var": f4(6)}, mean=f4(4), rstd=f4(4)),
    ),
    "running_twice": (
        ValueError,
        "running_mean and running_var overlap",
        lambda: call(norm={"running_mean": TWICE, "running_var": TWICE}),
    ),
    "mean_none": (TypeError, "mean is a NoneType; it must be an array", lambda: call(mean=None)),
    "mean_of_rms": (TypeError, "mean is a numpy.ndarray; it must be None", lambda: call(norm={"kind": "rms"})),
    "mean_shape": (ValueError, r"mean has shape \(4,\)", lambda: call(mean=f4(4))),
    "mean_dtype": (TypeError, "mean is float64; it must be float32", lambda: call(mean=np.full(6, 7.0))),
    "rstd_read_only": (ValueError, "rstd is read-only", lambda: call(rstd=broken(f4(6)))),
    "group_shape": (ValueError, r"mean has shape \(6,\); it must be \(4, 2\)", lambda: call(norm=GROUP)),
    "h_shape": (ValueError, r"h has shape \(4, 5\)", lambda: call(h=f4(4, 5))),
    "h_read_only": (ValueError, "h is read-only", lambda: call(h=broken(f4(4, 6)))),
    "merging": (
        ValueError,
        "must merge into two in all of them",
        lambda: call(**x_and_h(f4(4, 6, 10, 6)[:, :, ::2, ::3][:3])),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    error, match, make = REFUSED[case]
    arguments = make()
    written = [arguments[name] for name in ("h", "mean", "rstd") if isinstance(arguments[name], np.ndarray)]
    before = [array.copy() for array in written]
    with pytest.raises(error, match=match):
        native.norm_act(**arguments)
    for array, copy in zip(written, before, strict=True):
        assert np.array_equal(array, copy), "written before the refusal"


def test_overlaps():
    norm, memory = Norm("batch", f4(6), f4(6)), f4(8, 6)
    mean, rstd = statistics(norm, (4, 6))
    x, f, h = f4(4, 6), f4(4, 6), f4(4, 6)
    y = f4(4, 6)
    for match, run in {
        "h and x overlap": lambda: native.norm_act(memory[:4], memory[2:6], norm, mean, rstd, False),
        "y and x overlap": lambda: native.couple_norm_act(h, memory[1:5], memory[:4], f, norm, mean, rstd, False),
        "y and f overlap": lambda: native.couple_norm_act(h, y, x, y, norm, mean, rstd, False),
        "h and y overlap": lambda: native.couple_norm_act(y, y, x, f, norm, mean, rstd, False),
        "h and f overlap": lambda: native.uncouple_norm_act(f, x, y, f, norm, mean, rstd, False),
        "mean and rstd overlap": lambda: native.norm_act(h, x, norm, mean, mean, False),
        "mean and x overlap": lambda: native.norm_act(h, x, norm, x[0], rstd, False),
        "h and weight overlap": lambda: native.norm_act(h, x, Norm("batch", h[1]), mean, rstd, False),
    }.items():
        with pytest.raises(ValueError, match=match):
            run()
    native.norm_act(h, x, Norm("batch", mean), mean.copy(), rstd, False)
    native.norm_act(h, x, Norm("batch", rstd), mean, rstd, True)  # what is only read may be shared
    with pytest.raises(TypeError, match="one library"):
        native.norm_act(h, x, Norm("batch", pytest.importorskip("torch").ones(6)), mean, rstd, False)


def test_backward_refusals():
    norm, layer = Norm("batch", f4(6), f4(6)), Norm("layer", f4(6))
    x, dh, dx = f4(4, 6), f4(4, 6), np.full((4, 6), 7, "f4")
    mean, rstd, sums = f4(6), f4(6), (f4(6), f4(6))
    for error, match, arguments in [
        (ValueError, "sums is 3", (dx, None, dh, x, norm, mean, rstd, *sums, 3, 0, False)),
        (ValueError, "count is -1", (dx, None, dh, x, norm, mean, rstd, *sums, 0, -1, False)),
        (ValueError, "dx is None", (None, None, dh, x, norm, mean, rstd, *sums, 0, 0, False)),
        (ValueError, "dx is given", (dx, None, dh, x, norm, mean, rstd, *sums, 1, 0, False)),
        (ValueError, "base is given", (None, dh, dh, x, norm, mean, rstd, *sums, 1, 0, False)),
        (TypeError, "dweight is None", (dx, None, dh, x, norm, mean, rstd, None, sums[1], 0, 0, False)),
        (TypeError, "dbias is float64", (dx, None, dh, x, norm, mean, rstd, sums[0], np.ones(6), 0, 0, False)),
        (ValueError, "dweight and dbias overlap", (dx, None, dh, x, norm, mean, rstd, sums[0], sums[0], 0, 0, False)),
        (ValueError, "dx and x overlap", (x, None, dh, x, norm, mean, rstd, *sums, 0, 0, False)),
        (ValueError, "dx and dh overlap", (dh, None, dh, x, layer, f4(4), f4(4), *sums, 0, 0, False)),
        (ValueError, "dx and dh overlap", (TWO[:4], None, TWO[1:], x, norm, mean, rstd, *sums, 0, 0, False)),
        (ValueError, "dx has shape", (f4(3, 6), None, dh, x, norm, mean, rstd, *sums, 0, 0, False)),
        (ValueError, "sums is 2; it must be 0", (dx, None, dh, x, layer, f4(4), f4(4), *sums, 2, 0, False)),
        (ValueError, "constant is True", (dx, None, dh, x, layer, f4(4), f4(4), *sums, 0, 0, True)),
    ]:
        with pytest.raises(error, match=match):
            native.norm_act_backward(*arguments)
        assert np.all(dx == 7)
    native.norm_act_backward(dx, None, dh, x, layer, f4(4), rstd[:4], None, None, 0, 0, False)
    assert np.all(dx != 7)


# What is computed


def expected(x, norm, axis):
    """h in float64, of an activation without transcendental functions."""
    wide = np.moveaxis(x.astype("f8"), axis, -1)
    own = wide.reshape(wide.shape[0], -1, norm.groups, wide.shape[-1] // norm.groups)
    over = {"batch": (0, 1), "group": (1, 3), "layer": (2, 3), "rms": (2, 3)}[norm.kind]
    mean = 0.0 if norm.kind == "rms" else own.mean(over, keepdims=True)
    xhat = (own - mean) / np.sqrt(np.square(own - mean).mean(over, keepdims=True) + norm.eps)
    z = xhat.reshape(wide.shape) * norm.weight + norm.bias
    return np.moveaxis(np.where(z <= 0, 0, z) if norm.activation == "relu" else z, -1, axis)


LAYOUTS = {
    "nchw": lambda c: f4(5, c, 9, 7),
    "channels_last": lambda c: f4(5, 9, 7, c).transpose(0, 3, 1, 2),
    "half": lambda c: f4(5, 2 * c, 9, 7)[:, c:],
    "channels_last_half": lambda c: f4(5, 9, 7, 2 * c).transpose(0, 3, 1, 2)[:, :c],
    "rows": lambda c: f4(300, c),
    "batch_inside": lambda c: f4(c, 9, 40).transpose(2, 0, 1),
    "short_planes": lambda c: f4(35, c, 3, 3),
    "short_half": lambda c: f4(35, 2 * c, 2, 3)[:, c:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 6, 70, 171])
def test_values_in_every_layout(kind, layout, channels):
    """|h| is at most some 20 here; float32 keeps it to a few units in the seventh digit."""
    x = LAYOUTS[layout](channels)
    norm = norm_of(kind, channels, channel_dim=1)
    h, (mean, rstd) = np.empty_like(x), statistics(norm, x.shape)
    native.norm_act(h, x, norm, mean, rstd, False)
    assert np.abs(h - expected(x, norm, 1)).max() < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "short_planes"])
def test_a_large_mean_costs_no_digits(kind, layout):
    """mean 1e4, deviation 1: the statistics are as good as x's own rounding, 1e4 * 2^-24, lets them be."""
    x = LAYOUTS[layout](64) + np.float32(1e4)
    norm = norm_of(kind, 64, activation="none", channel_dim=1)
    h, (mean, rstd) = np.empty_like(x), statistics(norm, x.shape)
    native.norm_act(h, x, norm, mean, rstd, False)
    # The mean rounds to float32 in units of 2^-10, half of which xhat is off at most, times rstd and weight.
    scale = 1 if kind == "rms" else np.abs(norm.weight).max() * rstd.max()
    assert np.abs(h - expected(x, norm, 1)).max() < 2**-11 * scale * 1.01 + 1e-4
    if kind == "batch":
        exact = 1 / np.sqrt(x.astype("f8").var((0, 2, 3)) + norm.eps)
        assert np.abs(rstd / exact - 1).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f4", BFLOAT16, "f2"], ids=str)
def test_a_fused_call_has_the_bits_of_its_parts(kind, layout, dtype):
    """f in another layout, so that the walks differ; in place and apart; statistics computed and given."""
    x = LAYOUTS[layout](24).astype(dtype, order="K")
    f = np.ascontiguousarray(f4(*x.shape, seed=5)).astype(dtype)
    norm = norm_of(kind, 24, channel_dim=1)
    for fused, plain in ((native.couple_norm_act, native.couple), (native.uncouple_norm_act, native.uncouple)):
        y = x.copy(order="K")
        h, parts_h = np.empty_like(y), np.empty_like(y)
        own, parts = statistics(norm, x.shape), statistics(norm, x.shape)
        fused(h, y, y, f, norm, *own, False)
        parts_y = np.empty_like(y)
        plain(parts_y, x, f)
        native.norm_act(parts_h, parts_y, norm, *parts, False)
        assert y.tobytes() == parts_y.tobytes() and h.tobytes() == parts_h.tobytes()
        assert own[1].tobytes() == parts[1].tobytes()
        fused(h, np.empty_like(y), x, f, norm, *own, True)
        assert h.tobytes() == parts_h.tobytes()


def everything(kind, activation, x, dh, f):
    norm = norm_of(kind, x.shape[1], activation, channel_dim=1)
    h, y, dx = (np.empty_like(x) for _ in range(3))
    dweight, dbias = np.empty(x.shape[1], "f4"), np.empty(x.shape[1], "f4")
    mean, rstd = statistics(norm, x.shape)
    native.couple_norm_act(h, y, x, f, norm, mean, rstd, False)
    native.norm_act_backward(dx, f, dh, y, norm, mean, rstd, dweight, dbias, 0, 0, False)
    return [a.tobytes() for a in (h, y, dx, dweight, dbias, mean, rstd) if a is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "short planes"])
def test_bits_depend_on_neither_threads_nor_instruction_set(kind, layout, each_isa):  # noqa: F811
    torch = pytest.importorskip("torch")
    from revkernels import _native

    shape = (600, 40, 3, 5) if layout == "short planes" else (6, 40, 31, 29)
    if layout != "channels_last":
        x, dh, f = (f4(*shape, seed=s) for s in range(3))
    else:
        x, dh, f = (f4(6, 31, 29, 40, seed=s).transpose(0, 3, 1, 2) for s in range(3))
    tensors = [torch.from_numpy(a) for a in (x, dh, f)]
    before = torch.get_num_threads()
    for activation in ACTIVATIONS:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norm = norm_of(kind, 40, activation, channel_dim=1)
            own = Norm(kind, *(torch.from_numpy(p) for p in (norm.weight, norm.bias)), 1e-5, activation, norm.groups, 1)
            mean, rstd = (None if s is None else torch.from_numpy(s) for s in statistics(norm, shape))
            h, y, dx = (torch.empty_like(tensors[0]) for _ in range(3))
            sums = torch.empty(40), torch.empty(40)
            native.couple_norm_act(h, y, tensors[0], tensors[2], own, mean, rstd, False)
            native.norm_act_backward(dx, tensors[2], tensors[1], y, own, mean, rstd, *sums, 0, 0, False)
            found.append([t.numpy().tobytes() for t in (h, y, dx, *sums, mean, rstd) if t is not None])
        torch.set_num_threads(before)
        _native.set_isa("baseline")
        found.append(everything(kind, activation, x, dh, f))
        _native.set_isa(each_isa)
        assert all(other == found[0] for other in found[1:]), activation


@pytest.mark.parametrize("dtype", ["f4", BFLOAT16])
def test_activations_of_any_bits_whatever_an_element_lies_beside(dtype, each_isa):  # noqa: F811
    """Bundles of vectors, single vectors and what is left of a row give the bits of one element at a time, NaN,
    infinities and subnormals among them."""
    from revkernels import _native

    bits = np.random.default_rng(0).integers(0, 2**32, 100_003, dtype="u4").view("f4")
    moderate = np.linspace(-16, 16, 20_011, dtype="f4")
    edges = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-39, 15, -15, 104, -104, 10.75, -87.4], "f4")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x = np.concatenate([bits, moderate, edges]).astype(dtype)[None, None]
    dh = np.random.default_rng(1).standard_normal(x.shape).astype(dtype)
    mean, rstd, sums = np.zeros(1, "f4"), np.ones(1, "f4"), (np.empty(1, "f4"), np.empty(1, "f4"))

    def everything():
        h, dx = np.empty_like(x), np.empty_like(x)
        native.norm_act(h, x, norm, mean, rstd, True)
        native.norm_act_backward(dx, None, dh, x, norm, mean, rstd, *sums, 0, 0, True)
        # Which NaN it is depends on the order of a product's factors, which is the compiler's.
        return [np.where(np.isnan(a.astype("f4")), np.nan, a.astype("f4")).tobytes() for a in (h, dx)]

    for activation in ACTIVATIONS:
        norm = Norm("batch", activation=activation)
        own = everything()
        _native.set_isa("baseline")
        one_by_one = everything()
        _native.set_isa(each_isa)
        assert own == one_by_one, activation


def test_modes_of_the_sums_agree():
    """SUMS_ONLY, then SUMS_GIVEN, are the one-shot call; a batch in two parts is the whole batch."""
    x, dh, base = f4(64, 24, 5, 7), f4(64, 24, 5, 7, seed=3), f4(64, 24, 5, 7, seed=4)
    norm = norm_of("batch", 24)
    mean, rstd = statistics(norm, x.shape)
    native.norm_act(np.empty_like(x), x, norm, mean, rstd, False)
    dx, again = np.empty_like(x), np.empty_like(x)
    sums, only = [np.empty(24, "f4"), np.empty(24, "f4")], [np.empty(24, "f4"), np.empty(24, "f4")]
    native.norm_act_backward(dx, base, dh, x, norm, mean, rstd, *sums, 0, 0, False)
    native.norm_act_backward(None, None, dh, x, norm, mean, rstd, *only, 1, 0, False)
    native.norm_act_backward(again, base, dh, x, norm, mean, rstd, *only, 2, 0, False)
    assert dx.tobytes() == again.tobytes() and [s.tobytes() for s in sums] == [s.tobytes() for s in only]
    total = [np.zeros(24, "f4"), np.zeros(24, "f4")]
    for part in (slice(0, 20), slice(20, 64)):
        native.norm_act_backward(None, None, dh[part], x[part], norm, mean, rstd, *only, 1, 0, False)
        total = [t + o for t, o in zip(total, only, strict=True)]
    assert all(np.allclose(t, s, rtol=1e-5, atol=1e-4) for t, s in zip(total, sums, strict=True))
    for part in (slice(0, 20), slice(20, 64)):
        native.norm_act_backward(again[part], base[part], dh[part], x[part], norm, mean, rstd, *sums, 2, 64 * 35, False)
    assert dx.tobytes() == again.tobytes()
    in_place = dh.copy()  # dh may be dx itself
    native.norm_act_backward(in_place, base, in_place, x, norm, mean, rstd, *only, 0, 0, False)
    assert dx.tobytes() == in_place.tobytes()
    # Constant statistics: the gradient is the factor alone.
    native.norm_act_backward(dx, None, dh, x, norm, mean, rstd, *sums, 0, 0, True)
    z = (x - mean[:, None, None]) * rstd[:, None, None] * norm.weight[:, None, None] + norm.bias[:, None, None]
    want = (norm.weight * rstd)[:, None, None] * np.where(z <= 0, np.float32(0), dh)
    assert dx.tobytes() == want.tobytes()


def test_running_statistics():
    x = f4(50, 6) + 3
    mean, var = np.full(6, 1, BFLOAT16), np.full(6, 2, BFLOAT16)
    norm = Norm("batch", running_mean=mean, running_var=var, momentum=0.25)
    own = statistics(norm, x.shape)
    native.norm_act(np.empty_like(x), x, norm, *own, False)
    wide = x.astype("f8")
    assert np.array_equal(mean, (0.75 + 0.25 * wide.mean(0)).astype(BFLOAT16))
    assert np.array_equal(var, (1.5 + 0.25 * wide.var(0, ddof=1)).astype(BFLOAT16))
    native.norm_act(np.empty_like(x), x, norm, *own, True)
    assert np.array_equal(mean, (0.75 + 0.25 * wide.mean(0)).astype(BFLOAT16)), (
        "statistics that are given update nothing"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_empty_arrays(kind):
    shape = (0, 6) if kind == "batch" else (4, 0) if kind != "group" else (4, 6, 0)
    norm = Norm(kind, groups=2 if kind == "group" else 1)
    mean, rstd = statistics(norm, shape)
    h = np.empty(shape, "f4")
    native.norm_act(h, h.copy(), norm, mean, rstd, False)
    assert np.all(rstd == np.float32(1 / np.sqrt(1e-5))) and (mean is None or not mean.any())
    sums = np.ones(shape[norm.channel_axis(len(shape))], "f4"), np.ones(shape[norm.channel_axis(len(shape))], "f4")
    native.norm_act_backward(h, None, h.copy(), h.copy(), norm, mean, rstd, *sums, 0, 0, False)
    assert not sums[0].any() and not sums[1].any()


@pytest.mark.parametrize("dtype", ["f4", BFLOAT16])
@pytest.mark.parametrize("channels", [64, 333])
def test_outputs_past_the_caches_are_those_of_their_parts(dtype, channels, each_isa):  # noqa: F811
    """Outputs of 16 MiB and more are written past the caches, line by line: the same bits as in parts that are not.

    Rows of 333 begin anywhere in a line, and so does an array without its first row.
    """
    rows = (17 << 20) // (channels * np.dtype(dtype).itemsize) + 1
    x, f, dh = ((f4(rows, channels, seed=s) * 2).astype(dtype)[1:] for s in range(3))
    for kind, activation in (("batch", "relu"), ("layer", "none"), ("layer", "gelu")):
        norm = norm_of(kind, channels, activation)
        mean, rstd = (s + f4(*s.shape) ** 2 for s in (np.zeros_like(p) for p in statistics(norm, x.shape)))
        sums = np.ones(channels, "f4"), np.ones(channels, "f4")

        def run(part, norm=norm, kind=kind, mean=mean, rstd=rstd, sums=sums):
            own = (mean, rstd) if kind == "batch" else (mean[part], rstd[part])
            h, y, dx = (np.empty_like(x[part]) for _ in range(3))
            native.couple_norm_act(h, y, x[part], f[part], norm, *own, True)
            given = [np.copy(s) for s in sums]
            mode = 2 if kind == "batch" else 0  # SUMS_GIVEN
            native.norm_act_backward(dx, None, dh[part], y, norm, *own, *given, mode, rows if mode else 0, False)
            return h, y, dx

        whole, third = run(slice(None)), -(-len(x) // 3)
        parts = [run(slice(at, at + third)) for at in range(0, len(x), third)]
        for name, got, pieces in zip(("h", "y", "dx"), whole, zip(*parts, strict=True), strict=True):
            assert got.tobytes() == np.concatenate(pieces).tobytes(), f"{name} of {kind} {activation}"
