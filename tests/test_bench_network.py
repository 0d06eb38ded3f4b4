# SPDX-License-Identifier: Apache-2.0
"""``bench network`` and ``bench peers`` on tiny networks: what stands beside a time is true, and failures show."""

import gc
import json
import sys

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from revkernels import cli  # noqa: E402
from revkernels.bench import network, networks  # noqa: E402
from revkernels.bench.chains import Shape, unfuse  # noqa: E402
from revkernels.bench.contenders import BASELINE, COMPILED, WAYS, Contender, Way, _budget  # noqa: E402
from revkernels.bench.equal_memory import largest_batch  # noqa: E402
from revkernels.bench.network import Job  # noqa: E402
from revkernels.bench.networks import NETWORKS, Network, Stage  # noqa: E402
from revkernels.bench.peers import PEERS, Joined  # noqa: E402
from revkernels.cli.bench_tables import command_of  # noqa: E402
from revkernels.models import Plan, RevNet  # noqa: E402
from revkernels.nn.fusion import FusedSequential  # noqa: E402

BY_NAME = {way.name: way for way in (*WAYS, *COMPILED)}
OURS = [
    BY_NAME[name]
    for name in (BASELINE, "store, fused", "checkpoint, eager", "reconstruct, eager", "reconstruct, fused")
]
STAGE = Stage(Shape(depth=6, width=4, side=8))
TINY = Network("tiny", 4, 8, lambda classes, **o: RevNet(Plan("basic", (4, 3), (8, 16), stem_width=8), classes, **o))


@pytest.fixture(autouse=True, scope="module")
def quick():
    """One thread, for several wait for each other in every tiny call; and short garbage collections.

    Each peak is measured behind a collection, which would look through all that pytest holds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


class Clock:
    """Runs everything and says that all took a second."""

    def time(self, function, operands):
        for one in operands:
            function(*one)
        return 1.0


def rows(ways, workload=STAGE, name="stage", **options):
    job = Job("peers", name, workload, ways, batch=4, rounds=2, **options)
    return {row["variant"]: row for row in network.run(job, Clock())}


def peer(chain):
    return Way("peer", "peer", chain=chain)


@pytest.mark.parametrize("workload", [STAGE, TINY], ids=["stage", "network"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_this_packages_rows(workload, dtype):
    found = rows(OURS, workload, dtype=dtype)
    assert list(found) == [way.name for way in OURS]
    assert {name: row["statistics_updates"] for name, row in found.items()} == {
        **dict.fromkeys(found, 1),
        "checkpoint, eager": 2,
    }
    # float32: what masks of ReLUs may turn; bfloat16: what it loses by itself, the same in every row.
    most, exact = {"float64": (1e-6, 1e-6), "float32": (3, 3), "bfloat16": (10, 60)}[dtype]
    assert all(row["gradient_degrees"] < most and row["float64_degrees"] < exact for row in found.values())
    assert found[BASELINE]["gradient_degrees"] == 0
    assert found["reconstruct, eager"]["peak_bytes"] < found["checkpoint, eager"]["peak_bytes"]
    assert found["checkpoint, eager"]["peak_bytes"] < found[BASELINE]["peak_bytes"]
    assert all(row["images_per_s"] == 4 and row["error"] is None for row in found.values())


@pytest.mark.parametrize("one", PEERS, ids=[one.name for one in PEERS])
def test_a_peer_computes_the_same_step(one):
    if one.version() is None:
        pytest.skip(f"{one.name} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.showwarning", lambda *args: None)  # they use what torch has deprecated
        row = rows([OURS[0], BY_NAME[one.name]], TINY, dtype="float64")[one.name]
    assert row["error"] is None and row["version"] == one.version() and row["kind"] == "peer"
    assert row["gradient_degrees"] < 1e-6
    assert row["statistics_updates"] > 1  # what docs/migration.md says of all of them
    assert one.note().startswith(one.name)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * (torch.rand_like(dy) < 0.5)


class Wrong(nn.Module):
    """The right outputs, and gradients of which half are lost."""

    def __init__(self, pairs):
        super().__init__()
        self.branches = nn.ModuleList(branch for pair in pairs for branch in pair)

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        for F, G in zip(self.branches[::2], self.branches[1::2], strict=True):
            x1 = x1 + F(WrongBackward.apply(x2))
            x2 = x2 + G(x1)
        return torch.cat((x1, x2), 1)


def test_a_wrong_backward_shows_beside_its_time():
    row = rows([OURS[0], peer(lambda pairs: Joined(Wrong(pairs)))])["peer"]
    assert row["median_s"] == 1 and row["error"] is None
    assert row["gradient_degrees"] > 5 and row["float64_degrees"] > 5


def test_a_gradient_without_direction_says_so():
    class Nan(Wrong):
        def forward(self, x):
            return super().forward(x) * float("nan")

    row = rows([OURS[0], peer(lambda pairs: Joined(Nan(pairs)))])["peer"]
    assert row["gradient_degrees"] is None and "norm nan" in row["gradient_error"]


def fails_at_once(pairs):
    raise OSError("a library\nof the past")


class FailsInTheBackward(Wrong):
    def forward(self, x):
        y = super().forward(x)
        y.register_hook(lambda dy: fails_at_once(None))
        return y


@pytest.mark.parametrize("chain", [fails_at_once, lambda pairs: Joined(FailsInTheBackward(pairs))])
def test_one_that_fails_is_a_row_with_its_error(chain):
    found = rows([OURS[0], peer(chain), OURS[-1]])
    assert list(found) == [BASELINE, "peer", "reconstruct, fused"]
    assert found["peer"]["error"] == "OSError: a library"
    assert found["peer"]["median_s"] is None and found["reconstruct, fused"]["median_s"] == 1
    assert found["peer"].keys() - {"gbps", "bytes_moved"} >= {
        "benchmark",
        "case",
        "variant",
        "ratio",
        "goals",
        "version",
    }


@pytest.mark.parametrize("one", PEERS, ids=[one.name for one in PEERS])
def test_one_that_is_missing_is_a_row(one, monkeypatch):
    for module in ("memcnn", "revlib", "revtorch", "reformer_pytorch", "reformer_pytorch.reversible"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "import of " in rows([OURS[0], BY_NAME[one.name]])[one.name]["error"]


@pytest.mark.parametrize("name", [BASELINE, "reconstruct, fused"])
def test_this_package_must_not_fail(name):
    way = Way(name, "ours", chain=fails_at_once)
    with pytest.raises(OSError, match="of the past"):
        rows([OURS[0], way] if name != BASELINE else [way])


def test_all_start_from_the_same_weights():
    first = Contender(OURS[0], TINY, "float32", "cpu", None)
    second = Contender(OURS[-1], TINY, "float32", "cpu", first.state)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(first.parameters, second.parameters, strict=True))


def test_eager_is_plain_torch_whoever_runs_it():
    """The fused norms of the models' branches would otherwise run in checkpoints and in the other libraries."""
    for way in (*OURS, peer(lambda pairs: Joined(Wrong(pairs)))):
        contender = Contender(way, TINY, "float32", "cpu", None)
        fused = [part for part in contender._call.modules() if isinstance(part, FusedSequential)]
        assert bool(fused) == way.name.endswith("fused")
    branch = FusedSequential(nn.BatchNorm2d(4), nn.ReLU())
    assert list(unfuse(branch).state_dict()) == list(FusedSequential(nn.BatchNorm2d(4), nn.ReLU()).state_dict())


FASTER = ("reconstruct, fused", "reconstruct, eager", 0.85)
MEMCNN = Way("memcnn", "peer", chain=lambda pairs: Joined(Wrong(pairs)))


def near(at_most):
    return ("reconstruct, fused", BASELINE, at_most)


@pytest.mark.parametrize(
    ("name", "dtype", "ways", "expected"),
    [
        ("revnet38", "float32", OURS, [("store, fused", BASELINE, 0.88), FASTER, near(1.15)]),
        ("revnet38", "bfloat16", OURS, [near(1.25)]),
        ("revvit_small", "float32", OURS, [near(1.25)]),
        ("stage", "float32", OURS, [FASTER]),
        ("stage", "float32", [*OURS, MEMCNN], [FASTER, ("reconstruct, fused", "memcnn", 0.6)]),
        ("other", "float32", OURS, []),
    ],
)
def test_goals_are_those_of_the_network(name, dtype, ways, expected, monkeypatch):
    monkeypatch.setattr(network, "peak_bytes", lambda step, device: 1)
    found = rows(ways, name=name, dtype=dtype)
    goals = [
        (row["variant"], g["of"], g["at_most"], g["value"], g["met"]) for row in found.values() for g in row["goals"]
    ]
    assert goals == [(*goal, 1.0, goal[-1] >= 1) for goal in expected]


@pytest.mark.parametrize(
    ("peak", "limit", "most", "expected", "tries"),
    [
        (lambda b: 10 * b, 3000, 1600, 300, 2),
        (lambda b: 1000 + 7 * b, 3000, 1600, 285, 3),
        (lambda b: 1000 + 7 * b, 3000, 150, 150, 1),
        (lambda b: 5000 + b, 3000, 1600, 0, 6),
        (lambda b: 40 * b, 3000, 1600, 75, 2),
        (lambda b: 3000 if b <= 137 else 4000, 3000, 1600, 137, 6),
    ],
)
def test_the_largest_batch_is_one_that_was_measured(peak, limit, most, expected, tries):
    measured = {100: peak(100)}

    def measure(batch):
        assert batch not in measured and 1 <= batch <= most
        measured[batch] = peak(batch)
        return measured[batch]

    found = largest_batch(measure, limit, 100, peak(100), most)
    if expected == 137:
        assert found == 0 or peak(found) <= limit  # a step is not a line; what comes out fits nevertheless
    else:
        assert found == expected
    assert len(measured) - 1 <= tries
    assert found == 0 or measured[found] <= limit


def test_equal_memory_counts_images_of_a_batch_that_fits():
    found = rows(OURS, most=4)
    assert found[BASELINE]["equal_memory_batch"] == 4
    batch = found["reconstruct, eager"]["equal_memory_batch"]
    assert 4 < batch <= 16
    assert found["reconstruct, eager"]["equal_memory_images_per_s"] == batch
    contender = Contender(BY_NAME["reconstruct, eager"], STAGE, "float32", "cpu", None)
    data = STAGE.data(batch)
    contender.step(data)
    assert network.peak_bytes(lambda: contender.step(data)) <= found[BASELINE]["peak_bytes"]


def test_progress_is_as_long_as_announced():
    for most in (0, 4):
        job, begun = Job("peers", "stage", STAGE, OURS, 4, rounds=2, most=most), []
        list(network.run(job, Clock(), begun.append))
        assert len(begun) == network.steps(job)


def test_the_memory_budget_holds_inside_alone():
    from torch._functorch import config

    before = config.activation_memory_budget
    with _budget(0.25):
        assert config.activation_memory_budget == 0.25
    assert config.activation_memory_budget == before


@pytest.mark.slow
def test_compiled_contenders_compute_the_same():
    found = rows([OURS[0], *COMPILED], dtype="float64")
    assert {row["error"] for row in found.values()} == {None}
    assert all(row["gradient_degrees"] < 1e-6 for row in found.values())
    assert found["checkpoint, compiled"]["peak_bytes"] < found["store, compiled"]["peak_bytes"]


# ---- the command line


TINY_PEERS = ["bench", "peers", "--batch", "2", "--width", "4", "--side", "8", "--depth", "4", "--rounds", "2"]


def test_peers_writes_tables_lines_and_a_picture(tmp_path):
    files = ["--json", str(tmp_path / "p.json"), "--save", str(tmp_path), "--plot", str(tmp_path / "p.png")]
    assert cli.main([*TINY_PEERS, "--dtype", "float32", "bfloat16", "--keep-memory", *files]) == 0
    tables = json.loads((tmp_path / "p.json").read_text())["tables"]
    shown = [table for table in tables if table["title"].startswith("training step")]
    assert [len(table["rows"]) for table in shown] == [len(WAYS)] * 2
    (saved,) = tmp_path.glob("*.jsonl")
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [line["variant"] for line in lines] == 2 * [way.name for way in WAYS]
    assert {line["benchmark"] for line in lines} == {"peers"}
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_network_takes_the_contenders_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", TINY)
    words = ["bench", "network", "--network", "tiny", "--rounds", "2", "--only", "reconstruct, eager", "--equal-memory"]
    assert cli.main([*words, "--json", str(tmp_path / "n.json")]) == 0
    (table,) = json.loads((tmp_path / "n.json").read_text())["tables"]
    assert [row["variant"] for row in table["rows"]] == [BASELINE, "reconstruct, eager"]
    assert table["rows"][1]["equal_batch"] >= table["rows"][0]["equal_batch"] == 4


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["network", "--network", "resnet"], "--network is 'resnet'; it must be one of revnet38, revnet110"),
        (["network", "--only", "store, compiled"], "those of torch.compile need --compile"),
        (["peers", "--only", "memcn"], "--only 'memcn': there is no such contender; there are 'store, eager'"),
        (["network", "--plot", "picture.jpg"], "picture.jpg: the name must end in .png"),
        (["network", "--plot", "no/such/folder/p.png"], "the folder no/such/folder does not exist"),
        (["network", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["peers", "--depth", "3"], "3 is odd"),
    ],
)
def test_bad_options_are_named(words, complaint, capsys):
    try:
        status = cli.main(["bench", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert complaint in capsys.readouterr().err


def test_a_network_that_the_models_lack_is_named(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "revvit_huge", NETWORKS["revnet38"])
    with pytest.raises(ValueError, match=r"'revvit_huge', which revkernels\.models does not have; there are revnet38"):
        networks.find("revvit_huge")


def test_the_command_asks_for_the_same_again():
    options = {"subject": "network", "only": ["store, fused"], "compile": True, "equal_memory": False, "plot": "x.png"}
    args = type("Args", (), {})()
    vars(args).update(options, batch=None, dtype=["float32"])
    assert command_of(args) == "revkernels bench network --only 'store, fused' --compile --dtype float32"


def test_names_in_the_picture_cover_nothing():
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    from revkernels.cli import plots

    places = [(300, 1.0), (300, 0.86), (112, 1.28), (52, 1.35), (52, 1.1), (60, 2.4), (58, 1.62), (58, 1.6), (64, 1.61)]
    drawn = [
        {
            "variant": way.name,
            "kind": way.kind,
            "baseline": BASELINE,
            "error": None,
            "peak_bytes": x * 2**20,
            "ratio": y,
        }
        for way, (x, y) in zip(WAYS, places, strict=True)
    ]
    drawn[5] |= {"error": "OSError: gone", "peak_bytes": None, "ratio": None}
    figure = plots.trade_off([("one", drawn), ("two", drawn[:5])], "a device")
    for axes, names in zip(figure.axes, (8, 5), strict=True):
        boxes = [Text.get_window_extent(text) for text in axes.texts[2:]]
        assert len(boxes) == names
        assert not [1 for k, box in enumerate(boxes) for other in boxes[:k] if box.overlaps(other)]
        points = [
            axes.transData.transform((row["peak_bytes"] / 2**20, row["ratio"]))
            for row in drawn[: names + 1]
            if not row["error"]
        ]
        assert not [1 for box in boxes for point in points[:names] if box.contains(*point)]
        inside = axes.get_window_extent()
        assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    assert "failed: memcnn" in figure.axes[0].get_xlabel()


def test_graphs_need_a_gpu(capsys):
    assert cli.main(["bench", "network", "--graphs", "--rounds", "2"]) == 2
    assert "--graphs needs --device cuda" in capsys.readouterr().err
