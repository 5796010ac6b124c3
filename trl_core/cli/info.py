"""`trl-core info`: what an algorithm or a composition consists of, its options, and who acts in each step."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.text import Text

from ..errors import printable
from ..hookspecs import hook_kinds
from ..options import help_of, type_name
from .flags import LIBRARY, TRAINER, groups_of
from .list import make_console, print_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand."""
    parser.add_argument("name", metavar="NAME", help="algorithm, or several joined by +")
    parser.add_argument("--all", action="store_true", help=f"also list the options of {LIBRARY}")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print parts, options, trainer arguments and hooks.

    Raises:
        TRLCoreError: the name cannot be resolved, or the parts do not fit together.
    """
    from ..composition import compose

    composition = compose(args.name, warn=False)
    groups = groups_of(composition)
    left_out = [] if args.all else groups.pop(LIBRARY)
    options = {
        owner: [{"option": f.name, "type": type_name(f.type), "default": f.default, "help": help_of(f)} for f in fields]
        for owner, fields in groups.items()
    }
    arguments = [{"argument": name, "help": text} for name, text in composition.arguments.items()]
    chain = _chain(composition)
    if args.json:
        parts = {"name": composition.name, "parts": composition.provenance()}
        record = {**parts, "options": options, "arguments": arguments, "hooks": chain}
        print(json.dumps(record, indent=2, default=str))
        return 0
    hooks = [
        {"hook": hook, "acting": ", ".join(f"{name} {kind}s" for name, kind in acting)}
        for hook, acting in chain.items()
    ]
    tables: dict[str, list[dict[str, Any]]] = {"Algorithms, from the base outwards": composition.provenance()}
    tables |= {f"Options of {owner}": rows for owner, rows in options.items()}
    tables |= {
        "Arguments of the trainer": arguments,
        "Hooks in the order of a step, each from the base outwards": hooks,
    }
    console = make_console()
    for title, rows in tables.items():
        if rows:
            console.print(Text(printable(f"{title}:")))
            cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
            print_rows(console, list(rows[0]), cells)
    if left_out:
        console.print(f"{len(left_out)} options of {LIBRARY} are not shown; --all shows them.")
    return 0


def _chain(composition: Any) -> dict[str, list[tuple[str, str]]]:
    """Who acts in each hook; where no algorithm provides a step, the trainer itself does."""
    chain: dict[str, list[tuple[str, str]]] = composition.chain()
    for hook, (kind, _) in hook_kinds().items():
        if hasattr(composition.trainer_class.default_hooks, hook) and not any(k == "provide" for _, k in chain[hook]):
            chain[hook].insert(0, (TRAINER, kind))
    return chain
