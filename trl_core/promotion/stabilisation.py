"""The stabilisation report: one page that says why an algorithm may, or may not yet, be called stable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..markdown import table
from .criteria import CRITERIA, Candidate, Finding, verdict
from .documents import EVIDENCE, sections


def file_of(candidate: Candidate) -> Path:
    """Where the report of an algorithm is kept."""
    return candidate.project.folder / "evidence" / f"stabilisation-{candidate.name}.md"


def text_of(candidate: Candidate, found: list[Finding]) -> str:
    """The report in Markdown. The same findings give the same text."""
    algorithm, project = candidate.composition.own.algorithm, candidate.project
    lines = [
        f"# Stabilisation report: {candidate.name}",
        "",
        f"{algorithm.summary} {project.name} {project.version}, tagged "
        f"{project.algorithm(candidate.name)[0].value}. Written by `trl-core promote {candidate.name}`.",
        "",
        f"**{verdict(found).capitalize()}.**",
        "",
        table(["criterion", "what it asks", "met", "evidence", "missing"], map(_row, CRITERIA, found)),
    ]
    limits = sections(project.folder / EVIDENCE).get("Not shown", "Nothing is said about it.")
    promise = (
        "From the promotion on its options, its trainer's arguments and its public names change only after a "
        "deprecation, which names the version of the removal and what to use instead."
    )
    return "\n".join([*lines, "", "## What is promised", "", promise, "", "## What is not shown", "", limits, ""])


def _row(criterion: Callable[[Candidate], Finding], finding: Finding) -> list[str]:
    asks = (criterion.__doc__ or "").partition("\n")[0]
    return [finding.criterion, asks, "yes" if finding.met else "no", finding.evidence, finding.missing or ""]
