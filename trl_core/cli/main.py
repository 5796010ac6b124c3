"""Entry of the command `trl-core`.

A subcommand is a module of this package with `add_arguments(parser)` and `run(args) -> int`. Only the module of the
subcommand that is asked for is imported, so that `trl-core list` does not wait for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence

from ..errors import ConfigError, OutputDirError, TRLCoreError, printable
from ..names import did_you_mean
from ..redaction import hide_error

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

    The code is 2 where trl-core refuses something; what and how to mend it is then on stderr. It is 130 after Ctrl-C,
    and 141, as for any command in a pipe, if whoever reads the output goes away.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever a name or a text of somebody else's holds
    try:
        try:
            return _run(arguments, asked)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what is not written yet would fail where nobody can catch it
    except TRLCoreError as error:
        for line in (f"trl-core: {type(error).__name__}: {error}", *getattr(error, "__notes__", ())):
            print(printable(line), file=sys.stderr)
        return 2
    except (BrokenPipeError, SystemExit) as error:
        # rich makes SystemExit of a broken pipe.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _silence()
        return 141
    except KeyboardInterrupt:
        print("trl-core: stopped by Ctrl-C.", file=sys.stderr)
        return 130
    except OSError as error:
        hide_error(error)
        if asked == "train" or error.errno is None:
            raise
        _silence()
        what = f"{error.filename or 'The output'} cannot be read or written: {error.strerror}."
        told = OutputDirError(what, mend="Look at its permissions and at the space that is left.")
        print(f"trl-core: {type(told).__name__}: {told}", file=sys.stderr)
        return 2
    except Exception as error:
        hide_error(error)
        raise


def _run(arguments: list[str], asked: str | None) -> int:
    parser = argparse.ArgumentParser(prog="trl-core", description="Post-training of language models by plugins.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if name == asked:
            command = importlib.import_module(f".{name}", __package__)
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    if asked is not None and asked not in COMMANDS:
        what = f"There is no command {asked!r}.{did_you_mean(asked, COMMANDS)}"
        raise ConfigError(what, mend="`trl-core --help` lists the commands.")
    args, left = parser.parse_known_args(arguments)
    if left and asked == "train":
        shown = " ".join(word.partition("=")[0] for word in left)  # a value may be a secret
        what = f"The command line: NAME, the algorithm, comes before {shown!r}."
        raise ConfigError(what, mend=f"Write it so: {subparsers.choices[asked].usage}.")
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if args.version:
        from ..discovery import core_version

        print(f"trl-core {core_version()}")
        return 0
    if asked is None:
        parser.print_help(sys.stderr)
        return 2
    return int(args.run(args))


def _silence() -> None:
    """Let the rest of the output go nowhere: Python writes it when it ends, and would complain once more."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
