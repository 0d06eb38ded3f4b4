# SPDX-License-Identifier: Apache-2.0
"""Every fenced block of the documentation does what it says, or the page says why it is not run."""

import pytest

pytest.importorskip("sybil", reason="sybil, which finds and runs the blocks, is not installed")
pytest.importorskip("torch", reason="most pages need torch")

from documentation.blocks import faults, is_slow, left_out, pages, run

PAGES = pages()


def blocks():
    """Return the blocks of all pages as parameters, in order."""
    for page in PAGES:
        for example in page:
            reason = left_out(example)
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            marks += [pytest.mark.slow] if is_slow(example) else []
            yield pytest.param(page, example, id=f"{page.name}:{example.line}", marks=marks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_out_in_silence(page):
    """Every block has a language that is run or a marker with a reason, and every marker a block."""
    assert list(faults(page)) == []


@pytest.mark.parametrize(("page", "example"), list(blocks()))
def test_block(page, example, tmp_path_factory, monkeypatch):
    """The block does what it is there for, after those of its page that come before it."""
    page.folder = page.folder or tmp_path_factory.mktemp("page")
    monkeypatch.chdir(page.folder)
    monkeypatch.setenv("MPLBACKEND", "agg")
    run(page, example)
