"""`trl-core demote`: a stable algorithm, or a deprecated one that is to stay, becomes experimental."""

from __future__ import annotations

import argparse
import difflib
import tokenize
from collections.abc import Mapping
from pathlib import Path

from ..errors import PromotionError
from ..files import replace_text
from ..promotion import moves
from ..stability import Stability
from .promote import add_target, candidate_of, print_next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand."""
    add_target(parser)
    parser.add_argument("--apply", action="store_true", help="change the file; without it the change is only shown")


def run(args: argparse.Namespace) -> int:
    """Show or make the change of `pyproject.toml`, and take back what was said of a removal.

    Raises:
        TRLCoreError: there is no such algorithm, or it is experimental already.
    """
    with candidate_of(args) as candidate:
        project = candidate.project
        now = project.algorithm(candidate.name)[0]
        texts = {project.file: moves.moved(project, candidate.name, Stability.EXPERIMENTAL)}
        if now is Stability.DEPRECATED:
            try:
                announcement = moves.Announcement(project, candidate.name)
                texts[announcement.file] = announcement.text(removal=None, replacement=None)
            except PromotionError as error:
                print(f"note: take removal and replacement out of its definition yourself. {error.what}")
    if now is Stability.STABLE:
        print("note: whoever relies on it, with require='stable' for example, is refused from then on. Say why in the")
        print("changelog; where it can go on for a while, `trl-core deprecate` breaks less.")
    show_or_write(texts, args.apply)
    if args.apply:
        print_next(candidate, Stability.EXPERIMENTAL)
    return 0


def show_or_write(texts: Mapping[Path, str], apply: bool) -> None:
    """Print what changes in some files, and write them all if that is wanted."""
    encodings = {file: _encoding(file) for file in texts}
    olds = {file: file.read_bytes().decode(encodings[file]) for file in texts}
    for file, text in texts.items():
        lines = difflib.unified_diff(olds[file].splitlines(), text.splitlines(), str(file), str(file), lineterm="", n=1)
        print("\n".join(lines))
    if not apply:
        print("Nothing was written; --apply does.")
        return
    written: list[Path] = []
    try:
        for file, text in texts.items():
            replace_text(file, text, encodings[file])
            written.append(file)
    except BaseException:
        for file in written:
            replace_text(file, olds[file], encodings[file])
        raise


def _encoding(file: Path) -> str:
    """That of a Python file is as Python finds it out."""
    if file.suffix != ".py":
        return "utf-8"
    with file.open("rb") as stream:
        return tokenize.detect_encoding(stream.readline)[0]
