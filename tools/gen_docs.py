"""Writes the parts of the documentation that repeat what the code says; `--check` says which of them are not current.

`python tools/gen_docs.py` rewrites, in the README, in docs/ and in the plugins' READMEs, what stands between
`<!-- WHAT ARGUMENTS:begin -->` and the same with `:end`. WHAT is one of:

    algorithms          the table of `trl-core list --format md`, of the distributions of this repository
    hook NAME           kind, signature and description of a hook
    options NAME OWNER  the options that OWNER defines in the configuration of the algorithm NAME; OWNER is an
                        algorithm, or "trainer" for what the trainers of the core define
    fields CLASS        the fields of a class of trl_core.batch with their descriptions
    errors              every error class with its description
    matrix              which two algorithms of this repository compose, and why others do not
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_core import AlgorithmInfo

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/**/*.md", "plugins/*/*.md")
_PART = re.compile(r"(<!-- ((\w+)(?: [^\n]*?)?):begin -->\n)(.*?)(<!-- \2:end -->)", re.DOTALL)


def algorithms() -> str:
    """The table of the algorithms in this repository; what else is installed here is no part of a page."""
    from trl_core.cli.list import as_markdown

    return as_markdown(_ours())


def _ours() -> list[AlgorithmInfo]:
    from trl_core.discovery import CORE, list_algorithms

    ours = {CORE, *(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))}
    return [info for info in list_algorithms() if info.distribution in ours]


def hook(name: str) -> str:
    """Kind, signature and docstring of a hook."""
    from trl_core.hookspecs import HookSpecs, hook_kinds

    kind, refine = hook_kinds()[name]
    function = getattr(HookSpecs, name)
    kinds = f"{kind}, may be refined" if refine else kind
    return f"Kind: {kinds}.\n\n```python\ndef {name}{signature(function)}\n```\n\n{inspect.getdoc(function)}"


def signature(function: Callable[..., object]) -> str:
    """A signature as it is written in the source, whose annotations are not evaluated."""
    return str(inspect.signature(function)).replace("'", "")


def options(name: str, owner: str) -> str:
    """A table of options with type, default and help."""
    from trl_core.cli.flags import groups_of, help_of, type_name
    from trl_core.composition import compose

    rows = [["option", "type", "default", "what it does"], ["---"] * 4]
    for field in groups_of(compose(name))[owner]:
        default = "none" if field.default is None else f"`{field.default!r}`"
        rows.append([f"`{field.name}`", f"`{type_name(field.type)}`", default, help_of(field)])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def fields(name: str) -> str:
    """A table of the fields that a class of rows adds to its base, with the text that follows each in the source."""
    from trl_core import batch

    rows = ["| field | what it is |", "| --- | --- |"]
    (found,) = ast.parse(inspect.getsource(getattr(batch, name))).body
    assert isinstance(found, ast.ClassDef)
    for field, text in pairwise(found.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            described = " ".join(str(ast.literal_eval(text.value)).split()).replace("|", "\\|")
            rows.append(f"| `{ast.unparse(field.target)}` | {described} |")
    return "\n".join(rows)


def errors() -> str:
    """A table of the error classes, in the order in which they are defined."""
    from trl_core import errors as module

    rows = ["| error | when |", "| --- | --- |"]
    for name, value in vars(module).items():
        if isinstance(value, type) and issubclass(value, module.TRLCoreError) and value is not module.TRLCoreError:
            rows.append(f"| `{name}` | {' '.join((inspect.getdoc(value) or '').split())} |")
    return "\n".join(rows)


def families() -> dict[str, list[str]]:
    """The algorithms of this repository by the base they build on, where there is more than one to a base."""
    from trl_core.composition import compose

    found: dict[str, list[str]] = {}
    for info in _ours():
        found.setdefault(compose(info.qualified, warn=False).root.name, []).append(info.name)
    return {root: sorted(names, key=lambda name: (name != root, name)) for root, names in found.items() if names[1:]}


def refusal(first: str, second: str) -> str | None:
    """Why two algorithms do not compose, or None."""
    from trl_core.composition import compose
    from trl_core.errors import TRLCoreError

    try:
        compose(f"{first}+{second}", warn=False).config_class  # noqa: B018  options are joined when it is asked for
    except TRLCoreError as error:
        return error.what
    return None


def matrix() -> str:
    """For each base a table of its algorithms, and the reasons of the pairs that are refused."""
    lines: list[str] = []
    for root, names in families().items():
        lines += [f"### On {root}", "", f"| | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
        reasons: list[str] = []
        for first in names:
            cells = []
            for second in names:
                reason = None if first == second else refusal(first, second)
                cells.append("-" if first == second else "no" if reason else "yes")
                reasons += [f"- `{first}+{second}`: {reason}"] if reason else []
            lines.append(f"| **{first}** | {' | '.join(cells)} |")
        lines += ["", *reasons, *([""] if reasons else [])]
    return "\n".join(lines).rstrip()


WRITERS: dict[str, Callable[..., str]] = {f.__name__: f for f in (algorithms, hook, options, fields, errors, matrix)}


def current(text: str) -> str:
    """A page with all its generated parts written anew."""

    def write(match: re.Match[str]) -> str:
        begin, what, writer, _, end = match.groups()
        return f"{begin}{WRITERS[writer](*what.split()[1:])}\n{end}"

    return _PART.sub(write, text)


def pages() -> dict[Path, str]:
    """Every page with a generated part, and what it should say."""
    found = {path: path.read_text(encoding="utf-8") for pattern in PAGES for path in sorted(ROOT.glob(pattern))}
    return {path: current(text) for path, text in found.items() if _PART.search(text)}


def main() -> int:
    """Write all pages, or with `--check` name those that are not current."""
    parser = argparse.ArgumentParser(description="Write the generated parts of the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is not current")
    check = parser.parse_args().check
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    stale = [path for path, text in pages().items() if text != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not current" if check else f"wrote {path.relative_to(ROOT)}")
        if not check:
            path.write_text(current(path.read_text(encoding="utf-8")), encoding="utf-8")
    if check and stale:
        print("To mend: python tools/gen_docs.py")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
