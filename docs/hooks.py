# SPDX-License-Identifier: Apache-2.0
"""What MkDocs does with text that lies outside docs/: the files at the root are pages of the site, written once.

- CONTRIBUTING.md, CHANGELOG.md and benchmarks/README.md become pages (`PAGES`).
- A line that ends in ``<!-- include: README.md, introduction -->`` is replaced by what README.md has between
  ``<!-- part: introduction -->`` and ``<!-- end of part -->``. GitHub shows the line, which should say where that is.
- Links are written as GitHub wants them. One that leads to such a file leads to its page; one that leads to any other
  file of the repository becomes its text, for the site has no such page; one that leads nowhere stays, and the strict
  build stops at it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
#: Files of the repository, and the pages that show them. README.md is shown in parts, most of them on the front page.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks-method.md",
}
SHOWN = {**PAGES, "README.md": "index.md"}
INCLUDE = re.compile(r"^.*<!-- include: (?P<file>[\w./-]+), (?P<part>[\w ]+) -->$", re.MULTILINE)
LINK = re.compile(r"(?P<text>!?\[(?P<words>(?:[^\[\]]|\[[^\[\]]*\])*)\])\((?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
SCHEME = re.compile(r"[a-z]+:")


def on_files(files, config):
    """Add the pages that are made of files outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put the included parts in, and turn links."""
    name = page.file.src_uri
    source = next((file for file, shown in PAGES.items() if shown == name), f"docs/{name}")
    return INCLUDE.sub(lambda found: part(found["file"], found["part"], name), turned(markdown, source, name))


def part(file, title, page):
    """Return a part of a file of the repository, its links turned for the page that it is put on."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.search(rf"(?ms)^<!-- part: {re.escape(title)} -->\n(.*?)^<!-- end of part -->$", text)
    if found is None:
        raise PluginError(f"{page} includes the part {title!r} of {file}, which has none of that name")
    return turned(found[1], file, page)


def turned(markdown, source, page):
    """Return Markdown of the file ``source``, its links relative to the page that shows it."""

    def turn(link):
        if SCHEME.match(link["path"]):
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"]))
        inside = SHOWN.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if inside is not None:
            return f"{link['text']}({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{link['anchor'] or ''})"
        return link["words"] if (ROOT / target).exists() else link[0]

    return LINK.sub(turn, markdown)
