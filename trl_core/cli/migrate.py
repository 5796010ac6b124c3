"""`trl-core migrate`: scripts for TRL with the names of trl-core and its plugins."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from .. import install
from ..errors import TRLCoreError

if TYPE_CHECKING:
    from ..migration.files import Outcome

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand."""
    parser.add_argument("path", nargs="+", type=Path, help="a script, a notebook, or a folder with such")
    parser.add_argument("--write", action="store_true", help="rewrite the files; default: only show what would change")
    parser.add_argument("--no-color", action="store_true", help="no colours; the same as the variable NO_COLOR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show, or write, the scripts with our names, and list what is left to do.

    Returns:
        0 if nothing is left to do, 1 if something could not be mapped, 2 if a file could not be read or written.

    Raises:
        TRLCoreError: libcst is not installed.
    """
    try:
        from ..migration import files
    except ModuleNotFoundError as error:
        if error.name != "libcst":
            raise
        raise TRLCoreError(
            "trl-core migrate needs libcst, which is not installed.", mend=install.how("trl-core[migrate]")
        ) from error
    outcomes = [files.migrate(file) for file in files.find(args.path)]
    if args.write:
        for outcome in outcomes:
            if outcome.changed:
                try:
                    files.write(outcome)
                except OSError as error:
                    outcome.error = f"{outcome.file}: not written: {error.strerror}"
    left = any(finding.open for outcome in outcomes for _, finding in outcome.findings)
    code = 2 if any(outcome.error for outcome in outcomes) else int(left)
    if args.json:
        print(json.dumps(_as_dict(outcomes, args.write, code), indent=2))
    else:
        _print(outcomes, args.write, colour=not args.no_color and not os.environ.get("NO_COLOR"))
    return code


def to_install(outcomes: list[Outcome]) -> list[str]:
    """The distributions of the new imports, trl-core first; what comes with it is not named."""
    found = {name for outcome in outcomes if not outcome.error for name in outcome.distributions}
    ours = {name for name in found if name.startswith("trl-")}
    return ["trl-core", *sorted(ours - {"trl-core"})] if ours else sorted(found)


def _print(outcomes: list[Outcome], written: bool, colour: bool) -> None:
    console = Console(no_color=not colour, highlight=False, soft_wrap=True, color_system="auto" if colour else None)
    for outcome in outcomes:
        for line in outcome.diff if outcome.changed else []:
            console.print(Text(line, _STYLES.get(line[:1], "")))
    for title, still_open in (("Left for you to do:", True), ("Notes:", False)):
        found = [(place, finding) for o in outcomes for place, finding in o.findings if finding.open is still_open]
        if found:
            console.print(Text(f"\n{title}", "bold"))
        for place, finding in found:
            console.print(Text.assemble((f"{place}: ", "cyan"), f"{finding.name}: {finding.why}."))
            console.print(Text(f"    Instead: {finding.instead}."))
    if needed := to_install(outcomes):
        ours = all(name.startswith("trl-") for name in needed)
        console.print(Text(f"\nTo install: {install.how(*needed) if ours else install.from_index(*needed)}"))
    changed = sum(outcome.changed for outcome in outcomes)
    state = "rewritten" if written else "to be rewritten (--write does it)"
    console.print(Text(f"\n{len(outcomes)} files read, {changed} {state}."))
    for outcome in outcomes:
        if outcome.error:
            print(f"trl-core migrate: {outcome.error}", file=sys.stderr)


def _as_dict(outcomes: list[Outcome], written: bool, code: int) -> dict[str, object]:
    return {
        "exit_code": code,
        "written": written,
        "install": to_install(outcomes),
        "files": [
            {
                "file": str(outcome.file),
                "changed": outcome.changed,
                "diff": outcome.diff if outcome.changed else [],
                "error": outcome.error,
                "findings": [
                    {
                        "place": place,
                        "line": finding.line,
                        "name": finding.name,
                        "kind": finding.kind,
                        "why": finding.why,
                        "instead": finding.instead,
                    }
                    for place, finding in outcome.findings
                ],
            }
            for outcome in outcomes
        ],
    }
