# SPDX-License-Identifier: Apache-2.0
"""revkernels.adapters.numpy: what chains refuse, by name, and before anything is written."""

import numpy as np
import pytest
from dlpack_producer import Exporter
from numpy_cases import Tanh, blocks_of, streams

import revkernels as rk
from revkernels import native
from revkernels.adapters.numpy import Checksums, ReversibleChain

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)


def test_bad_chains():
    good = Tanh(4, 0)
    for bad, error, words in (
        ([], ValueError, "blocks is empty"),
        ([good], TypeError, r"blocks\[0\] is a Tanh; it must be a pair"),
        ([(good, good), (good, good, good)], TypeError, r"blocks\[1\] is a tuple"),
        ([(good, np.tanh)], TypeError, "G of block 0 is a ufunc; it must be callable and have a method vjp"),
    ):
        with pytest.raises(error, match=words):
            ReversibleChain(bad)
    for coupling, error, words in (
        (12, TypeError, "coupling is a int"),
        (rk.Coupling(), TypeError, "grid_exponent is a NoneType"),
        (rk.Coupling(grid_exponent=200), ValueError, "grid_exponent is 200"),
        (rk.Coupling(grid_exponent=2, amax=np.zeros(1, "f4")), ValueError, "amax is given"),
    ):
        with pytest.raises(error, match=words):
            ReversibleChain([(good, good)], coupling=coupling)
    with pytest.raises(rk.BackendError, match="'gpu'"):
        ReversibleChain([(good, good)], backend="gpu")
    with pytest.raises(TypeError, match="x2 is float16; it must be float32 or float64"):
        ReversibleChain([(good, good)], coupling=rk.Coupling(grid_exponent=2)).forward(np.ones(2), np.ones(2, "f2"))
    with pytest.raises(ValueError, match="checksums is given; it must be None for a chain without"):
        ReversibleChain([(good, good)]).forward(np.ones(2), np.ones(2), checksums=Checksums())
    with pytest.raises(ValueError, match="checksums is empty"):
        ReversibleChain([(good, good)]).backward_(*streams(4), checksums=Checksums())


class Bad(Tanh):
    """A branch with one thing wrong, from some call on."""

    def __init__(self, call=None, vjp=None):
        super().__init__(4, 0)
        self.call, self.make = call, vjp

    def __call__(self, x):
        return super().__call__(x) if self.call is None else self.call(x)

    def vjp(self, x):
        return super().vjp(x) if self.make is None else self.make(x)


OUTPUTS = {
    "shape": (ValueError, r"G of block 1 returned shape \(5, 3\); it must return \(5, 4\)", lambda x: x[:, :3]),
    "dtype": (TypeError, "G of block 1 returned int64; it must return one of", lambda x: np.ones(x.shape, int)),
    "nothing": (TypeError, "G of block 1 returned a NoneType; it must return an array", lambda x: None),
    "list": (TypeError, "G of block 1 returned a list", lambda x: x.tolist()),
    "strides": (
        ValueError,
        "G of block 1 returned an array that .* negative stride in dimension 1",
        lambda x: x[:, ::-1],
    ),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_bad_outputs_of_a_branch(case):
    """A bad argument in the forward; in the backward, where it once was right, a ReconstructionError."""
    error, words, call = OUTPUTS[case]
    blocks = blocks_of(2)
    y = ReversibleChain(blocks).forward(*streams(2))
    blocks[1] = (blocks[1][0], Bad(call=call))
    chain = ReversibleChain(blocks)
    with pytest.raises(error, match=words):
        chain.forward(*streams(2))
    with pytest.raises(rk.ReconstructionError, match=words):
        chain.inverse_(*(a.copy() for a in y))
    blocks[1] = (blocks[1][0], Bad(vjp=lambda x: (call(x), lambda df: (df, None))))
    with pytest.raises(rk.ReconstructionError, match=words):
        ReversibleChain(blocks).backward_(*y, *streams(2))


PULLBACKS = {
    "no pair": ("the vjp of F of block 0 returned a ndarray; it must return a tuple", lambda x: x),
    "no function": (r"the vjp of F of block 0 returned a tuple of 2; .* the latter callable", lambda x: (x, x)),
    "no tuple": ("the pullback of F of block 0 returned a ndarray", lambda x: (x, lambda df: df)),
    "shape": (r"the pullback of F of block 0 returned shape \(4,\)", lambda x: (x, lambda df: (df[0], None))),
    "dtype": ("the pullback of F of block 0 returned bool", lambda x: (x, lambda df: (df > 0, None))),
}


@pytest.mark.parametrize("case", PULLBACKS)
def test_bad_pullbacks(case):
    words, vjp = PULLBACKS[case]
    with pytest.raises(rk.ReconstructionError, match=words):
        ReversibleChain([(Bad(vjp=vjp), Tanh(4, 1))]).backward_(*streams(4))


def test_a_branch_cannot_write_to_what_it_is_given():
    """NumPy's own error, where the branch does it; and a note that names the branch."""

    def in_place(x):
        x += 1
        return x

    chain = ReversibleChain([(Tanh(4, 0), Bad(call=in_place))])
    with pytest.raises(ValueError, match="read-only") as raised:
        chain.forward(*streams(2))
    assert getattr(raised.value, "__notes__", ["raised in G of block 0"]) == ["raised in G of block 0"]
    chain = ReversibleChain([(Tanh(4, 0), Bad(vjp=lambda x: (x, lambda df: (in_place(df), None))))])
    with pytest.raises(ValueError, match="read-only"):
        chain.backward_(*streams(4))


def test_the_four_arrays_are_checked_before_anything_is_written():
    chain = ReversibleChain(blocks_of(1))
    y1, y2, dy1, dy2 = streams(4)
    kept = [a.copy() for a in (y1, y2, dy1, dy2)]
    frozen = dy2.view()
    frozen.flags.writeable = False
    for arrays, error, words in (
        ((y1, y2, dy1, frozen), ValueError, "dy2 is read-only"),
        ((y1, y2, dy1, dy1), ValueError, "dy1 and dy2 overlap"),
        ((y1, y1[:], dy1, dy2), ValueError, "y1 and y2 overlap"),
        ((y1, y2, dy1, None), TypeError, "dy2 is a NoneType"),
        ((y1, y2, dy1, dy2.astype(int)), TypeError, "dy2 is int64"),
        ((y1, y2, dy1, Exporter(frozen)), ValueError, "dy2 is read-only"),
        ((y1, y2, dy1, dy2[0]), ValueError, r"dy2 has shape \(4,\), y2 has \(5, 4\)"),
        ((y1, y2, dy1, dy2[:, ::-1]), ValueError, "dy2 has a negative stride in dimension 1"),
        ((y1, y2, np.zeros(161, "u1")[1:].view("f8").reshape(5, 4), dy2), ValueError, "dy1 is not aligned"),
        ((y1, y2, np.zeros((5, 4), "f8, u1")["f0"], dy2), ValueError, "dy1 has a stride of 36 bytes in dimension 0"),
    ):
        with pytest.raises(error, match=words):
            chain.backward_(*arrays)
    with pytest.raises(ValueError, match="y1 has a negative stride"):
        chain.inverse_(y1[::-1], y2)
    checksums, grid = Checksums(), rk.Coupling(grid_exponent=20)
    ReversibleChain(blocks_of(2), coupling=grid).forward(y1, y2, checksums=checksums)
    with pytest.raises(ValueError, match="checksums is of a chain of another length"):
        ReversibleChain(blocks_of(1), coupling=grid).backward_(y1, y2, dy1, dy2, checksums=checksums)
    with pytest.raises(ValueError, match="y2 is read-only"):
        chain.inverse_(y1, Exporter(frozen))
    np.testing.assert_array_equal([y1, y2, dy1, dy2], kept)


def test_checksums_and_another_memory_order():
    """They count elements in memory order, so a copy in another one is refused: no branch is to blame."""
    chain, checksums = ReversibleChain(blocks_of(2), coupling=rk.Coupling(grid_exponent=20)), Checksums()
    x1, x2, dy1, dy2 = (np.asfortranarray(x) for x in streams(4))
    y1, y2 = chain.forward(x1, x2, checksums=checksums)
    before = y1.copy(), dy1.copy()
    with pytest.raises(ValueError, match=r"y2 has its dimensions \(0, 1\) from the outermost .* had \(1, 0\)"):
        chain.backward_(y1, y2.copy(), dy1, dy2, checksums=checksums)
    assert all(map(np.array_equal, (y1, dy1), before))
    kept = y1.copy(order="K"), y2.copy(order="K")
    (r1, _), _, _ = chain.backward_(*kept, dy1, dy2, checksums=checksums)
    assert np.array_equal(r1, np.rint(x1 * 2**20) / 2**20)
