"""Entry of the command `trl-core`.

A subcommand is a module of this package with `add_arguments(parser)` and `run(args) -> int`. Only the module of the
subcommand that is asked for is imported, so that `trl-core list` does not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..errors import TRLCoreError

COMMANDS = {
    "list": "list the installed algorithms",
    "info": "show the parts, options and hooks of an algorithm or composition",
    "train": "train a model with an algorithm or composition",
    "new": "make a plugin: a complete project that runs and passes its tests",
    "check": "run the conformance kit on an algorithm or on a project",
    "promote": "show what an algorithm needs to become stable, and make it so",
    "demote": "make a stable or deprecated algorithm experimental again",
    "deprecate": "announce that an algorithm will be removed",
    "api": "record the public interface of a distribution, or check it against its records",
    "migrate": "rewrite scripts for TRL with the names of trl-core and its plugins",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trl-core` with the given arguments (default: those of the process) and return the exit code.

    The code is 2 where trl-core refuses something; what and how to mend it is then on stderr. It is 130 after an
    interrupt (Ctrl-C).
    """
    try:
        return _run(argv)
    except TRLCoreError as error:
        print(f"trl-core: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trl-core: interrupted", file=sys.stderr)
        return 130


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="trl-core", description="Post-training of language models by plugins.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if name == asked:
            command = importlib.import_module(f".{name}", __package__)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    if args.version:
        from ..discovery import core_version

        print(f"trl-core {core_version()}")
        return 0
    if asked is None:
        parser.print_help(sys.stderr)
        return 2
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
