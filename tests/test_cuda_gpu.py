# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU, through the public functions: bits, streams, graphs, devices, errors."""

import pytest

torch = pytest.importorskip("torch")

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

from revkernels import Coupling, ops  # noqa: E402

pytestmark = pytest.mark.gpu

EVERYTHING = "channel sample grid checksum amax"
OPTION_LAYOUTS = ["second half of NCHW", "channels-last", "half of channels-last", "half of wide rows", "5-D"]
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@pytest.fixture(autouse=True)
def kernels(available):
    """Skip, and say why, where the extension was built without CUDA or the driver is too old for it."""
    available("cuda")


def bits(tensor):
    return tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])


def same(a, b):
    """Equal shapes, dtypes and stored bits, where any NaN equals any NaN."""
    either_nan = torch.isnan(a) | torch.isnan(b)
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(torch.isnan(a), torch.isnan(b))
        and torch.equal(bits(a.masked_fill(either_nan, 0)), bits(b.masked_fill(either_nan, 0)))
    )


def whole(view):
    """The memory that a view is cut from."""
    return view if view._base is None else view._base


def twin(view):
    """The same view of a copy of its memory."""
    return whole(view).clone().as_strided(view.shape, view.stride(), view.storage_offset())


def reports(coupling):
    written = ("checksum", "amax", "value")
    cells = {} if coupling is None else {name: getattr(coupling, name) for name in written}
    return {name: cell for name, cell in cells.items() if cell is not None}


def with_own_reports(coupling):
    if coupling is None:
        return None
    names = ("channel_scale", "sample_scale", "channel_dim", "grid_exponent")
    own = {name: cell.clone() for name, cell in reports(coupling).items()}
    return Coupling(**{name: getattr(coupling, name) for name in names}, **own)


def assert_as_oracle(function, *views, coupling=None):
    """Run `function` on "cuda" and on "reference": equal bits in the views, around them, and in the reports."""
    truths, truth_coupling = [twin(view) for view in views], with_own_reports(coupling)
    function(*views, backend="cuda", **({} if coupling is None else {"coupling": coupling}))
    function(*truths, backend="reference", **({} if coupling is None else {"coupling": truth_coupling}))
    for position, (view, truth) in enumerate(zip(views, truths, strict=True)):
        assert same(view, truth), f"operand {position}"
        assert same(whole(view), whole(truth)), f"operand {position}: written outside the view"
    for name, cell in reports(coupling).items():
        expected = reports(truth_coupling)[name]
        assert same(cell, expected), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("stream", "branch"), PAIRS, ids=PAIR_IDS)
def test_every_layout(layout, stream, branch):
    y, dy = layout(make(stream, device="cuda")), layout(make(stream, device="cuda"))
    f, df = layout(make(branch, device="cuda")), layout(make(branch, device="cuda"))
    assert_as_oracle(ops.couple_, y, f)
    assert_as_oracle(ops.uncouple_, y, f.contiguous())
    assert_as_oracle(ops.accumulate_, y, f)
    assert_as_oracle(ops.reverse_step_, y, f, dy, df)


@pytest.mark.parametrize("branch", DTYPES, ids=str)
@pytest.mark.parametrize("stream", DTYPES, ids=str)
def test_every_pair_of_dtypes(stream, branch):
    """A branch far smaller than the stream, so that most sums round; an odd size, so that there is a tail."""
    y, dy = (make(stream, device="cuda")(9, 1001) for _ in range(2))
    f, df = (make(branch, 1e-3, "cuda")(9, 1001) for _ in range(2))
    assert_as_oracle(ops.reverse_step_, y, f, dy, df)
    assert_as_oracle(ops.couple_, dy, f)
    for out_of_place in (ops.couple, ops.uncouple):
        assert same(out_of_place(y, f, backend="cuda"), out_of_place(y, f, backend="reference"))


def test_reverse_step_with_four_dtypes():
    y, f, dy, df = (make(dtype, device="cuda")(3, 77) for dtype in (F32, BF16, F64, F16))
    assert_as_oracle(ops.reverse_step_, y, f, dy, df)


@pytest.mark.parametrize("half", [BF16, F16], ids=str)
@pytest.mark.parametrize("wide", [F32, F64], ids=str)
def test_every_half_value_and_every_tie(half, wide):
    """All 65,536 values widen exactly; between neighbours, ties and their surroundings narrow to nearest even."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cuda").view(half)
    zeros = torch.zeros(values.shape, dtype=wide, device="cuda")
    assert same(ops.couple(zeros, values, backend="cuda"), values.to(wide) + 0)

    ordered = torch.sort(values[torch.isfinite(values)].to(F64)).values
    ties = (ordered[1:] + ordered[:-1]) / 2
    ties = torch.cat([ties, ties.new_tensor([65519.9, 65520.0, 3.39e38, 3.4e38, float("inf"), float("nan")])]).to(wide)
    away = [torch.nextafter(ties, torch.full_like(ties, limit)) for limit in (float("-inf"), float("inf"))]
    for branch in (ties, *away):
        stream = torch.zeros(branch.shape, dtype=half, device="cuda")
        assert_as_oracle(ops.couple_, stream, branch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan(dtype):
    odd = [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 3e-41, -6e-8, 60000.0]
    values = torch.tensor(odd, device="cuda").to(dtype)
    x, f = (t.reshape(-1).contiguous() for t in torch.meshgrid(*[values] * 2, indexing="ij"))
    assert_as_oracle(ops.couple_, x, f)
    assert_as_oracle(ops.uncouple_, x, f)
    coupling = Coupling(amax=torch.zeros(1, device="cuda"))
    ops.couple(x, f, coupling=coupling, backend="cuda")
    assert torch.isnan(coupling.amax)


@pytest.mark.parametrize("layout", OPTION_LAYOUTS)
@pytest.mark.parametrize("which", ["channel", "sample", "grid", "checksum", "amax", EVERYTHING])
def test_coupling_options(layout, which):
    for stream, branch in PAIRS:
        x, f = LAYOUTS[layout](make(stream, device="cuda")), LAYOUTS[layout](make(branch, 3, "cuda"))
        assert_as_oracle(ops.couple_, x, f, coupling=some_coupling(x, f, which))
        dy, df = LAYOUTS[layout](make(stream, device="cuda")), LAYOUTS[layout](make(branch, device="cuda"))
        assert_as_oracle(ops.reverse_step_, x, f, dy, df, coupling=some_coupling(x, f, which))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("branch", DTYPES, ids=str)
def test_int16_streams(branch, layout):
    check_int16_streams(assert_as_oracle, branch, layout, "cuda")


@pytest.mark.parametrize("layout", OPTION_LAYOUTS)
@pytest.mark.parametrize("which", ["channel", "sample", "checksum", "channel sample checksum amax"])
def test_options_of_int16_streams(layout, which):
    for branch, number in ((F64, F16), (F32, F32), (BF16, F64), (F16, BF16)):
        y, f = LAYOUTS[layout](make_int16("cuda")), LAYOUTS[layout](make(branch, 9, "cuda"))
        coupling = with_value(some_coupling(y, f, which), y, number, False, grid_exponent=12)
        assert_as_oracle(ops.couple_, y, f, coupling=coupling)
        y_out = ops.uncouple(y, f, coupling=with_own_reports(coupling), backend="cuda")
        assert same(y_out, ops.uncouple(y, f, coupling=with_own_reports(coupling), backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_int16_streams(dtype):
    """Ties, both limits, what is infinite or NaN, and an amax of each."""
    sizes = [0.0, 0.3, 0.5, 1.5, 2.5, 32767.0, 32768.5, 8388607.0, 8388608.0, 8388609.0, 16777218.0, 2.0**31, 2.0**40]
    sizes += [3e38, 1e300, float("inf"), float("nan")]
    q = torch.tensor([-32768, -32767, -1, 0, 1, 2, 32767] * 3, dtype=torch.int16, device="cuda")
    for size in (*sizes, *(-size for size in sizes)):
        f = torch.full(q.shape, size, dtype=F64, device="cuda").to(dtype)
        for k in (0, 1, -126, 126):
            for function in (ops.couple_, ops.uncouple_):
                coupling = Coupling(grid_exponent=k, amax=torch.zeros(1, device="cuda"))
                assert_as_oracle(function, q.clone(), f, coupling=coupling)


def test_large_int16_streams_as_on_the_host():
    """Past all blocks, with everything, and back."""
    start, f = make_int16("cuda")(64, 128, 56, 56), make(BF16, 300, "cuda")(64, 128, 56, 56)
    results = []
    for device, backend in (("cuda", "cuda"), ("cpu", "cpu")):
        y, branch, value = (
            start.to(device, copy=True),
            f.to(device),
            torch.empty(start.shape, dtype=BF16, device=device),
        )
        checksum, amax = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
        coupling = Coupling(grid_exponent=6, checksum=checksum, amax=amax, value=value)
        ops.couple_(y, branch, coupling=coupling, backend=backend)
        results.append([t.cpu().clone() for t in (y, value, checksum, amax)])
        ops.uncouple_(y, branch, coupling=Coupling(grid_exponent=6), backend=backend)
        assert torch.equal(y.cpu(), start.cpu())
    for mine, truth in zip(*results, strict=True):
        assert torch.equal(mine, truth)


def test_coupling_of_tokens():
    x, f = make(F32, device="cuda")(4, 33, 24), make(BF16, device="cuda")(4, 33, 24)
    assert_as_oracle(ops.couple_, x, f, coupling=some_coupling(x, f, EVERYTHING, channel_dim=-1))


@pytest.mark.parametrize("shape", [(64, 128, 56, 56), (10_000_019,)], ids=["images", "odd"])
def test_large_arrays_as_on_the_host(shape):
    """Every block goes round its loop; the host's kernels, being the same arithmetic, must agree in every bit."""
    on_device = [make(dtype, device="cuda")(*shape) for dtype in (F32, BF16, F32, BF16)]
    on_host = [tensor.cpu() for tensor in on_device]
    results = []
    for arrays, backend in ((on_device, "cuda"), (on_host, "cpu")):
        device = arrays[0].device
        coupling = Coupling(
            grid_exponent=12,
            checksum=torch.zeros(1, dtype=torch.int64, device=device),
            amax=torch.zeros(1, device=device),
        )
        ops.reverse_step_(*arrays, coupling=coupling, backend=backend)
        results.append([arrays[0].cpu(), arrays[2].cpu(), coupling.checksum.cpu(), coupling.amax.cpu()])
    for mine, truth in zip(*results, strict=True):
        assert torch.equal(mine, truth)


def test_more_than_2_31_elements():
    size = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 7 * size:
        pytest.skip("needs 15 GB of free device memory")
    x = torch.ones(size, dtype=BF16, device="cuda")
    f = torch.full((size,), 0.5, dtype=BF16, device="cuda")
    f[-1] = 2
    ops.couple_(x, f, backend="cuda")
    assert x[-1] == 3 and x[0] == 1.5 and x[2**31] == 1.5
    assert int((x[:-1] != 1.5).sum()) == 0


@pytest.mark.parametrize("count", [2, 111, 112, 113, 300])
def test_accumulate_lists(count):
    sizes = [1, 33, 1024, 5000, 0, 70_001]
    totals = [make(F32, device="cuda")(sizes[i % 6] + 1)[1:] for i in range(count)]  # not on 16-byte boundaries
    totals[::2] = [total.clone() for total in totals[::2]]
    parts = [make(BF16 if i % 4 == 0 else F32, device="cuda")(sizes[i % 6]) for i in range(count)]
    totals.append(make(F32, device="cuda")(40, 60).t())
    parts.append(make(F32, device="cuda")(60, 40))
    truths = [total + part for total, part in zip(totals, parts, strict=True)]
    ops.accumulate_(totals, parts, backend="cuda")
    assert all(same(total, truth) for total, truth in zip(totals, truths, strict=True))


def test_results_do_not_vary():
    x, f = make(F32, device="cuda")(64, 64, 32, 32), make(F32, device="cuda")(64, 64, 32, 32)
    checksums = set()
    for _ in range(20):
        coupling = Coupling(checksum=torch.zeros(1, dtype=torch.int64, device="cuda"))
        ops.couple(x, f, coupling=coupling, backend="cuda")
        checksums.add(int(coupling.checksum))
    assert len(checksums) == 1


def test_runs_on_the_current_stream_and_does_not_wait():
    x, f = torch.zeros(1 << 20, device="cuda"), torch.ones(1 << 20, device="cuda")
    ops.couple_(x, f, backend="cuda")  # the kernel is loaded, so that loading it does not wait below
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        x.fill_(5.0)
        ops.couple_(x, f, backend="cuda")
        assert not side.query(), "the call waited for the device"
    side.synchronize()
    assert bool((x == 6.0).all())


def test_allocates_nothing():
    y, f, dy, df = (make(F32, device="cuda")(100_000) for _ in range(4))
    ops.reverse_step_(y, f, dy, df, backend="cuda")
    torch.cuda.synchronize()
    before, unmoved = torch.cuda.memory_stats()["allocation.all.allocated"], False
    for _ in range(20):  # of the device's free memory, which other processes take from too, once has to do
        free = torch.cuda.mem_get_info()[0]
        for _ in range(10):
            ops.reverse_step_(y, f, dy, df, backend="cuda")
            ops.accumulate_([y, dy], [f, df], backend="cuda")
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        unmoved = unmoved or torch.cuda.mem_get_info()[0] == free
    assert unmoved


def test_cuda_graph():
    """Captured once, replayed on other values: the graph holds every kernel."""
    y, f, dy, df = (make(d, device="cuda")(6, 10, 7, 7) for d in (F32, BF16, F32, BF16))
    half, branch = y[:, 5:], f[:, :5].contiguous()
    checksum = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step():
        checksum.zero_()
        ops.couple_(half, branch, backend="cuda")
        ops.reverse_step_(y, f, dy, df, coupling=Coupling(grid_exponent=8, checksum=checksum), backend="cuda")
        ops.accumulate_([dy, y], [df, f], backend="cuda")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        for tensor in (y, f, dy, df, branch):
            tensor.normal_()
        saved = [tensor.clone() for tensor in (y, dy)]
        step()
        expected = [tensor.clone() for tensor in (y, dy, checksum)]
        for tensor, value in zip((y, dy), saved, strict=True):
            tensor.copy_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip((y, dy, checksum), expected, strict=True))


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, f = (make(F32, device="cuda:1")(1000) for _ in range(2))
    truth = x + f
    ops.couple_(x, f, backend="cuda")
    assert torch.cuda.current_device() == 0 and torch.equal(x, truth)
    with pytest.raises(ValueError, match="device"):
        ops.couple_(x, f.to("cuda:0"), backend="cuda")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda x, f: (x, f.cpu()), ValueError, "f"),
        (lambda x, f: (x, f[:-1]), ValueError, "shape"),
        (lambda x, f: (x, f.long()), TypeError, "f"),
        (lambda x, f: (x[1:], x[:-1]), ValueError, "overlap"),
        (lambda x, f: (x[:1].expand(64), f), ValueError, "x"),
    ],
    ids=["on the host", "short", "integers", "overlapping", "expanded"],
)
def test_refused_before_anything_is_written(spoil, error, message):
    x, f = make(F32, device="cuda")(64), make(F32, device="cuda")(64)
    before = x.clone()
    with pytest.raises(error, match=message):
        ops.couple_(*spoil(x, f), backend="cuda")
    torch.cuda.synchronize()
    assert torch.equal(x, before)


def test_host_tensors_are_refused():
    with pytest.raises(ValueError, match="cuda"):
        ops.couple_(torch.zeros(3), torch.ones(3), backend="cuda")
