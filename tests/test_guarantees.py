# SPDX-License-Identifier: Apache-2.0
"""docs/guarantees.md says what is guaranteed and which test proves it: both have to stay true."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guarantees.md"
ROWS = range(1, 37)
ON_GPU, NOT_RUN = "**on a GPU:**", "**not run on a GPU yet:**"
OF_A_GPU = re.compile("|".join(map(re.escape, (ON_GPU, NOT_RUN))))
NOT_TESTED = "**not tested yet**"
NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@functools.cache
def named_in(path):
    """The tests of a file by name: (is it marked gpu, the rows that its docstring names)."""
    module = ast.parse(path.read_text())
    marks = [node.value for node in module.body if isinstance(node, ast.Assign) and _names(node) == ["pytestmark"]]
    found = {}
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            is_gpu = any("attr='gpu'" in ast.dump(mark) for mark in (*marks, *node.decorator_list))
            said = re.match(r"Rows? ([\d, and]+)", ast.get_docstring(node) or "")
            found[node.name] = is_gpu, {int(n) for n in re.findall(r"\d+", said[1])} if said else set()
    return found


def _names(node):
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def rows_of(page):
    """Of every row: number, situation, what is guaranteed, its proof, tests of any machine in it, tests of a GPU."""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 4 and cells[0].isdigit():
            anywhere, *on_gpu = OF_A_GPU.split(cells[3])
            yield int(cells[0]), *cells[1:], NODE.findall(anywhere), NODE.findall("".join(on_gpu))


def problems(page, files):
    """What is wrong with a page, in words; ``files`` must all be named on it."""
    rows = list(rows_of(page))
    if [row[0] for row in rows] != list(ROWS):
        yield f"the rows are {[row[0] for row in rows]}; they must be 1 to {ROWS[-1]}"
    for number, situation, text, proof, anywhere, on_gpu in rows:
        if not situation or not text or (proof != NOT_TESTED) is not bool(anywhere + on_gpu):
            yield f"row {number} lacks its situation, what is guaranteed, or a test"
        for tests, gpu in ((anywhere, False), (on_gpu, True)):
            for file, name in tests:
                is_gpu, said = named_in(ROOT / file).get(name, (gpu, set())) if (ROOT / file).exists() else (gpu, set())
                if is_gpu is not gpu:
                    yield f"row {number}: {file}::{name} is {'' if is_gpu else 'not '}marked gpu"
                if said and number not in said:
                    yield f"row {number}: {file}::{name} says that it is about {sorted(said)}"
    for file, name in NODE.findall(page):
        if not (ROOT / file).exists() or name not in named_in(ROOT / file):
            yield f"{file}::{name} does not exist"
    named = {file for file, _ in NODE.findall(page)}
    for file in files:
        if file not in named:
            yield f"{file} is named nowhere"


def files_to_name():
    found = [*(ROOT / "tests" / "behaviour").glob("test_*.py"), *(ROOT / "tests" / "distributed").glob("test_*.py")]
    return [str(path.relative_to(ROOT)) for path in sorted(found)]


def test_the_page_is_true():
    """Every row is there, with tests that exist, run where it says, and are about it; every test file is named."""
    assert list(problems(PAGE.read_text(), files_to_name())) == []


def test_links():
    """Paths in backticks lead somewhere."""
    paths = re.findall(r"`((?:tests|revkernels|docs|benchmarks)/[\w./]+?)(?:::\w+)?`", PAGE.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


CHANGES = {
    "a row removed": (r"(?m)^\| 17 \|.*\n", "", "the rows are"),
    "a test renamed": (r"test_running_statistics`", "test_running_statistic`", "test_running_statistic does not exist"),
    "a file renamed": (r"behaviour/test_norms\.py", "behaviour/test_norm.py", "behaviour/test_norm.py::"),
    "a file left out": (r"`tests/behaviour/test_layouts\.py::\w+`", "", "test_layouts.py is named nowhere"),
    "a row without tests": (r"(?m)(^\| 29 \|.*\| )[^|]*\|$", r"\1 |", "row 29 lacks"),
    "a test of any machine said not to have run": (r"(?m)(^\| 4 \|.* \| )", rf"\1{NOT_RUN}", "not marked gpu"),
    "a test of a GPU said to run anywhere": (OF_A_GPU, "", "is marked gpu"),
    "a test in another row": (
        r"(?m)(^\| 36 \|.* \| )",
        r"\1`tests/behaviour/test_norms.py::test_kinds_of_norm`<br>",
        "row 36: tests/behaviour/test_norms.py::test_kinds_of_norm says",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_untrue_page_is_found(change):
    """The check finds what it is there for."""
    pattern, replacement, said = CHANGES[change]
    page = PAGE.read_text()
    changed = re.sub(pattern, replacement, page)
    assert changed != page
    assert any(said in problem for problem in problems(changed, files_to_name()))
