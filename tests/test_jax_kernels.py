# SPDX-License-Identifier: Apache-2.0
"""The kernels as XLA custom calls: bit for bit the oracle's, on every dtype, and what they refuse."""

import itertools

import numpy as np
import pytest
from jax_cases import FLOATS, jax, jnp, same_bits, to_jax, values, x64

import revkernels as rk
from revkernels import reference
from revkernels.adapters import jax as rj

BACKENDS = ["kernels", pytest.param("xla", marks=pytest.mark.slow)]
SHAPES = [(2, 6, 5, 7), (1009,), (3, 0, 4), ()]
GRID = rk.Coupling(grid_exponent=4)


def every_call(x, f, options):
    """All that takes two arrays; each of them is the stream once in a reverse step and in a list."""
    return [
        rj.couple(x, f, **options),
        rj.couple_(x, f, **options),
        rj.uncouple(x, f, **options),
        rj.uncouple_(x, f, **options),
        *rj.reverse_step_(x, f, x, f, **options),
        rj.accumulate_(x, f, backend=options["backend"]),
        *rj.accumulate_([x, f], [f, x], backend=options["backend"]),
    ]


def every_result(x, f, x_dtype, f_dtype, k):
    y, back = (function(x, f, x_dtype, f_dtype, grid_exponent=k) for function in (reference.couple, reference.uncouple))
    total, other = reference.accumulate(x, f, x_dtype, f_dtype), reference.accumulate(f, x, f_dtype, x_dtype)
    return [y, y, back, back, back, total, total, total, other]


@pytest.mark.parametrize("backend", BACKENDS)
def test_couplings_and_sums(backend):
    """Every pair of dtypes, plain and on a grid; of the kernels on every shape too."""
    shapes = SHAPES if backend == "kernels" else SHAPES[:1]
    given = [[[values(shape, dtype, n) for n in range(2)] for dtype in FLOATS] for shape in shapes]
    which = list(itertools.product(range(len(shapes)), itertools.product(range(len(FLOATS)), repeat=2), (None, 4)))

    def everything(arrays):
        return [
            every_call(arrays[s][i][0], arrays[s][j][1], {"coupling": rk.Coupling(grid_exponent=k), "backend": backend})
            for s, (i, j), k in which
        ]

    with x64():
        arrays = [[[to_jax(n, d) for n in pair] for pair, d in zip(row, FLOATS, strict=True)] for row in given]
        found = jax.device_get(jax.jit(everything)(arrays))
    for results, (s, (i, j), k) in zip(found, which, strict=True):
        expected = every_result(given[s][i][0], given[s][j][1], FLOATS[i], FLOATS[j], k)
        for number, (got, right) in enumerate(zip(results, expected, strict=True)):
            assert got.dtype == (FLOATS[j] if number == 8 else FLOATS[i])
            same_bits(got, right, f"{shapes[s]} {FLOATS[i]} {FLOATS[j]} k={k} result {number}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("f_dtype", ["float32", "float16"])
def test_int16_streams(backend, f_dtype):
    """Half of all results wrap; NaN and infinities are in f."""
    y, f = values((61, 7), "int16", 0), values((61, 7), f_dtype, 1)
    d, df = values((61, 7), "float32", 2), values((61, 7), f_dtype, 3)
    dtypes = ("int16", f_dtype, "float32", f_dtype)
    options = {"coupling": rk.Coupling(grid_exponent=11), "backend": backend}

    def everything(y, f, d, df):
        return rj.couple(y, f, **options), rj.uncouple_(y, f, **options), *rj.reverse_step_(y, f, d, df, **options)

    arrays = [to_jax(numbers, dtype) for numbers, dtype in zip((y, f, d, df), dtypes, strict=True)]
    found = jax.jit(everything)(*arrays)
    back, total = reference.reverse_step(y, f, d, df, dtypes, grid_exponent=11)
    expected = reference.couple(y, f, "int16", f_dtype, grid_exponent=11), back, back, total
    for got, right, dtype in zip(found, expected, ("int16", "int16", "int16", "float32"), strict=True):
        assert got.dtype == dtype
        same_bits(got, right, f"int16 {f_dtype}")


def test_large():
    """Past what one thread takes, 65,536 elements, so that several threads are at work, at an odd length."""
    y, f, dy, df = (np.random.default_rng(n).standard_normal(300_007).astype("float32") for n in range(4))
    x, dx = jax.jit(rj.reverse_step_)(y, f, dy, df)
    assert np.array_equal(x, y - f)
    assert np.array_equal(dx, dy + df)
    (total,) = jax.jit(rj.accumulate_)([y], [f])
    assert np.array_equal(total, y + f)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int16"])
def test_reports(dtype):
    """amax and checksum of what was written are the oracle's, example by example under vmap, NaN included."""
    from revkernels.adapters.jax import calls

    x, f = values((3, 40), dtype, 0), np.nan_to_num(values((3, 40), "float32", 1), posinf=9, neginf=9)
    x[1:] = np.nan_to_num(x[1:], posinf=5, neginf=5)

    def couple(x, f):
        return calls.couple(x, f, subtract=False, k=8, in_place=True, reports=True)

    y, found = jax.jit(jax.vmap(couple))(to_jax(x, dtype), f.astype("float32"))
    for row in range(3):
        if dtype == "int16":
            largest = reference.amax_before_wrapping(x[row], f[row], False, "float32", grid_exponent=8)
        else:
            largest = reference.amax_of(np.asarray(y[row], np.float64))
        same_bits(found.amax[row], np.float64(largest), "amax")
        if not np.isnan(np.asarray(y[row], np.float64)).any():
            low, high = map(int, found.checksum[row])
            assert low + high * 2**32 == reference.checksum_of(np.asarray(y[row], np.float64), dtype)


def test_reports_of_many_slices():
    """The same whichever thread made which; another if one bit is another, or two elements change places."""
    from revkernels.adapters.jax import calls

    couple = jax.jit(lambda x: calls.couple(x, x * 0, subtract=False, k=10, in_place=False, reports=True)[1])
    x = np.random.default_rng(0).integers(-999, 999, 300_007).astype("float32")
    first, *again = (couple(x) for _ in range(4))
    assert float(first.amax) == np.abs(x).max()
    assert all(np.array_equal(first.checksum, other.checksum) for other in again)
    assert x[3] != x[65_539]
    flipped, swapped = x.copy(), x.copy()
    flipped[200_000] += 2.0**-10
    swapped[[3, 65_539]] = x[[65_539, 3]]  # of equal places in their slices
    for other in (flipped, swapped):
        assert not np.array_equal(first.checksum, couple(other).checksum)


def test_outside_jit():
    """Operation by operation, from NumPy too; an operand that is not given away stays as it was."""
    x, f = np.arange(6.0, dtype="float32").reshape(2, 3), np.ones((2, 3), "float32")
    kept = jnp.asarray(x)
    assert isinstance(rj.couple(x, f), jax.Array)
    assert np.array_equal(rj.couple_(kept, f), x + 1)
    assert np.array_equal(rj.reverse_step_(kept, f, kept, f)[0], x - 1)
    assert np.array_equal(kept, x)


X = np.ones((2, 3), "float32")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rj.couple([1.0], X), TypeError, "x is a list; it must be a jax.Array"),
        (lambda: rj.couple(X, X.astype(int)), TypeError, "f is int"),
        (lambda: rj.uncouple(X.astype(bool), X), TypeError, "y is bool"),
        (lambda: rj.couple(X, X[:, :1]), ValueError, r"f has shape \(2, 1\), x has \(2, 3\)"),
        (lambda: rj.reverse_step_(X, X, X, X[0]), ValueError, r"df has shape \(3,\), y has \(2, 3\)"),
        (lambda: rj.accumulate_([X], X), TypeError, "both be arrays, or both lists"),
        (lambda: rj.accumulate_([X], [X, X]), ValueError, "part has 2 arrays, total has 1"),
        (lambda: rj.accumulate_([X, X], [X, X[0]]), ValueError, r"part\[1\] has shape"),
        (lambda: rj.couple(X.astype("int16"), X), ValueError, "x is int16, which needs a coupling with a grid_expo"),
        (lambda: rj.couple(X, X.astype("int16"), coupling=GRID), TypeError, "f is int16"),
        (lambda: rj.couple(X, X, coupling=3), TypeError, "coupling is a int"),
        (lambda: rj.couple(X, X, coupling=rk.Coupling(grid_exponent=2.0)), TypeError, "grid_exponent is a float"),
        (lambda: rj.couple(X, X, coupling=rk.Coupling(grid_exponent=127)), ValueError, "grid_exponent is 127"),
        (lambda: rj.couple(X, X, coupling=rk.Coupling(sample_scale=X[0])), ValueError, "sample_scale is given"),
        (lambda: rj.couple(X, X, backend="cpu"), rk.BackendError, "'kernels' or 'xla'"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()
    with pytest.raises(error, match=words):  # while traced just so
        jax.jit(call)()


def test_what_the_library_refuses(monkeypatch):
    """Its text is in XLA's error."""
    from revkernels.adapters.jax import calls

    monkeypatch.setattr(calls, "_grid", lambda k: np.int64(500))
    with pytest.raises(Exception, match="revkernels: coupling: grid_exponent is 500"):
        jax.block_until_ready(rj.couple(X, X))


def test_both_platforms_have_every_handler():
    from revkernels.adapters.jax import build

    build.load()
    for kernel in build.KERNELS:
        for platform in ("cpu", "cuda"):
            assert getattr(build._loaded, f"revk_jax_{kernel}_{platform}")


@pytest.mark.gpu
def test_on_a_gpu():
    """Not run where JAX has no CUDA device."""
    try:
        (device, *_) = jax.devices("cuda")
    except RuntimeError as error:
        pytest.skip(f"this JAX has no CUDA device: {error}")
    x, f, dx, df = (jax.device_put(values((64, 33), "float32", n), device).astype("float32") for n in range(4))
    got = jax.jit(rj.reverse_step_)(x, f, dx, df)
    expected = reference.reverse_step(*(np.asarray(a, np.float64) for a in (x, f, dx, df)), ("float32",) * 4)
    for one, right in zip(got, expected, strict=True):
        same_bits(one, right, "reverse_step_ on a GPU")
