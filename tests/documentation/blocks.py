# SPDX-License-Identifier: Apache-2.0
"""The fenced blocks of the documentation as examples of Sybil: what runs them, and what may be left out.

    python          executed; the blocks of a page share one namespace, in order
    bash, sh        executed in a temporary folder, one a page, the environment's programs first in PATH
    c               compiled against the installed header and library, and run

An HTML comment on the line before the fence says what is special about a block:

    <!-- not run: REASON -->       it is shown only. Without this or the next two any other language is a mistake
    <!-- output -->                it is, to the letter, what the block before printed
    <!-- from: PATH -->            it is a passage of that file of the repository
    <!-- needs: NAME, NAME -->     it is left out where one of these, packages or programs, is not installed
    <!-- slow -->                  it runs in the slow tests alone

``<!-- page needs: NAME, NAME -->`` at a page's top, above its title, says the same as ``needs`` of every block of it.
"""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from revkernels import native

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 280  # seconds for a program, below pytest's own

#: Markers, and whether they say something.
MARKERS = {"not run": True, "output": False, "from": True, "needs": True, "slow": False}
SHOWN = {"not run", "output", "from"}  # with one of these nothing is executed
_COMMENT = re.compile(r"^[ \t]*<!-- (?P<name>[a-z ]+?)(?::[ \t]*(?P<said>.*?))? -->[ \t]*$")
_PAGE_NEEDS = re.compile(r"<!-- page needs: (.+) -->\n")
_FENCES = RawFencedCodeBlockLexer(re.compile(r"[ \t]*(?P<info>[^\n]*)\n"))


class Page(Document):
    """A file, with what its blocks leave to each other besides the namespace.

    Attributes:
        folder: where they run; whoever runs them sets it.
        printed: what the last one wrote on its standard output.
        finished: the lines of those that have run.
    """

    def __init__(self, text: str, path: str) -> None:
        super().__init__(text, path)
        self.folder: Path | None = None
        self.printed: str | None = None
        self.finished: set[int] = set()

    @property
    def name(self) -> str:
        path = Path(self.path)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def pages() -> list[Page]:
    """Return every page: those of docs/, and those at other places that a reader is sent to."""
    elsewhere = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
    return [Page.parse(str(path), fences) for path in [*elsewhere, *sorted((ROOT / "docs").rglob("*.md"))]]


def fences(document: Document) -> Iterator[Region]:
    """Find the fenced blocks: a parser for Sybil. Lexemes: source, info (the language), markers."""
    for region in _FENCES(document):
        region.lexemes["markers"] = dict(_above(document.text[: region.start]))
        region.parsed = region.lexemes["source"]
        region.evaluator = _evaluator(region)
        yield region


def language(example: Example) -> str:
    return example.region.lexemes["info"].strip()


def markers(example: Example) -> dict[str, str | None]:
    return example.region.lexemes["markers"]


def left_out(example: Example) -> str | None:
    """Return why a block is not executed here, or None if it is."""
    if "not run" in markers(example):
        return f"not run: {markers(example)['not run']}"
    of_page = _PAGE_NEEDS.match(example.document.text)
    wanted = _list(of_page and of_page[1]) + _list(markers(example).get("needs"))
    missing = [name for name in wanted if not _is_installed(name)]
    return f"needs {', '.join(missing)}" if missing else None


def is_slow(example: Example) -> bool:
    return "slow" in markers(example)


def run(page: Page, example: Example) -> None:
    """Run a block after those that come before it and have not run yet: any block can be asked for alone.

    Slow ones before a quick one are left out; they are for the slow tests.
    """
    for each in page:
        before = each.line < example.line and (is_slow(example) or not is_slow(each))
        if (before or each.line == example.line) and each.line not in page.finished and left_out(each) is None:
            page.finished.add(each.line)  # once, also if it fails: those after it are not all to fail with it
            each.evaluate()


def faults(page: Page) -> Iterator[str]:
    """Say what is wrong with the blocks of a page, before any is run."""
    examples = list(page)
    for example in examples:
        where = f"{page.name}:{example.line}: "
        if language(example) not in RUN and not SHOWN & markers(example).keys():
            yield f"{where}nothing runs {language(example) or 'a block without a language'!r}, and no marker says why"
        for name, said in markers(example).items():
            if name not in MARKERS:
                yield f"{where}there is no marker {name!r}; there are {', '.join(MARKERS)}"
            elif MARKERS[name] is not bool(said):
                yield f"{where}the marker {name!r} {'must say something' if MARKERS[name] else 'says nothing more'}"
        if len(SHOWN & markers(example).keys()) > 1:
            yield f"{where}more than one of {', '.join(sorted(SHOWN))}"
    tokens = MarkdownIt().parse(page.text)  # another reader of Markdown: does it see the same?
    lines = [token.map[0] + 1 for token in tokens if token.type == "fence"]
    if lines != [example.line for example in examples]:
        yield f"{page.name}: fenced blocks are at lines {lines}, and examples at {[e.line for e in examples]}"
    for token in tokens:
        if token.type == "code_block":
            yield f"{page.name}:{token.map[0] + 1}: an indented block, which nothing would run; fence it"
    used = sum(len(markers(example)) for example in examples)
    written = sum(_is_marker(line) for line in page.text.splitlines())
    if used != written:
        yield f"{page.name}: {written} markers, {used} of them on the line before a fence"


def _above(text: str) -> Iterator[tuple[str, str | None]]:
    for line in reversed(text.splitlines()):
        found = _COMMENT.match(line)
        if found is None:
            return
        yield found["name"], found["said"]


def _is_marker(line: str) -> bool:
    found = _COMMENT.match(line)
    return found is not None and found["name"] in MARKERS


def _list(names: str | None) -> list[str]:
    return [name.strip() for name in names.split(",")] if names else []


def _is_installed(name: str) -> bool:
    try:
        return shutil.which(name) is not None or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that a dotted name is in
        return False


def _evaluator(region: Region) -> Callable[[Example], None]:
    for name, evaluator in (("not run", _show), ("output", _compare_output), ("from", _compare_file)):
        if name in region.lexemes["markers"]:
            return evaluator
    return RUN.get(region.lexemes["info"].strip(), _refuse)


def _refuse(example: Example) -> None:
    raise AssertionError(f"nothing runs {language(example)!r}")


def _show(example: Example) -> None:
    """It is there to be read."""


def _compare_output(example: Example) -> None:
    assert (example.document.printed or "").rstrip() == str(example.parsed).rstrip()


def _compare_file(example: Example) -> None:
    path = ROOT / markers(example)["from"]
    assert str(example.parsed) in path.read_text(encoding="utf-8"), f"{path} has no such passage"


def _python(example: Example) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        PythonEvaluator()(example)
    example.document.printed = said.getvalue()


def _shell(example: Example) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    _program(example, ["bash", "-euo", "pipefail", "-c", example.parsed], env=env)


def _c(example: Example) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    if native.missing() is not None:
        pytest.skip(str(native.missing()))
    library = Path(native.library())
    (example.document.folder / "block.c").write_text(example.parsed)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{native.include_dir()}"]
    _program(example, ["gcc", *flags, "block.c", str(library), f"-Wl,-rpath,{library.parent}", "-lm", "-o", "block"])
    _program(example, ["./block"])


def _program(example: Example, command: list[str], **options) -> None:
    page = example.document
    done = subprocess.run(command, cwd=page.folder, capture_output=True, text=True, timeout=LIMIT, **options)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    page.printed = done.stdout


#: A language to what runs it.
RUN: dict[str, Callable[[Example], None]] = {"python": _python, "bash": _shell, "sh": _shell, "c": _c}
