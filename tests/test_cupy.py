# SPDX-License-Identifier: Apache-2.0
"""CuPy on a real GPU: zero copy, its current stream, refusals, results, norms, and a chain that trains."""

import numpy as np
import pytest

import revkernels as rk
from revkernels import native, ops
from revkernels.adapters.numpy import Checksums, ReversibleChain

cupy = pytest.importorskip("cupy", reason="cupy is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.missing("cuda") is not None, reason=str(native.missing("cuda"))),
]


def random(*shape, dtype="f4", seed=0):
    return cupy.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
def test_in_place_and_zero_copy(dtype):
    x, f = random(64, 33, dtype=dtype), random(64, 33, dtype=dtype, seed=1)
    address, right = x.data.ptr, cupy.asnumpy(x) + cupy.asnumpy(f)
    assert ops.couple_(x, f) is x and x.data.ptr == address
    np.testing.assert_array_equal(cupy.asnumpy(x), right)
    y, dy = random(64, 33, dtype=dtype), random(64, 33, dtype=dtype)
    before = cupy.asnumpy(y), cupy.asnumpy(dy)
    ops.reverse_step_(y, f, dy, f)
    np.testing.assert_array_equal(cupy.asnumpy(y), before[0] - cupy.asnumpy(f))
    np.testing.assert_array_equal(cupy.asnumpy(dy), before[1] + cupy.asnumpy(f))


def test_halves_and_results():
    """Views of a larger array; a new result is a CuPy array in x's memory order."""
    memory = random(4, 6, 5)
    x, f = memory[:, :3].transpose(0, 2, 1), random(4, 5, 3, seed=1)
    y = ops.couple(x, f)
    assert type(y) is cupy.ndarray and y.strides[1] < y.strides[0]
    np.testing.assert_array_equal(cupy.asnumpy(y), cupy.asnumpy(x) + cupy.asnumpy(f))
    kept = cupy.asnumpy(memory[:, 3:])
    ops.couple_(x, f)
    np.testing.assert_array_equal(cupy.asnumpy(memory[:, 3:]), kept)


@pytest.mark.parametrize("non_blocking", [True, False])
def test_the_current_stream(non_blocking):
    """Work before and after on the same stream needs no waiting: a long chain of additions comes out right.

    On a non-blocking stream nothing orders the kernels but the stream itself.
    """
    x, f = cupy.zeros(1 << 22, cupy.float32), cupy.zeros(1 << 22, cupy.float32)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=non_blocking):
        for number in range(200):
            f[...] = number
            ops.couple_(x, f)
            f *= 2
            ops.uncouple_(x, f)
        total = cupy.asnumpy(x)
    assert (total == -sum(range(200))).all()


def test_what_is_refused():
    x, host = random(4), np.ones(4, "f4")
    for error, words, call in (
        (TypeError, "f is from numpy, x is from cupy", lambda: ops.couple_(x, host)),
        (ValueError, "f has a negative stride", lambda: ops.couple_(x, x[::-1])),
        (ValueError, "overlap in memory", lambda: ops.couple_(x[:3], x[1:])),
        (
            ValueError,
            "x has several elements in one place",
            lambda: ops.couple_(cupy.broadcast_to(x, (2, 4)), cupy.zeros((2, 4), cupy.float32)),
        ),
        (TypeError, "x is int32", lambda: ops.couple_(x.astype("i4"), x)),
    ):
        with pytest.raises(error, match=words):
            call()


class Exporter:
    """CuPy's memory behind nothing but DLPack, as any other library on the device."""

    def __init__(self, array, read_only=False):
        self.array, self.streams = array, []

    def __dlpack__(self, *, stream=None, **options):
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream, **options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_other_producers_on_the_device():
    """Asked for the legacy default stream, and waited for: what comes next may be on any stream."""
    x, f = cupy.zeros(1 << 24, cupy.float32), cupy.zeros(1 << 24, cupy.float32)
    cupy.cuda.Device().synchronize()
    mine = Exporter(x)
    with cupy.cuda.Stream(non_blocking=True):
        f[...] = 3  # on a stream that the legacy one does not know of: the export has to order them
        ops.couple_(mine, Exporter(f))
    with cupy.cuda.Stream(non_blocking=True):
        assert (cupy.asnumpy(x) == 3).all()
    assert mine.streams == [1]
    with pytest.raises(TypeError, match="f is from an exporter of DLPack, x is from cupy"):
        ops.couple_(x, Exporter(f))


def test_read_only_exports():
    """JAX on the same device, if it is there: read, never written."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    if jax.default_backend() != "gpu":
        pytest.skip("this jax has no GPU")
    f, x = jax.numpy.ones(4, "float32"), random(4)
    before = cupy.asnumpy(x)
    ops.couple_(Exporter(x), f)
    np.testing.assert_array_equal(cupy.asnumpy(x), before + 1)
    with pytest.raises(ValueError, match="x is a JAX array, and these are immutable"):
        ops.couple_(f, Exporter(x))


@pytest.mark.parametrize("kind", ["batch", "layer", "rms", "group"])
def test_norms(kind):
    """Forward and backward against the same on the host; their partial results live in CuPy's pool."""
    found = []
    for wrap in (lambda a: a, cupy.asarray):
        rng = np.random.default_rng(0)
        x, f, dh, w, b = (
            wrap(rng.standard_normal(s).astype("f4")) for s in ((64, 32, 9), (64, 32, 9), (64, 32, 9), 32, 32)
        )
        norm = rk.Norm(kind, w, b, activation="silu", channel_dim=1, groups=4 if kind == "group" else 1)
        h, statistics = ops.norm_act(x, norm)
        y, h2, more = ops.couple_norm_act(x, f, norm)
        z, h3, _ = ops.uncouple_norm_act_(y, f, norm, statistics=statistics)
        dx, dweight, dbias = ops.norm_act_backward_(f, dh, x, norm, statistics)
        arrays = [h, *(s for s in (*statistics, *more) if s is not None), h2, z, h3, dx, dweight, dbias]
        assert all(type(a) is type(x) for a in arrays)
        found.append([a if isinstance(a, np.ndarray) else cupy.asnumpy(a) for a in arrays])
    for host, device in zip(*found, strict=True):
        # Sums of up to 64 * 9 terms in another order, and an exponential of another library: some units of float32.
        np.testing.assert_allclose(device, host, rtol=2e-5, atol=2e-5)


class Tanh:
    def __init__(self, seed):
        self.W = 0.3 * random(8, 8, seed=seed)

    def __call__(self, x):
        return cupy.tanh(x @ self.W)

    def vjp(self, x):
        f = self(x)

        def pullback(df):
            dz = df * (1 - f * f)
            return dz @ self.W.T, x.T @ dz

        return f, pullback


def test_a_chain_trains():
    """The adapter of NumPy on CuPy arrays: streams come back, exactly on a grid, and the loss falls."""
    blocks = [(Tanh(2 * k), Tanh(2 * k + 1)) for k in range(4)]
    x1, x2, target = random(16, 8, seed=20), random(16, 8, seed=21), random(16, 8, seed=22)
    exact, checksums = ReversibleChain(blocks, coupling=rk.Coupling(grid_exponent=12)), Checksums()
    y1, y2 = exact.forward(x1, x2, checksums=checksums)
    (r1, r2), _, _ = exact.backward_(y1, y2, cupy.ones_like(y1), cupy.ones_like(y2), checksums=checksums)
    for rebuilt, x in ((r1, x1), (r2, x2)):
        np.testing.assert_array_equal(cupy.asnumpy(rebuilt), np.rint(cupy.asnumpy(x) * 2**12) / 2**12)
    chain, losses = ReversibleChain(blocks), []
    for _ in range(20):
        y1, y2 = chain.forward(x1, x2)
        error = y1 - target
        losses.append(float((error * error).sum()))
        _, _, gradients = chain.backward_(y1, y2, 2 * error, cupy.zeros_like(y2))
        for pair, own in zip(blocks, gradients, strict=True):
            for branch, dW in zip(pair, own, strict=True):
                branch.W -= 0.01 * dW
    assert losses[-1] < 0.5 * losses[0]
