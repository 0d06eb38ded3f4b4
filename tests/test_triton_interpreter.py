# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels run by Triton's interpreter on CPU tensors, bit for bit against the NumPy oracle.

TRITON_INTERPRET counts when a kernel is decorated, so all this happens in a process of its own.
"""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.6")

import interpreted  # noqa: E402
from interpreted_couplings import (  # noqa: E402
    assert_reports,
    assert_same,
    assert_same_value,
    expected,
    for_oracle,
    numbers,
    surroundings,
    whether_it_truncates,  # noqa: F401 (the fixture `truncates`)
)
from kernel_cases import (  # noqa: E402
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    PAIR_IDS,
    PAIRS,
    dense,
    make,
    make_int16,
    some_coupling,
)

from revkernels.arrays import dtype_name  # noqa: E402
from revkernels.coupling import Coupling  # noqa: E402
from revkernels.reference import accumulate as plain_sum  # noqa: E402
from revkernels.reference import coupling as oracle  # noqa: E402
from revkernels.triton_kernels import backend  # noqa: E402

#: Options of a coupling. Those that others contain are left to `make test-all`, for the interpreter is slow.
OPTIONS = [
    *(pytest.param(alone, marks=pytest.mark.slow) for alone in ("channel", "sample", "checksum amax")),
    "channel sample grid",
    "all",
]


class TestInterpreted:
    __test__ = interpreted.INSIDE

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.parametrize(("stream", "branch"), PAIRS, ids=PAIR_IDS)
    def test_couple_and_uncouple(self, layout, stream, branch, truncates):
        x, f = layout(make(stream)), layout(make(branch))
        y = torch.empty_like(x)
        backend.couple(y, x, f, None)
        assert_same(y, expected(oracle.couple, x, f, truncates))
        truth, around = expected(oracle.uncouple, x, f, truncates), surroundings(x)
        backend.uncouple(x, x, f, None)
        assert_same(x, truth)
        assert torch.equal(surroundings(x), around)

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_reverse_step(self, layout, truncates):
        y, f, dy, df = layout(make(F32)), layout(make(BF16)), layout(make(F16)), layout(make(F32)).contiguous()
        x, dx = expected(oracle.uncouple, y, f, truncates), expected(plain_sum, dy, df, truncates)
        around = surroundings(y), surroundings(dy)
        backend.reverse_step(y, f, dy, df, None)
        assert_same(y, x)
        assert_same(dy, dx)
        assert torch.equal(surroundings(y), around[0]) and torch.equal(surroundings(dy), around[1])

    @pytest.mark.parametrize("branch", DTYPES, ids=str)
    @pytest.mark.parametrize("stream", DTYPES, ids=str)
    def test_every_pair_of_dtypes(self, stream, branch, truncates):
        """The branch is far smaller, so that most sums need rounding, ties and near-ties of float64 among them."""
        y, f, dy, df = (
            make(dtype, scale)(3, 61) for dtype, scale in zip((stream, branch) * 2, (1, 1e-3) * 2, strict=True)
        )
        ties = torch.tensor([1.0, 2.0**-9, 2.0**-12, 2.0**-8 + 2.0**-40, 2.0**-8 - 2.0**-40, -(2.0**-45)], dtype=F64)
        y[0, : len(ties)], f[0, : len(ties)] = 1.0, ties.to(branch)
        x, dx = expected(oracle.uncouple, y, f, truncates), expected(plain_sum, dy, df, truncates)
        backend.reverse_step(y, f, dy, df, None)
        assert_same(y, x)
        assert_same(dy, dx)

    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if " of " in name or name in ("channels-last", "5-D")])
    @pytest.mark.parametrize("which", OPTIONS)
    def test_coupling_options(self, layout, which, truncates):
        which = "channel sample grid checksum amax" if which == "all" else which
        for stream, branch in PAIRS:
            x = LAYOUTS[layout](make(stream))
            f = LAYOUTS[layout](make(branch, 3)).contiguous()
            coupling = some_coupling(x, f, which)
            y = torch.empty_like(x)
            truth = expected(oracle.couple, x, f, truncates, **for_oracle(coupling))
            backend.couple(y, x, f, coupling)
            assert_same(y, truth)
            assert_reports(coupling, y, truth)

    def test_coupling_of_a_reverse_step_acts_on_f_alone(self, truncates):
        y, f, dy, df = (make(dtype)(4, 5, 9) for dtype in (F32, BF16, F32, F32))
        coupling = some_coupling(y, f, "channel sample grid checksum amax", channel_dim=-1)
        x = expected(oracle.uncouple, y, f, truncates, **for_oracle(coupling))
        dx = expected(plain_sum, dy, df, truncates)
        backend.reverse_step(y, f, dy, df, coupling)
        assert_same(y, x)
        assert_same(dy, dx)
        assert_reports(coupling, y, x)

    @pytest.mark.filterwarnings("ignore:overflow")
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    def test_grid_rounds_half_to_even_at_every_size(self, dtype):
        values = [
            0.5,
            1.5,
            2.5,
            -0.5,
            -1.5,
            -0.3,
            -0.0,
            0.0,
            0.49999997,
            8388607.5,
            8388609.0,
            4194304.5,
            2.0**52 - 0.5,
        ]
        values += [-(2.0**52) + 1.5, 2.0**60, 1e30, float("inf"), float("-inf"), float("nan")]
        f = torch.tensor(values, dtype=dtype)
        for exponent in (0, 1, -1, 126, -126):
            x = torch.full_like(f, -0.0)  # keeps the sign of a zero
            truth = expected(oracle.couple, x, f, False, grid_exponent=exponent)
            backend.couple(x, x, f, Coupling(grid_exponent=exponent))
            assert_same(x, truth)

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_int16_streams(self, layout, truncates):
        """Both signs, in place and not, with a value in each type; there and back again."""
        for k, (branch, number) in enumerate(zip(DTYPES, (F16, F64, F32, BF16), strict=True), start=11):
            q, f, value = layout(make_int16()), layout(make(branch, 4)).contiguous(), layout(make(number))
            start, around, y = q.clone(), (surroundings(q), surroundings(value)), torch.empty_like(q)
            options = {"grid_exponent": k}
            truth = oracle.couple(numbers(q), numbers(f), "int16", dtype_name(f), **options)
            backend.couple(y, q, f, Coupling(**options, value=value))
            assert_same(y, truth)
            assert_same_value(value, truth, k, truncates)
            truth = oracle.uncouple(numbers(q), numbers(f), "int16", dtype_name(f), **options)
            backend.uncouple(q, q, f, Coupling(**options))
            assert_same(q, truth)
            backend.couple(q, q, f, Coupling(**options))
            assert torch.equal(q, start)
            assert torch.equal(surroundings(q), around[0]) and torch.equal(surroundings(value), around[1])

    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if " of " in name or name in ("channels-last", "5-D")])
    @pytest.mark.parametrize("which", OPTIONS)
    def test_options_of_int16_streams(self, layout, which, truncates):
        """The amax is of the result before it wraps."""
        which = "channel sample checksum amax" if which == "all" else which.replace(" grid", "")  # it has one
        for branch in DTYPES:
            y, f, dy, df = LAYOUTS[layout](make_int16()), *(LAYOUTS[layout](make(d)) for d in (branch, F32, F16))
            f, value = (f * 9).contiguous(), torch.empty(y.shape, dtype=F16)
            coupling = replace(some_coupling(y, f, which + " grid"), grid_exponent=12, value=value)
            options = for_oracle(coupling)
            x = oracle.uncouple(numbers(y), numbers(f), "int16", dtype_name(f), **options)
            dx = expected(plain_sum, dy, df, truncates)
            amax = oracle.amax_before_wrapping(numbers(y), numbers(f), True, dtype_name(f), **options)
            backend.reverse_step(y, f, dy, df, coupling)
            assert_same(y, x)
            assert_same(dy, dx)
            assert_same_value(value, x, 12, truncates)
            assert_reports(coupling, y, x, amax)

    @pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
    @pytest.mark.parametrize(
        "dtype", [BF16, *(pytest.param(other, marks=pytest.mark.slow) for other in DTYPES if other != BF16)], ids=str
    )
    def test_edges_of_int16_streams(self, dtype):
        """Ties, both limits, what is infinite or NaN, and an amax of each."""
        sizes = [
            0.0,
            0.3,
            0.5,
            1.5,
            2.5,
            32767.0,
            32768.5,
            65535.0,
            8388607.0,
            8388608.0,
            8388609.0,
            16777218.0,
            2.0**31,
        ]
        sizes += [2.0**40, 3e38, 1e300, float("inf"), float("nan")]
        for size in (*sizes, *(-size for size in sizes)):
            f = torch.full((7,), size, dtype=F64).to(dtype)
            q = torch.tensor([-32768, -32767, -1, 0, 1, 2, 32767], dtype=torch.int16)
            for k in (0, 1, -126, 126):
                for subtract, kernel, operation in (
                    (0, backend.couple, oracle.couple),
                    (1, backend.uncouple, oracle.uncouple),
                ):
                    y, amax = torch.empty_like(q), torch.zeros(1)
                    kernel(y, q, f, Coupling(grid_exponent=k, amax=amax))
                    assert_same(y, operation(numbers(q), numbers(f), "int16", dtype_name(f), grid_exponent=k))
                    largest = oracle.amax_before_wrapping(
                        numbers(q), numbers(f), subtract, dtype_name(f), grid_exponent=k
                    )
                    assert_same(amax, np.array([np.float64(largest)]))

    def test_int16_streams_are_checked(self):
        """On the first call and on later ones."""
        q, f = torch.ones(8, dtype=torch.int16), torch.ones(8)
        for _ in range(2):
            for coupling in (None, Coupling(amax=torch.zeros(1))):
                with pytest.raises(TypeError, match=r"x is int16.*grid_exponent"):
                    backend.couple(q, q, f, coupling)
            with pytest.raises(TypeError, match="out is float32, x is int16"):
                backend.couple(f, q, f + 1, Coupling(grid_exponent=1))
            with pytest.raises(TypeError, match="f is int16"):
                backend.couple(q, q, q + 1, Coupling(grid_exponent=1))
            with pytest.raises(TypeError, match=r"total is int16; it must be one of float64, .*float16$"):
                backend.accumulate([q], [f])
            backend.couple(q.clone(), q, f, Coupling(grid_exponent=1))
        assert bool((q == 1).all()) and bool((f == 1).all())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_amax_hands_on_nan_and_infinity(self, dtype):
        for special in (float("nan"), float("-inf")):
            x = torch.zeros(5000, dtype=dtype)
            x[4321] = special
            amax = torch.zeros(1)
            backend.couple(x, x, torch.ones(5000, dtype=dtype), Coupling(amax=amax))
            backend.couple(torch.ones(9, dtype=dtype), torch.ones(9, dtype=dtype), torch.ones(9), Coupling(amax=amax))
            assert str(amax.abs().item()) == str(abs(special))
        amax = torch.tensor([-1], dtype=torch.int32).view(F32)  # NaN with its sign set, as a CPU makes it
        backend.couple(x, x, torch.ones(5000, dtype=dtype), Coupling(amax=amax))
        assert amax.isnan()

    def test_checksum_may_be_unsigned(self, truncates):
        x, f = make(F64)(50), make(F64)(50)
        checksum = torch.zeros(1, dtype=torch.uint64)
        truth = expected(oracle.couple, x, f, truncates)
        backend.couple(x, x, f, Coupling(checksum=checksum))
        assert int(checksum.item()) == oracle.checksum_of(truth, "float64")

    def test_an_expanded_branch(self, truncates):
        x, f = make(F32)(6, 50), make(BF16)(50).expand(6, 50)
        truth = expected(oracle.couple, x, f, truncates)
        backend.couple(x, x, f, None)
        assert_same(x, truth)

    @pytest.mark.parametrize("pairs", [1, 2, 8, 9, 70])
    def test_accumulate_lists(self, pairs, truncates):
        """Empty, tiny, one tile, more than one, misaligned, strided and mixed pairs; more than a launch takes."""
        totals, parts = [], []
        for i in range(pairs):
            stream, branch = PAIRS[i % 2 * 3 + i % 2 // 2 + (i % 5 == 4)]
            layout = (
                dense(0),
                dense(1),
                dense(33),
                dense(1024),
                dense(17, 61),
                lambda m: m(50)[1:],
                lambda m: m(9, 8).t(),
            )
            totals.append(layout[i % 7](make(stream)))
            parts.append(layout[i % 7](make(branch)).contiguous())
        truth = [expected(plain_sum, total, part, truncates) for total, part in zip(totals, parts, strict=True)]
        around = [surroundings(total) for total in totals]
        backend.accumulate(totals, parts)
        for total, values, before in zip(totals, truth, around, strict=True):
            assert_same(total, values)
            assert torch.equal(surroundings(total), before)

    def test_accumulate_lists_in_few_launches(self, monkeypatch):
        from revkernels.triton_kernels import accumulate

        launches = []

        class Counted:
            def __getitem__(self, grid):
                launches.append(grid)
                return accumulate_kernel[grid]

        accumulate_kernel = accumulate.accumulate_kernel
        monkeypatch.setattr(accumulate, "accumulate_kernel", Counted())
        totals, parts = [torch.ones(40) for _ in range(64)], [torch.ones(40) for _ in range(64)]
        backend.accumulate(totals, parts)
        assert len(launches) == 2
        assert all(bool((total == 2).all()) for total in totals)

    @pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
    def test_bad_input_is_named_and_nothing_is_written(self, warm):
        if warm:  # the first call checks everything; later ones must refuse just as much
            for array in (torch.zeros(8), torch.zeros(4)):
                backend.couple(array, array, torch.zeros_like(array), None)
                backend.reverse_step(array, *(torch.zeros_like(array) for _ in range(3)), None)
        x = torch.zeros(8)
        pair = torch.zeros(12)
        head, tail = pair[:8], pair[4:]
        bad = [
            (ValueError, r"f has shape \(4,\), x has \(8,\)", lambda: backend.couple(x, x, torch.ones(4), None)),
            (TypeError, "f is int64", lambda: backend.couple(x, x, torch.ones(8, dtype=torch.int64), None)),
            (TypeError, "f is from numpy", lambda: backend.couple(x, x, np.ones(8), None)),
            (TypeError, "f is a int", lambda: backend.couple(x, x, 3, None)),
            (ValueError, "x and f overlap", lambda: backend.couple(head, head, tail, None)),
            (ValueError, "y and dy overlap", lambda: backend.reverse_step(x, x + 1, x, x + 1, None)),
            (ValueError, r"total\[0\] and part\[1\]", lambda: backend.accumulate([x, x + 1], [x + 1, x])),
            (ValueError, r"total\[0\] and total\[1\]", lambda: backend.accumulate([x, x], [x + 1, x + 1])),
            (ValueError, "several elements in one place", lambda: backend.couple(*[x[:1].expand(8)] * 2, x + 1, None)),
        ]
        for kind, message, call in bad:
            with pytest.raises(kind, match=message):
                call()
        assert not x.any() and not pair.any()

    def test_interleaved_halves_are_not_an_overlap(self):
        """Their ranges of memory meet, and no element does: on the first call and when the launch is known."""
        for _ in range(2):
            whole = torch.arange(24.0).reshape(2, 3, 4)
            want = whole[:, :, :2] + whole[:, :, 2:]
            backend.couple(whole[:, :, :2], whole[:, :, :2].clone(), whole[:, :, 2:], None)
            assert torch.equal(whole[:, :, :2], want)
            totals = [whole[:, :, :1], whole[:, :, 1:2]]
            backend.accumulate(totals, [torch.ones(2, 3, 1)] * 2)
            assert torch.equal(whole[:, :, :2], want + 1)


@interpreted.both
def test_in_a_process_of_its_own(which):
    """Run the class above under TRITON_INTERPRET=1."""
    interpreted.run(__file__, which)


test_in_a_process_of_its_own.__test__ = not interpreted.INSIDE
