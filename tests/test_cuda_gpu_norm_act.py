# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels with a norm and an activation on a GPU, through the public functions.

With statistics given and no transcendental function every operation is fixed: bits, against `reference`. Sums have
bounds in units u of the compute type (half a last place of 1), and so have the smooth activations.
"""

import itertools

import pytest

torch = pytest.importorskip("torch")

from kernel_cases import BF16, DTYPES, F16, F32, F64, PAIR_IDS, PAIRS, make  # noqa: E402
from torch.nn import functional as tf  # noqa: E402

from revkernels import Norm, ops  # noqa: E402
from revkernels.norm import Statistics  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = "cuda", "cuda"
KINDS = ("batch", "layer", "rms", "group")
EXACT = ("none", "relu")
SMOOTH = {"gelu": tf.gelu, "gelu_tanh": lambda z: tf.gelu(z, approximate="tanh"), "silu": tf.silu}


def channels_last(make, *shape):
    return make(*shape).contiguous(memory_format=torch.channels_last)


# How to make an operand, and the dimension of its channels.
LAYOUTS = {
    "rows": (lambda make: make(9, 40), 1),
    "odd rows": (lambda make: make(9, 33), 1),
    "tokens": (lambda make: make(3, 50, 96), 2),
    # As wide as transformers are: several packets a thread, teams of one warp, of two, and of a block.
    "rows of 384": (lambda make: make(150, 384), 1),
    "tokens of 768": (lambda make: make(6, 50, 768), 2),
    "rows of 1024": (lambda make: make(150, 1024), 1),
    "rows of 1536": (lambda make: make(2, 75, 1536), 2),
    "tokens of 2048": (lambda make: make(3, 50, 2048), 2),
    "half of tokens": (lambda make: make(3, 5, 48)[:, :, 24:], 2),
    "image": (lambda make: make(3, 6, 8, 8), 1),
    "7 x 7": (lambda make: make(4, 10, 7, 7), 1),
    "channels last": (lambda make: channels_last(make, 3, 64, 9, 7), 1),
    "half of an image": (lambda make: make(2, 12, 4, 4)[:, 6:], 1),
    "half of channels last": (lambda make: channels_last(make, 2, 32, 5, 7)[:, 16:], 1),
    "wide rows": (lambda make: make(5, 4104), 1),
    "five dimensions": (lambda make: make(2, 3, 4, 5, 3), 1),
    "one element": (lambda make: make(1, 1), 1),
}


@pytest.fixture(autouse=True)
def kernels(available):
    available(BACKEND)


def norm_of(kind, x, axis, activation="none", **options):
    """A norm of x, with a weight and a bias in float32."""
    channels = x.shape[axis]
    groups = next((n for n in (4, 3, 2) if channels % n == 0), 1) if kind == "group" else 1
    weight, bias = (torch.randn(channels, device=DEVICE) for _ in range(2))
    return Norm(kind, weight, bias, activation=activation, groups=groups, channel_dim=axis, **options)


def wide_of(*arrays):
    return F64 if any(array.dtype == F64 for array in arrays) else F32


def some_statistics(norm, x, wide):
    """Statistics that are not those of x."""
    shape = norm.statistics_shape(tuple(x.shape))
    mean = None if norm.kind == "rms" else torch.randn(shape, dtype=wide, device=DEVICE)
    return Statistics(mean, torch.rand(shape, dtype=wide, device=DEVICE) + 0.5)


def twin(view):
    whole = view if view._base is None else view._base
    return whole.clone().as_strided(view.shape, view.stride(), view.storage_offset())


def same(a, b):
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def spread(statistic, norm, x, axis):
    """A statistic for every element of x."""
    if norm.kind == "batch":
        return statistic.reshape([-1 if k == axis else 1 for k in range(x.ndim)])
    if norm.kind == "group":
        statistic = statistic.repeat_interleave(x.shape[axis] // norm.groups, 1)
        return statistic.reshape(*statistic.shape, *[1] * (x.ndim - 2)).movedim(1, axis)
    return statistic.unsqueeze(axis)


def true_statistics(norm, x, axis):
    """The mean and the variance of x in float64, shaped as statistics are."""
    x = x.double()
    origin = 0 if norm.kind == "rms" else x.flatten()[0]
    x = x - origin  # torch's sums lose digits too
    if norm.kind == "group":
        x = x.movedim(axis, 1).reshape(x.shape[0], norm.groups, -1)
    dims = {"batch": [k for k in range(x.ndim) if k != axis], "group": [2]}.get(norm.kind, [axis])
    mean = torch.zeros_like(x.mean(dims)) if norm.kind == "rms" else x.mean(dims)
    variance = x.square().mean(dims) if norm.kind == "rms" else x.var(dims, correction=0)
    return mean + origin, variance


def assert_statistics(norm, statistics, x, axis):
    mean, variance = true_statistics(norm, x, axis)
    u, deviation = torch.finfo(statistics.rstd.dtype).eps / 2, (variance + norm.eps).sqrt()
    if norm.kind == "rms":
        assert statistics.mean is None
    else:
        assert bool(((statistics.mean - mean).abs() <= u * (4 * mean.abs() + 64 * deviation)).all())
    assert bool(((statistics.rstd * deviation - 1).abs() <= 64 * u + 4 * u * mean.abs() / deviation).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stream", "branch"), PAIRS, ids=PAIR_IDS)
def test_forward(kind, layout, stream, branch):
    """All three functions, statistics given and computed: s and h have the oracle's bits for the same statistics."""
    operand, axis = LAYOUTS[layout]
    for activation in EXACT:
        x, f = operand(make(stream, device=DEVICE)), operand(make(branch, device=DEVICE))
        norm = norm_of(kind, x, axis, activation)
        given = some_statistics(norm, x, wide_of(x))
        for statistics in (given, None):
            h, used = ops.norm_act(x, norm, statistics=statistics, dtype=branch, backend=BACKEND)
            if statistics is None:
                assert_statistics(norm, used, x, axis)
            assert same(h, ops.norm_act(x, norm, statistics=used, dtype=branch, backend="reference")[0])
        given = some_statistics(norm, x, wide_of(x, f))
        for statistics in (given, None):
            y, h, used = ops.couple_norm_act(x, f, norm, statistics=statistics, dtype=branch, backend=BACKEND)
            if statistics is None:
                assert_statistics(norm, used, y, axis)
            truth = ops.couple_norm_act(x, f, norm, statistics=used, dtype=branch, backend="reference")
            assert same(y, truth[0]) and same(h, truth[1])
            mine, other = twin(x), twin(x)
            _, h, used = ops.uncouple_norm_act_(mine, f, norm, statistics=statistics, backend=BACKEND)
            truth = ops.uncouple_norm_act_(other, f, norm, statistics=used, backend="reference")
            assert same(mine, other) and same(h, truth[1])
            outside = [view if view._base is None else view._base for view in (mine, other)]
            assert same(*outside), "written outside the view"


@pytest.mark.parametrize("stream", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_of_h(kind, stream):
    for dtype, layout in itertools.product(DTYPES, ("tokens", "image")):
        operand, axis = LAYOUTS[layout]
        x = operand(make(stream, device=DEVICE))
        norm = norm_of(kind, x, axis, "relu")
        h, used = ops.norm_act(x, norm, dtype=dtype, backend=BACKEND)
        assert same(h, ops.norm_act(x, norm, statistics=used, dtype=dtype, backend="reference")[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stream", "branch"), PAIRS, ids=PAIR_IDS)
def test_backward(kind, layout, stream, branch):
    """Bits where no sum is made; else against the same formulas in float64, which autograd does not share."""
    operand, axis = LAYOUTS[layout]
    for activation in EXACT:
        x, dx, dh = (operand(make(d, device=DEVICE)) for d in (stream, stream, branch))
        norm = norm_of(kind, x, axis, activation)
        wide = wide_of(x)
        statistics = ops.norm_act(x, norm, backend=BACKEND)[1]
        if kind == "batch":
            sums = tuple(torch.randn(x.shape[axis], dtype=wide, device=DEVICE) for _ in range(2))
            for options in ({"sums": sums, "count": 3 * x.numel()}, {"constant": True}):
                mine, other = twin(dx), twin(dx)
                ops.norm_act_backward_(mine, dh, x, norm, statistics, **options, backend=BACKEND)
                ops.norm_act_backward_(other, dh, x, norm, statistics, **options, backend="reference")
                assert same(mine, other), options

        mean, rstd, weight = (
            None if value is None else value.double() for value in (statistics.mean, statistics.rstd, norm.weight)
        )
        column = [-1 if k == axis else 1 for k in range(x.ndim)]
        rest = [k for k in range(x.ndim) if k != axis]
        scale = spread(rstd, norm, x, axis)
        xhat = (x.double() - (0 if mean is None else spread(mean, norm, x, axis))) * scale
        # The mask comes from z as the kernel rounds it: of the h that it made.
        mask = ops.norm_act(x, norm, statistics=statistics, dtype=wide, backend="reference")[0] > 0
        dz = dh.double() * (mask if activation == "relu" else 1)
        dweight, dbias = (dz * xhat).sum(rest), dz.sum(rest)
        g = dz * weight.reshape(column)
        mean_g, mean_gx = (true_statistics(norm, array, axis)[0] for array in (g, g * xhat))
        if kind == "rms":
            mean_g, mean_gx = torch.zeros_like(mean_g), (g * xhat).mean(axis)
        mean_g, mean_gx = (spread(m, norm, x, axis) for m in (mean_g, mean_gx))
        want = dx.double() + scale * (g - mean_g - xhat * mean_gx)

        got, got_dweight, got_dbias = ops.norm_act_backward_(twin(dx), dh, x, norm, statistics, backend=BACKEND)
        # xhat is off by a unit of x / deviation; terms add up to 64 units more.
        u = torch.finfo(wide).eps / 2
        size = dx.double().abs() + scale * (g.abs() + (1 + xhat.abs()) * (g.abs() * (1 + xhat.abs())).amax())
        assert bool(((got - want).abs() <= 64 * u * size + torch.finfo(stream).eps * want.abs()).all())
        for mine, truth, terms in ((got_dweight, dweight, dz * xhat), (got_dbias, dbias, dz)):
            assert mine.dtype == wide
            bound = 64 * u * (terms.abs().sum(rest) + dz.abs().sum(rest))
            assert bool(((mine - truth).abs() <= bound).all())


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_smooth_activations(activation, dtype):
    """Values and gradients against torch in float64, at z = x."""
    x = torch.linspace(-12, 12, 40_008, dtype=dtype, device=DEVICE).reshape(-1, 8)
    norm = Norm("batch", activation=activation)
    ones = torch.ones(8, dtype=dtype, device=DEVICE)
    statistics = Statistics(0 * ones, ones)
    h = ops.norm_act(x, norm, statistics=statistics, backend=BACKEND)[0]
    z = x.double().clone().requires_grad_()
    truth = SMOOTH[activation](z)
    (slope,) = torch.autograd.grad(truth.sum(), z)
    dx = torch.zeros_like(x)
    ops.norm_act_backward_(dx, torch.ones_like(x), x, norm, statistics, constant=True, backend=BACKEND)
    u = torch.finfo(dtype).eps / 2
    # torch's own float64 forms lose digits where Phi is tiny, 1e-15 of z.
    # The float32 tanh form is made of an exponential of -2 |z| (1 + ...), which rounds with its argument.
    places = 32 + (4 * x.abs() if activation == "gelu_tanh" and dtype == F32 else 0)
    assert bool(((h - truth).abs() <= places * u * truth.abs() + 1e-14 * x.abs()).all())
    terms = (1 + x.abs()) * (slope.abs() + 0.1 * (x.abs() < 4))  # which cancel where the slope is 0
    assert bool(((dx - slope).abs() <= places * u * terms + 1e-13).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(32, 64, 28, 28), (16, 128, 7, 7)], ids=str)
def test_a_mean_far_from_zero(kind, shape):
    for last, dtype in itertools.product((False, True), (F32, F64)):
        x = (torch.randn(shape, dtype=F64) + 1e4).to(DEVICE, dtype)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        norm = norm_of(kind, x, 1)
        h, statistics = ops.norm_act(x, norm, backend=BACKEND)
        assert_statistics(norm, statistics, x, 1)
        assert same(h, ops.norm_act(x, norm, statistics=statistics, backend="reference")[0])


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics(momentum):
    x = make(BF16, device=DEVICE)(16, 24, 9, 9)
    running = torch.zeros(24, device=DEVICE), torch.ones(24, device=DEVICE)
    truth = [value.clone() for value in running]
    norm = norm_of("batch", x, 1, running_mean=running[0], running_var=running[1], momentum=momentum)
    _, statistics = ops.norm_act(x, norm, backend=BACKEND)
    tf.batch_norm(x.float(), *truth, training=True, momentum=momentum)
    for mine, other in zip(running, truth, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    before = [value.clone() for value in running]
    ops.norm_act(x, norm, statistics=statistics, backend=BACKEND)
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels last"])
def test_large_images(kind, last):
    """Many slices and many blocks; results that do not vary."""
    x, f = make(F32, device=DEVICE)(32, 64, 56, 56), make(BF16, device=DEVICE)(32, 64, 56, 56)
    if last:
        x, f = (array.contiguous(memory_format=torch.channels_last) for array in (x, f))
    norm = norm_of(kind, x, 1, "relu")
    results = []
    for _ in range(5):
        y, h, statistics = ops.couple_norm_act(x, f, norm, dtype=BF16, backend=BACKEND)
        dx, dweight, dbias = ops.norm_act_backward_(x.clone(), h, y, norm, statistics, backend=BACKEND)
        results.append([value for value in (y, h, *statistics, dx, dweight, dbias) if value is not None])
    assert_statistics(norm, statistics, y, 1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    truth = ops.couple_norm_act(x, f, norm, statistics=statistics, dtype=BF16, backend="reference")
    assert same(y, truth[0]) and same(h, truth[1])


def test_cuda_graph():
    """Captured once, replayed on other values: the graph holds every kernel, and nothing waits."""
    x, f, dx = (make(d, device=DEVICE)(6, 10, 7, 7) for d in (F32, F16, F32))
    norms = [norm_of(kind, x, 1, "silu") for kind in KINDS]

    def step():
        out = []
        for norm in norms:
            y, h, statistics = ops.couple_norm_act(x, f, norm, dtype=F16, backend=BACKEND)
            _, *sums = ops.norm_act_backward_(dx, h, y, norm, statistics, backend=BACKEND)
            _, again, _ = ops.uncouple_norm_act_(y, f, norm, statistics=statistics, backend=BACKEND)
            out += [y, h, again, *sums]
        return [*out, dx]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for tensor in (x, f, dx):
            tensor.normal_()
        saved = dx.clone()
        expected = [value.clone() for value in step()]
        dx.copy_(saved)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
