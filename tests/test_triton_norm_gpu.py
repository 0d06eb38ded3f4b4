# SPDX-License-Identifier: Apache-2.0
"""norm_act and its relatives in Triton on a GPU, through the public functions, against the backend "reference"."""

import itertools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.6")

from revkernels import ops  # noqa: E402
from revkernels.norm import ACTIVATIONS, KINDS, Norm, Statistics  # noqa: E402

pytestmark = pytest.mark.gpu

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
PAIRS = [(F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F64, F16)]
LAYOUTS = {
    "image": ((6, 24, 15, 14), lambda a: a, 1),
    "channels last": ((6, 56, 16, 16), lambda a: a.contiguous(memory_format=torch.channels_last), 1),
    "half of an image": ((4, 32, 16, 16), lambda a: a[:, 16:], 1),
    "half of channels last": (
        (4, 112, 8, 8),
        lambda a: a.contiguous(memory_format=torch.channels_last)[:, 56:],
        1,
    ),
    "tokens": ((4, 197, 384), lambda a: a, 2),
    "half of tokens": ((4, 50, 100), lambda a: a[:, :, 50:], 2),
    "wide rows": ((5, 20000), lambda a: a, 1),
    "columns": ((300, 70), lambda a: a.t(), 1),
    "one": ((1, 1), lambda a: a, 1),
    "empty": ((0, 4, 3), lambda a: a, 1),
}


@pytest.fixture(autouse=True)
def kernels(available):
    """Skip, and say why, where triton finds no device that it can compile for."""
    available("triton")


def make(layout, dtype, mean=0.0):
    shape, view, _ = LAYOUTS[layout]
    return view((torch.randn(shape, dtype=F64) + mean).to("cuda", dtype))


def norm_for(kind, x, axis, activation="none", **options):
    channels = x.shape[axis]
    groups = next(g for g in (4, 3, 2, 1) if channels % g == 0) if kind == "group" else 1
    weight, bias = (torch.randn(channels, device="cuda") for _ in range(2))
    return Norm(kind, weight, bias, activation=activation, groups=groups, channel_dim=axis, **options)


def some_statistics(norm, x):
    shape, wide = norm.statistics_shape(tuple(x.shape)), F64 if x.dtype == F64 else F32
    mean, rstd = (torch.rand(shape, dtype=wide, device="cuda") + 0.5 for _ in range(2))
    return Statistics(None if norm.kind == "rms" else mean, rstd)


def same_bits(a, b):
    """Equal shapes, dtypes and stored bits. The inputs hold no NaN."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    bits = [t.contiguous().view(-1).view(integer) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)


def close(got, expected, units, scale=None):
    """Within ``units`` roundings of the compute type, relative to ``scale``, and one of the stored type."""
    stored = torch.finfo(got.dtype).eps
    wide = torch.finfo(F64 if got.dtype == F64 else F32).eps
    scale = expected.double().abs() if scale is None else scale
    bound = units * wide * scale + stored * expected.double().abs() + torch.finfo(got.dtype).tiny
    return bool(((got.double() - expected.double()).abs() <= bound).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_given_statistics(layout, kind):
    """Every bit, of h and of the stream; nothing is written beside the stream's own half."""
    for (stream, branch), activation in itertools.product(PAIRS, ("none", "relu")):
        x, f = make(layout, stream), make(layout, branch)
        norm = norm_for(kind, x, LAYOUTS[layout][2], activation)
        h_statistics = some_statistics(norm, x)
        h = [
            ops.norm_act(x, norm, statistics=h_statistics, dtype=branch, backend=name)[0]
            for name in ("triton", "reference")
        ]
        assert same_bits(*h)
        wide = torch.promote_types(stream, branch)
        statistics = some_statistics(norm, x.to(wide))
        base = x if x._base is None else x._base
        twin = base.clone(memory_format=torch.preserve_format)
        y = twin.as_strided(x.shape, x.stride(), x.storage_offset())
        _, mine, _ = ops.uncouple_norm_act_(x, f, norm, statistics=statistics, backend="triton")
        _, truth, _ = ops.uncouple_norm_act_(y, f, norm, statistics=statistics, backend="reference")
        assert same_bits(mine, truth) and same_bits(base, twin)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_computed_statistics(layout, kind, mean):
    """A few roundings of the deviation, however large the mean; the stream has couple's bits."""
    for stream, branch in ((F64, F64), (F32, F32), (F32, BF16)):
        x, f = make(layout, stream, mean), make(layout, branch)
        norm = norm_for(kind, x, LAYOUTS[layout][2])
        y, _, found = ops.couple_norm_act(x, f, norm, backend="triton")
        assert same_bits(y, ops.couple(x, f, backend="reference"))
        _, truth = ops.norm_act(y, norm, backend="reference")
        assert close(found.rstd, truth.rstd, 16)
        if kind != "rms":
            assert close(found.mean, truth.mean, 8, truth.mean.double().abs() + 1 / truth.rstd.double())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_activations(activation, dtype):
    """Value and slope. Exponentials are within 2 last places on NVIDIA's hardware, divisions rounded; z^3 and what is
    made of it have an error that grows with z, and so has the oracle's erfc."""
    z = torch.linspace(-12, 12, 30001, dtype=dtype, device="cuda")[:, None]
    norm = Norm("batch", activation=activation)
    statistics = Statistics(*(torch.full((1,), v, dtype=dtype, device="cuda") for v in (0.0, 1.0)))
    h = [ops.norm_act(z, norm, statistics=statistics, backend=b)[0] for b in ("triton", "reference")]
    growth = z.double().abs() ** 3 if activation == "gelu_tanh" else z.double() ** 2 * (dtype == F64)
    info = torch.finfo(dtype)  # a gate below the smallest normal number may be 0: h is z times that
    assert close(*h, 1, h[1].double().abs() * (8 + growth) + z.double().abs() * info.tiny / info.eps)
    sums = [torch.zeros(1, dtype=dtype, device="cuda") for _ in range(2)]
    slopes = []
    for backend in ("triton", "reference"):
        dx = torch.zeros_like(z)
        ops.norm_act_backward_(
            dx, torch.ones_like(z), z, norm, statistics, sums=sums, constant=True, backend=backend
        )  # fmt: skip
        slopes.append(dx)
    assert close(*slopes, 8, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward(layout, kind):
    """Sums of some thousand terms, each off by a few roundings; and the gradient that follows."""
    for (stream, branch), activation in itertools.product(((F64, F64), (F32, F32), (F32, BF16)), ("relu", "silu")):
        x, dh, dx = make(layout, stream), make(layout, branch), make(layout, stream)
        norm = norm_for(kind, x, LAYOUTS[layout][2], activation)
        _, statistics = ops.norm_act(x, norm, backend="reference")
        truth = ops.norm_act_backward_(dx.clone(), dh, x, norm, statistics, backend="reference")
        got = ops.norm_act_backward_(dx, dh, x, norm, statistics, backend="triton")
        xhat = x.double().abs().max() if x.numel() else 0
        per_channel = 8 * dh.numel() / max(x.shape[LAYOUTS[layout][2]], 1)
        scale = (statistics.rstd.double().max() if x.numel() else 1) * 40 * (1 + xhat) ** 2
        assert close(got[1], truth[1], 16, per_channel * (1 + xhat))
        assert close(got[2], truth[2], 16, per_channel)
        assert close(got[0], truth[0], 16, scale)


def test_sums_over_processes_and_constant_statistics():
    """Bits: the second half of a batch norm is elementwise."""
    for layout, (stream, branch) in itertools.product(("image", "channels last"), PAIRS):
        x, dh, dx = make(layout, stream), make(layout, branch), make(layout, stream)
        norm = norm_for("batch", x, 1, "relu")
        statistics = some_statistics(norm, x)
        sums = tuple(some_statistics(norm, x))
        for options in ({"sums": sums, "count": 12345}, {"sums": sums, "constant": True}):
            pair = dx.clone(memory_format=torch.preserve_format), dx.clone(memory_format=torch.preserve_format)
            for out, backend in zip(pair, ("triton", "reference"), strict=True):
                ops.norm_act_backward_(out, dh, x, norm, statistics, backend=backend, **options)
            assert same_bits(*pair)


def test_the_same_bits_every_time():
    x = make("channels last", F32).repeat(8, 1, 2, 2).contiguous(memory_format=torch.channels_last)
    dh = torch.randn_like(x)
    for kind in KINDS:
        norm = norm_for(kind, x, 1, "silu")
        seen = []
        for _ in range(5):
            h, statistics = ops.norm_act(x, norm, backend="triton")
            results = ops.norm_act_backward_(torch.zeros_like(x), dh, x, norm, statistics, backend="triton")
            seen.append([h, *(t for t in (*statistics, *results) if t is not None)])
        assert all(torch.equal(a, b) for one in seen for a, b in zip(one, seen[0], strict=True))


def test_in_a_graph_and_on_a_stream():
    """Nothing waits, and memory for partial results is the graph's own."""
    x, f, dh = (torch.randn(64, 32, 16, 16, device="cuda") for _ in range(3))
    norm = norm_for("batch", x, 1, "relu", running_mean=torch.zeros(32, device="cuda"),
                    running_var=torch.ones(32, device="cuda"))  # fmt: skip

    def step():
        y, h, statistics = ops.couple_norm_act(x, f, norm, backend="triton")
        dx = torch.zeros_like(x)
        return y, h, *statistics, *ops.norm_act_backward_(dx, dh, y, norm, statistics, backend="triton")

    expected = [t.clone() for t in step()]  # compiled before the capture
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    kept = 0.9**3
    torch.testing.assert_close(norm.running_mean, (1 - kept) * results[2], rtol=1e-5, atol=1e-6)


def test_beyond_32_bits():
    """The second sample begins 2^31 elements after the first."""
    need = 2 * 2 * (2**31 + 64)
    if torch.cuda.mem_get_info()[0] < need * 1.1:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free device memory")
    wide = torch.zeros(2, 2**31 + 64, dtype=BF16, device="cuda")
    x, f = wide[:, -48:], torch.arange(96.0, device="cuda").view(2, 48).to(BF16)
    for kind in KINDS:
        x.zero_()
        norm = norm_for(kind, x, 1)
        y, h, _ = ops.couple_norm_act(f, x, norm, backend="triton")
        assert same_bits(y, f)
        truth = ops.norm_act(f, norm, backend="reference")[0]
        torch.testing.assert_close(h, truth, rtol=2**-7, atol=2**-7)
        ops.uncouple_norm_act_(x, f, norm, backend="triton")
        assert same_bits(x, -f + 0.0)
    assert wide.count_nonzero() == 95


def test_a_large_array_takes_several_tiles_a_program():
    x = make("channels last", BF16).repeat(8, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    for kind in KINDS:
        norm = norm_for(kind, x, 1, "relu")
        h, statistics = ops.norm_act(x, norm, backend="triton")
        eager, truth = ops.norm_act(x, norm, backend="eager")
        assert close(statistics.rstd, truth.rstd, 64)
        assert same_bits(h, ops.norm_act(x, norm, statistics=statistics, backend="eager")[0])
        assert (h - eager).abs().max() < 0.1
