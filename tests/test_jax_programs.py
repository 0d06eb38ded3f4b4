# SPDX-License-Identifier: Apache-2.0
"""Whole programs: the example and the benchmark."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax_cases  # noqa: F401  skips where jax is missing
import pytest

from revkernels.cli import main

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["bench", "jax", "--depth", "4", "--batch", "2", "--side", "4", "--width", "4", "--rounds", "2"]


@pytest.mark.slow
def test_example():
    """It learns; four times the blocks need the same memory but for gradients, where stored ones need four times."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    command = [sys.executable, str(ROOT / "examples" / "jax_train.py"), "--blocks", "2", "--epochs", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    shallow, deep, result = done.stdout.splitlines()
    (few, few_gradients, few_stored), (many, many_gradients, many_stored) = (
        map(float, re.findall(r"[\d.]+(?= MiB| of it)", line)) for line in (shallow, deep)
    )
    assert abs((many - many_gradients) - (few - few_gradients)) < 0.15 * few
    assert many_stored > 3 * few_stored
    assert float(re.search(r"([\d.]+)% of the test digits", result)[1]) > 90


@pytest.mark.parametrize(
    "options",
    [pytest.param([], marks=pytest.mark.slow), ["--branch", "mlp", "--scan"]],
    ids=["conv", "mlp in a scan"],
)
def test_benchmark(options, tmp_path, capsys):
    """A row for every way, with time, memory and time to compile; a result line for every row."""
    from revkernels.bench.jax_chain import WAYS

    out = tmp_path / "out.json"
    assert main([*SMALL, *options, "--json", str(out), "--save", str(tmp_path)]) == 0
    (table,) = json.loads(out.read_text())["tables"]
    assert [row["variant"] for row in table["rows"]] == list(WAYS)
    assert all(row["temp_mib"] > 0 and row["compile_s"] > 0 and row["median_ms"] > 0 for row in table["rows"])
    (saved,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [row["variant"] for row in rows] == list(WAYS)
    assert all(row["jax"] and row["temp_bytes"] and row["command"].startswith("revkernels bench jax") for row in rows)
    assert "temporary memory" in capsys.readouterr().out


def test_what_the_benchmark_refuses(capsys, monkeypatch):
    assert main(["bench", "jax", "--device", "abacus"]) == 2
    assert "--device abacus" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "revkernels.adapters.jax", None)
    assert main(SMALL) == 2
    assert capsys.readouterr().err.startswith("revkernels bench: ")
