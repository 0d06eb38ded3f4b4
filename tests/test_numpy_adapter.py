# SPDX-License-Identifier: Apache-2.0
"""revkernels.adapters.numpy: Algorithm 1 in place, against the oracle, central differences and itself."""

import array
import collections

import numpy as np
import pytest
from dlpack_producer import Exporter
from numpy_cases import Tanh, blocks_of, streams

import revkernels as rk
from revkernels import native, reference
from revkernels.adapters.numpy import Checksums, ReversibleChain

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)


class ForOracle:
    """The same function as the oracle wants it."""

    def __init__(self, branch):
        self.branch = branch

    def __call__(self, x):
        return self.branch(x)

    def vjp(self, x, df):
        return self.branch.vjp(x)[1](df)


def test_against_the_oracle():
    """Streams, gradients and parameter gradients of three blocks, in float64."""
    blocks = blocks_of(3)
    oracle = [(ForOracle(F), ForOracle(G)) for F, G in blocks]
    x1, x2, dy1, dy2 = streams(4)
    chain = ReversibleChain(blocks)
    y1, y2 = chain.forward(x1, x2)
    right = reference.chain_forward(x1, x2, oracle)
    np.testing.assert_array_equal([y1, y2], right)
    expected = reference.chain_backward(*right, dy1, dy2, oracle)
    (r1, r2), (dx1, dx2), gradients = chain.backward_(y1, y2, dy1, dy2)
    np.testing.assert_array_equal([r1, r2], expected[0])
    np.testing.assert_array_equal([dx1, dx2], expected[1])
    for mine, theirs in zip(gradients, expected[2], strict=True):
        for (dW, db), (right_dW, right_db) in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(dW, right_dW)
            np.testing.assert_array_equal(db, right_db)


def test_against_central_differences():
    """The derivative of a loss along random directions, by every parameter and input."""
    blocks, (x1, x2, w1, w2) = blocks_of(2), streams(4, seed=3)
    chain = ReversibleChain(blocks)

    def loss():
        y1, y2 = chain.forward(x1, x2)
        return float((w1 * y1).sum() + (w2 * y2**2).sum())

    y1, y2 = chain.forward(x1, x2)
    _, (dx1, dx2), gradients = chain.backward_(y1, y2, w1.copy(), 2 * w2 * y2)
    pairs = [(x1, dx1), (x2, dx2)]
    for branches, found in zip(blocks, gradients, strict=True):
        for branch, (dW, db) in zip(branches, found, strict=True):
            pairs += [(branch.W, dW), (branch.b, db)]
    rng, step = np.random.default_rng(1), 1e-5
    for value, gradient in pairs:
        direction = rng.standard_normal(value.shape)
        value += step * direction
        above = loss()
        value -= 2 * step * direction
        below = loss()
        value += step * direction
        # The truncation error is step^2 times a third derivative of order 10, the rounding error 1e-16 / step.
        assert abs((above - below) / (2 * step) - float((gradient * direction).sum())) < 1e-8


def test_one_more_forward_a_branch():
    """Once forward, and once in the backward, shared by the inverse and the derivative."""
    blocks = blocks_of(3)
    chain = ReversibleChain(blocks)
    y = chain.forward(*streams(2))
    assert [branch.forwards for pair in blocks for branch in pair] == [1] * 6
    chain.backward_(*y, *streams(2))
    assert [branch.forwards for pair in blocks for branch in pair] == [2] * 6


class Linear:
    """f = x / 2 + b, whose gradient of b is df itself, and what stands for x in dw a part of x."""

    def __init__(self, wrap):
        self.b, self.wrap = 0.1, wrap

    def __call__(self, x):
        return 0.5 * x + self.b

    def vjp(self, x):
        return self(x), lambda df: (0.5 * df, self.wrap(df, x))


Named = collections.namedtuple("Named", "bias seen")
DW = {
    "itself": (lambda df, x: df, lambda dw: (dw, None)),
    "a view of it": (lambda df, x: df.T, lambda dw: (dw.T, None)),
    "a tuple": (lambda df, x: (df, x[:1]), lambda dw: dw),
    "a named tuple": (lambda df, x: Named(df, x[:1]), lambda dw: (dw.bias, dw.seen)),
    "a dictionary in a list": (lambda df, x: [{"b": df, "name": "b"}, x[:1]], lambda dw: (dw[0]["b"], dw[1])),
    "an exporter": (lambda df, x: Exporter(df), lambda dw: (np.asarray(dw), None)),
}


@pytest.mark.parametrize("case", DW)
def test_gradients_of_parameters_may_be_the_gradient_of_the_output(case):
    """They are not written over by what the chain does next."""
    wrap, unwrap = DW[case]
    blocks = [(Linear(wrap), Linear(wrap)) for _ in range(3)]
    chain = ReversibleChain(blocks)
    x, loss = streams(2), streams(2, seed=8)
    y = chain.forward(*x)
    _, _, found = chain.backward_(*(a.copy() for a in (*y, *loss)))

    def total():
        return sum((a * b).sum() for a, b in zip(chain.forward(*x), loss, strict=True))

    rows: list[np.ndarray] = []
    for block, of_block in zip(blocks, found, strict=True):
        for branch, dw in zip(block, of_block, strict=True):
            bias, seen = unwrap(dw)
            branch.b += 1e-3
            above = total()
            branch.b -= 2e-3
            below = total()
            branch.b += 1e-3
            assert bias.sum() == pytest.approx((above - below) / 2e-3, rel=1e-9)
            if seen is not None:
                rows.append(seen)
    if rows:
        np.testing.assert_allclose(rows[0], x[1][:1], rtol=1e-12)  # F of block 0 reads x2
    if case != "an exporter":
        assert type(found[0][0]) is type(wrap(loss[0], x[0]))


def test_streams_of_two_shapes():
    chain = ReversibleChain([(Tanh(6, 2 * k, out=4), Tanh(4, 2 * k + 1, out=6)) for k in range(2)])
    (x1,), (x2,) = streams(1), streams(1, width=6)
    (loss1,), (loss2,) = streams(1, seed=8), streams(1, width=6, seed=8)
    y = chain.forward(x1, x2)
    back, (dx1, dx2), gradients = chain.backward_(*(a.copy() for a in (*y, loss1, loss2)))
    np.testing.assert_allclose(back[0], x1, rtol=1e-12)
    np.testing.assert_allclose(back[1], x2, rtol=1e-12)

    def change(array, place):
        values = []
        for step in (1e-6, -2e-6):
            array[place] += step
            y1, y2 = chain.forward(x1, x2)
            values.append((y1 * loss1).sum() + (y2 * loss2).sum())
        array[place] += 1e-6
        return (values[0] - values[1]) / 2e-6

    assert dx1[1, 2] == pytest.approx(change(x1, (1, 2)), rel=1e-6)
    assert dx2[2, 5] == pytest.approx(change(x2, (2, 5)), rel=1e-6)
    assert gradients[0][0][0][3, 1] == pytest.approx(change(chain.blocks[0][0].W, (3, 1)), rel=1e-6)
    assert gradients[1][1][0][1, 4] == pytest.approx(change(chain.blocks[1][1].W, (1, 4)), rel=1e-6)


def test_in_place_and_the_inputs_untouched():
    chain = ReversibleChain(blocks_of(2))
    x1, x2, dy1, dy2 = streams(4)
    kept = x1.copy(), x2.copy()
    y1, y2 = chain.forward(x1, x2)
    assert not np.shares_memory(y1, x1) and not np.shares_memory(y2, x2)
    np.testing.assert_array_equal([x1, x2], kept)
    addresses = [a.ctypes.data for a in (y1, y2, dy1, dy2)]
    (r1, r2), (dx1, dx2), _ = chain.backward_(y1, y2, dy1, dy2)
    assert all(a is b for a, b in zip((r1, r2, dx1, dx2), (y1, y2, dy1, dy2), strict=True))
    assert [a.ctypes.data for a in (r1, r2, dx1, dx2)] == addresses
    np.testing.assert_allclose([r1, r2], kept, atol=1e-14)
    y1, y2 = chain.forward(*kept)
    assert chain.inverse_(y1, y2)[0] is y1
    np.testing.assert_allclose([y1, y2], kept, atol=1e-14)


class Identity:
    """Returns what it was given, here and back: memory that is read twice is written never."""

    def __call__(self, x):
        return x

    def vjp(self, x):
        return x, lambda df: (df, None)


def test_branches_that_return_what_they_were_given():
    chain = ReversibleChain([(Identity(), Identity())])
    (x1, x2), (dy1, dy2) = (np.array([[1.0], [2.0]]), np.array([[3.0], [5.0]]))
    y1, y2 = chain.forward(x1[None], x2[None])
    assert (y1.item(), y2.item()) == (3, 5)
    (r1, r2), (dx1, dx2), gradients = chain.backward_(y1, y2, dy1[None].copy(), dy2[None].copy())
    assert (r1.item(), r2.item()) == (1, 2)
    assert (dx1.item(), dx2.item()) == (3 + 5, 5 + 8) and gradients == [(None, None)]


def test_exporters_and_buffers():
    """Anything that rk.ops takes: results of the first operand's library, or NumPy's."""

    class Half:
        def __call__(self, x):
            return array.array("f", [v / 2 for v in memoryview(x)])

        def vjp(self, x):
            return self(x), lambda df: (array.array("f", [v / 2 for v in memoryview(df)]), None)

    chain = ReversibleChain([(Half(), Half())])
    y1, y2 = chain.forward(array.array("f", [2, 4]), array.array("f", [4, 8]))
    assert type(y1) is np.ndarray and y1.tolist() == [4, 8] and y2.tolist() == [6, 12]
    dy = array.array("f", [1, 1]), memoryview(np.array([2, 2], "f4"))
    (x1, x2), (dx1, dx2), _ = chain.backward_(y1, y2, *dy)
    assert x1.tolist() == [2, 4] and x2.tolist() == [4, 8]
    assert dx1.tolist() == [2, 2] and dx2.tolist() == [3, 3]


# ---- the grid


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_grid_rebuilds_every_bit(dtype):
    """50 blocks: the float chain drifts, the other does not; gradients are those of the stored streams."""
    blocks = blocks_of(50, dtype=dtype)
    x1, x2, dy1, dy2 = streams(4, dtype=dtype)
    exact = ReversibleChain(blocks, coupling=rk.Coupling(grid_exponent=12))
    checksums = Checksums()
    y1, y2 = exact.forward(x1, x2, checksums=checksums)
    (r1, r2), _, _ = exact.backward_(y1, y2, dy1, dy2, checksums=checksums)
    on_grid = [np.rint(x * 2**12) / 2**12 for x in (x1, x2)]
    np.testing.assert_array_equal([r1, r2], on_grid)
    plain = ReversibleChain(blocks)
    y1, y2 = plain.forward(x1, x2)
    r1, _ = plain.inverse_(y1, y2)
    assert not np.array_equal(r1, x1)


def test_a_branch_that_does_not_repeat_is_found():
    """By the checksums, and named; the last such branch that ran is the first that the backward meets."""
    blocks = blocks_of(3, dtype="f4")
    chain = ReversibleChain(blocks, coupling=rk.Coupling(grid_exponent=12))
    checksums = Checksums()
    y = chain.forward(*streams(2, dtype="f4"), checksums=checksums)
    blocks[1][0].b += 0.5
    with pytest.raises(rk.ReconstructionError, match="F of block 1 did not return what it returned in the forward"):
        chain.backward_(*y, *streams(2, dtype="f4"), checksums=checksums)


def test_a_stream_too_large_for_the_grid_is_found():
    chain = ReversibleChain(blocks_of(2, dtype="f4"), coupling=rk.Coupling(grid_exponent=14))
    x1, x2 = streams(2, dtype="f4")
    with pytest.raises(rk.ReconstructionError, match=r"x2 reaches 2e\+03; on a grid of 2\^-14 a float32 stream"):
        chain.forward(x1, np.full_like(x2, 2000), checksums=Checksums())
    with pytest.raises(rk.ReconstructionError, match="the stream that F of block 0 is added to reaches"):
        chain.forward(np.full_like(x1, 1023.5), x2, checksums=Checksums())
    chain.forward(x1.astype("f8"), np.full(x2.shape, 2000.0), checksums=Checksums())  # 2^39 in float64
    chain.forward(x1, np.full(x2.shape, 2000.0), checksums=Checksums())  # either stream has its own limit
    with pytest.raises(rk.ReconstructionError, match=r"x2 reaches .* a float32 stream"):
        chain.forward(x1.astype("f8"), np.full_like(x2, 2000), checksums=Checksums())
