# SPDX-License-Identifier: Apache-2.0
"""The site: it builds without a warning and asks nothing of other hosts; links and tables of the pages are true."""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sybil", reason="sybil, which finds the pages, is not installed")

from markdown_it import MarkdownIt

from documentation.blocks import ROOT, pages
from revkernels.backends import KERNELS

PAGES = [page for page in pages() if not page.name.startswith("docs/reference/")]
SCHEME = re.compile(r"[a-z]+:")


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (the extra docs)")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(source, out):
    """Build the site, and return what went wrong."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        if not os.environ.get("CI"):  # there it has to be built
            pytest.importorskip(name, reason=f"{name} is not installed (the extra docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)]  # --quiet would hide warnings from it
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The pages of the site, by name."""
    out = tmp_path_factory.mktemp("site")
    assert build(ROOT, out) == ""
    return {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.html")}


def test_it_builds(html):
    """Strictly; pages from outside docs/ are there; no browser is sent to another host for a part of a page."""
    assert {"index.html", "contributing.html", "changelog.html", "benchmarks-method.html"} <= html.keys()
    assert "network-h200-revnet104.png" in html["index.html"] and "MemCNN" in html["benchmarks.html"]
    assert "Algorithm 1" in html["reference/ops.html"]
    for name, text in html.items():
        elsewhere = r"=[\"']?(?:https?:)?//"
        assert not re.search(rf"<(script|img|iframe|source)\b[^>]*\bsrc{elsewhere}", text), name
        assert not re.search(rf"<link\b[^>]*\bhref{elsewhere}", text), name
        assert "<!-- include" not in text and "::: revkernels" not in text, name


#: Pages of the reference, and the module that each describes.
REFERENCE = {
    "ops": "revkernels.ops",
    "nn": "revkernels.nn",
    "models": "revkernels.models",
    "diagnostics": "revkernels.diagnostics",
    "numpy": "revkernels.adapters.numpy",
    "jax": "revkernels.adapters.jax",
}
#: Described on the page of another module, which their own page names.
ELSEWHERE = {"ops": ["Coupling", "Norm", "Statistics"], "models": ["BasicBranch", "BottleneckBranch"]}


@pytest.mark.parametrize("page", REFERENCE)
def test_public_names_are_in_the_reference(page, html):
    """Every public class and function, one that shares its name with a module too."""
    module = pytest.importorskip(REFERENCE[page], exc_type=ImportError)
    entries = set(re.findall(r'id="([\w.]+)"', html[f"reference/{page}.html"]))
    public = [name for name in module.__all__ if callable(getattr(module, name))]
    missing = [
        name for name in public if not {f"{module.__name__}.{name}", f"{module.__name__}.{name}.{name}"} & entries
    ]
    assert sorted(missing) == ELSEWHERE.get(page, [])


BREAKS = {
    "a link to nowhere": ("docs/numerics.md", "\n[gone](gone.md)\n", "gone.md"),
    "a link to a heading that is none": ("docs/numerics.md", "\n[gone](planner.md#gone)\n", "#gone"),
    "a part that is none": ("docs/numerics.md", "\nSee <!-- include: README.md, gone -->\n", "gone"),
    "a page outside the navigation": ("docs/new.md", "# New\n", "new.md"),
    "a docstring of a name that is none": ("docs/reference/ops.md", "\n::: revkernels.ops.gone\n", "gone"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BREAKS)
def test_what_breaks_it(case, tmp_path):
    """The strict build stops at it."""
    file, text, said = BREAKS[case]
    source = tmp_path / "source"
    for name in ("docs", "benchmarks", "revkernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("results", "*.so*", "__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, source / name)
    with (source / file).open("a") as page:
        page.write(text)
    assert said in build(source, tmp_path / "site")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_on_github(page):
    """Every relative link and picture of a page leads to a file, and to a heading of it if it names one."""
    folder = Path(page.path).parent
    for target in targets(page.text):
        path, _, anchor = target.partition("#")
        if SCHEME.match(target):
            continue
        file = (folder / path).resolve() if path else Path(page.path)
        assert file.exists() and file.is_relative_to(ROOT), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page.name} links to {target}"


#: What is no path of ours: the kernel that CONTRIBUTING.md adds, and a test of another library.
FOREIGN = ("lerp", "tests/test_revnet.py")


def test_files_that_pages_name():
    """Paths in backticks lead somewhere. (A changelog may name what is gone.)"""
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        named = re.findall(r"`((?:tests|revkernels|docs|benchmarks|csrc|cmake)/[\w./-]+?)(?:::\w+)?`", page.text)
        ours = [path for path in named if not any(word in path for word in FOREIGN)]
        assert [path for path in ours if not (ROOT / path).exists()] == [], page.name


def targets(text):
    """Return where the links and pictures of a page lead."""
    inline = [child for token in MarkdownIt().enable("table").parse(text) for child in token.children or ()]
    return [child.attrs[name] for child in inline for name in ("href", "src") if name in child.attrs]


def anchors(text):
    """Return the anchors that GitHub gives a page's headings."""
    tokens = MarkdownIt().parse(text)
    words = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", word.lower()).replace(" ", "-") for word in words}


def test_links_on_the_site(hooks):
    """Links of GitHub become links between pages, or plain text where the site has no page."""
    text = "[a](docs/planner.md#the-plan) [b](CONTRIBUTING.md) [`c`](benchmarks/results/) [d](https://e.org) [f](no.md)"
    assert hooks.turned(text, "README.md", "index.md") == (
        "[a](planner.md#the-plan) [b](contributing.md) `c` [d](https://e.org) [f](no.md)"
    )
    text = "[a](../../README.md#use-it) [b](../planner.md) ![c](../demo.png) [d](#d)"
    assert hooks.turned(text, "docs/frameworks/index.md", "frameworks/index.md") == (
        "[a](../index.md#use-it) [b](../planner.md) ![c](../demo.png) [d](#d)"
    )


def test_parts(hooks):
    """A part is what lies between its marks, links turned."""
    assert "(network-h200-revnet104.png)" in hooks.part("README.md", "introduction", "index.md")
    assert "(../network-h200-revnet104.png)" in hooks.part("README.md", "introduction", "frameworks/index.md")
    with pytest.raises(Exception, match="none of that name"):
        hooks.part("README.md", "gone", "index.md")


def test_every_kernel_is_on_its_page():
    """Python's on docs/kernels.md, C's on docs/frameworks/c.md, both in backticks."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    missing = [kernel for kernel in KERNELS if not re.search(rf"`{kernel}_?`", text)]
    assert not missing, f"docs/kernels.md does not name, in backticks: {', '.join(missing)}"
    text = (ROOT / "docs" / "frameworks" / "c.md").read_text()
    missing = [f"revk_{kernel}" for kernel in KERNELS if f"`revk_{kernel}`" not in text]
    assert not missing, f"docs/frameworks/c.md does not name, in backticks: {', '.join(missing)}"


MOVES = re.compile(r"^\| (?P<kernels>.*`.*?) \| (?P<reads>\d) R (?P<writes>\d) W \| (\d) R (\d) W \|$", re.MULTILINE)


def test_bytes_moved(monkeypatch):
    """The reads and writes of docs/kernels.md are the ones that the benchmarks count."""
    pytest.importorskip("torch", reason="the benchmarks need torch")
    from revkernels.bench import coupling, passes

    for module in (coupling, passes):
        monkeypatch.setattr(module, "last_level_cache", lambda device: 1)  # one set of operands is enough
    section = (ROOT / "docs" / "kernels.md").read_text().partition("## Bytes moved")[2].partition("\n## ")[0]
    rows = list(MOVES.finditer(section))
    assert len(rows) == section.count("\n| ") - 1 > 0, "a row that is not written as the others are"  # 1: the heading
    for row in rows:
        for kernel in re.findall(r"`(\w+)`", row["kernels"]):
            kind = "layer+none rows" if "layer" in row["kernels"] else "batch+relu NCHW"
            of_norm = hasattr(passes, kernel)
            setup = (passes.PassSetup if of_norm else coupling.Setup)("cpu", 1)
            case = f"{kind} float32 in cache" if of_norm else "float32"
            benchmark = getattr(passes if of_norm else coupling, kernel, None)
            assert benchmark is not None, f"no benchmark {kernel} in revkernels/bench/coupling.py or passes.py"
            trial = benchmark(setup, case)
            assert trial.bytes_moved == (int(row["reads"]) + int(row["writes"])) * trial.operands[0][0].nbytes, row[0]
