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
