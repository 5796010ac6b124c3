"""What the documents of a project say to a machine: claims in `EVIDENCE.md`, sections of a README."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ProjectError

EVIDENCE = Path("EVIDENCE.md")
_CLAIM = re.compile(r'^```toml title="evidence"\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^## +(.+?) *$", re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_NEEDED = ("command", "seeds", "figure", "versions", "hardware", "date", "source")
SEEDS = 3
"""How many a claim needs."""


@dataclass(frozen=True)
class Claim:
    """A block of `EVIDENCE.md`: a claim of a paper, and what became of it when it was tried here."""

    algorithm: str
    claim: str
    reproduced: bool
    facts: dict[str, Any]
    """All other keys; see `docs/promotion.md`."""

    @property
    def missing(self) -> str | None:
        """What it lacks to count as evidence, or None."""
        if not self.reproduced:
            return str(self.facts.get("why", "not reproduced yet"))
        lacking = [key for key in _NEEDED if not self.facts.get(key)]
        if lacking:
            return f"the block lacks {', '.join(lacking)}"
        seeds = self.facts["seeds"]
        if len(set(seeds)) < SEEDS:
            return f"{len(set(seeds))} seeds; {SEEDS} are needed"
        return None

    def __str__(self) -> str:
        facts = self.facts
        if not self.reproduced:
            return self.claim
        versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
        seeds = ", ".join(map(str, facts.get("seeds", [])))
        where = f"seeds {seeds}; {facts.get('hardware')}; {versions}; {facts.get('date')}"
        return f"{self.claim} {facts.get('figure')} ({where}; `{facts.get('command')}`)"


def claims(folder: Path) -> list[Claim]:
    """The claims that a project's `EVIDENCE.md` holds; none if there is no such file.

    Raises:
        ProjectError: a block is no TOML, or lacks what every claim has.
    """
    file = folder / EVIDENCE
    found = []
    for text in _CLAIM.findall(_read(file)):
        try:
            facts = tomllib.loads(text)
            found.append(
                Claim(facts.pop("algorithm"), facts.pop("claim"), facts.pop("reproduced") is True, dict(facts))
            )
        except (tomllib.TOMLDecodeError, KeyError) as error:
            raise ProjectError(
                f"A block of {file} cannot be used: {type(error).__name__}: {error}.",
                mend="Give it algorithm, claim and reproduced = true or false; see docs/promotion.md.",
            ) from error
    return found


def sections(file: Path) -> dict[str, str]:
    """The text under each heading of the second level of a Markdown file; empty if there is no such file."""
    text = _read(file)
    # A line of a program that begins with ## is no heading; blanked out, its place stays.
    blank = _FENCED.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    places = [*_HEADING.finditer(blank)]
    ends = [match.start() for match in places[1:]] + [len(text)]
    return {match.group(1): text[match.end() : end].strip() for match, end in zip(places, ends, strict=False)}


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
