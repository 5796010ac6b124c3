"""`trl-core demote`: a stable algorithm, or a deprecated one that is to stay, becomes experimental."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from ..files import replace_text
from ..promotion import moves
from ..stability import Stability
from .promote import add_target, candidate_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand."""
    add_target(parser)
    parser.add_argument("--apply", action="store_true", help="change the file; without it the change is only shown")


def run(args: argparse.Namespace) -> int:
    """Show or make the change of `pyproject.toml`.

    Raises:
        TRLCoreError: there is no such algorithm, or it is experimental already.
    """
    candidate = candidate_of(args)
    now, file = candidate.project.algorithm(candidate.name)[0], candidate.project.file
    text = moves.moved(candidate.project, candidate.name, Stability.EXPERIMENTAL)
    if now is Stability.STABLE:
        print("note: whoever relies on it, with require='stable' for example, is refused from then on. Say why in the")
        print("changelog; where it can go on for a while, `trl-core deprecate` breaks less.")
    show_or_write(file, text, args.apply)
    return 0


def show_or_write(file: Path, text: str, apply: bool) -> None:
    """Print what changes in a file, and write it if that is wanted."""
    old = file.read_text(encoding="utf-8")
    lines = difflib.unified_diff(old.splitlines(), text.splitlines(), str(file), str(file), lineterm="", n=1)
    print("\n".join(lines))
    if apply:
        replace_text(file, text)
    else:
        print("Nothing was written; --apply does.")
