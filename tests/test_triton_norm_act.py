# SPDX-License-Identifier: Apache-2.0
"""norm_act and its relatives in Triton, run by Triton's interpreter on CPU tensors, against the oracle.

As in test_triton_interpreter.py all of it happens in a process of its own.
"""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.6")

import interpreted  # noqa: E402
from interpreted_norms import TILES, rounding  # noqa: E402, F401 (a fixture)
from norm_cases import (  # noqa: E402
    EPSILON,
    KINDS,
    LAYOUTS,
    Operand,
    Oracle,
    lattice,
    norm_for,
    normal,
    some_statistics,
    vector,
    wide_of,
)
from operands import as_float64, assert_same_bits, values_for  # noqa: E402

from revkernels.norm import SUMS_COMPUTED, SUMS_GIVEN, SUMS_ONLY, Norm, Statistics  # noqa: E402
from revkernels.triton_kernels import backend, norm_backend, norm_launch  # noqa: E402

DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float64", "float64"), ("float16", "float32"),
          ("float32", "bfloat16"), ("bfloat16", "float64")]  # fmt: skip


@pytest.fixture(params=[pytest.param("as they are", marks=pytest.mark.slow), "many"])
def tiles(request, monkeypatch):
    """Once with the tiles as they are; once so that programs take several of them, and rows take several tiles."""
    for name, value in TILES[request.param].items():
        monkeypatch.setattr(norm_launch, name, value)
    monkeypatch.setattr(norm_backend, "_prepared", {})
    return request.param


def special(seed):
    """Zeros of both signs, NaN, infinities, tiny and huge numbers among others."""
    return lambda shape: values_for(shape, "float64", seed)


def some_dtypes(*of):
    """Another pair of dtypes for another case, so that all of them meet all kinds and many layouts."""
    return DTYPES[sum(list(LAYOUTS).index(o) if o in LAYOUTS else len(o) for o in of) % len(DTYPES)]


def few_samples(layout, kind):
    """Another layout for a group norm that would take many programs, which is slow in the interpreter."""
    return "half of tokens" if kind == "group" and layout in ("channels first of all", "half of rows") else layout


def empty_statistics(norm, x, wide):
    made = [torch.full(norm.statistics_shape(tuple(x.shape)), float("nan"), dtype=getattr(torch, wide)) for _ in "mr"]
    return Statistics(None if norm.kind == "rms" else made[0], made[1])


def assert_statistics(norm, values, found, wide):
    """As in test_norm_act.py: sums that begin near the mean are off by a few roundings of the deviation, whatever the
    mean; and both results are rounded."""
    mean, rstd, variance = (s.astype(np.float64) for s in Oracle(norm, values.shape, wide).statistics(values))
    if norm.kind != "rms":
        off = np.abs(as_float64(found.mean).ravel() - mean)
        assert (off <= EPSILON[wide] * (2.01 * np.abs(mean) + 16 * np.sqrt(variance + norm.eps))).all()
    assert (np.abs(as_float64(found.rstd).ravel() - rstd) <= 16 * EPSILON[wide] * rstd).all()


class TestInterpreted:
    __test__ = interpreted.INSIDE

    @pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_given_statistics(self, layout, kind):
        """Every bit, for NaN, infinities and zeros of both signs too; nothing beside h is written."""
        dtypes = some_dtypes(layout, kind)
        for activation, parameters in (("none", ("float32", None)), ("relu", (None, "bfloat16"))):
            x, h = (Operand(layout, dtype, special(n)) for n, dtype in enumerate(dtypes))
            weight, bias = (None if p is None else vector((x.array.shape[x.axis],), p, normal(3)) for p in parameters)
            norm = norm_for(kind, x.array, x.axis, activation)
            norm = Norm(kind, weight, bias, 0.1, activation, norm.groups, x.axis)
            statistics = some_statistics(norm, x.array, wide_of(dtypes[0]))
            backend.norm_act(h.array, x.array, norm, *statistics, True)
            expected = Oracle(norm, x.array.shape, wide_of(dtypes[0])).h(x.values, statistics, dtypes[1])
            assert_same_bits(h.values, expected, f"h of {activation}")
            assert_same_bits(*h.outside(), "memory beside h")
            assert_same_bits(as_float64(x.memory), x.before, "x")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("layout", "subtract"),
        [  # every layout and both signs; the other half in `make test-all`
            pytest.param(layout, subtract, marks=pytest.mark.slow if subtract == layout.startswith("c") else [])
            for layout in ("half of rows", "channels last", "half of an image", "channels first of all")
            for subtract in (False, True)
        ],
    )
    def test_coupled(self, layout, kind, subtract, tiles):
        """The stream has `couple`'s bits; h those that it has of the stream as it was stored."""
        layout = few_samples(layout, kind)
        call = backend.uncouple_norm_act if subtract else backend.couple_norm_act
        alone = backend.uncouple if subtract else backend.couple
        for in_place, given in itertools.product((False, True), repeat=2):
            dtypes = some_dtypes(layout, kind, "x" * (2 * in_place + given))
            x, f, h, y = (Operand(layout, dtype, normal(n)) for n, dtype in enumerate((*dtypes, dtypes[1], dtypes[0])))
            y, wide = x if in_place else y, wide_of(*dtypes)
            norm = norm_for(kind, x.array, x.axis, "relu")
            statistics = some_statistics(norm, x.array, wide) if given else empty_statistics(norm, x.array, wide)
            expected = torch.empty_like(x.array)
            alone(expected, x.array, f.array, None)
            call(h.array, y.array, x.array, f.array, norm, *statistics, given)
            assert_same_bits(y.values, as_float64(expected), "the stream")
            if not given:
                assert_statistics(norm, y.values, statistics, wide)
            assert_same_bits(h.values, Oracle(norm, h.array.shape, wide).h(y.values, statistics, dtypes[1]), "h")
            for operand in (x, f, h, y):
                assert_same_bits(*operand.outside(), "memory beside a view")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("layout", "shape"), [("image", (2, 6, 21, 20)), ("last", (2, 6, 21, 20)), ("rows", (40, 21))]
    )
    def test_a_mean_far_from_zero(self, layout, shape, kind, tiles):
        """Mean 1e4, deviation 1, and a first value that is far from all others."""
        if kind == "group" and layout == "rows":
            shape = (5, 21)  # a program for each sample and group takes its time
        for dtype, outlier in (("float32", None), ("float32", 1e4), ("float64", None)):
            x = torch.from_numpy(normal(4, 1e4 if outlier is None else 0.0)(shape)).to(getattr(torch, dtype))
            if outlier is not None:
                x[(0, slice(None), *[0] * (x.dim() - 2))] = outlier
            x = x.contiguous(memory_format=torch.channels_last) if layout == "last" else x
            norm = norm_for(kind, x, 1)
            statistics = empty_statistics(norm, x, dtype)
            backend.norm_act(torch.empty_like(x), x, norm, *statistics, False)
            assert_statistics(norm, as_float64(x), statistics, dtype)

    def test_running_statistics(self):
        """running <- (1 - momentum) running + momentum batch, the variance unbiased; within their own rounding."""
        x = torch.from_numpy(normal(6, 2.0)((4, 6, 5))).float()
        batch = as_float64(x).transpose(1, 0, 2).reshape(6, -1)
        batch = batch.mean(1), batch.var(1, ddof=1)
        for dtype, momentum in (("float64", 0.0), ("float32", 0.1), ("bfloat16", 1.0), ("float64", 0.3)):
            running = [vector((6,), dtype, normal(n, 1.0)) for n in (7, 8)]
            before = [as_float64(r) for r in running]
            norm = Norm("batch", running_mean=running[0], running_var=running[1], momentum=momentum)
            statistics = empty_statistics(norm, x, "float32")
            for given in (False, True):  # with statistics given they stay as they are
                backend.norm_act(torch.empty_like(x), x, norm, *statistics, given)
                for got, old, new in zip(running, before, batch, strict=True):
                    bound = 2 * max(EPSILON[dtype], EPSILON["float64"] + 2 * EPSILON["float32"] * (momentum > 0))
                    expected = (1 - momentum) * old + momentum * new
                    assert (np.abs(as_float64(got) - expected) <= bound * (np.abs(old) + np.abs(new))).all()

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_tanh"])
    def test_smooth_activations(self, activation, dtype):
        """Value and slope within 4 last places, 8 eps: of |h|, and of 1 for the slope, which has zeros.

        What an exponent is off by is not the kernel's arithmetic alone: u of gelu_tanh is made with 3 roundings, and
        the oracle's erfc rounds z / sqrt(2), which is a relative error of z^2 eps in float64.
        """
        z = torch.linspace(-14, 14, 3001, dtype=getattr(torch, dtype))[:, None]
        norm = Norm("batch", activation=activation)
        mean, rstd = torch.zeros(1, dtype=z.dtype), torch.ones(1, dtype=z.dtype)
        h, slope, sums = torch.empty_like(z), torch.empty_like(z), [torch.empty_like(mean) for _ in range(2)]
        backend.norm_act(h, z, norm, mean, rstd, True)
        backend.norm_act_backward(
            slope, None, torch.ones_like(z), z, norm, mean, rstd, *sums, SUMS_COMPUTED, 0, True
        )  # fmt: skip
        oracle, values = Oracle(norm, z.shape, dtype), as_float64(z)
        expected = oracle.h(values, (mean, rstd), "float64")
        grows = {
            "gelu_tanh": 6 * np.abs(1.6 * (values + 0.045 * values**3)),
            "gelu": values**2 * (dtype == "float64"),
        }.get(activation, 0)
        bound = EPSILON[dtype] * (8 + grows) * np.abs(expected) + 1e-43
        assert (np.abs(as_float64(h) - expected) <= bound).all()
        ones = np.ones(values.shape)
        expected, _, _ = oracle.gradients(None, ones, values, (mean, rstd), "float64", constant=True)
        assert (np.abs(as_float64(slope) - expected) <= EPSILON[dtype] * 8).all()

    @pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
    def test_activations_far_out(self):
        """Limits at huge and infinite z, where a formula taken literally has infinity times 0."""
        z = torch.tensor([[-np.inf, -1e30, -200.0, 200.0, 1e30, np.inf, np.nan]]).T
        mean, rstd, sums = torch.zeros(1), torch.ones(1), (torch.zeros(1), torch.zeros(1))
        for activation in ("gelu", "gelu_tanh", "silu"):
            h, dz = torch.empty_like(z), torch.empty_like(z)
            norm = Norm("batch", activation=activation)
            backend.norm_act(h, z, norm, mean, rstd, True)
            backend.norm_act_backward(dz, None, torch.ones_like(z), z, norm, mean, rstd, *sums, SUMS_GIVEN, 0, True)
            assert h[1:6, 0].tolist() == [0.0, 0.0, 200.0, z[4].item(), np.inf]
            assert dz[:6, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
            assert h[6].isnan() and dz[6].isnan()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("layout", ["half of rows", "half of channels last", "image", "channels first of all"])
    def test_gradient(self, layout, kind, tiles):
        """dx, dweight and dbias of numbers small enough that only divisions and the last steps round, and base's three
        ways. m(.) of a count that is no power of two is rounded; dx then has a bound, a few eps of its terms."""
        layout = few_samples(layout, kind)
        for base_is, activation in (("dx", "relu"), ("apart", "none"), ("none", "relu")):
            dtypes = some_dtypes(layout, kind, base_is)
            x, dh, dx, base = (
                Operand(layout, dtype, lattice(n, 3, 0.5)) for n, dtype in enumerate((*dtypes, dtypes[0], dtypes[0]))
            )
            wide = wide_of(dtypes[0])
            norm = norm_for(kind, x.array, x.axis, activation, values=lambda seed: lattice(seed, 2))
            statistics = some_statistics(norm, x.array, wide, lambda seed: lattice(seed, 2))
            base = {"dx": dx, "apart": base, "none": None}[base_is]
            start = None if base is None else base.values
            oracle = Oracle(norm, x.array.shape, wide)
            expected, *sums = oracle.gradients(start, dh.values, x.values, statistics, "float64")
            found = [torch.full((x.array.shape[x.axis],), np.nan, dtype=statistics.rstd.dtype) for _ in range(2)]
            into = None if base is None else base.array
            backend.norm_act_backward(
                dx.array, into, dh.array, x.array, norm, *statistics, *found, SUMS_COMPUTED, 0, False
            )
            for got, right, name in zip(found, sums, ("dweight", "dbias"), strict=True):
                assert_same_bits(as_float64(got), right, name)
            terms = 40 * np.abs(as_float64(statistics.rstd)).max() * np.abs(as_float64(norm.weight)).max()
            bound = EPSILON[wide] * terms + EPSILON[dtypes[0]] * 2 * np.abs(expected)
            assert (np.abs(dx.values - expected) <= bound).all()
            assert_same_bits(*dx.outside(), "memory beside dx")

    @pytest.mark.parametrize("layout", ["rows", "image", "half of channels last"])
    def test_given_sums_and_constant_statistics(self, layout, tiles):
        """Bits: with the sums given, with statistics that are constants; and sums alone are those of the whole call."""
        for (x_dtype, h_dtype), activation in zip(DTYPES[:4], ("none", "relu", "none", "relu"), strict=True):
            x, dh, dx = (Operand(layout, dtype, normal(n)) for n, dtype in enumerate((x_dtype, h_dtype, x_dtype)))
            norm = norm_for("batch", x.array, x.axis, activation)
            statistics = some_statistics(norm, x.array, wide_of(x_dtype))
            oracle, channels = Oracle(norm, x.array.shape, wide_of(x_dtype)), (x.array.shape[x.axis],)
            for constant, count in ((True, 0), (False, 0), (False, 12345)):
                sums = [vector(channels, wide_of(x_dtype), normal(n)) for n in (30, 31)]
                expected, _, _ = oracle.gradients(
                    dx.values, dh.values, x.values, statistics, x_dtype,
                    sums=[as_float64(s) for s in sums], count=count, constant=constant,
                )  # fmt: skip
                backend.norm_act_backward(
                    dx.array, dx.array, dh.array, x.array, norm, *statistics, *sums, SUMS_GIVEN, count, constant
                )
                assert_same_bits(dx.values, expected, f"dx {constant} {count}")
            alone, whole = ([torch.zeros_like(s) for s in sums] for _ in range(2))
            shared = dh.array, x.array, norm, *statistics
            backend.norm_act_backward(None, None, *shared, *alone, SUMS_ONLY, 0, False)
            backend.norm_act_backward(dx.array, None, *shared, *whole, SUMS_COMPUTED, 0, False)
            assert all(torch.equal(a, b) and a.any() for a, b in zip(alone, whole, strict=True))

    @pytest.mark.parametrize("kind", ["layer", "rms", "group"])
    def test_sums_that_nobody_wants(self, kind, tiles):
        """dx is the same without dweight, dbias or either."""
        x, dh = (torch.randn(3, 24) for _ in range(2))
        norm = norm_for(kind, x, 1, "gelu")
        statistics = some_statistics(norm, x, "float32")
        results = []
        for wanted in itertools.product((False, True), repeat=2):
            dx, sums = torch.zeros(x.shape), [torch.zeros(24) if want else None for want in wanted]
            backend.norm_act_backward(dx, None, dh, x, norm, *statistics, *sums, SUMS_COMPUTED, 0, False)
            results.append((dx, *sums))
        for dx, dweight, dbias in results:
            assert torch.equal(dx, results[-1][0]) and dx.any()
            assert dweight is None or torch.equal(dweight, results[-1][1])
            assert dbias is None or torch.equal(dbias, results[-1][2])

    def test_launches(self, monkeypatch):
        """Row norms take one kernel forward, and with their parameters' gradients two; batch norm three and three."""
        launches = []
        kernels = norm_launch._kernel
        monkeypatch.setattr(norm_launch, "_kernel", lambda *name: launches.append(name[1]) or kernels(*name))
        x, f, h, dh = (torch.randn(6, 40) for _ in range(4))
        counts = {}
        for kind in ("batch", "layer"):
            norm = norm_for(kind, x, 1, "silu")
            statistics, sums = empty_statistics(norm, x, "float32"), [torch.zeros(40), torch.zeros(40)]
            seen = []
            for call in (
                lambda: backend.couple_norm_act(h, x, x, f, norm, *statistics, False),  # noqa: B023
                lambda: backend.uncouple_norm_act(h, x, x, f, norm, *statistics, True),  # noqa: B023
                lambda: backend.norm_act_backward(x, x, dh, f, norm, *statistics, *sums, SUMS_COMPUTED, 0, False),  # noqa: B023
            ):
                launches.clear()
                call()
                seen.append(len(launches))
            counts[kind] = seen
        assert counts == {"batch": [3, 1, 3], "layer": [1, 1, 2]}

    @pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
    def test_bad_input_is_named_and_nothing_is_written(self, warm):
        def arrays():
            return [torch.zeros(4, 6) for _ in range(3)]

        norm = Norm("layer", torch.ones(6))
        if warm:  # the first call checks everything; later ones must refuse just as much
            x, f, h = arrays()
            backend.norm_act(h, x, norm, torch.zeros(4), torch.zeros(4), False)
            backend.couple_norm_act(h, x, x, f, norm, torch.zeros(4), torch.zeros(4), False)
            backend.norm_act_backward(h, None, f, x, norm, *torch.zeros(2, 4), *torch.zeros(2, 6), 0, 0, False)
        x, f, h = arrays()
        mean, rstd, dweight, dbias = torch.zeros(4), torch.zeros(4), torch.zeros(6), torch.zeros(6)
        whole = torch.zeros(4, 4, 6, 6)
        crop = whole[:, :, 1:5, 1:5]
        bad = [
            (ValueError, "f has shape", lambda: backend.couple_norm_act(h, x, x, f[:, :5], norm, mean, rstd, False)),
            (TypeError, "h is a int", lambda: backend.norm_act(3, x, norm, mean, rstd, False)),
            (TypeError, "x is int64", lambda: backend.norm_act(h, x.long(), norm, mean, rstd, False)),
            (TypeError, "rstd is float64", lambda: backend.norm_act(h, x, norm, mean, rstd.double(), False)),
            (ValueError, "weight has shape", lambda: backend.norm_act(
                h, x, Norm("layer", torch.ones(5)), mean, rstd, False)),
            (ValueError, "h and x overlap", lambda: backend.norm_act(x, x, norm, mean, rstd, False)),
            (ValueError, "h and weight overlap", lambda: backend.norm_act(
                h, x, Norm("layer", h[0]), mean, rstd, False)),
            (ValueError, "overlap", lambda: backend.norm_act(h, x, norm, mean, mean, False)),
            (ValueError, "dx and dh overlap", lambda: backend.norm_act_backward(
                f, None, f, x, norm, mean, rstd, dweight, dbias, 0, 0, False)),
            (ValueError, "dweight and dbias overlap", lambda: backend.norm_act_backward(
                h, None, f, x, norm, mean, rstd, dweight, dweight, 0, 0, False)),
            (ValueError, "must merge", lambda: backend.norm_act(
                torch.zeros(4, 4, 4, 4), crop, Norm("batch"), torch.zeros(4), torch.zeros(4), False)),
        ]  # fmt: skip
        for kind, message, call in bad:
            with pytest.raises(kind, match=message):
                call()
        assert not any(array.any() for array in (x, f, h, mean, rstd, dweight, dbias, whole))


@interpreted.both
def test_in_a_process_of_its_own(which):
    """Run the class above under TRITON_INTERPRET=1."""
    interpreted.run(__file__, which, "-k", "Interpreted")


test_in_a_process_of_its_own.__test__ = not interpreted.INSIDE
