# SPDX-License-Identifier: Apache-2.0
"""The command line in processes of its own: info and bench, with and without torch and rich."""

import argparse
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from revkernels import backends
from revkernels.cli import COMMANDS, check, main, output, stamp
from tests.commands import revk, tables
from tests.programs import ROOT


def test_info_shows_and_writes_the_same(tmp_path):
    done = revk("info", "--json", tmp_path / "info.json")
    assert done.returncode == 0, done.stderr
    found = tables(tmp_path / "info.json")
    assert [row["name"] for row in found["backends"]["rows"]] == list(backends.BACKENDS)
    for row in found["backends"]["rows"]:
        assert row["name"] in done.stdout
        assert row["available"] == (row["reason"] is None)


def test_results_outlive_their_terminal(tmp_path, monkeypatch):
    table = output.Table("a", {"n": "n"}, [{"n": 1}])
    monkeypatch.setattr(sys, "stdout", None)  # as after >&-
    output.report("info", [table], tmp_path / "closed.json")
    assert list(tables(tmp_path / "closed.json")) == ["a"]

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space left"):
        output.report("info", [table], tmp_path / "full.json")
    assert list(tables(tmp_path / "full.json")) == ["a"]


def test_info_does_not_import_torch():
    code = "import sys; from revkernels.cli import main; main(['info']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plain_text_without_rich():
    rich, plain = revk("info"), revk("info", without=["rich"])
    assert rich.returncode == plain.returncode == 0, plain.stderr
    assert "┃" in rich.stdout
    assert plain.stdout.isascii()
    words = {word for line in plain.stdout.splitlines() for word in line.split() if not set(word) <= {"-"}}
    assert words <= set(rich.stdout.replace("│", " ").replace("┃", " ").split())


def test_info_without_torch_says_what_is_missing():
    done = revk("info", without=["torch", "triton"])
    assert done.returncode == 0, done.stderr
    assert "torch is not installed" in done.stdout


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nonsense"], "invalid choice"),
        (["info", "--json", "no/such/folder/x.json"], "the folder no/such/folder does not exist"),
        (["bench", "coupling", "--rounds", "1"], "at least 2"),
        (["bench", "block", "--depth", "7"], "7 is odd"),
        (["bench", "block", "--device", "tpu"], "it must be cpu or cuda"),
        (["bench", "block", "--batch", "1", "--side", "1"], "one value a channel"),
        (["bench", "coupling", "--save", "README.md"], "README.md is a file"),
        (["bench", "coupling", "--save", "/proc/nowhere"], "no file can be made there"),
        (["bench", "network", "--plot", "/proc/a.png"], "no file can be made there"),
        (["info", "--json", ""], "the name is empty"),
        (["info", "--json", "a" * 300], "name too long"),
        (["bench", "network", "--graphs", "--device", "cpu:0"], "--graphs needs --device cuda"),
        (["exact", "--out", "/proc/a.png"], "no file can be made there"),
        (["drift", "--out", "/proc/a.png"], "no file can be made there"),
        (["drift", "--device", "tpu"], "it must be cpu or cuda"),
        (["drift", "--seed", "99999999999999999999"], "from 0 to 2^63 - 1"),
        (["demo", "--seed", "-1"], "from 0 to 2^63 - 1"),
    ],
)
def test_a_bad_call_exits_2_and_says_why(words, complaint, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        code = main(words)
    except SystemExit as refused:
        code = refused.code
    assert code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("words", [["drift"], ["exact"], ["demo"], ["bench", "coupling", "--save"]], ids=" ".join)
def test_a_default_place_that_cannot_be_written_is_refused_before_the_work(words, capsys, monkeypatch):
    monkeypatch.chdir("/proc")
    with pytest.raises(SystemExit) as refused:
        raise SystemExit(main(words))
    assert refused.value.code == 2
    assert "no file can be made there" in capsys.readouterr().err


def test_a_file_that_is_there_is_judged_by_itself(tmp_path, capsys, monkeypatch):
    """Not by its folder: who can make no file in /dev can still write to /dev/stdout."""
    file = tmp_path / "x.json"
    file.write_text("")
    monkeypatch.setattr(output, "check_folder", lambda folder: pytest.fail(f"{folder} was asked"))
    assert output.file_to_write(str(file)) == file
    monkeypatch.setattr(output.os, "access", lambda path, mode: False)  # tests may run as root, who can write all
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be written"):
        output.file_to_write(str(file))


def test_the_environment_variable():
    """`info` says what it does; a benchmark that compares backends does not run under it."""
    assert "REVKERNELS_BACKEND=eager takes the place" in revk("info", REVKERNELS_BACKEND="eager").stdout
    assert "does not exist" in revk("info", REVKERNELS_BACKEND="foo").stdout
    done = revk("bench", "coupling", REVKERNELS_BACKEND="eager")
    assert done.returncode == 2 and "unset it" in done.stderr


def test_bench_without_torch_names_the_extra():
    done = revk("bench", "coupling", "--rounds", "2", "--megabytes", "1", without=["torch"])
    assert done.returncode == 2
    assert "revkernels bench: it needs torch" in done.stderr
    assert "pip install 'revkernels[torch]'" in done.stderr


def test_bench_writes_what_it_shows_and_saves_lines(tmp_path):
    pytest.importorskip("torch")
    words = ["--rounds", "2", "--megabytes", "1", "--threads", "1"]
    done = revk("bench", "coupling", *words, "--save", tmp_path, "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["environment"]["threads"] == 1
    shown = [row for table in found["tables"] for row in table["rows"]]
    (saved,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [row["variant"] for row in rows] == [row["variant"] for row in shown]
    assert {row["benchmark"] for row in rows} >= {
        "couple_",
        "uncouple_",
        "accumulate_",
        "reverse_step_",
        "mixed",
        "call",
    }
    assert all(row["environment"]["threads"] == 1 and "--megabytes 1" in row["command"] for row in rows)


def test_block_and_memory_on_a_tiny_chain(tmp_path):
    pytest.importorskip("torch")
    tiny = ["--batch", "4", "--width", "8", "--side", "16", "--threads", "1"]
    done = revk("bench", "block", *tiny, "--depth", "4", "--rounds", "2", "--json", tmp_path / "block.json")
    assert done.returncode == 0, done.stderr
    (table,) = tables(tmp_path / "block.json").values()
    assert len(table["rows"]) == 5
    assert all(row["peak_mib"] > 0 for row in table["rows"])
    done = revk("bench", "memory", *tiny, "--depth", "4", "16", "--json", tmp_path / "memory.json")
    assert done.returncode == 0, done.stderr
    (table,) = tables(tmp_path / "memory.json").values()
    peaks = {row["variant"]: (row["depth_4"], row["depth_16"]) for row in table["rows"]}
    stored = peaks["store, eager"]
    assert stored[1] > 2 * stored[0]
    assert peaks["reconstruct, eager"][1] == peaks["reconstruct, eager"][0]
    shallow, deep = peaks["reconstruct, fused"]
    statistics = 12 * 2 * 2 * 4 * 8 / 2**20  # 12 branches more of two norms, each with 8 means and rstds in float32
    assert 0 <= deep - shallow <= statistics


@pytest.mark.parametrize("branch", ["scale", "stateless", "conv", "mlp"])
def test_overhead_of_the_driver(branch, tmp_path):
    """The goal is set for the first of them. Another library is in a row, or in a note that says why it is not."""
    pytest.importorskip("torch")
    from revkernels.bench.peers import PEERS

    options = "--threads", "1", "--rounds", "3", "--branch", branch
    done = revk("bench", "overhead", *options, "--json", tmp_path / "overhead.json")
    assert done.returncode == 0, done.stderr
    (table,) = tables(tmp_path / "overhead.json").values()
    rows = {row["variant"]: row for row in table["rows"]}
    assert rows["plain torch"]["ratio"] == 1
    assert rows["reconstruct, eager"]["us"] > rows["plain torch"]["us"] > 0
    failed = {note.split(" failed: ")[0] for note in table["notes"] if " failed: " in note}
    ran = {name for name in rows if "," not in name} - {"plain torch", "checkpoint"}
    assert {peer.name for peer in PEERS} == ran | failed and not ran & failed
    judged = ["reconstruct, eager", "reconstruct, fused"] if branch == "scale" else []
    assert [name for name, row in rows.items() if "met" in row] == judged


def test_stamp_holds_no_path_or_host_name():
    found = stamp.environment()
    assert found["device"] == found["cpu"] != ""
    assert found["threads"] >= 1
    assert found["numpy"] == np.__version__
    text = json.dumps(found)
    assert str(ROOT) not in text
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4


def test_plain_table_aligns_numbers_right_and_words_left():
    table = output.Table("title", {"name": "name", "ms": "ms"}, [{"name": "a", "ms": 1.5}, {"name": "bcd", "ms": None}])
    assert output.plain(table).splitlines() == ["", "title", "name     ms", "----  -----", "a     1.500", "bcd       -"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (0.97049, "0.970"),
        (1.0034, "1.003"),
        (19.93, "19.9"),
        (1234.5, "1,234"),
        (1e-6, "1e-06"),
    ],
)
def test_display(value, text):
    assert output.display(value) == text


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 2
    told = capsys.readouterr().err
    assert all(command in told for command in COMMANDS)


@pytest.mark.parametrize("when", ["run", "import"])
def test_ctrl_c_ends_with_one_line(when, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    if when == "run":
        monkeypatch.setattr(check, "run", interrupted)
    else:
        monkeypatch.setattr("revkernels.cli.importlib.import_module", interrupted)
    assert main(["check"]) == 130
    assert capsys.readouterr().err == "revkernels check: interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [("info",), ("--library",), ("info", "--json", "/dev/full")])
def test_a_full_disk_ends_with_one_line(words):
    with open("/dev/full", "w") as full:
        out = subprocess.PIPE if "--json" in words else full
        command = [sys.executable, "-m", "revkernels", *words]
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.endswith("what it has to say cannot be written: No space left on device\n")
    assert done.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--quick", "--out", str(tmp_path / "file" / "folder")])
    assert "--out" in capsys.readouterr().err
