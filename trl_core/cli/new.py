"""`trl-core new`: make a plugin, complete from its entry point to its conformance test."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import importlib_metadata
from packaging.version import Version

from .. import install
from ..discovery import CORE, AlgorithmInfo, core_version, find, list_algorithms
from ..errors import CompositionError
from ..options import require
from ..scaffold import SHAPES, Names, render, write

_SUMMARIES = {
    "online": "{base} with a limit to advantages.",
    "pairs": "{base} with a level at which the loss of a pair flattens.",
    "scores": "{base} with a level at which the loss of a pair flattens.",
    "texts": "{base} with the first term of PolyLoss.",
    "alone": "Policy gradient with the mean of the other completions as baseline.",
}
_LONGEST_SUMMARY = 100
# The repository of the plugin names the Git address of trl-core, while no index has it.
_CORE_IN_CI = f"""\
      - if: vars.TRL_CORE_GIT  # a variable of this repository: the Git address of trl-core, until it is published
        run: {install.from_git(f"{CORE}[authors]").replace("GIT_ADDRESS", "${{ vars.TRL_CORE_GIT }}")}
"""
# No default of argparse, which would not see that it is also given.
_BASE = "grpo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand."""
    parser.add_argument(
        "name", metavar="NAME", help="name of the algorithm; my-algo makes the distribution trl-my-algo"
    )
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--extends", metavar="ALGORITHM", help=f"what it builds on; default: {_BASE}")
    base.add_argument("--stands-alone", action="store_true", help="it builds on no other algorithm")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write it; default: ./trl-NAME")
    parser.add_argument("--author", metavar="'NAME <MAIL>'", help="who answers for it; default: as git knows you")
    parser.add_argument("--summary", metavar="TEXT", help="one line for `trl-core list`")


def run(args: argparse.Namespace) -> int:
    """Check everything, write the files, and say what to do next.

    Raises:
        TRLCoreError: the name is taken or cannot be one, there is no such base, or the folder is not empty.
    """
    names = Names.parse(args.name)
    _check_free(names)
    base = None if args.stands_alone else find(args.extends or _BASE)
    shape = "alone" if base is None else _shape(base)
    core = core_version()
    fields = {
        "core": core,
        "base": base.name if base else "",
        "extends": (args.extends or _BASE).strip(),
        "author": _author(args.author),
        "dependencies": ", ".join(json.dumps(line) for line in _requirements(core, base)),
        "install_core": install.how(f"{CORE}[authors]"),
        "core_in_ci": "" if install.PUBLISHED else _CORE_IN_CI,
        "summary": _summary(args.summary or _SUMMARIES[shape].format(base=base.name if base else "")),
    }
    contents = render(shape, names, fields)
    if licence := _licence():
        contents["LICENSE"] = licence
    folder = args.folder or Path(names.distribution)
    write(folder, contents)
    told = f"which builds on {base.name}" if base else "which builds on no other"
    print(f"Made {folder}: the algorithm {names.algorithm!r}, {told}.\n")
    _print_files(contents, names, SHAPES[shape][1]["hook"])
    print(f"""
Next:
  cd {shlex.quote(str(folder))} && pip install -e ".[test]"
  python examples/train.py
  trl-core check .""")
    return 0


def _print_files(contents: dict[str, str], names: Names, hook: str) -> None:
    notes = {
        f"{names.package}/{names.algorithm}.py": f"your options and your hook: {hook}",
        "pyproject.toml": "the entry point, in the group that is its tag",
        "examples/train.py": "trains a tiny model in seconds",
        f"tests/test_{names.algorithm}.py": "values worked out by hand",
        "tests/test_conformance.py": "what every algorithm must keep",
        "EVIDENCE.md": "what has been shown of it",
    }
    width = max(map(len, contents))
    for path in sorted(contents, key=lambda path: (path not in notes, [*notes].index(path) if path in notes else path)):
        print(f"  {path:{width}}  {notes.get(path, '')}".rstrip())


def _summary(text: str) -> str:
    plain = text.isprintable() and len(text) <= _LONGEST_SUMMARY and not {*text} & {'"', "\\"}
    what = f"The summary {text!r} is no plain line of at most {_LONGEST_SUMMARY} characters."
    require(plain, what, "Shorten it; leave out double quotes and backslashes.")
    return text


def _requirements(core: str, base: AlgorithmInfo | None) -> list[str]:
    """What the plugin needs: this minor release of trl-core or the next, and the distribution of its base."""
    version = Version(core)
    least = version.public if version.is_prerelease else f"{version.major}.{version.minor}"
    lines = [f"{CORE}>={least},<{version.major}.{version.minor + 2}"]
    if base and base.distribution != CORE:
        lines.append(f"{base.distribution}>={Version(base.version).public}")
    return lines


def _check_free(names: Names) -> None:
    owners = [info.qualified for info in list_algorithms() if info.name == names.algorithm]
    what = f"The name {names.algorithm!r} is taken: {' and '.join(owners)} is installed."
    mend = f"Choose another name; to build on it: trl-core new OTHER --extends {' or '.join(owners)}"
    require(not owners, what, mend)


def _shape(base: AlgorithmInfo) -> str:
    """Which templates suit what extends an algorithm.

    Raises:
        TRLCoreError: it is broken, or there is no template for its trainer.
    """
    from ..composition import compose
    from ..training.offline import OfflineTrainer
    from ..training.online import OnlineTrainer
    from ..training.pairs import PairTrainer, ScoreTrainer

    trainer: Any = compose(base.qualified, warn=False).trainer_class
    shapes = {OnlineTrainer: "online", ScoreTrainer: "scores", PairTrainer: "pairs", OfflineTrainer: "texts"}
    for of, shape in shapes.items():
        if issubclass(trainer, of):
            return shape
    raise CompositionError(
        f"{base.qualified} runs on {trainer.__name__}, for which there is no template.",
        mend="Start from --stands-alone, and write `extends` yourself.",
    )


def _author(given: str | None) -> str:
    """An entry of `maintainers`; empty where nobody is known, which `trl-core promote` will say."""
    name, _, mail = (given or "").partition("<")
    if given is None:
        name, mail = _git("user.name"), _git("user.email")
    found = {"name": name.strip(), "email": mail.strip(" >")}
    pairs = ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in found.items() if value)
    return f"{{ {pairs} }}" if found["name"] else ""


def _git(key: str) -> str:
    try:
        done = subprocess.run(["git", "config", key], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _licence() -> str | None:
    """The text of Apache-2.0, which comes with trl-core."""
    return importlib_metadata.distribution(CORE).read_text("licenses/LICENSE")
