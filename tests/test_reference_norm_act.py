# SPDX-License-Identifier: Apache-2.0
"""The oracle of the norms itself: by hand, against finite differences, and its activations against torch."""

import numpy as np
import pytest
from test_reference import slope

from revkernels import reference

KINDS = {"batch": 1, "layer": 2, "rms": 2, "group": 1}
SHAPE = (3, 4, 5)


def normalised(x, weight, bias, kind, activation, wide=np.float64):
    of = reference.owners(SHAPE, kind, KINDS[kind], 2 if kind == "group" else 1)
    mean, rstd, _ = reference.statistics_of(x, of, 1e-2, wide, center=kind != "rms")
    return of, mean, rstd, reference.norm_act(x, of, mean, rstd, weight, bias, activation)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_finite_differences(kind, activation):
    """dx, dweight and dbias: each entry against the slope of a loss of h."""
    x, dh = np.random.standard_normal((2, *SHAPE))
    weight, bias = np.random.standard_normal((2, SHAPE[KINDS[kind]])) + 1
    of, mean, rstd, _ = normalised(x, weight, bias, kind, activation)
    base = np.random.standard_normal(SHAPE)
    dx, dweight, dbias = reference.norm_act_backward(base, dh, x, of, mean, rstd, weight, bias, activation, kind=kind)

    def loss():
        return float((dh * normalised(x, weight, bias, kind, activation)[-1]).sum())

    for array, derivative in ((x, dx - base), (weight, dweight), (bias, dbias)):
        for at in np.ndindex(array.shape):
            assert derivative[at] == pytest.approx(slope(loss, array, at), rel=1e-7, abs=1e-8)


def test_constant_statistics_against_finite_differences():
    """In evaluation the statistics stay where they are while x moves."""
    x, dh = np.random.standard_normal((2, *SHAPE))
    weight, bias = np.random.standard_normal((2, 4))
    of, mean, rstd, _ = normalised(x, weight, bias, "batch", "silu")
    dx, *_ = reference.norm_act_backward(None, dh, x, of, mean, rstd, weight, bias, "silu", kind="batch", constant=True)

    def loss():
        return float((dh * reference.norm_act(x, of, mean, rstd, weight, bias, "silu")).sum())

    for at in np.ndindex(SHAPE):
        assert dx[at] == pytest.approx(slope(loss, x, at), rel=1e-7, abs=1e-8)


def test_owners_by_hand():
    """Two samples, four channels in two groups, two positions."""
    shape = (2, 4, 2)
    expected = {
        "batch": [[[c, c] for c in range(4)] for _ in range(2)],
        "layer": [[[2 * n, 2 * n + 1]] * 4 for n in range(2)],
        "group": [[[2 * n + c // 2] * 2 for c in range(4)] for n in range(2)],
    }
    for kind, statistic in expected.items():
        of = reference.owners(shape, kind, 1, 2)
        np.testing.assert_array_equal(of.statistic, statistic)
        np.testing.assert_array_equal(of.channel, expected["batch"])
        assert of.statistics == np.max(statistic) + 1
        assert of.channels == 4


def test_statistics_by_hand():
    """Numbers small enough to check by head; without a centre the mean of the squares; of nothing, nothing."""
    x = np.array([[1.0, 3.0], [5.0, 7.0]])
    of = reference.owners((2, 2), "layer", 1)
    mean, rstd, variance = reference.statistics_of(x, of, 3.0, np.float32)
    np.testing.assert_array_equal(mean, [2, 6])
    np.testing.assert_array_equal(variance, [1, 1])
    np.testing.assert_array_equal(rstd, [0.5, 0.5])
    np.testing.assert_array_equal(reference.statistics_of(x, of, center=False)[2], [5, 37])
    empty = reference.owners((0, 2), "batch", 1)
    mean, rstd, variance = reference.statistics_of(np.zeros((0, 2)), empty, 0.25)
    assert (mean.tolist(), rstd.tolist(), variance.tolist()) == ([0, 0], [2, 2], [0, 0])


def test_statistics_keep_their_precision():
    """A mean a million deviations away, in float64: against whole numbers."""
    x = 1e9 + np.arange(1000.0)
    of = reference.owners((1000, 1), "batch", 1)
    mean, rstd, variance = reference.statistics_of(x[:, None], of)
    assert mean[0] == 1e9 + 499.5
    assert variance[0] == (1000**2 - 1) / 12
    assert rstd[0] == pytest.approx(((1000**2 - 1) / 12) ** -0.5, rel=2e-16)


def test_relu_of_zeros_and_nan():
    """Both zeros become +0, NaN stays; the gradient is 0 at both zeros and passes at NaN."""
    z = np.array([-0.0, 0.0, np.nan, -1.0, 2.0, np.inf, -np.inf])
    h = reference.activate(z, "relu")
    np.testing.assert_array_equal(h, [0, 0, np.nan, 0, 2, np.inf, 0])
    assert not np.signbit(h).any()
    np.testing.assert_array_equal(reference.derivative(z, np.full(7, 3.0), "relu"), [0, 0, 3, 0, 3, 3, 0])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_smooth_activations_as_torch_makes_them(activation):
    """In float64, over the whole range; and the derivative against finite differences."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    theirs = {
        "gelu": functional.gelu,
        "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
        "silu": functional.silu,
    }[activation]
    z = np.concatenate([np.linspace(-12, 12, 4001), [-800.0, -100.0, -40.0, 40.0, 100.0, 800.0, 0.0]])
    expected = theirs(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(reference.activate(z, activation), expected, rtol=1e-14, atol=4e-15)
    around = [reference.activate(z + k * 1e-3, activation) for k in (-2, -1, 1, 2)]
    slopes = (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / 12e-3
    np.testing.assert_allclose(reference.derivative(z, np.ones_like(z), activation), slopes, rtol=1e-9, atol=1e-10)
