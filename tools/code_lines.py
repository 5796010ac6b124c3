"""Counts code lines: what is left of a file without blank lines, comments and docstrings.

`python tools/code_lines.py` counts the core and every plugin of this repository, `python tools/code_lines.py PATH ...`
other packages or files.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG_FILE, LONG_FUNCTION = 400, 60
"""Above these many code lines, look again whether the file or function does two things."""

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code; a string that stands alone as a statement counts as a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def count(package: Path) -> dict[Path, int]:
    """Code lines of each Python file of a package (or of one file), by path."""
    files = sorted(package.rglob("*.py")) if package.is_dir() else [package]
    return {file: len(code_lines(file.read_text(encoding="utf-8"))) for file in files}


def long_functions(file: Path) -> list[tuple[str, int]]:
    """Name and code lines of the functions over `LONG_FUNCTION`."""
    source = file.read_text(encoding="utf-8")
    lines = code_lines(source)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = len(lines.intersection(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            if size > LONG_FUNCTION:
                found.append((node.name, size))
    return found


def packages() -> list[Path]:
    """The core's package and those of the in-repo plugins."""
    return [ROOT / "trl_core", *sorted(p for p in ROOT.glob("plugins/*/trl_*") if p.is_dir())]


def table(paths: Iterable[Path]) -> str:
    """The report that is printed: every package with its total, every file, and what is long."""
    rows = []
    for path in paths:
        counts = count(path)
        rows.append(f"{sum(counts.values()):6}  {_shown(path)}")
        rows += [
            f"{number:6}    {_shown(file)}{'  (long)' if number > LONG_FILE else ''}"
            for file, number in counts.items()
            if number
        ]
        rows += [
            f"{size:6}    {_shown(file)}:{name}  (long function)"
            for file in counts
            for name, size in long_functions(file)
        ]
    return "\n".join(rows)


def _shown(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def main() -> None:
    """Print the table for the paths given, or for all packages."""
    parser = argparse.ArgumentParser(description="Count code lines without blank lines, comments and docstrings.")
    parser.add_argument("paths", nargs="*", type=Path, help="packages or files (default: core and plugins)")
    print(table(parser.parse_args().paths or packages()))


if __name__ == "__main__":
    main()
