"""Runs of `trl-core train`, and what they leave."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trl_core.cli.main import main


def flags(**options: Any) -> list[str]:
    """Options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def train(*words: str, algorithm: str) -> SimpleNamespace:
    """Run `trl-core train`; the exit code with what is printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", algorithm, *words])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def work_in(folder: Path, monkeypatch: Any) -> None:
    """Work in the folder for one test, and leave the import path and the user's cache alone."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))


def metrics(folder: Path | str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
