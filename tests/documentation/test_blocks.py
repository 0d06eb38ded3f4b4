# SPDX-License-Identifier: Apache-2.0
"""The blocks of a page are run as `blocks` says, and nothing that it forbids goes by."""

import pytest

pytest.importorskip("sybil", reason="sybil, which finds and runs the blocks, is not installed")

from documentation.blocks import Page, faults, fences, is_slow, left_out, run


@pytest.fixture
def page_of(tmp_path):
    """page_of(text) -> the page, whose blocks run in a folder of the test's."""

    def make(text):
        path = tmp_path / "page.md"
        path.write_text(text)
        page = Page.parse(str(path), fences)
        page.folder = tmp_path
        return page

    return make


def block(language, *lines, above=()):
    return "\n".join([*(f"<!-- {marker} -->" for marker in above), f"```{language}", *lines, "```", "", ""])


def run_all(page):
    for example in page:
        if left_out(example) is None:
            run(page, example)


PROGRAM = ("#include <revkernels/revkernels.h>", "#include <stdio.h>", "int main(void) {")

RIGHT = {
    "python shares a namespace": block("python", "a = 1") + "Text.\n\n" + block("python", "assert a == 1"),
    "what python prints": block("python", "print('b')") + block("text", "b", above=["output"]),
    "what a program prints": block("sh", "echo c > d") + block("bash", "cat d") + block("", "c", above=["output"]),
    "bash finds this python": block("bash", "python -c 'import revkernels'"),
    "c": block("c", *PROGRAM, '  return printf("%d\\n", REVK_OK) < 0;', "}") + block("text", "0", above=["output"]),
    "from a file": block("c", "static int failures = 0;", above=["from: examples/c_host/main.c"]),
    "not run": block("fortran", "oh no", above=["not run: nobody has a compiler"]),
    "needs": block("python", "import nothing_of_this_name", above=["needs: torch, nothing_of_this_name"]),
    "in a list": "- An item:\n\n  ```python\n  a = [\n      1]\n  ```\n",
    "of four backticks": "````python\na = '''\n```\n'''\n````\n",
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right(case, page_of):
    page = page_of(RIGHT[case])
    assert list(faults(page)) == []
    run_all(page)


FAILING = {
    "python": (block("python", "assert 1 == 2"), AssertionError, None),
    "bash": (block("bash", "true", "false", "true"), AssertionError, "exit status 1"),
    "a pipe": (block("sh", "false | cat"), AssertionError, "exit status 1"),
    "c that does not compile": (block("c", *PROGRAM, "  return unknown;", "}"), AssertionError, "unknown"),
    "c with a warning": (block("c", *PROGRAM, "  int unused;", "  return 0;", "}"), AssertionError, "unused"),
    "c that fails": (block("c", *PROGRAM, "  return 3;", "}"), AssertionError, "exit status 3"),
    "other output": (block("python", "print('b')") + block("text", "c", above=["output"]), AssertionError, None),
    "no output": (block("text", "c", above=["output"]), AssertionError, None),
    "another text": (
        block("c", "int none;", above=["from: examples/c_host/main.c"]),
        AssertionError,
        "no such passage",
    ),
    "a file that is gone": (block("c", "int a;", above=["from: gone.c"]), FileNotFoundError, "gone.c"),
    "a language": (block("fortran", "oh no"), AssertionError, "nothing runs 'fortran'"),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_fails(case, page_of):
    text, error, said = FAILING[case]
    with pytest.raises(error, match=said):
        run_all(page_of(text))


FAULTS = {
    "a language that nothing runs": (block("fortran", "oh no"), "nothing runs 'fortran'"),
    "no language": (block("", "make"), "a block without a language"),
    "a reason that is none": (block("bash", "make", above=["not run:"]), "'not run' must say something"),
    "no reason": (block("bash", "make", above=["not run"]), "'not run' must say something"),
    "an unknown marker": (block("bash", "make", above=["notrun: it takes long"]), "no marker 'notrun'"),
    "a marker with too much": (block("text", "a", above=["output: of all"]), "'output' says nothing more"),
    "two of a kind": (block("text", "a", above=["output", "not run: why not"]), "more than one of"),
    "a marker on its own": ("<!-- not run: why -->\n\n" + block("bash", "make"), "1 markers, 0 of them"),
    "an indented block": ("Text.\n\n    import revkernels\n", "an indented block"),
    "a block that another reader of Markdown does not see": ("<pre>\n```python\n1\n```\n</pre>\n", "examples at [2]"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_a_fault(case, page_of):
    text, said = FAULTS[case]
    assert any(said in fault for fault in faults(page_of(text)))


def test_a_block_asked_for_alone(page_of):
    """It finds what those before it left, each run once; a slow one before it is left out, and not one after it."""
    lines = block("python", "a = [1]"), block("python", "a.append(2)", above=["slow"]), block("python", "a.append(3)")
    page = page_of("".join(lines))
    first, slow, last = page
    assert [is_slow(example) for example in (first, slow, last)] == [False, True, False]
    run(page, last)
    run(page, last)
    assert page.namespace["a"] == [1, 3]
    run(page, slow)
    assert page.namespace["a"] == [1, 3, 2]


def test_reasons(page_of):
    """What is left out says why."""
    text = RIGHT["not run"] + RIGHT["needs"] + RIGHT["python shares a namespace"]
    reasons = [left_out(example) for example in page_of(text)]
    assert reasons == ["not run: nobody has a compiler", "needs nothing_of_this_name", None, None]
    page = page_of("<!-- page needs: not_this_either, bash -->\n# Title\n\n" + text)
    assert list(faults(page)) == []
    reasons = [left_out(example) for example in page]
    assert reasons[1:] == ["needs not_this_either, nothing_of_this_name"] + ["needs not_this_either"] * 2
