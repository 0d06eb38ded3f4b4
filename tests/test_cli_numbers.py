# SPDX-License-Identifier: Apache-2.0
"""Numbers and devices on the command line that no machine has: one line says so, before the work or without memory."""

import argparse
import shlex

import pytest

from revkernels.cli import bench, check, main
from revkernels.cli.bench_tables import command_of


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["bench", "numpy", "--threads", "99999999999"], "'99999999999'; it must be a whole number, 1 to 4096"),
        (["bench", "coupling", "--threads", "0"], "'0'; it must be a whole number, 1 to 4096"),
        (["bench", "numpy", "--rounds", "²"], "'²'; it must be a whole number, at least 2"),
        (["bench", "block", "--width", "9" * 30], "it must be a whole number, at least 1 and below 2^31"),
        (["bench", "block", "--width", "9" * 5000], "it must be a whole number, at least 1 and below 2^31"),
        (["bench", "coupling", "--device", "cpu:x"], "--device cpu:x: it must be cpu or cuda[:n]"),
        (["bench", "coupling", "--device", "cuda:x"], "--device cuda:x: it must be cpu or cuda[:n]"),
        (["bench", "coupling", "--device", "cuda:999"], "--device cuda:999: this torch sees"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_no_machine_has(words, complaint, capsys):
    if "--device" in words:
        pytest.importorskip("torch")
    with pytest.raises(SystemExit) as refused:
        raise SystemExit(main(words))
    assert refused.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 EiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 104857599998951424 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 9 EiB"),
    ],
    ids=["NumPy", "torch", "torch, CUDA"],
)
def test_too_little_memory_ends_with_one_line(error, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr(check, "run", run)
    assert main(["check"]) == 2
    assert capsys.readouterr().err == f"revkernels check: there is not enough memory: {error}\n"


def test_another_error_is_not_taken_for_it(monkeypatch):
    def run(args):
        raise RuntimeError("planted")

    monkeypatch.setattr(check, "run", run)
    with pytest.raises(RuntimeError, match="planted"):
        main(["check"])


@pytest.mark.parametrize(
    "subject", ["coupling", "numpy", "passes", "block", "network", "budget", "peers", "memory", "overhead", "jax"]
)
def test_the_command_of_a_result_line_asks_for_the_same_again(subject):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args([subject])
    words = shlex.split(command_of(args))
    assert words[:3] == ["revkernels", "bench", subject]
    assert parser.parse_args(words[2:]) == args
