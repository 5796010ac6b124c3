"""Scripts and notebooks on disk: finding, reading, rewriting and writing them."""

from __future__ import annotations

import difflib
import io
import json
import os
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import replace_text
from .rewrite import Finding, Rewritten, rewrite

_NOT_LOOKED_INTO = {"site-packages", "node_modules", "__pycache__", "venv", "env", "build", "dist"}


@dataclass
class Outcome:
    """What became of one file."""

    file: Path
    before: str = ""
    after: str = ""
    findings: list[tuple[str, Finding]] = field(default_factory=list)
    """Each with its place, `FILE:LINE`."""
    distributions: set[str] = field(default_factory=set)
    error: str | None = None
    encoding: str = "utf-8"

    @property
    def changed(self) -> bool:
        """Whether there is anything to write."""
        return self.error is None and self.before != self.after

    @property
    def diff(self) -> list[str]:
        """A unified diff, without ends of lines."""
        name = str(self.file)
        old, new = self.before.splitlines(), self.after.splitlines()
        return list(difflib.unified_diff(old, new, f"{name} (TRL)", f"{name} (trl-core)", lineterm=""))


def find(paths: Iterable[Path]) -> Iterator[Path]:
    """The files that are named, and all scripts and notebooks under folders that are, once each.

    Hidden folders, environments and folders of build tools are left out.
    """
    seen: set[Path] = set()
    for path in paths:
        for file in _under(path) if path.is_dir() else [path]:
            # Not `resolve`, which raises where links go round in a circle.
            if (resolved := Path(os.path.realpath(file))) not in seen:
                seen.add(resolved)
                yield file


def _under(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in _NOT_LOOKED_INTO
            and not Path(parent, name, "pyvenv.cfg").exists()
        )
        yield from (Path(parent, name) for name in sorted(files) if name.endswith((".py", ".ipynb")))


def migrate(file: Path) -> Outcome:
    """Rewrite one script or notebook, without writing it."""
    outcome = Outcome(file)
    try:
        if file.exists() and not file.is_file():  # a pipe would wait for ever
            outcome.error = f"{file} is no regular file"
            return outcome
        raw = file.read_bytes()
        if file.suffix == ".ipynb":
            outcome.before = raw.decode("utf-8")
            outcome.after = _notebook(outcome)
        else:
            outcome.encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
            outcome.before = raw.decode(outcome.encoding)
            outcome.after = _take(outcome, rewrite(outcome.before))
            outcome.after.encode(outcome.encoding)
    except SyntaxError as error:  # also from a line that names an unknown encoding
        outcome.error = f"{file}:{error.lineno or 1}: no valid Python: {error.msg}"
    except (OSError, UnicodeError, _NotebookError) as error:
        outcome.error = f"{file}: {getattr(error, 'strerror', None) or error}"
    return outcome


def write(outcome: Outcome) -> None:
    """Put the new text into the place of the old one, at once and with the mode that the file has.

    Raises:
        OSError: it cannot be written; the file is then as it was.
    """
    replace_text(outcome.file, outcome.after, outcome.encoding)


def _take(outcome: Outcome, rewritten: Rewritten) -> str:
    outcome.findings += [(f"{outcome.file}:{finding.line}", finding) for finding in rewritten.findings]
    outcome.distributions |= rewritten.distributions
    return rewritten.source


# -- notebooks ---------------------------------------------------------------------------------------------------------
class _NotebookError(ValueError):
    """A notebook that cannot be rewritten as one script."""


_CELL = "# trl-core-migrate: cell "
_MAGIC = "# trl-core-migrate: line "
_MAGIC_LINE = re.compile(r"\s*[%!?]|.*\?\s*$")


def _notebook(outcome: Outcome) -> str:
    """The text of a notebook with its code cells rewritten, all as one script: what one imports another uses."""
    text = outcome.before
    if "trl" not in text:
        return text
    try:
        notebook = json.loads(text)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise _NotebookError("no notebook of format 4") from error
    numbers = [i for i, cell in enumerate(notebook["cells"], 1) if cell["cell_type"] == "code"]
    script = "".join(f"{_CELL}{i}\n{_without_magics(source)}\n" for i, source in enumerate(sources))
    try:
        rewritten = rewrite(script)
    except SyntaxError as error:
        cell, line = _place(script, error.lineno or 1)
        raise _NotebookError(f"cell {numbers[cell]}, line {line}: no valid Python: {error.msg}") from error
    for finding in rewritten.findings:
        cell, line = _place(script, finding.line)
        outcome.findings.append((f"{outcome.file}:cell {numbers[cell]}:{line}", finding))
    outcome.distributions |= rewritten.distributions
    parts = re.split(rf"^{re.escape(_CELL)}\d+\n", rewritten.source, flags=re.MULTILINE)[1:]
    if len(parts) != len(cells):
        raise _NotebookError("its cells cannot be told apart; rewrite them as a script")
    layout = _layout(text, notebook)
    for cell, old, new in zip(cells, sources, parts, strict=True):
        source = re.sub(rf"^{re.escape(_MAGIC)}", "", new.removesuffix("\n"), flags=re.MULTILINE)
        if source != old:
            cell["source"] = source.splitlines(keepends=True) if isinstance(cell["source"], list) else source
    return text if [*map(_source, cells)] == sources else _dump(notebook, layout)


def _source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def _without_magics(source: str) -> str:
    """A cell with its lines for the notebook as comments; of a cell with a %%magic all lines."""
    whole = source.lstrip().startswith("%%")
    lines = source.split("\n")
    return "\n".join(f"{_MAGIC}{line}" if whole or _MAGIC_LINE.match(line) else line for line in lines)


def _place(script: str, line: int) -> tuple[int, int]:
    """Index of the code cell, and line in it, of a line of the joined script."""
    starts = [i for i, text in enumerate(script.split("\n"), 1) if text.startswith(_CELL)]
    cell = max((i for i, start in enumerate(starts) if start < line), default=0)
    return cell, line - starts[cell]


def _layout(text: str, notebook: dict[str, Any]) -> dict[str, Any]:
    """The options of json.dumps that give the text of a notebook.

    Raises:
        _NotebookError: none does.
    """
    for indent in (1, 2, 4, "\t", None):
        for ascii_only in (False, True):
            layout = {"indent": indent, "ensure_ascii": ascii_only, "end": text[len(text.rstrip()) :]}
            if _dump(notebook, layout) == text:
                return layout
    raise _NotebookError("its JSON is laid out in an unusual way, which would be lost; save it with Jupyter first")


def _dump(notebook: dict[str, Any], layout: dict[str, Any]) -> str:
    end = layout["end"]
    return json.dumps(notebook, indent=layout["indent"], ensure_ascii=layout["ensure_ascii"]) + str(end)
