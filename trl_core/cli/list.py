"""`trl-core list`: what is installed, read from metadata only."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..discovery import AlgorithmInfo, damaged, list_algorithms, unknown_groups
from ..errors import printable
from ..markdown import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--format", choices=["table", "md", "json"], default="table", help="default: table")
    form.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")


def run(args: argparse.Namespace) -> int:
    """Print the installed algorithms on stdout and what is wrong with the installation on stderr.

    Raises:
        TRLCoreError: trl-core itself is not installed.
    """
    infos = list_algorithms()
    usable = [info for info in infos if info.broken is None]
    broken = [info for info in infos if info.broken is not None]
    if args.format == "json":
        print(json.dumps([asdict(info) for info in infos], indent=2))
    elif args.format == "md":
        print(as_markdown(usable))
        for info in broken:
            print(f"warning: left out {info.qualified}: {info.broken}", file=sys.stderr)
    else:
        _print_table(usable, broken)
    for warning in (*unknown_groups(), *damaged()):
        print(f"warning: {printable(str(warning))}", file=sys.stderr)
    return 0


def as_markdown(infos: Iterable[AlgorithmInfo]) -> str:
    """A Markdown table of algorithms; without versions, so that a page does not change with every release."""
    rows = [[i.name, i.stability.value, i.distribution, i.extends or "", i.summary or ""] for i in infos]
    return table(["name", "tag", "distribution", "extends", "summary"], rows)


def _print_table(usable: list[AlgorithmInfo], broken: list[AlgorithmInfo]) -> None:
    console = make_console()
    print_rows(
        console,
        ["name", "tag", "distribution", "version", "extends", "summary"],
        [[i.name, i.stability.value, i.distribution, i.version, i.extends or "", i.summary or ""] for i in usable],
    )
    if broken:
        console.print("Installed, but cannot be used:")
        print_rows(
            console,
            ["name", "tag", "distribution", "version", "reason"],
            [[i.name, i.stability.value, i.distribution, i.version, i.broken or ""] for i in broken],
        )


def make_console() -> Console:
    """A console on stdout that never breaks a line in a pipe, which has no width: grep and cut want whole lines."""
    console = Console()
    if not console.is_terminal:
        console.width = 10_000
    return console


def print_rows(console: Console, header: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    table = Table(*header, box=SIMPLE_HEAD)
    for row in rows:
        # Text, not str: what a distribution says of itself is no markup of ours, and no command to the terminal.
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
