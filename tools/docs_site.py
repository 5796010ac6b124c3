"""Hooks of mkdocs: the site shows the pages as they are on GitHub, links included.

The pages are written for GitHub, where a link may lead to any file of the repository, and where lists and tables need
no blank line before them. Here the linked pages and pictures outside docs/ join the site, links are turned to where
their targets are in it, and what Python-Markdown reads otherwise than GitHub is rewritten.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
_PICTURES = (".png", ".svg", ".jpg")
_LINK = re.compile(r"(?P<code>^ *```.*?^ *```$|`[^`]+`)|\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", re.M | re.S)
_MARKER = re.compile(r"([-*+]|\d+\.) +(?=\S)")


# -- what mkdocs calls -------------------------------------------------------------------------------------------------
def on_config(config: MkDocsConfig) -> None:
    """In the navigation a folder stands for its pages."""
    config.nav = _spread(config.nav)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Bring in the pages and pictures outside docs/ that a page leads to."""
    waiting = [_path(file) for file in files.documentation_pages()]
    known = {"README.md", *waiting}
    for page in waiting:  # grows
        for target in linked(page):
            if target not in known and not target.startswith("docs/"):
                known.add(target)
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
                waiting += [target] if target.endswith(".md") else []


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page for Python-Markdown."""
    return reformatted(relinked(markdown, _path(page.file)))


# -- navigation and links ----------------------------------------------------------------------------------------------
def _spread(entry: Any) -> Any:
    if isinstance(entry, list):
        return [_spread(item) for item in entry]
    if isinstance(entry, dict):
        return {title: _spread(item) for title, item in entry.items()}
    if isinstance(entry, str) and entry.endswith("/"):
        pages = (path.name for path in (ROOT / "docs" / entry).glob("*.md"))
        return [f"{entry}{name}" for name in sorted(pages, key=lambda name: (name != "README.md", name))]
    return entry


def _path(file: File) -> str:
    """Where a page is in the repository."""
    return Path(file.abs_src_path or "").relative_to(ROOT).as_posix()


def _place(path: str) -> str:
    """Where a page of the repository is in the site, whose first page stands for the README."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def resolved(target: str, page: str) -> str | None:
    """The file that a link leads to, from the root of the repository; for a folder its README. None if there is none.

    Args:
        target: as it stands in the link, without anchor.
        page: the page it stands on, from the root of the repository.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if (ROOT / path).is_dir() and (ROOT / path / "README.md").is_file():
        path = f"{path}/README.md"
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def linked(page: str) -> Iterator[str]:
    """The pages and pictures of the repository that a page leads to."""
    for match in _LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
        path = resolved(match["target"].partition("#")[0], page) if match["target"] else None
        if path and path.endswith((".md", *_PICTURES)):
            yield path


def relinked(text: str, page: str) -> str:
    """A page whose links lead to the places in the site; of a link to source code or to a folder the words stay."""

    def turned(match: re.Match[str]) -> str:
        path, hash_, anchor = (match["target"] or "#").partition("#")
        found = resolved(path, page) if path and "://" not in path else None
        if found is None:  # code, or a link that leads elsewhere, nowhere, or to the page itself
            return match[0]
        if not found.endswith((".md", *_PICTURES)):
            return match["text"]
        there = posixpath.relpath(_place(found), posixpath.dirname(_place(page)) or ".")
        return f"[{match['text']}]({there}{hash_}{anchor})"

    return _LINK.sub(turned, text)


# -- GitHub's Markdown for Python-Markdown -----------------------------------------------------------------------------
def reformatted(text: str) -> str:
    """A page with what Python-Markdown wants: blank lines before lists and tables, and four spaces for each level.

    Comments, such as the marks of generated parts, go, and so does what follows the title of a code block.
    """
    lines: list[str] = []
    levels: list[int] = []  # for each open list the column of its text
    fence = apart = False  # apart: in an item, behind a blank line
    source = text.split("\n")
    for line, following in zip(source, [*source[1:], ""], strict=True):
        body = line.lstrip(" ")
        marker = None if fence else _MARKER.match(body)
        indent, before = len(line) - len(body), lines[-1].strip() if lines else ""
        if not fence and (not body or re.fullmatch(r"<!--.*-->", body)):
            lines.append("")
            continue
        inside = bool(levels)
        # Without a blank line, what is no item and no heading goes on with the item before it.
        while not fence and levels and indent < levels[-1] and (marker or not before or body.startswith("#")):
            levels.pop()
        inner = indent - (levels[-1] if levels else 0)
        if body.startswith("```"):
            body, fence = re.sub(r'(title="[^"]*").*', r"\1", body), not fence
        elif marker and inner < 4:
            if before and (apart or (not inside and marker[1] in "-*+1.")):
                lines.append("")
            apart = False
            lines.append("    " * len(levels) + body)
            levels.append(indent + marker.end())
            continue
        elif body.startswith("|") and not before.startswith("|") and re.fullmatch(r" *\|[-:| ]+", following):
            lines += [""] if before else []
        if body.startswith("|"):  # in code a bar needs no mark here, and would show it
            body = re.sub("`[^`]+`", lambda code: code[0].replace("\\|", "|"), body)
        apart = bool(levels) and (apart or not before)
        lines.append("    " * len(levels) + " " * max(inner, 0) + body if body else "")
    return "\n".join(lines)
