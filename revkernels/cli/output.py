# SPDX-License-Identifier: Apache-2.0
"""The output of a command: tables, progress, and the same content as a JSON file.

With rich installed, tables have borders and progress is a bar; otherwise both are plain text. The content is the same.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from revkernels.cli.stamp import environment

__all__ = [
    "Table",
    "add_json_option",
    "check_folder",
    "display",
    "file_to_write",
    "folder_to_write",
    "progress",
    "remark",
    "report",
]

#: The value of ``--json -``, but not of ``./-``. The JSON then goes to standard output, and the tables to standard
#: error.
STDOUT = Path("-")

#: Width for a pipe or a file, where rich would wrap at 80.
_UNBOUNDED = 200
_LONG_WORD = 30  # longer ones, such as paths, are broken in a narrow terminal


@dataclass
class Table:
    """Rows of plain values under headings.

    Attributes:
        title: one line above the table.
        columns: key of a row to its heading, in order. Both contain the unit: ``"median_ms": "median, ms"``.
        rows: one dict per row; a missing key or None shows as "-".
        notes: lines below the table.
    """

    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """Return the rows as text."""
        return [[display(row.get(key)) for key in self.columns] for row in self.rows]

    def numeric(self) -> list[bool]:
        """Return, for each column, whether it contains only numbers."""
        return [all(_is_number(row.get(key)) for row in self.rows) for key in self.columns]


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json FILE``, rejected at once if its folder does not exist, not after the work."""
    about = "also write what the tables show to FILE; - is standard output, and the tables go to standard error"
    parser.add_argument("--json", metavar="FILE", type=_json_file, help=about)


def report(command: str, tables: Sequence[Table], json_file: Path | None = None, device: str = "cpu") -> None:
    """Print the tables and, if a file is named, write them there with the environment stamp.

    The file contains ``{"command", "environment", "tables": [{"title", "columns", "rows", "notes"}]}``.
    """
    try:
        for table in tables:
            show(table, _stream(json_file))
    finally:  # results are not lost if the terminal is gone
        if json_file is not None:
            content = {
                "command": command,
                "environment": environment(device),
                "tables": [vars(table) for table in tables],
            }
            text = json.dumps(content, indent=2) + "\n"
            if json_file is STDOUT:
                print(text, end="")
            else:
                json_file.write_text(text)


def remark(line: str, json_file: Path | None = None) -> None:
    """Print a line where `report` prints the tables."""
    print(line, file=_stream(json_file))


def _stream(json_file: Path | None) -> TextIO:
    return _open(sys.stderr if json_file is STDOUT else sys.stdout)


def _open(stream: TextIO | None) -> TextIO:
    """Replaces a closed stream (None), for which print would use standard output."""
    return io.StringIO() if stream is None else stream


def show(table: Table, stream: TextIO | None = None) -> None:
    """Print one table, with rich if it is installed, to standard output if no stream is given."""
    stream = _open(sys.stdout) if stream is None else stream
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        print(plain(table), file=stream)
        return
    # markup=False: "pip install 'revkernels[torch]'" is text here, not a style.
    console = Console(file=stream, markup=False, highlight=False, width=None if stream.isatty() else _UNBOUNDED)
    widths = _widths(table, console.width)
    shown: Any = records(table)
    if widths is not None:
        shown = RichTable(title=table.title, title_justify="left", show_header=any(table.columns.values()))
        for heading, numeric, width in zip(table.columns.values(), table.numeric(), widths, strict=True):
            shown.add_column(heading, justify="right" if numeric else "left", width=width, overflow="fold")
        for row in table.cells():
            shown.add_row(*row)
    try:
        console.print(shown)
        for note in table.notes:
            console.print(note)
    except SystemExit:  # rich exits if the reader has gone, with the status of a failed check
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None


def _widths(table: Table, room: int) -> list[int] | None:
    """Return column widths at which no word is broken, or None if there are none: rich would truncate words."""
    columns = list(zip(table.columns.values(), *table.cells(), strict=True))
    widths = [min(_LONG_WORD, max(len(word) for cell in column for word in cell.split() or [""])) for column in columns]
    spare = room - 1 - sum(width + 3 for width in widths)
    if spare < 0:
        return None
    wanted = [max(map(len, column)) for column in columns]
    while spare and widths != wanted:
        index = min((k for k in range(len(widths)) if widths[k] < wanted[k]), key=widths.__getitem__)
        widths[index] += 1
        spare -= 1
    return widths


def records(table: Table) -> str:
    """Return the table as text for a narrow terminal: row by row, one line per cell."""
    width = max(map(len, table.columns.values()))
    lines = ["", table.title]
    for row in table.cells():
        lines += ["", *(f"{name:{width}}  {cell}" for name, cell in zip(table.columns.values(), row, strict=True))]
    return "\n".join(lines)


def plain(table: Table) -> str:
    """Return the table as text in aligned columns."""
    lines = [list(table.columns.values()), *table.cells()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(line, widths, table.numeric(), strict=True)
        ).rstrip()
        for line in lines
    ]
    rule = "  ".join("-" * width for width in widths)
    head = [aligned[0], rule] if aligned[0] else []
    return "\n".join(["", table.title, *head, *aligned[1:], *table.notes])


def display(value: Any) -> str:
    """Return a value as a cell: at least three digits of a float, yes or no, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        size = abs(value)
        return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 3}f}" if size >= 0.01 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(display, value))
    return str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show progress on stderr during the ``with``: call the yielded function with a description of each step."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        rich_here = False
    else:
        rich_here = True
    if not (rich_here and _open(sys.stderr).isatty()):
        yield _plain_progress(title, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, markup=False), transient=True) as bar:
        task = bar.add_task(title, total=total)
        begun = 0

        def begin(step: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=f"{title}: {step}")
            begun += 1

        yield begin


def _plain_progress(title: str, total: int) -> Callable[[str], None]:
    begun = 0

    def begin(step: str) -> None:
        nonlocal begun
        begun += 1
        print(f"{title} {begun}/{total}: {step}", file=_open(sys.stderr), flush=True)

    return begin


def _json_file(name: str) -> Path:
    return STDOUT if name == str(STDOUT) else file_to_write(name)


def file_to_write(name: str) -> Path:
    """A writable file, rejected at once if it is not, not after the work.

    An option's default must be a string: argparse then passes it here too.
    """
    path = Path(name)
    if not name:
        raise argparse.ArgumentTypeError("the name is empty; a file name is needed")
    try:
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{name}: the folder {path.parent} does not exist")
        there = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        check_folder(path.parent)
        return path
    except OSError as error:  # the name is too long, or the folder is not accessible
        raise argparse.ArgumentTypeError(f"{name}: {error.strerror}") from None
    if stat.S_ISDIR(there):
        raise argparse.ArgumentTypeError(f"{name} is a folder; a file name is needed")
    if not os.access(path, os.W_OK):  # an existing file is overwritten, wherever it is: /dev/stdout and the like
        raise argparse.ArgumentTypeError(f"{name} is there and cannot be written")
    return path


def folder_to_write(name: str) -> Path:
    """A folder where files can be written, or that can be created; rejected at once if not, not after the work."""
    if not name:
        raise argparse.ArgumentTypeError("the name is empty; a folder is needed")
    folder = Path(name)
    try:
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    except OSError as error:  # the name is too long, or the folder is not accessible
        raise argparse.ArgumentTypeError(f"{name}: {error.strerror}") from None
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: {nearest} is a file; a folder is needed")
    check_folder(nearest)
    return folder


def check_folder(folder: Path) -> None:
    """Check that files can be created there.

    Raises:
        argparse.ArgumentTypeError: they cannot.
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{folder}: no file can be made there ({error.strerror})") from None
