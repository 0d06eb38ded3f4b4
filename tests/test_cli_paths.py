# SPDX-License-Identifier: Apache-2.0
"""Where the command line writes: pipes, full disks, files and folders. What was worked for is not lost on the way."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from revkernels.cli import check, main, output

ROOT = Path(__file__).resolve().parent.parent
SIGPIPE_STATUS = 141  # 128 + SIGPIPE


def buffered(*words, **options):
    """A process whose output Python holds back, as it does for whoever has not set PYTHONUNBUFFERED."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, *words]
    options = {"cwd": ROOT, "env": environment, "text": True, "timeout": 120, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, **options)


WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from revkernels.cli import main; sys.exit(main())"
CALLS = {
    "an option": ["-m", "revkernels", "--library"],
    "a table by rich": ["-m", "revkernels", "info"],
    "a table without rich": ["-c", WITHOUT_RICH, "info"],
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("call", CALLS)
def test_a_full_disk_is_told_where_output_is_buffered(call):
    with open("/dev/full", "w") as full:
        done = buffered(*CALLS[call], stdout=full)
    assert done.returncode == 2
    assert done.stderr.endswith("what it has to say cannot be written: No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("call", CALLS)
def test_a_reader_who_has_gone_ends_it_without_a_word(call):
    """As `head` goes, and as the shell's own tools end then."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = buffered(*CALLS[call], stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (SIGPIPE_STATUS, "")


def test_a_disk_that_cannot_be_read_is_no_failed_write(monkeypatch):
    def unreadable(args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(check, "run", unreadable)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        main(["check"])


def test_json_on_standard_output_is_all_that_is_there(tmp_path):
    """For `revkernels info --json - | jq`; the tables go where progress goes."""
    done = buffered("-m", "revkernels", "info", "--json", "-", stdout=subprocess.PIPE, cwd=tmp_path)
    assert done.returncode == 0
    content = json.loads(done.stdout)
    assert [table["title"] for table in content["tables"]] == ["revkernels", "backends"]
    assert "why it is missing" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_beside_json_a_remark_is_no_part_of_it(capsys):
    output.remark("picture: a.png", output.STDOUT)
    output.remark("picture: b.png", Path("b.json"))
    assert capsys.readouterr() == ("picture: b.png\n", "picture: a.png\n")


def test_a_file_of_that_name_is_still_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["info", "--json", "./-"]) == 0
    assert json.loads((tmp_path / "-").read_text())["command"] == "info"
    assert "why it is missing" in capsys.readouterr().out


LONG = "a" * 300


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["bench", "numpy", "--save", LONG], "File name too long"),
        (["bench", "numpy", "--save", ""], "the name is empty"),
        (["info", "--json", f"{LONG}/x.json"], "File name too long"),
        (["demo", "--out", LONG], "File name too long"),
        (["demo", "--out", ""], "the name is empty"),
        (["demo", "--out", "nowhere/picture.png"], "picture.png is the name of a picture; the folder of demo.png"),
    ],
)
def test_a_place_that_is_none_is_refused(words, complaint, tmp_path, monkeypatch, capsys):
    if words[0] == "demo":
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        raise SystemExit(main(words))
    assert refused.value.code == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_demo_makes_its_folder_when_there_is_a_picture(tmp_path, monkeypatch):
    """Not before: what it cannot serve, or is interrupted, leaves nothing behind."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from revkernels.cli import demo

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.digits, "load", interrupted)
    assert main(["demo", "--out", str(tmp_path / "new" / "folder")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_a_plot_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    from revkernels.bench import network

    monkeypatch.setattr(network, "run", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "revkernels.cli.plots", raising=False)
    monkeypatch.delattr("revkernels.cli.plots", raising=False)
    assert main(["bench", "peers", "--plot", str(tmp_path / "a.png")]) == 2
    assert "pip install 'revkernels[demo]'" in capsys.readouterr().err


def a_table():
    return output.Table("found", {"n": "n"}, [{"n": 1}])


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def nothing_to_do(monkeypatch):
    """Long work that is done at once, and a picture that cannot be written after it."""
    pytest.importorskip("sklearn")
    plots = pytest.importorskip("revkernels.cli.plots", reason="matplotlib is not installed")
    from revkernels.bench import budget, network
    from revkernels.cli import bench_budget, bench_network, demo, exact

    class Found:
        rows = ()

        def table(self):
            return a_table()

    for module, name, instead in (
        (demo, "trained", lambda name, *_: (demo.build(name), [])),
        (demo, "_step_costs", lambda *_: {}),
        (demo, "_chain_costs", lambda *_: {}),
        (demo, "_summary", lambda *_: a_table()),
        (demo, "_by_depth", lambda *_: a_table()),
        (exact, "_drift", lambda *_: Found()),
        (exact, "_trained", lambda *_: None),
        (exact, "_summary", lambda *_: a_table()),
        (exact, "_by_seed", lambda *_: a_table()),
        (network, "run", lambda *_: [{"measured": 1}]),
        (budget, "run", lambda *_: [{"measured": 1}]),
        (bench_network, "_tables", lambda *_: [a_table()]),
        (bench_budget, "_table", lambda *_: a_table()),
        *((plots, name, full) for name in plots.__all__),
    ):
        monkeypatch.setattr(module, name, instead)


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--quick"],
        ["exact"],
        ["bench", "network", "--batch", "2", "--plot", "a.png", "--save", "."],
        ["bench", "peers", "--plot", "a.png", "--save", "."],
        ["bench", "budget", "--network", "revnet38", "--plot", "a.png", "--save", "."],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("nothing_to_do")
def test_what_was_measured_outlives_a_picture_that_cannot_be_written(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("revkernels.cli._forget_output", lambda: None)  # of the tests' own process
    assert main([*words, "--json", "all.json"]) == 2
    shown = capsys.readouterr()
    assert "found" in shown.out and "No space left on device" in shown.err
    assert json.loads((tmp_path / "all.json").read_text())["tables"][0]["title"].startswith("found")
    assert "--save" not in words or '"measured": 1' in next(tmp_path.glob("*.jsonl")).read_text()


def test_what_was_measured_is_shown_where_it_cannot_be_saved(tmp_path, monkeypatch, capsys):
    from revkernels.bench import results
    from revkernels.cli import bench

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("revkernels.cli._forget_output", lambda: None)
    monkeypatch.setattr(bench, "_numpy", lambda args: ([], [a_table()]))
    monkeypatch.setattr(results, "append", full)
    assert main(["bench", "numpy", "--save", ".", "--json", "all.json"]) == 2
    shown = capsys.readouterr()
    assert "found" in shown.out and "No space left on device" in shown.err
    assert (tmp_path / "all.json").exists()


@pytest.mark.parametrize("rich", ["by rich", "without rich"])
def test_a_closed_standard_error(rich, monkeypatch, capsys):
    """As after 2>&-: progress goes nowhere, least of all between the lines of what is asked for."""
    if rich == "without rich":
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "stderr", None)
    with output.progress("work", 1) as begin:
        begin("step")
    output.remark("picture: a.png", output.STDOUT)
    output.report("info", [a_table()], output.STDOUT)
    assert json.loads(capsys.readouterr().out)["tables"][0]["title"] == "found"
