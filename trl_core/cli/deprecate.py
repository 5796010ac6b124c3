"""`trl-core deprecate`: an algorithm will be removed; from now on its users are told when, and what to use instead."""

from __future__ import annotations

import argparse

from ..options import require
from ..promotion import moves
from ..stability import Stability
from .demote import show_or_write
from .promote import add_target, candidate_of, print_next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand."""
    add_target(parser)
    parser.add_argument("--removal", required=True, metavar="VERSION", help="of the distribution that removes it")
    parser.add_argument("--replacement", required=True, metavar="NAME", help="what to use instead")
    parser.add_argument("--apply", action="store_true", help="change the files; without it the changes are only shown")


def run(args: argparse.Namespace) -> int:
    """Show or make the changes of `pyproject.toml` and of the module that defines the algorithm.

    Raises:
        TRLCoreError: there is no such algorithm, or its removal comes too soon.
    """
    with candidate_of(args) as candidate:
        project, name = candidate.project, candidate.name
        now, announcement = project.algorithm(name)[0], moves.Announcement(project, name)
        require(
            bool(args.replacement.strip()) and args.replacement not in (name, candidate.qualified),
            f"--replacement {args.replacement!r} names nothing else to use.",
            f"Name what takes the place of {name}.",
        )
        moves.check_removal(project, now, args.removal, announcement.removal)
        texts = {announcement.file: announcement.text(removal=args.removal, replacement=args.replacement)}
        if now is not Stability.DEPRECATED:
            texts[project.file] = moves.moved(project, name, Stability.DEPRECATED)
    show_or_write(texts, args.apply)
    if args.apply:
        print_next(candidate, Stability.DEPRECATED)
    return 0
