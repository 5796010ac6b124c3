"""`trl-core deprecate`: an algorithm will be removed; from now on its users are told when, and what to use instead."""

from __future__ import annotations

import argparse

from ..promotion import moves
from ..stability import Stability
from .demote import show_or_write
from .promote import add_target, candidate_of


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
    candidate = candidate_of(args)
    project = candidate.project
    now, value = project.algorithm(candidate.name)
    moves.check_removal(project, now, args.removal)
    tagged = moves.moved(project, candidate.name, Stability.DEPRECATED)
    source, text = moves.announced(value, args.removal, args.replacement)
    show_or_write(source, text, args.apply)
    show_or_write(project.file, tagged, args.apply)
    return 0
