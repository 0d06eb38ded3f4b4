# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on a GPU, bit for bit against the oracle, through the public functions."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.6")

from kernel_cases import (  # noqa: E402
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    PAIR_IDS,
    PAIRS,
    check_int16_streams,
    make,
    make_int16,
    some_coupling,
    with_value,
)

from revkernels import ops  # noqa: E402
from revkernels.coupling import Coupling  # noqa: E402

pytestmark = pytest.mark.gpu

EVERYTHING = "channel sample grid checksum amax"


@pytest.fixture(autouse=True)
def kernels(available):
    """Skip, and say why, where triton finds no device that it can compile for."""
    available("triton")


def same_bits(a, b):
    """Equal shapes, dtypes and stored bits. The inputs hold no NaN."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    bits = [t.contiguous().view(-1).view(integer) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)


def twice(view):
    """The view, and the same view of a copy of its buffer."""
    base = (view if view._base is None else view._base).detach()
    return view, base.clone().as_strided(view.shape, view.stride(), view.storage_offset())


def copied(coupling):
    """The same options with reports of their own."""
    fresh = {
        name: getattr(coupling, name) for name in ("channel_scale", "sample_scale", "channel_dim", "grid_exponent")
    }
    return Coupling(
        **fresh,
        **{n: None if (c := getattr(coupling, n)) is None else c.clone() for n in ("checksum", "amax", "value")},
    )


def on_both(call, *views, coupling=None):
    """Run ``call`` on the triton backend and on the oracle; all arrays and reports must end with the same bits."""
    pairs = [twice(view) for view in views]
    for backend, arrays, options in (
        ("triton", [mine for mine, _ in pairs], coupling),
        ("reference", [truth for _, truth in pairs], None if coupling is None else copied(coupling)),
    ):
        extra = {} if coupling is None else {"coupling": options}
        call(*arrays, backend=backend, **extra)
        reference = options
    for mine, truth in pairs:
        assert same_bits(mine, truth)
        around = [t if t._base is None else t._base for t in (mine, truth)]
        assert same_bits(*around), "written outside the view"
    if coupling is not None:
        for name in ("checksum", "amax", "value"):
            if getattr(coupling, name) is not None:
                assert torch.equal(getattr(coupling, name), getattr(reference, name)), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("stream", "branch"), PAIRS, ids=PAIR_IDS)
def test_in_place(layout, stream, branch):
    x, f = layout(make(stream, device="cuda")), layout(make(branch, device="cuda"))
    on_both(ops.couple_, x, f)
    on_both(ops.uncouple_, x, f.contiguous())
    on_both(ops.accumulate_, x, f)
    dy, df = layout(make(branch, device="cuda")), layout(make(stream, device="cuda"))
    on_both(ops.reverse_step_, x, f, dy, df)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_out_of_place_keeps_strides(layout):
    x, f = layout(make(F32, device="cuda")), layout(make(BF16, device="cuda"))
    y = ops.couple(x, f, backend="triton")
    truth = ops.couple(x, f, backend="reference")
    assert y.stride() == truth.stride() and same_bits(y, truth)


@pytest.mark.parametrize("branch", DTYPES, ids=str)
@pytest.mark.parametrize("stream", DTYPES, ids=str)
def test_every_pair_of_dtypes(stream, branch):
    """The branch is far smaller, so that most sums need rounding, near-ties of float64 among them."""
    y, f, dy, df = (make(d, s, "cuda")(64, 1000) for d, s in zip((stream, branch) * 2, (1, 1e-3) * 2, strict=True))
    ties = [1.0, 2.0**-9, 2.0**-12, 2.0**-8 + 2.0**-40, 2.0**-8 - 2.0**-40, -(2.0**-45)]
    y[0, : len(ties)] = 1.0
    f[0, : len(ties)] = torch.tensor(ties, dtype=torch.float64, device="cuda").to(branch)
    on_both(ops.reverse_step_, y, f, dy, df)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if " of " in name or name in ("channels-last", "5-D")])
@pytest.mark.parametrize("which", ["channel", "sample", "grid", "checksum amax", EVERYTHING])
def test_coupling_options(layout, which):
    for stream, branch in PAIRS:
        x, f = LAYOUTS[layout](make(stream, device="cuda")), LAYOUTS[layout](make(branch, 3, "cuda"))
        on_both(ops.couple_, x, f, coupling=some_coupling(x, f, which))
        dy, df = torch.randn_like(x), torch.randn_like(f)
        on_both(ops.reverse_step_, x, f.contiguous(), dy, df, coupling=some_coupling(x, f, which))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("branch", DTYPES, ids=str)
def test_int16_streams(branch, layout):
    check_int16_streams(on_both, branch, layout, "cuda")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if " of " in name or name in ("channels-last", "5-D")])
@pytest.mark.parametrize("which", ["channel", "sample", "checksum", "channel sample checksum amax"])
def test_options_of_int16_streams(layout, which):
    for branch, number in ((F64, F16), (F32, F32), (BF16, F64), (F16, BF16)):
        y, f = LAYOUTS[layout](make_int16("cuda")), LAYOUTS[layout](make(branch, 9, "cuda"))
        coupling = with_value(some_coupling(y, f, which), y, number, False, grid_exponent=12)
        on_both(ops.couple_, y, f, coupling=coupling)
        on_both(ops.uncouple_, y, f.contiguous(), coupling=coupling)


@pytest.mark.parametrize("pairs", [2, 33, 70])
def test_accumulate_lists(pairs):
    sizes = [1, 33, 1024, 5000, 0, 70_001]
    totals = [make(F32, device="cuda")(sizes[i % 6]) for i in range(pairs)]
    parts = [make(BF16 if i % 4 == 0 else F32, device="cuda")(sizes[i % 6]) for i in range(pairs)]
    truth = [total + part for total, part in zip(totals, parts, strict=True)]
    ops.accumulate_(totals, parts, backend="triton")
    assert all(same_bits(total, t) for total, t in zip(totals, truth, strict=True))


def test_large_arrays_take_many_programs():
    y, f, dy, df = (make(d, device="cuda")(64, 128, 56, 56) for d in (F32, BF16, F32, BF16))
    truth = y.clone() - f.float(), dy.clone() + df.float()
    ops.reverse_step_(y, f, dy, df, backend="triton")
    assert same_bits(y, truth[0]) and same_bits(dy, truth[1])


def test_the_checksum_is_the_same_every_time():
    x, f = make(F32, device="cuda")(64, 64, 32, 32), make(F32, device="cuda")(64, 64, 32, 32)
    sums = set()
    for _ in range(5):
        coupling = Coupling(checksum=torch.zeros(1, dtype=torch.int64, device="cuda"))
        ops.couple(x, f, coupling=coupling, backend="triton")
        sums.add(coupling.checksum.item())
    assert len(sums) == 1 and sums != {0}


def test_rows_beyond_32_bits():
    """The second row begins 2^31 elements after the first."""
    need = 2 * 2 * (2**31 + 64)
    if torch.cuda.mem_get_info()[0] < need * 1.1:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free device memory")
    wide = torch.zeros(2, 2**31 + 64, dtype=BF16, device="cuda")
    x, f = wide[:, -50:], torch.ones(2, 50, dtype=BF16, device="cuda")
    ops.couple_(x, f, backend="triton")
    assert bool((x == 1).all()) and wide.count_nonzero() == 100


def test_on_the_callers_stream_and_in_a_graph():
    x, f = torch.zeros(4096, device="cuda"), torch.ones(4096, device="cuda")
    ops.couple_(x, f, backend="triton")  # compiled before the capture
    x.zero_()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        ops.couple_(x, f, backend="triton")
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert bool((x == 3).all())


def test_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        x, f = torch.zeros(5000, device="cuda:1"), torch.ones(5000, device="cuda:1")
        ops.couple_(x, f, backend="triton")
        assert torch.cuda.current_device() == 0
    assert bool((x == 1).all())


def test_host_memory_is_refused():
    with pytest.raises(ValueError, match="triton"):
        ops.couple_(torch.zeros(4), torch.zeros(4), backend="triton")
