"""The criteria for `stable`: each a function that looks at the evidence and says what is missing.

Popularity is none of them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..composition import Composition, compose
from ..discovery import CORE, list_algorithms
from ..errors import TRLCoreError
from ..project import Project, is_core
from . import conformance
from .documents import EVIDENCE, claims, sections

RELEASES = 2
"""Minor releases of trl-core over which the options have to stay as they are."""
README = ("Install", "Example", "Options", "Composition")
"""Sections that a README needs."""


@dataclass(frozen=True)
class Candidate:
    """An algorithm whose promotion is looked at."""

    project: Project
    name: str

    @property
    def qualified(self) -> str:
        """Its unmistakable name."""
        return f"{self.project.name}:{self.name}"

    @property
    def composition(self) -> Composition:
        """It alone, on its base.

        Raises:
            TRLCoreError: it is not installed, or broken.
        """
        return compose(self.qualified, warn=False)


@dataclass(frozen=True)
class Finding:
    """What was found about one criterion."""

    criterion: str
    evidence: str
    """What ran, when, and the figure."""
    missing: str | None = None
    """What is missing, and how to get it; None if the criterion is met."""
    releases: int = 0
    """Releases to wait for, where nothing else is missing."""

    @property
    def met(self) -> bool:
        """Whether nothing is missing."""
        return self.missing is None


def criterion_conformance(candidate: Candidate) -> Finding:
    """The conformance kit is green for this very source, with no exemption."""
    from ..testing.checks import CHECKS

    name, file = "conformance", candidate.project.folder / conformance.FILE
    command = f"run `trl-core check {candidate.project.name}`"
    try:
        report = conformance.read(file)
    except FileNotFoundError:
        return Finding(name, "no report", f"{command}, which writes {conformance.FILE.as_posix()}")
    subjects = [subject for subject in report.subjects if subject.covers(candidate.qualified)]
    if not subjects:
        return Finding(name, f"a report of {report.when}", f"it is not about {candidate.qualified}: add a test of it")
    checks = sum(len(subject.checks) for subject in subjects)
    seconds = sum(subject.seconds for subject in subjects)
    named = dict.fromkeys((candidate.project.name, CORE, "torch"))
    versions = ", ".join(f"{of} {report.versions.get(of)}" for of in named)
    tests = "1 test" if len(subjects) == 1 else f"{len(subjects)} tests"
    evidence = f"{checks} checks, as {tests}, {seconds:.0f} s, {report.when}, {versions}"
    red = _named({check: s.checks[check]["outcome"] for s in subjects for check in s.red})
    exempt = _named({check: why for s in subjects for check, why in s.exempt.items()})
    lacking = [c.__name__ for c in CHECKS if any(c.__name__ not in s.checks for s in subjects)]
    source = conformance.fingerprint(candidate.project.algorithm(candidate.name)[1])
    if exempt:
        return Finding(name, evidence, f"exemptions: {exempt}")
    if lacking:
        return Finding(name, evidence, f"checks that were not made: {', '.join(lacking)}")
    if red:
        return Finding(name, evidence, f"not green: {red}")
    if any(subject.sources[candidate.qualified] != source for subject in subjects):
        return Finding(name, evidence, f"the source has changed since: {command}")
    return Finding(name, evidence)


def _named(checks: dict[str, str]) -> str:
    return ", ".join(f"{check.removeprefix('check_')} ({why})" for check, why in sorted(checks.items()))


def criterion_claim(candidate: Candidate) -> Finding:
    """A claim of the paper is reproduced in `EVIDENCE.md`: command, three seeds, versions, hardware, figure."""
    found = [claim for claim in claims(candidate.project.folder) if claim.algorithm == candidate.name]
    if not found:
        return Finding("claim", "no claim", f'a block ```toml title="evidence"``` in {EVIDENCE} about {candidate.name}')
    for claim in found:
        if claim.missing is None:
            return Finding("claim", str(claim))
    return Finding("claim", str(found[0]), found[0].missing)


def criterion_releases(candidate: Candidate) -> Finding:
    """Its options have stayed the same over two minor releases of trl-core."""
    from ..contract import minors_unchanged

    count, since = minors_unchanged(candidate.project, candidate.name)
    evidence = f"{count} of {RELEASES} minor releases of {CORE}" + (f", unchanged since {since}" if since else "")
    wait = max(0, RELEASES - count)
    return Finding("releases", evidence, f"waiting for {_releases(wait)}" if wait else None, wait)


def criterion_composition(candidate: Candidate) -> Finding:
    """It is known what it composes with: the README names those of its base that come with it or that it requires."""
    row = composition_row(candidate)
    shown = "; ".join(f"{name}: {'no, ' + why if why else 'yes'}" for name, why in row.items())
    text = sections(_readme(candidate)).get("Composition", "")
    unnamed = [name for name in row if not re.search(rf"\b{re.escape(name)}\b", text)]
    missing = f"the section Composition of the README does not name {', '.join(unnamed)}" if unnamed else None
    return Finding("composition", shown or "nothing else has its base", missing)


def composition_row(candidate: Candidate) -> dict[str, str | None]:
    """Algorithms of the same base, and why they do not compose with this one (None: they do).

    Asked are its own distribution and those that it requires: what else is installed here says nothing about it.
    """
    own = candidate.composition
    near = {candidate.project.name, CORE, *candidate.project.required}
    ancestors = {part.info.qualified for part in own.parts}
    row: dict[str, str | None] = {}
    for info in list_algorithms():
        if info.distribution not in near or info.broken or info.qualified in ancestors:
            continue
        try:
            other = compose(info.qualified, warn=False)
        except TRLCoreError:
            continue
        if other.parts[0].info.qualified == own.parts[0].info.qualified:
            row[info.name] = refusal(f"{candidate.qualified}+{info.qualified}")
    return row


def refusal(name: str) -> str | None:
    """Why algorithms do not compose, or None if they do."""
    try:
        assert compose(name, warn=False).config_class  # made on first use, which compares the options
    except TRLCoreError as error:
        return error.what
    return None


def criterion_readme(candidate: Candidate) -> Finding:
    """The README says how to install it, has an example that can be run, names every option and what composes."""
    readme, options = _readme(candidate), _own_options(candidate)
    found = sections(readme)
    needed = README[1:] if is_core(candidate.project) else README
    evidence = f"{readme.relative_to(candidate.project.folder)}: {len(found)} sections, {len(options)} options"
    lacking = [name for name in needed if not found.get(name)]
    if lacking:
        return Finding("readme", evidence, f"sections that are missing or empty: {', '.join(lacking)}")
    if "```python" not in found["Example"]:
        return Finding("readme", evidence, "the section Example has no Python program")
    text = readme.read_text(encoding="utf-8")
    unnamed = [name for name in options if not re.search(rf"`{re.escape(name)}\b", text)]
    return Finding("readme", evidence, f"options it does not name: {', '.join(unnamed)}" if unnamed else None)


def _readme(candidate: Candidate) -> Path:
    """What says how to use it; the core's README is about all of its algorithms, which have a page each."""
    page = Path("docs", "algorithms", f"{candidate.name}.md") if is_core(candidate.project) else Path("README.md")
    return candidate.project.folder / page


def _own_options(candidate: Candidate) -> list[str]:
    algorithm = candidate.composition.own.algorithm
    return [*inspect.get_annotations(algorithm.config or object), *algorithm.defaults]


def criterion_owner(candidate: Candidate) -> Finding:
    """Somebody is named who mends it when it breaks."""
    listed = candidate.project.table.get("maintainers")
    people = [one for one in listed if isinstance(one, dict) and one] if isinstance(listed, list) else []
    names = [str(one.get("name") or one.get("email")) for one in people]
    missing = None if names else 'name one in pyproject.toml: maintainers = [{ name = "...", email = "..." }]'
    return Finding("owner", ", ".join(names) or "nobody is named", missing)


def criterion_report(candidate: Candidate) -> Finding:
    """The stabilisation report can be written: `EVIDENCE.md` also says what has not been shown."""
    limits = sections(candidate.project.folder / EVIDENCE).get("Not shown", "")
    evidence = f"{len(limits.split())} words about what is not shown"
    return Finding("report", evidence, None if limits else f"a section `## Not shown` in {EVIDENCE}")


CRITERIA: tuple[Callable[[Candidate], Finding], ...] = tuple(
    value for name, value in list(globals().items()) if name.startswith("criterion_")
)
"""All of them, in the order in which they are shown."""


def findings(candidate: Candidate) -> list[Finding]:
    """What was found about every criterion."""
    return [criterion(candidate) for criterion in CRITERIA]


def verdict(found: list[Finding]) -> str:
    """Whether all is there: ready; ready, waiting for N releases; or not ready, with what is missing."""
    lacking = [finding.criterion for finding in found if not finding.met]
    if not lacking:
        return "ready"
    wait = max(finding.releases for finding in found)
    if all(finding.met or finding.releases for finding in found):
        return f"ready, waiting for {_releases(wait)}"
    return f"not ready: {', '.join(lacking)}"


def _releases(count: int) -> str:
    return f"{count} release{'s' if count != 1 else ''}"
