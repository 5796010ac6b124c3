"""`trl-core promote`: what an algorithm needs to be stable, with the evidence; and the step itself."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ..errors import PromotionError
from ..files import replace_text
from ..project import check_installed, find_project
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
    parser.add_argument("name", metavar="NAME", help="algorithm")
    parser.add_argument("--project", metavar="FOLDER", help="default: the folder it is installed from")


def candidate_of(args: argparse.Namespace) -> Candidate:
    """The algorithm that is named, with its project.

    Raises:
        TRLCoreError: there is none, or it is not installed from its folder.
    """
    project = find_project(args.project or args.name)
    candidate = Candidate(project, args.name.rpartition(":")[2])
    project.algorithm(candidate.name)
    check_installed(project)
    return candidate


def run(args: argparse.Namespace) -> int:
    """Print the criteria and write the report; with `--apply` move the line. 1 if something is missing.

    Raises:
        TRLCoreError: there is no such algorithm, or it cannot be promoted from where it is.
    """
    candidate = candidate_of(args)
    now = candidate.project.algorithm(candidate.name)[0]
    found = findings(candidate)
    if args.json:
        told = {"algorithm": candidate.qualified, "stability": now.value, "verdict": verdict(found)}
        print(json.dumps({**told, "criteria": [{**asdict(f), "met": f.met} for f in found]}, indent=2))
    else:
        _print(candidate, now, found)
    if not args.json or args.apply:
        file = stabilisation.file_of(candidate)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(stabilisation.text_of(candidate, found), encoding="utf-8")
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
    print(f"{candidate.qualified} is stable now. What is left to do, so that metadata and contract say so too:")
    print(f"  pip install -e {project.folder}\n  trl-core api record {project.folder}")
