# SPDX-License-Identifier: Apache-2.0
"""The lemma behind the exact coupling, at its edges, on every backend that runs here.

Let a and b be multiples of 2^-k with |a + b| < 2^(24 - k): then a + b is exact, and taking b away gives a's bits.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from revkernels import ops
from revkernels.coupling import Coupling
from revkernels.exact import EXPONENTS as ALLOWED
from revkernels.exact import exponent_for, limit

torch = pytest.importorskip("torch")

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
EXPONENTS = st.integers(-102, 126)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


@st.composite
def streams(draw):
    """k, a stream of the grid as whole numbers, and branch outputs that leave the sum in range."""
    k, bound = draw(EXPONENTS), 2**24 - 1
    near = st.sampled_from([0, 1, -1, bound, -bound, 2**23, -(2**23), 2**22 + 1])
    a = draw(st.lists(st.integers(-bound, bound) | near, min_size=1, max_size=20))
    fs = []
    for n in a:
        # A sum at the edge, a tie, a tiny value, a zero of either sign, or anything between; in units of 2^-k.
        whole = draw(st.integers(-bound - n, bound - n) | st.sampled_from([bound - n, -bound - n, 0]))
        part = draw(st.sampled_from([0.0, -0.0, 0.5, -0.5, 0.25, 2.0**-30]) | st.floats(-0.5, 0.5))
        fs.append(whole + part if abs(whole) < 2**22 else float(whole))
    return k, a, fs


def couple_and_back(k, a, f, f_dtype, backend):
    scale = 2.0**-k
    x = torch.tensor([n * scale for n in a], dtype=torch.float64).float()
    branch = torch.tensor([value * scale for value in f], dtype=torch.float64).to(f_dtype)
    before = x.clone()
    amax = torch.zeros(1)
    ops.couple_(x, branch, coupling=Coupling(grid_exponent=k, amax=amax), backend=backend)
    y, top = x.clone(), amax.item()
    ops.uncouple_(x, branch, coupling=Coupling(grid_exponent=k), backend=backend)
    return before, y, x, top


@settings(max_examples=150, **QUIET)
@given(streams())
@example((14, [0, 0, 3], [-0.25, 0.5, 1.5]))  # -0 on its way, and ties
@example((126, [1, -1], [0.5, 2.0**23]))
@example((-102, [2**24 - 1], [0.0]))
def test_what_is_in_range_comes_back(backend, case):
    k, a, f = case
    before, y, back, top = couple_and_back(k, a, f, torch.float32, backend)
    rounded = [n + round(float(np.float32(value * 2.0**-k)) * 2.0**k) for n, value in zip(a, f, strict=True)]
    if max(map(abs, rounded)) < 2**24:
        assert top < limit("float32", k)
        assert y.double().mul(2.0**k).tolist() == rounded
        assert torch.equal(back.view(torch.int32), before.view(torch.int32))  # bits: +0 stays +0
    else:
        assert top >= limit("float32", k)


@settings(max_examples=60, **QUIET)
@given(
    st.integers(0, 24),
    st.lists(st.floats(-200, 200, width=32) | st.sampled_from([SMALLEST, -SMALLEST, -0.0, 1e-30]), min_size=1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_branch_output(backend, k, values, dtype):
    """Subnormal, of any sign, of any dtype: where the sums stay in range, the stream comes back."""
    f = torch.tensor(values).to(dtype)
    x = torch.round(torch.randn(f.shape) * 2.0**k) * 2.0**-k + 0.0
    before, amax = x.clone(), torch.zeros(1)
    ops.couple_(x, f, coupling=Coupling(grid_exponent=k, amax=amax), backend=backend)
    ops.uncouple_(x, f, coupling=Coupling(grid_exponent=k), backend=backend)
    if amax.item() < limit("float32", k):
        assert torch.equal(x.view(torch.int32), before.view(torch.int32))


def test_beyond_the_range_sums_round(backend):
    """Which shows that the bound is where it has to be: one step further a sum loses its last bit."""
    k, edge = 3, 2**24
    _, y, back, top = couple_and_back(k, [edge - 1], [2.0], torch.float32, backend)
    assert top == limit("float32", k) and y.item() * 2.0**k == edge  # not edge + 1
    assert back.item() * 2.0**k == edge - 2


@given(st.floats(1e-30, 1e30), st.integers(0, 8), st.sampled_from(["float32", "int16"]))
def test_exponent_for(largest, spare, storage):
    """The finest that leaves the room asked for."""
    k = exponent_for(storage, largest, spare)
    assert largest * 2.0**spare < limit(storage, k) or k == min(ALLOWED[storage])
    assert largest * 2.0 ** (spare + 1) >= limit(storage, k) or k == max(ALLOWED[storage])
