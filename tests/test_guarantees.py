# SPDX-License-Identifier: Apache-2.0
"""docs/guarantees.md says what is guaranteed, docs/tests-of-guarantees.md what proves it: both must stay true."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE, TESTS = (ROOT / "docs" / name for name in ("guarantees.md", "tests-of-guarantees.md"))
ROWS = range(1, 37)
ON_GPU, NOT_RUN = "**on a GPU:**", "**not run on a GPU yet:**"
OF_A_GPU = re.compile("|".join(map(re.escape, (ON_GPU, NOT_RUN))))
NOT_TESTED = "**not tested yet**"
NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
PROOF = re.compile(r"(?ms)^### Row (\d+)\n\n([^\n]*)\.\n(.*?)(?=^#|\Z)")


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
    """Of every row: number, situation, what is guaranteed, the link to its tests."""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 4 and cells[0].isdigit():
            yield int(cells[0]), *cells[1:]


def proofs_of(tests):
    """Of every row: number, situation, whether it is said not to be tested, tests of any machine, tests of a GPU."""
    for number, situation, text in PROOF.findall(tests):
        anywhere, *on_gpu = OF_A_GPU.split(text)
        yield int(number), situation, NOT_TESTED in text, NODE.findall(anywhere), NODE.findall("".join(on_gpu))


def problems(page, tests, files):
    """What is wrong with the two pages, in words; ``files`` must all be named there."""
    rows, proofs = list(rows_of(page)), list(proofs_of(tests))
    for name, found in ((PAGE.name, rows), (TESTS.name, proofs)):
        if [row[0] for row in found] != list(ROWS):
            yield f"the rows of {name} are {[row[0] for row in found]}; they must be 1 to {ROWS[-1]}"
    for number, situation, text, link in rows:
        if not situation or not text:
            yield f"row {number} lacks its situation, or what is guaranteed"
        if link != f"[tests]({TESTS.name}#row-{number})":
            yield f"row {number} does not link to its tests, but is {link}"
    situations = {row[0]: row[1] for row in rows}
    for number, situation, untested, anywhere, on_gpu in proofs:
        if situation != situations.get(number):
            yield f"row {number} is {situation!r} among the tests, {situations.get(number)!r} in the table"
        if untested is bool(anywhere + on_gpu):
            yield f"row {number} lacks a test"
        for named, gpu in ((anywhere, False), (on_gpu, True)):
            for file, name in named:
                is_gpu, said = named_in(ROOT / file).get(name, (gpu, set())) if (ROOT / file).exists() else (gpu, set())
                if is_gpu is not gpu:
                    yield f"row {number}: {file}::{name} is {'' if is_gpu else 'not '}marked gpu"
                if said and number not in said:
                    yield f"row {number}: {file}::{name} says that it is about {sorted(said)}"
    named = NODE.findall(page + tests)
    for file, name in named:
        if not (ROOT / file).exists() or name not in named_in(ROOT / file):
            yield f"{file}::{name} does not exist"
    for file in set(files) - {file for file, _ in named}:
        yield f"{file} is named nowhere"


def files_to_name():
    found = [*(ROOT / "tests" / "behaviour").glob("test_*.py"), *(ROOT / "tests" / "distributed").glob("test_*.py")]
    return [str(path.relative_to(ROOT)) for path in sorted(found)]


def test_the_pages_are_true():
    """Every row is there, with tests that exist, run where it says, and are about it; every test file is named."""
    assert list(problems(PAGE.read_text(), TESTS.read_text(), files_to_name())) == []


@pytest.mark.parametrize("page", [PAGE, TESTS], ids=lambda page: page.name)
def test_links(page):
    """Paths in backticks lead somewhere."""
    paths = re.findall(r"`((?:tests|revkernels|docs|benchmarks)/[\w./]+?)(?:::\w+)?`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


CHANGES = {
    "a row removed": (r"(?m)^\| 17 \|.*\n", "", "the rows of guarantees.md are"),
    "a row without a section": (r"(?ms)^### Row 17\n.*?(?=^### )", "", "the rows of tests-of-guarantees.md are"),
    "a row that links to another's tests": (r"#row-5\)", "#row-6)", "row 5 does not link"),
    "a row that guarantees nothing": (r"(?m)^(\| 8 \|.*? \|).*?( \| \[tests\])", r"\1 \2", "row 8 lacks"),
    "another situation": (r"(?m)(^### Row 6\n\n).*$", r"\1Dropouts.", "row 6 is 'Dropouts'"),
    "a test renamed": (r"test_running_statistics`", "test_running_statistic`", "test_running_statistic does not exist"),
    "a file renamed": (r"behaviour/test_norms\.py", "behaviour/test_norm.py", "behaviour/test_norm.py::"),
    "a file left out": (r"`tests/behaviour/test_layouts\.py::\w+`", "", "test_layouts.py is named nowhere"),
    "a row without tests": (r"(?ms)(^### Row 29\n\n[^\n]*\n).*?(?=^### )", r"\1", "row 29 lacks a test"),
    "a test of any machine said not to have run": (r"(?m)(^### Row 4\n\n.*\n)", rf"\1{NOT_RUN}", "not marked gpu"),
    "a test of a GPU said to run anywhere": (OF_A_GPU, "", "is marked gpu"),
    "a test in another row": (
        r"(?m)(^### Row 36\n\n.*\n)",
        r"\1- `tests/behaviour/test_norms.py::test_kinds_of_norm`\n",
        "row 36: tests/behaviour/test_norms.py::test_kinds_of_norm says",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_untrue_page_is_found(change):
    """The check finds what it is there for."""
    pattern, replacement, said = CHANGES[change]
    pages = [page.read_text() for page in (PAGE, TESTS)]
    changed = [re.sub(pattern, replacement, page) for page in pages]
    assert changed != pages
    assert any(said in problem for problem in problems(*changed, files_to_name()))
