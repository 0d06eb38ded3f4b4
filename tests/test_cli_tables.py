# SPDX-License-Identifier: Apache-2.0
"""Tables on terminals of every width: no digit and no word is cut off."""

import io
import re

import pytest

from revkernels.cli import output

pytest.importorskip("rich")

NETWORK = output.Table(
    "training step, RevNet-38",
    {"variant": "variant", "ms": "median, ms", "ratio": "ratio", "peak": "peak activations, MiB", "off": "off float64"}
    | {"quartiles": "quartiles", "updates": "BN updates", "goal": "goal", "reached": "reached", "version": "version"},
    [
        {"variant": "reconstruct, transitions too", "ms": 1234.5, "ratio": 0.9731, "peak": 138.2, "off": 2.2e-05}
        | {"quartiles": "1,200 to 1,300", "updates": 1, "goal": "<= 1.15 of store, eager", "reached": 1.071},
        {"variant": "reformer-pytorch", "ms": 987.6, "ratio": 2.17, "peak": 147.0, "updates": 2, "version": "1.4.4"},
    ],
    ["a note"],
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(table, columns, monkeypatch):
    """What a terminal of so many columns is sent, without colours."""
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    output.show(table, stream)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


@pytest.mark.parametrize("columns", [60, 80, 120, 132, 160, 200])
def test_all_is_there(columns, monkeypatch):
    shown = on_terminal(NETWORK, columns, monkeypatch)
    assert "…" not in shown
    assert all(len(line) <= columns for line in shown.splitlines())
    words = {word for row in [NETWORK.columns.values(), *NETWORK.cells()] for cell in row for word in cell.split()}
    assert words <= set(re.split(r"[\s│┃|]+", shown))
    assert shown.rstrip().endswith("a note")


def test_a_narrow_terminal_has_a_line_a_cell(monkeypatch):
    assert on_terminal(NETWORK, 60, monkeypatch).splitlines()[:6] == [
        "",
        "training step, RevNet-38",
        "",
        "variant                reconstruct, transitions too",
        "median, ms             1,234",
        "ratio                  0.973",
    ]


def test_a_word_that_is_too_long_is_broken(monkeypatch):
    table = output.Table("paths", {"path": "path", "n": "n"}, [{"path": "x" * 100, "n": 1}])
    shown = on_terminal(table, 60, monkeypatch)
    assert shown.count("x") == 100 and all(len(line) <= 60 for line in shown.splitlines())


def test_a_table_without_rows(monkeypatch):
    assert "n" in on_terminal(output.Table("empty", {"n": "n"}), 60, monkeypatch)


def test_a_table_without_headings_has_no_head(monkeypatch):
    table = output.Table("host", {"name": "", "value": ""}, [{"name": "python", "value": "3.11"}])
    lines = [line.strip() for line in on_terminal(table, 80, monkeypatch).splitlines()]
    assert lines == ["host", "┌────────┬──────┐", "│ python │ 3.11 │", "└────────┴──────┘"]
    assert output.plain(table).splitlines() == ["", "host", "python  3.11"]
