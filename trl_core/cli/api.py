"""`trl-core api`: record the interface of a distribution, and check that nothing promised has changed since."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import date

from ..project import Project, find_project


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="record|check")
    record = commands.add_parser("record", help="write api/<version>.json")
    record.add_argument("--released", type=date.fromisoformat, metavar="DATE", help="day of the release, YYYY-MM-DD")
    check = commands.add_parser("check", help="compare with the records; exit code 1 for a breaking change")
    check.add_argument("--against", metavar="VERSION", help="compare with this record alone")
    check.add_argument("--json", action="store_true", help="print JSON")
    for each in (record, check):
        each.add_argument(
            "names", nargs="*", metavar="NAME", help="algorithm, distribution or folder; default: this folder"
        )


def run(args: argparse.Namespace) -> int:
    """Record or check.

    Raises:
        ProjectError, ContractError, AlgorithmNotFoundError: see `trl_core.contract` and `trl_core.project`.
    """
    projects = [find_project(name) for name in args.names or ["."]]
    return _check(projects, args) if args.command == "check" else _record(projects, args.released)


def _record(projects: list[Project], released: date | None) -> int:
    from ..contract import write

    for project in projects:
        print(write(project, released))
    return 0


def _check(projects: list[Project], args: argparse.Namespace) -> int:
    from ..contract import check

    found = {f"{project.name} {project.version}": check(project, args.against) for project in projects}
    if args.json:
        print(json.dumps({name: [asdict(change) for change in each] for name, each in found.items()}, indent=2))
    else:
        for name, changes in found.items():
            for change in changes:
                print(f"{change.kind}: {change.what}" + (f"\n  To mend: {change.mend}" if change.mend else ""))
            broken = sum(change.kind == "breaking" for change in changes)
            print(f"{name}: {broken or 'no'} breaking change{'' if broken == 1 else 's'}")
    return int(any(change.kind == "breaking" for changes in found.values() for change in changes))
