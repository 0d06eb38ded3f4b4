# SPDX-License-Identifier: Apache-2.0
"""The reference is made from docstrings: Griffe finds every section of theirs, and one name or error in each entry."""

import ast
import re
from pathlib import Path

import pytest

griffe = pytest.importorskip("griffe", reason="griffe is not installed (the extra docs)")

ROOT = Path(__file__).resolve().parents[2]
HEADING = re.compile(r"^(?:Args|Attributes|Raises|Returns|Yields)\b.*:$", re.MULTILINE)
SECOND = re.compile(r"[.;] (?:[a-z]\w*|[A-Z]\w*Error(?: \([^)]*\))?): ")


def docstrings():
    """Return (where, docstring) of every class and function of the package."""
    for path in sorted((ROOT / "revkernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", ast.get_docstring(node)


def faults(text):
    """What a reader of the reference would not see as such."""
    for section in griffe.Docstring(text, lineno=1).parse("google", warnings=False):
        if section.kind.value == "text":
            yield from HEADING.findall(section.value)
        elif section.kind.value in ("parameters", "attributes", "raises"):
            yield from (entry.description for entry in section.value if SECOND.search(entry.description))


def test_sections_are_found():
    assert [(where, fault) for where, text in docstrings() for fault in faults(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "It.\n\nRaises (in the call):\n    TypeError: always.",
        "It.\n\nRaises:\n    TypeError: at times. ValueError: at others.",
        "It.\n\nAttributes:\n    one: the first. other: the second.",
    ],
)
def test_what_is_a_fault(text):
    assert list(faults(text))
