# SPDX-License-Identifier: Apache-2.0
"""Random norms in Triton's interpreter: shapes, layouts, dtypes, values, tiles, within the bounds of `norm_act_cases`.

As in test_triton_norm_act.py all of it happens in a process of its own. Examples are the same every time.
"""

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.6")

import interpreted  # noqa: E402
from interpreted_norms import TILES, rounding  # noqa: E402, F401 (a fixture)
from norm_act_cases import FLOATS, WIDE, Operand, Oracle, cases, compute_dtype, same_bits  # noqa: E402

from revkernels import Statistics, ops  # noqa: E402
from revkernels.norm import SUMS_COMPUTED  # noqa: E402
from revkernels.triton_kernels import backend, launch, norm_backend, norm_launch  # noqa: E402

QUIET = {
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "phases": (Phase.explicit, Phase.generate),  # an example as it was found says enough, and shrinking takes minutes
}
TRITON = {"backend": "triton"}


def forward(case):
    """norm_act, and with a coupling in front of it: in place and not, statistics computed and given."""
    norm, (x, f, *_) = case.norm(), map(case.operand, range(4))
    h, statistics = ops.norm_act(x.array, norm, dtype=case.h_dtype, **TRITON)
    Oracle(case, norm, x.array, compute_dtype(x.array)).check_forward(h, statistics)

    wide = compute_dtype(x.array, f.array)
    y, h, statistics = ops.couple_norm_act(x.array, f.array, norm, dtype=case.h_dtype, **TRITON)
    same_bits(y, ops.couple(x.array, f.array, backend="reference"), "y")
    Oracle(case, norm, y, wide).check_forward(h, statistics)

    rebuilt = ops.uncouple(x.array, f.array, backend="reference")
    given = statistics if case.seed % 2 else None
    _, h, statistics = ops.uncouple_norm_act_(x.array, f.array, norm, statistics=given, dtype=case.h_dtype, **TRITON)
    same_bits(x.array, rebuilt, "y - f")
    assert x.rest_is_untouched()
    if given is None:
        Oracle(case, norm, x.array, wide).check_forward(h, statistics)
    elif case.activation in ("none", "relu") and wide == compute_dtype(x.array):
        again = ops.norm_act(x.array, norm, statistics=statistics, dtype=h.dtype, backend="reference")
        same_bits(h, again[0], "h")


def backward(case):
    """Added to dx in place, to a base apart, and to nothing; dh may be one row for all."""
    if expanded := case.seed % 3 == 0 and case.activation != "relu":
        case = replace(case, layouts=("dense",) * 4)
    norm, (x, _, dh, dx) = replace(case, running=None).norm(), map(case.operand, range(4))
    _, statistics = ops.norm_act(x.array, norm, backend="cpu")
    oracle = Oracle(case, norm, x.array, compute_dtype(x.array))
    gradient = dh.array[:1].expand(case.shape) if expanded else dh.array
    if not expanded:
        gradient[oracle.unsee(oracle.unclear())] = 0.0
    base = Operand(dx.array.double(), FLOATS[case.seed % 4], case.layouts[3], case.axis).array
    sums = [torch.full((case.channels,), math.nan, dtype=statistics.rstd.dtype) for _ in range(2)]
    for into in (dx.array, base, None):
        start = torch.zeros_like(dx.array) if into is None else into.clone()
        backend.norm_act_backward(dx.array, into, gradient, x.array, norm, *statistics, *sums, SUMS_COMPUTED, 0, False)
        oracle.check_backward(gradient, start, dx.array, *sums)
        assert dx.rest_is_untouched()


def backward_in_two_calls(case):
    """Constant statistics; and sums alone, then dx from sums that are given."""
    case = replace(case, kind="batch", groups=1, running=None)
    norm, (x, _, dh, dx) = case.norm(), map(case.operand, range(4))
    wide = compute_dtype(x.array)
    statistics = Statistics(*(torch.rand(case.channels, generator=case.generator(i)).to(wide) + 0.5 for i in (5, 6)))
    oracle = Oracle(case, norm, x.array, wide, statistics)
    dh.array[oracle.unsee(oracle.unclear())] = 0.0
    base, of = dx.array.clone(), (dh.array, x.array, norm, statistics)
    _, *sums = ops.norm_act_backward_(dx.array, *of, constant=True, **TRITON)
    oracle.check_backward(dh.array, base, dx.array, *sums, constant=True)
    if case.activation not in ("none", "relu"):  # whose slopes have no bits promised
        return
    results = []
    for name in ("triton", "reference"):
        dx.array.copy_(base)
        ops.norm_act_backward_(dx.array, *of, sums=tuple(sums), count=case.seed % 7, backend=name)
        results.append(dx.array.clone())
    same_bits(*results, "dx from given sums")


def special_values(case):
    """NaN, infinities, zeros and subnormal numbers, with statistics given: every bit; and computed: what is NaN."""
    case = replace(case, activation=("none", "relu")[case.seed % 2], running=None)
    norm, x = case.norm(), case.operand(0).array
    statistics, h_dtype = ops.norm_act(x, norm, backend="cpu")[1], case.h_dtype or x.dtype
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-41, 3e38], dtype=WIDE)
    where = torch.rand(case.shape, generator=case.generator(7)) < 0.03
    picked = torch.randint(len(special), case.shape, generator=case.generator(8))
    x.copy_(torch.where(where, special[picked], x.double()))
    h, right = (
        ops.norm_act(x, norm, statistics=statistics, dtype=h_dtype, backend=name)[0] for name in ("triton", "reference")
    )
    same_bits(h, right, "h")
    if not (x.abs() > 1e30).logical_and(x.isfinite()).any():  # their squares are infinite in float32
        h, right = (ops.norm_act(x, norm, dtype=WIDE, backend=name)[0] for name in ("triton", "reference"))
        assert torch.equal(h.isnan(), right.isnan())


class TestInterpreted:
    __test__ = interpreted.INSIDE

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("examples", [12, pytest.param(80, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("check", [forward, backward, backward_in_two_calls, special_values])
    def test_within_bounds(self, check, examples, monkeypatch):
        few = cases(sizes=(1, 2, 3, 5)).filter(
            lambda case: math.prod(case.shape) <= 800 and case.shape[0] * case.groups <= 12
        )

        @settings(max_examples=examples, **QUIET)
        @given(case=few, tiles=st.sampled_from(list(TILES)))
        def run(case, tiles):
            with monkeypatch.context() as patched:
                for name, value in TILES[tiles].items():
                    patched.setattr(norm_launch, name, value)
                patched.setattr(launch, "TILE", 64 if tiles == "many" else launch.TILE)
                patched.setattr(norm_backend, "_prepared", {})
                check(case)

        run()


@interpreted.both
def test_in_a_process_of_its_own(which):
    """Run the class above under TRITON_INTERPRET=1."""
    interpreted.run(__file__, which, "-k", "Interpreted")


test_in_a_process_of_its_own.__test__ = not interpreted.INSIDE
