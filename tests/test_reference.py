# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: Algorithm 1 against finite differences, its rounding against the machine's own conversions."""

import itertools

import numpy as np
import pytest

from revkernels import reference


class Residual:
    """w2 tanh(w1 x): a residual function with weights, and its derivative by hand."""

    def __init__(self, size):
        self.w1, self.w2 = np.random.standard_normal((2, size, size))

    def __call__(self, x):
        return self.w2 @ np.tanh(self.w1 @ x)

    def vjp(self, x, df):
        h = np.tanh(self.w1 @ x)
        da = (self.w2.T @ df) * (1 - h * h)
        return self.w1.T @ da, (np.outer(da, x), np.outer(df, h))


SIZE = 3


def chain(depth):
    return [(Residual(SIZE), Residual(SIZE)) for _ in range(depth)]


def loss(y1, y2, c1, c2):
    return float(c1 @ y1 + c2 @ y2 + 0.5 * (y1 @ y1) ** 2 + np.sin(y2).sum())


def derivatives_of_loss(y1, y2, c1, c2):
    return c1 + 2 * (y1 @ y1) * y1, c2 + np.cos(y2)


def slope(function, array, at, step=1e-5):
    """The derivative of function() by array[at]: central differences of fourth order."""
    value = array[at]
    around = []
    for k in (-2, -1, 1, 2):
        array[at] = value + k * step
        around.append(function())
    array[at] = value
    return (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / (12 * step)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_algorithm_1_against_finite_differences(depth):
    """dx1, dx2 and every dw of a chain: each entry against the slope of the loss."""
    blocks, x1, x2, c1, c2 = chain(depth), *np.random.standard_normal((4, SIZE))
    y1, y2 = reference.chain_forward(x1, x2, blocks)
    (back1, back2), (dx1, dx2), dw = reference.chain_backward(y1, y2, *derivatives_of_loss(y1, y2, c1, c2), blocks)
    np.testing.assert_allclose(back1, x1, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(back2, x2, rtol=1e-9, atol=1e-10)

    def value():
        return loss(*reference.chain_forward(x1, x2, blocks), c1, c2)

    pairs = [(x1, dx1), (x2, dx2)]
    for (F, G), (dF, dG) in zip(blocks, dw, strict=True):
        pairs += [(F.w1, dF[0]), (F.w2, dF[1]), (G.w1, dG[0]), (G.w2, dG[1])]
    assert len(pairs) == 2 + 4 * depth
    scale = max(np.abs(derivative).max() for _, derivative in pairs)
    for array, derivative in pairs:
        for at in np.ndindex(array.shape):
            assert derivative[at] == pytest.approx(slope(value, array, at), rel=1e-7, abs=1e-9 * scale)


@pytest.mark.parametrize("depth", [0, 1, 2, 7])
def test_inverse(depth):
    """Equation 7 undoes equation 6."""
    blocks, x1, x2 = chain(depth), *np.random.standard_normal((2, SIZE))
    back = reference.chain_inverse(*reference.chain_forward(x1, x2, blocks), blocks)
    np.testing.assert_allclose(back, (x1, x2), rtol=1e-10, atol=1e-10)


def test_block_is_equation_6():
    """Written out with numbers."""
    double, square = (lambda x: 2 * x), (lambda x: x * x)
    assert reference.block_forward(1.0, 3.0, double, square) == (7.0, 52.0)
    assert reference.block_inverse(7.0, 52.0, double, square) == (1.0, 3.0)


def test_no_block_has_no_derivative_but_the_loss_s():
    """A chain of none hands everything through."""
    assert reference.chain_backward(1.0, 2.0, 3.0, 4.0, []) == ((1.0, 2.0), (3.0, 4.0), [])


# ---- rounding


SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1.0,
    -1.0,
    65504.0,
    65519.999,
    65520.0,
    3.4e38,
    3.3961775e38,
    1e-40,
    5e-8,
]


def floats_around(dtype_bits):
    """Values that stand on, beside and half-way between neighbours of every size, and random bits of float32."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        random = np.random.randint(0, 2**32, 20_000, dtype=np.uint32).view(np.float32).astype(np.float64)
    exponents = np.repeat(np.arange(-150, 128), 40)
    significands = 1 + np.random.randint(0, 2**dtype_bits * 4, exponents.size) / (
        2.0**dtype_bits * 4
    )  # quarters of a step
    ties = np.ldexp(significands, exponents) * np.random.choice([-1.0, 1.0], exponents.size)
    near = np.nextafter(ties, np.random.choice([-np.inf, np.inf], ties.size))
    with np.errstate(over="ignore"):
        return np.concatenate([random, ties, near, np.array(SPECIAL)])


def same_values(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    both_nan = np.isnan(got) & np.isnan(expected)
    same = both_nan | ((got == expected) & (np.signbit(got) == np.signbit(expected)))
    assert same.all(), f"first of {(~same).sum()}: {got[~same][0]!r} against {expected[~same][0]!r}"


def test_rounding_to_float16_as_numpy_rounds():
    """NumPy converts float64 to float16 in one rounding."""
    values = floats_around(10)
    with np.errstate(over="ignore"):
        same_values(reference.round_to(values, "float16"), values.astype(np.float16))


def test_rounding_to_bfloat16_as_ml_dtypes_rounds():
    """ml_dtypes goes through float32, so that only values of float32 are compared."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with np.errstate(over="ignore"):
        values = floats_around(7).astype(np.float32)
    same_values(reference.round_to(values, "bfloat16"), values.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_as_torch_rounds(dtype):
    """From float32, the type that the kernels compute in."""
    torch = pytest.importorskip("torch")
    with np.errstate(over="ignore"):
        values = floats_around({"bfloat16": 7, "float16": 10, "float32": 23}[dtype]).astype(np.float32)
    theirs = torch.from_numpy(values.copy()).to(getattr(torch, dtype)).double().numpy()
    same_values(reference.round_to(values.astype(np.float64), dtype), theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_done_once(dtype):
    """A value whose rounding through float32 would fall on a tie, and then to the wrong side."""
    step = {"bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
    just_above_the_tie = 1 + step / 2 + 2.0**-40  # float32 cannot tell it from the tie
    assert reference.round_to(np.array([just_above_the_tie]), dtype)[0] == 1 + step
    assert reference.round_to(np.array([1 + step / 2]), dtype)[0] == 1.0


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_rounding_twice_is_rounding_once(dtype):
    """A rounded value is one of the type's own."""
    once = reference.round_to(floats_around(10), dtype)
    same_values(reference.round_to(once, dtype), once)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_bits_as_torch_stores_them(dtype):
    """The stored bits of every rounded value that is not NaN."""
    torch = pytest.importorskip("torch")
    values = reference.round_to(floats_around(10), dtype)
    values = values[~np.isnan(values)]
    stored = torch.from_numpy(values.copy()).to(getattr(torch, dtype))
    unsigned = {8: np.uint64, 4: np.uint32, 2: np.uint16}[stored.element_size()]
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[stored.element_size()]
    theirs = stored.view(integer).numpy().view(unsigned).astype(np.uint64)
    np.testing.assert_array_equal(reference.bits_of(values, dtype), theirs)


# ---- the coupling


@pytest.mark.parametrize("dtypes", list(itertools.product(["float64", "float32", "bfloat16", "float16"], repeat=2)))
def test_coupling_is_one_addition_rounded_once(dtypes):
    """Against torch: widen both, add, convert."""
    torch = pytest.importorskip("torch")
    x_dtype, f_dtype = dtypes
    x, f = (torch.randn(500, dtype=torch.float64).to(getattr(torch, name)) for name in dtypes)
    wide = torch.float64 if "float64" in dtypes else torch.float32
    for function, sign in ((reference.couple, 1), (reference.uncouple, -1)):
        theirs = (x.to(wide) + sign * f.to(wide)).to(x.dtype).double().numpy()
        same_values(function(x.double().numpy(), f.double().numpy(), x_dtype, f_dtype), theirs)
    same_values(
        reference.accumulate(x.double().numpy(), f.double().numpy(), x_dtype, f_dtype),
        (x.to(wide) + f.to(wide)).to(x.dtype).double().numpy(),
    )


def test_options_of_the_coupling():
    """Both scales and the grid, with numbers small enough to check by head."""
    x, f = np.zeros((2, 3)), np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 0.5]])
    scales = {"channel_scale": np.array([1.0, 0.5, 0.25]), "sample_scale": np.array([1.0, 2.0])}
    np.testing.assert_array_equal(reference.couple(x, f, **scales), [[1, 1, 0.75], [2, 1, 0.25]])
    halves = reference.couple(x, f, **scales, grid_exponent=1)
    np.testing.assert_array_equal(halves, [[1, 1, 1.0], [2, 1, 0.0]])  # 0.75 to 1, 0.25 to 0: halves go to even
    (y, dy) = reference.reverse_step(x, f, x, f, **scales)
    np.testing.assert_array_equal(y, [[-1, -1, -0.75], [-2, -1, -0.25]])
    np.testing.assert_array_equal(dy, f)  # the options act on f, not on df
    along_rows = reference.couple(x, f, channel_scale=np.array([2.0, 4.0]), channel_dim=0)
    np.testing.assert_array_equal(along_rows, [[2, 4, 6], [4, 4, 2]])


def test_checksum_and_amax():
    """The definition with two elements; order matters; NaN shows."""
    one, two = (int(np.float64(v).view(np.uint64)) for v in (1.0, 2.0))
    assert reference.checksum_of(np.array([1.0, 2.0]), "float64") == (one + 3 * two) % 2**64
    assert reference.checksum_of(np.array([2.0, 1.0]), "float64") == (two + 3 * one) % 2**64
    assert reference.checksum_of(np.array([1.0]), "bfloat16") == 0x3F80
    assert reference.checksum_of(np.array([1.0]), "float16") == 0x3C00
    assert reference.checksum_of(np.zeros((0, 3)), "float32") == 0
    assert reference.amax_of(np.array([1.0, -3.0])) == 3
    assert reference.amax_of(np.array([])) == 0
    assert np.isnan(reference.amax_of(np.array([1.0, np.nan])))
