# SPDX-License-Identifier: Apache-2.0
"""The example and the benchmark run, and say what is so."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks import bench_integrations
from integrations.common import package
from integrations.torchvision import timm_or_skip

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_example_trains_alike_in_all_three_ways(capsys):
    package("torch_geometric")
    spec = importlib.util.spec_from_file_location("revgnn", ROOT / "examples" / "revgnn.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(["--layers", "12", "--nodes", "400", "--hidden", "32", "--epochs", "8"])
    assert "12 modules changed, 0 left" in capsys.readouterr().out
    stored, theirs, ours = found.values()
    for losses, accuracy, *_ in found.values():
        assert len(losses) == 8 and losses[-1] < losses[0] and accuracy > 1.5 / example.COMMUNITIES
        # float32: a unit of 2^-24 in a first gradient is more after each step of Adam, which divides by its size
        assert losses[:2] == pytest.approx(stored[0][:2], rel=1e-4)
    assert ours[2] < stored[2] / 3 and ours[2] < 1.1 * theirs[2]


@pytest.mark.parametrize("name", bench_integrations.PACKAGES)
def test_the_benchmark_runs(name, capsys):
    if name == "timm":
        timm_or_skip()
    package({"pyg": "torch_geometric", "freia": "FrEIA"}.get(name, name))
    shallow, deep = bench_integrations.main(["--packages", name, "--depths", "2", "5", "--repeat", "1"])
    assert deep.peaks[0] > 1.5 * shallow.peaks[0] and deep.peaks[2] < 1.1 * shallow.peaks[2]
    assert all((peak is None) == (seconds is None) for peak, seconds in zip(deep.peaks, deep.seconds, strict=True))
    assert name in capsys.readouterr().out


def test_a_package_that_is_not_there_is_a_line(capsys, monkeypatch):
    def missing(depth):
        raise ImportError("No module named 'nowhere'\nand more")

    monkeypatch.setitem(bench_integrations.PACKAGES, "pyg", missing)
    assert bench_integrations.main(["--packages", "pyg"]) == []
    assert "pyg            not run: No module named 'nowhere'\n" in capsys.readouterr().out
