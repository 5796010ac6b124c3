"""`trl-core promote`: what an algorithm needs to be stable, with the evidence; and the step itself."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ..errors import PromotionError, TRLCoreError
from ..files import replace_text
from ..project import Project, find_project, from_source
from ..promotion import moves, stabilisation
from ..promotion.criteria import Candidate, Finding, findings, verdict
from ..stability import Stability
from .list import make_console, print_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand."""
    add_target(parser)
    parser.add_argument("--apply", action="store_true", help="move the line in pyproject.toml, if all criteria are met")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_target(parser: argparse.ArgumentParser) -> None:
    """The options that name an algorithm of a project."""
    parser.add_argument("name", metavar="NAME", help="algorithm, or the folder or distribution of a single one")
    where = "default: this folder if it registers the algorithm, else the one it is installed from"
    parser.add_argument("--project", metavar="FOLDER", type=Path, help=where)


@contextlib.contextmanager
def candidate_of(args: argparse.Namespace) -> Iterator[Candidate]:
    """The algorithm that is named, with its project, which is read from its folder while this is open.

    Raises:
        TRLCoreError: there is none, or its modules are not in the folder.
    """
    if args.project:
        project = Project(args.project.resolve())
    else:
        project = _here(args.name) or find_project(args.name)
    name = project.name if Path(args.name).is_dir() and not args.project else args.name
    with from_source(project):
        yield Candidate(project, project.named(name))


def _here(name: str) -> Project | None:
    """The project of the current folder, if it is one and has such an algorithm."""
    try:
        project = Project(Path.cwd())
        project.named(name)
    except TRLCoreError:
        return None
    return project


def run(args: argparse.Namespace) -> int:
    """Print the criteria and write the report; with `--apply` move the line. 1 if something is missing.

    Raises:
        TRLCoreError: there is no such algorithm, or it cannot be promoted from where it is.
    """
    with candidate_of(args) as candidate:
        now = candidate.project.algorithm(candidate.name)[0]
        found = findings(candidate)
        report = stabilisation.text_of(candidate, found)
    if args.json:
        told = {"algorithm": candidate.qualified, "stability": now.value, "verdict": verdict(found)}
        print(json.dumps({**told, "criteria": [{**asdict(f), "met": f.met} for f in found]}, indent=2))
    else:
        _print(candidate, now, found)
    if not args.json or args.apply:
        file = stabilisation.file_of(candidate)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(report, encoding="utf-8")
        if not args.json:
            print(f"Report: {file}")
    if args.apply:
        _apply(candidate, now, found)
    return int(not all(finding.met for finding in found))


def _print(candidate: Candidate, now: Stability, found: list[Finding]) -> None:
    console = make_console()
    console.print(f"{candidate.qualified} {candidate.project.version} is {now.value}: {verdict(found)}.", markup=False)
    rows = [[f.criterion, "yes" if f.met else "no", f.evidence, f.missing or ""] for f in found]
    print_rows(console, ["criterion", "met", "evidence", "missing"], rows)


def _apply(candidate: Candidate, now: Stability, found: list[Finding]) -> None:
    if now is Stability.DEPRECATED:
        raise PromotionError(
            f"{candidate.qualified} is deprecated: its users were told that it goes.",
            mend=f"Take that back first: trl-core demote {candidate.name} --apply",
        )
    lacking = [f"  {finding.criterion}: {finding.missing}" for finding in found if not finding.met]
    if lacking and now is not Stability.STABLE:
        raise PromotionError(
            "\n".join([f"{candidate.qualified} is not promoted; what is missing:", *lacking]),
            mend="Supply the evidence. No criterion can be waived.",
        )
    project = candidate.project
    replace_text(project.file, moves.moved(project, candidate.name, Stability.STABLE))
    print_next(candidate, Stability.STABLE)


def print_next(candidate: Candidate, tag: Stability) -> None:
    """What remains once a line was moved."""
    folder = shlex.quote(str(candidate.project.folder))
    print(f"{candidate.qualified} is {tag.value} now. What is left to do, so that metadata and contract say so too:")
    print(f"  pip install -e {folder}\n  trl-core api record {folder}")
