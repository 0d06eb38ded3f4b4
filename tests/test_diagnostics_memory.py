# SPDX-License-Identifier: Apache-2.0
"""`memory_report`: every byte held between forward and backward, whose it is and why."""

import pytest

torch = pytest.importorskip("torch")
from diagnostics_cases import images, mlp  # noqa: E402
from one_thread import one_thread_here  # noqa: E402, F401
from torch import nn  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from revkernels.diagnostics import memory_report  # noqa: E402
from revkernels.diagnostics.report import HELD, INPUT, OUTPUT, OUTSIDE, PARAMETERS, SAVED, UNSEEN  # noqa: E402
from revkernels.models import revnet38  # noqa: E402
from revkernels.nn import ReversibleBlock, ReversibleSequential  # noqa: E402

MIB = 2**20


class Stash(torch.autograd.Function):
    """x -> 2x, with a copy of x on ctx where no hook finds it."""

    @staticmethod
    def forward(ctx, x):
        ctx.mask = x.clone()
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class Stashing(nn.Module):
    def forward(self, x):
        return Stash.apply(x)


class Caching(nn.Module):
    """Keeps its result on itself, and counts its calls."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.cache = self.linear(x)
        return self.cache.tanh()


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
        return x


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(576, 5)
    )


NETS = {
    "plain": (plain, (4, 3, 8, 8)),
    "revnet": (revnet38, (2, 3, 16, 16)),
    "reversible": (lambda: images(4), (4, 16, 8, 8)),
    "stored": (lambda: images(4, activations="store"), (4, 16, 8, 8)),
    "eager": (lambda: images(4, backend="eager"), (4, 16, 8, 8)),
    "dropout": (
        lambda: ReversibleSequential(*(ReversibleBlock(nn.Dropout(0.1), nn.Linear(8, 8)) for _ in range(3))),
        (4, 16),
    ),
    "stashing": (lambda: nn.Sequential(nn.Linear(16, 16), Stashing(), Caching(16)), (4, 16)),
    "checkpointed": (Checkpointed, (8, 64)),
}


def live_after(forward):
    """Bytes that the allocator gave out and did not get back, while what ``forward`` returns is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        result = forward()
    events = session.profiler.kineto_results.events()
    del result
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.device_type() == DeviceType.CPU)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("case", NETS)
def test_the_categories_sum_to_the_live_bytes(case, autocast):
    make, shape = NETS[case]
    net, x = make(), torch.randn(shape)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
            return y, y.float().square().mean() if autocast else y.square().mean()

    forward()  # what is cached once, is
    for module in net.modules():
        module.__dict__.pop("cache", None)
    measured = live_after(forward)
    for module in net.modules():
        module.__dict__.pop("cache", None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        report = memory_report(net, x)
    assert report.held_bytes == measured
    assert sum(row.bytes for row in report.rows if row.kind in HELD) == measured
    assert report.total(UNSEEN) == 0
    assert report.total(PARAMETERS) == sum(p.nbytes for p in net.parameters())
    assert report.total(INPUT) == x.nbytes
    assert report.total("gradients") == sum(p.nbytes for p in net.parameters())
    assert report.total() == sum(report.by_kind().values())
    assert all(row.bytes > 0 or row.kind == "buffers" for row in report.rows)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (lambda: nn.LSTM(16, 32, num_layers=2, dropout=0.1), lambda: torch.randn(7, 3, 16)),
        (lambda: nn.TransformerEncoderLayer(32, 4, batch_first=True), lambda: torch.randn(2, 10, 32)),
        (lambda: nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)), lambda: torch.randint(0, 9, (5, 7))),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)), lambda: torch.randn(4, 8)),
        (
            lambda: ReversibleBlock(ReversibleBlock(nn.Linear(4, 4), torch.tanh), nn.Linear(8, 8)),
            lambda: torch.randn(4, 16),
        ),
    ],
    ids=["lstm", "transformer", "sparse", "in place", "a chain in a chain"],
)
def test_other_modules_to_the_byte(net, x):
    report = memory_report(net(), x())
    assert report.held_bytes > 0
    assert report.total(UNSEEN) == 0
    assert report.outside() == ()


def test_what_is_saved_and_cached_says_both():
    report = memory_report(nn.Sequential(nn.Linear(16, 16), Caching(16)), torch.randn(64, 16))
    (row,) = (row for row in report.rows if row.holder == "self.cache")
    assert (row.module, row.kind, row.bytes) == ("1.linear", OUTSIDE, 64 * 16 * 4)  # tanh saves its result
    kept = nn.Linear(16, 16)
    kept.register_forward_hook(lambda module, given, y: setattr(module, "seen", y))
    report = memory_report(nn.Sequential(kept, nn.SiLU()), torch.randn(64, 16))
    (row,) = (row for row in report.rows if row.holder == "self.seen")
    assert (row.module, row.kind) == ("0", SAVED)


@pytest.mark.parametrize("reversible", [True, False])
def test_a_function_that_stashes_a_mebibyte_is_named(reversible):
    size = 512
    if reversible:
        branches = (mlp(size), nn.Sequential(nn.Linear(size, size), Stashing()))
        net, x = ReversibleSequential(ReversibleBlock(*branches)), torch.randn(512, 2 * size)
        name = "0.G.1"
    else:
        net, x = nn.Sequential(nn.Linear(size, size), Stashing(), nn.Linear(size, size)), torch.randn(512, size)
        name = "1"
    (row,) = memory_report(net, x).outside()
    assert (row.module, row.kind, row.bytes, row.tensors) == (name, OUTSIDE, MIB, 1)
    assert row.operator == "aten::clone"
    assert row.holder == "ctx.mask of Stash"


def test_the_advice_names_what_is_outside():
    branch = [nn.Sequential(nn.Linear(64, 64), Stashing()) for _ in range(6)]
    net = ReversibleSequential(*(ReversibleBlock(*branch[k : k + 2]) for k in range(0, 6, 2)))
    report = memory_report(net, torch.randn(1024, 128))
    (sentence,) = (s for s in report.advice if "outside saved tensors" in s)
    assert "0.F.1 and 5 more like it hold 1.5 MiB" in sentence
    assert "ctx.mask of Stash" in sentence
    assert "no reversible library" in sentence
    assert sentence in str(report)


def test_a_module_that_caches_its_activation_is_named_and_loses_it_again():
    net = ReversibleSequential(ReversibleBlock(Caching(64), mlp(64)))
    report = memory_report(net, torch.randn(128, 128))
    (row,) = report.outside()
    assert (row.module, row.bytes) == ("0.F.linear", 128 * 64 * 4)
    assert (row.operator, row.holder) == ("aten::addmm", "self.cache")
    assert not hasattr(net[0].F, "cache")
    assert net[0].F.calls == 0


def test_arguments_and_a_loss_of_ones_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, mask, *, scale):
            return {"y": self.linear(x) * mask * scale, "n": 3}

    net, x, mask = Net(), torch.randn(4, 8), torch.ones(4, 8)
    report = memory_report(net, x, mask, scale=2.0, loss=lambda out: out["y"].abs().sum())
    assert report.total(INPUT) == x.nbytes + mask.nbytes
    assert report.total(OUTPUT) == x.nbytes + 4
    assert memory_report(net, x, mask, scale=2.0).total(OUTPUT) == x.nbytes + 4


def test_memory_that_is_shared_counts_once():
    linear = nn.Linear(8, 8)
    net = nn.Sequential(linear, nn.ReLU(), linear)
    assert memory_report(net, torch.randn(4, 8)).total(PARAMETERS) == (64 + 8) * 4
    x = torch.randn(4, 8)
    assert (
        memory_report(images(1), (torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4))).total(INPUT) == 2 * 2 * 8 * 16 * 4
    )
    assert memory_report(nn.Bilinear(8, 8, 3), x, x[:]).total(INPUT) == x.nbytes


def test_it_prints_as_a_table():
    text = str(memory_report(revnet38(), torch.randn(2, 3, 16, 16)))
    lines = text.splitlines()
    assert lines[0].startswith("One training step on cpu: ")
    assert text.isascii()
    rule = next(line for line in lines if set(line) == {"-", " "})
    column = rule.index(" ")
    assert all(line[column : column + 2] == "  " for line in lines[1:6])
    assert "stages.0.1" in text
    assert "block 1, branch G (BasicBranch)" in text
    assert memory_report(plain(), torch.randn(2, 3, 8, 8)).as_dicts()[0].keys() >= {
        "module",
        "kind",
        "bytes",
        "operator",
    }


def test_bad_arguments():
    x = torch.randn(4, 8)
    with pytest.raises(TypeError, match=r"net is a function; it must be an nn\.Module"):
        memory_report(lambda x: x, x)
    with pytest.raises(TypeError, match="loss is a int; it must be a function"):
        memory_report(nn.Linear(8, 8), x, loss=3)
    with pytest.raises(ValueError, match=r"the loss is a tensor of shape \(4, 8\)"):
        memory_report(nn.Linear(8, 8), x, loss=lambda y: y)
    with pytest.raises(ValueError, match="the loss is a float"):
        memory_report(nn.Linear(8, 8), x, loss=lambda y: 1.0)
    with pytest.raises(ValueError, match="has no shape yet"):
        memory_report(nn.LazyLinear(8), x)
    with pytest.raises(ValueError, match="no output is a floating-point tensor"):
        memory_report(nn.ReLU(), torch.arange(3))


@pytest.mark.gpu
def test_on_a_gpu():
    net = nn.Sequential(nn.Conv2d(3, 16, 1), images(4), Stashing()).cuda()
    x = torch.randn(64, 3, 32, 32, device="cuda")
    report = memory_report(net, x)
    assert sum(row.bytes for row in report.rows if row.kind in HELD) == report.held_bytes
    assert abs(report.total(UNSEEN)) < 0.05 * report.held_bytes
    (row,) = report.outside()
    assert (row.module, row.holder, row.bytes) == ("2", "ctx.mask of Stash", 64 * 16 * 32 * 32 * 4)
    assert report.chains[0].largest_frame_bytes > 0
