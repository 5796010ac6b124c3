"""A small stable distribution in a folder, whose sources tests change between a record and a check."""

from __future__ import annotations

import sys
from pathlib import Path

from trl_core.cli.main import main

PYPROJECT = """\
[project]
name = "trl-promise"
version = "0.2.0"

[project.entry-points."trl_core.stable"]
promise = "trl_promise.promise:algorithm"

[project.entry-points."trl_core.experimental"]
draft = "trl_promise.promise:draft"
"""
PACKAGE = """\
from .promise import Brief, Judge, algorithm, shorten

__all__ = ["Brief", "Judge", "PROMISEConfig", "PROMISETrainer", "algorithm", "shorten"]
"""
MODULE = '''\
from dataclasses import dataclass

import trl_core
from trl_core import Algorithm, Deprecation, deprecated, option


@dataclass
class PromiseOptions:
    least: float = option(0.5, "Least score.")
    mode: str = option("soft", "How to judge.")
    rounds: int | None = option(None, "Rounds.")


@dataclass
class DraftOptions:
    sketch: int = option(1, "Anything.")


@dataclass(frozen=True)
class Brief:
    """A record."""

    text: str
    limit: int = 3


class Judge:
    """Judges."""

    def __init__(self, strict: bool = False):
        self.strict = strict

    def score(self, text: str, weight: float = 1.0) -> float:
        """One number."""
        return weight * len(text)


def shorten(text: str, limit: int = 3, *, mark: str = "...") -> str:
    """Cut."""
    return text[:limit] + mark


algorithm = Algorithm(
    name="promise",
    summary="For tests.",
    extends="grpo",
    config=PromiseOptions,
    defaults={"loss_type": "grpo"},
    arguments={"judge": "Who judges.", "coach": "Who helps."},
)
draft = Algorithm(name="draft", summary="For tests.", extends="grpo", config=DraftOptions)
'''
SOURCES = {"pyproject.toml": PYPROJECT, "trl_promise/__init__.py": PACKAGE, "trl_promise/promise.py": MODULE}


def edited(sources: dict[str, str], *edits: tuple[str, str]) -> dict[str, str]:
    """Sources with texts replaced, each of which must be there."""
    result = dict(sources)
    for old, new in edits:
        assert any(old in text for text in result.values()), f"nothing to replace: {old}"
        result = {file: text.replace(old, new) for file, text in result.items()}
    return result


def write(folder: Path, sources: dict[str, str]) -> Path:
    """Write the sources, and forget what was imported of them before."""
    for file, text in sources.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl_promise"]:
        del sys.modules[name]
    return folder


def api(*words: str | Path) -> int:
    """Run `trl-core api`."""
    return main(["api", *map(str, words)])
