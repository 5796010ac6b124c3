"""Writes the parts of the documentation that repeat what the code says; `--check` says which of them are not current.

`python tools/gen_docs.py` rewrites, in the README, in docs/ and in the plugins' READMEs, what stands between
`<!-- WHAT ARGUMENTS:begin -->` and the same with `:end`. WHAT is one of:

    algorithms          the table of `trl-core list --format md`, of the distributions of this repository
    hook NAME           kind, signature and description of a hook
    options NAME OWNER  the options that OWNER defines in the configuration of the algorithm NAME; OWNER is an
                        algorithm, or "trainer" for what the trainers of the core define
    all_options         the options of every algorithm of this repository and of every trainer of the core
    fields CLASS        the fields of a class of trl_core.batch with their descriptions
    error CLASS         what an error class means, and what else it can be caught as
    matrix              which two algorithms of this repository compose, and why others do not
    composition NAME    the same for one algorithm
    commands            every command of trl-core with its arguments
    run                 the keys of a run that `trl-core train` has beside the options of the algorithm
    names MODULE        the public names of a module
    decisions           the pages of docs/decisions
    promotion           how far each algorithm is on the way to stable
    migration [homeless] where names of TRL are here, or which have no home
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_core import AlgorithmInfo
    from trl_core.options import Field

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/**/*.md", "plugins/*/*.md")
_PART = re.compile(r"(<!-- ((\w+)(?: [^\n]*?)?):begin -->\n)(.*?)(<!-- \2:end -->)", re.DOTALL)


def algorithms() -> str:
    """The table of the algorithms in this repository; what else is installed here is no part of a page."""
    from trl_core.cli.list import as_markdown

    return as_markdown(_ours())


def _ours() -> list[AlgorithmInfo]:
    from trl_core.discovery import CORE, list_algorithms

    ours = {CORE, *(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))}
    return [info for info in list_algorithms() if info.distribution in ours]


def hook(name: str) -> str:
    """Kind, signature and docstring of a hook."""
    from trl_core.hookspecs import HookSpecs, hook_kinds

    kind, refine = hook_kinds()[name]
    function = getattr(HookSpecs, name)
    kinds = f"{kind}, may be refined" if refine else kind
    return f"Kind: {kinds}.\n\n```python\ndef {name}{signature(function)}\n```\n\n{inspect.getdoc(function)}"


def signature(function: Callable[..., object]) -> str:
    """A signature as it is written in the source, whose annotations are not evaluated."""
    return str(inspect.signature(function)).replace("'", "")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table; what looks like HTML outside of code is shown as it is."""
    from trl_core.markdown import table as joined

    return joined(header, [[_cell(text) for text in row] for row in rows])


def _cell(text: str) -> str:
    parts = re.split("(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def options(name: str, owner: str) -> str:
    """A table of options with type, default and help."""
    from trl_core.cli.flags import groups_of
    from trl_core.composition import compose

    return _options(groups_of(compose(name))[owner])


def _options(found: Iterable[Field]) -> str:
    from trl_core.options import help_of, type_name

    rows = [[f"`{f.name}`", f"`{type_name(f.type)}`", _value(f.default), help_of(f)] for f in found]
    return table(["option", "type", "default", "what it does"], rows)


def _value(value: object) -> str:
    return "none" if value is None else f"`{value!r}`"


def _fields_of_own(cls: type) -> list[Field]:
    from trl_core.options import fields_of

    return [f for f in fields_of(cls) if f.name in inspect.get_annotations(cls)]


def _is_ours(cls: type) -> bool:
    return not cls.__module__.startswith("transformers.") and cls is not object


def all_options() -> str:
    """A section for each algorithm, for each class of options of the core, and for the changed defaults."""
    from trl_core.composition import compose

    infos = _ours()
    classes: list[type] = []
    for info in infos:
        root = compose(info.qualified, warn=False).root.config
        assert root is not None
        classes += [cls for cls in root.__mro__[1:] if _is_ours(cls) and cls not in classes]
    classes.sort(key=lambda cls: (len(cls.__mro__) == 2, len(cls.__mro__), cls.__name__))  # what all have comes first
    lines = ["## Algorithms", ""]
    for info in infos:
        lines += [*_options_of(info), ""]
    lines += ["## Trainers of the core", ""]
    for cls in classes:
        first = (inspect.getdoc(cls) or "").partition("\n")[0]
        lines += [f"### {cls.__name__}", "", f"{first} {_also(cls)}".strip(), "", _options(_fields_of_own(cls)), ""]
    return "\n".join([*lines, "## Options of transformers with another default", "", _changed(classes)])


def _also(cls: type) -> str:
    bases = [f"[{base.__name__}](#{base.__name__.lower()})" for base in cls.__mro__[1:] if _is_ours(base)]
    return f"Further options: {', '.join(bases)}." if bases else ""


def _options_of(info: AlgorithmInfo) -> list[str]:
    """The section of an algorithm: where it comes from, its own options, the defaults it changes, its arguments."""
    from trl_core.cli.flags import groups_of
    from trl_core.composition import compose
    from trl_core.options import fields_of

    composition = compose(info.qualified, warn=False)
    algorithm = composition.own.algorithm
    base = f"; it extends [{algorithm.extends}](#{algorithm.extends})" if algorithm.extends else ""
    lines = [f"### {info.name}", "", f"From `{info.distribution}`{base}."]
    if algorithm.extends is None and algorithm.config is not None:
        lines[-1] += f" {_also(algorithm.config)}"
    if own := groups_of(composition).get(info.name):
        lines += ["", _options(own)]
    if changed := [f for f in fields_of(composition.config_class) if f.name in algorithm.defaults]:
        lines += ["", "Options of the base with another default:", "", _options(changed)]
    if arguments := algorithm.arguments:
        rows = [[f"`{name}`", text] for name, text in arguments.items()]
        lines += ["", table(["argument of the trainer", "what it is"], rows)]
    return lines


def _changed(classes: list[type]) -> str:
    """The options of transformers that a class of ours defines anew."""
    from transformers import TrainingArguments

    from trl_core.composition import compose
    from trl_core.options import fields_of

    theirs = {f.name: f.default for f in fields_of(TrainingArguments)}
    configs = dict.fromkeys([*classes, *(compose(info.qualified, warn=False).root.config for info in _ours())])
    rows = [
        [f"`{f.name}`", _value(theirs[f.name]), _value(f.default), f"`{cls.__name__}`"]
        for cls in configs
        if cls is not None
        for f in _fields_of_own(cls)
        if f.name in theirs
    ]
    return table(["option", "default there", "default here", "of"], rows)


def fields(name: str) -> str:
    """A table of the fields that a class of rows adds to its base, with the text that follows each in the source."""
    from trl_core import batch

    rows = ["| field | what it is |", "| --- | --- |"]
    (found,) = ast.parse(inspect.getsource(getattr(batch, name))).body
    assert isinstance(found, ast.ClassDef)
    for field, text in pairwise(found.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            described = " ".join(str(ast.literal_eval(text.value)).split()).replace("|", "\\|")
            rows.append(f"| `{ast.unparse(field.target)}` | {described} |")
    return "\n".join(rows)


def error(name: str) -> str:
    """What an error class means, and the built-in it derives from."""
    from trl_core import errors

    found: type[Exception] = getattr(errors, name)
    others = [cls for cls in found.__mro__[1:] if cls.__module__ in ("builtins", errors.__name__)]
    others = [cls for cls in others if cls not in (errors.TRLCoreError, Exception, BaseException, object)]
    text = " ".join((inspect.getdoc(found) or "").split())
    return f"{text} It is also caught as {' and '.join(f'`{cls.__name__}`' for cls in others)}." if others else text


@functools.cache
def families() -> dict[str, list[str]]:
    """The algorithms of this repository by the base they build on, where there is more than one to a base."""
    from trl_core.composition import compose

    found: dict[str, list[str]] = {}
    for info in _ours():
        found.setdefault(compose(info.qualified, warn=False).root.name, []).append(info.name)
    return {root: sorted(names, key=lambda name: (name != root, name)) for root, names in found.items() if names[1:]}


@functools.cache
def refusal(first: str, second: str) -> str | None:
    """Why two algorithms do not compose, or None."""
    from trl_core.promotion.criteria import refusal

    return refusal(f"{first}+{second}")


def matrix() -> str:
    """For each base a table of its algorithms, and the reasons of the pairs that are refused."""
    lines: list[str] = []
    for root, names in families().items():
        lines += [f"### On {root}", "", f"| | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
        reasons: list[str] = []
        for first in names:
            cells = []
            for second in names:
                reason = None if first == second else refusal(first, second)
                cells.append("-" if first == second else "no" if reason else "yes")
                reasons += [f"- `{first}+{second}`: {reason}"] if reason else []
            lines.append(f"| **{first}** | {' | '.join(cells)} |")
        lines += ["", *reasons, *([""] if reasons else [])]
    return "\n".join(lines).rstrip()


def composition(name: str) -> str:
    """Which algorithms of this repository one composes with, with the reasons of those that it does not."""
    base, names = next(((root, found) for root, found in families().items() if name in found), ("", []))
    if not names:
        return f"No other algorithm of this repository builds on `{name}`, so there is nothing to join it with."
    others = [other for other in names if other != name]
    reasons = {other: refusal(name, other) or refusal(other, name) for other in others}
    row = [f"**{name}**", *("no" if reasons[other] else "yes" for other in others)]
    said = [f"- `{name}+{other}`: {reason}" for other, reason in reasons.items() if reason]
    return "\n".join([table([f"on {base}", *others], [row]), *(["", *said] if said else [])])


def commands() -> str:
    """A section for each command, with its arguments."""
    from trl_core.cli.main import COMMANDS

    parts = []
    for name, summary in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"trl-core {name}", add_help=False)
        importlib.import_module(f"trl_core.cli.{name}").add_arguments(parser)
        parts += [f"## {name}", "", f"{summary[0].upper()}{summary[1:]}.", "", *_command(parser)]
    return "\n".join(parts).rstrip()


def _command(parser: argparse.ArgumentParser) -> list[str]:
    lines, rows, shown = [], [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, sub in action.choices.items():
                lines += [f"### {parser.prog.removeprefix('trl-core ')} {name}", ""]
                lines += [f"{helps[name]}".capitalize().rstrip(".") + ".", ""] if helps.get(name) else []
                lines += _command(sub)
        elif action.help is not argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            word, asked = _spelling(action)
            shown.append(word if asked else f"[{word}]")
            rows.append([f"`{word}`", (action.help or "").replace("%(default)s", str(action.default))])
    own = f"{parser.prog} {' '.join(shown)}".rstrip()
    usage = ["```text", parser.usage or own, "```", ""] if shown or not lines else []
    return [*usage, *([table(["argument", "what it is"], rows), ""] if rows else []), *lines]


def _spelling(action: argparse.Action) -> tuple[str, bool]:
    """How an argument is written, and whether it must be given."""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
    value = str(action.metavar or choices or (action.dest.upper() if action.option_strings else action.dest))
    several = {"*": "...", "+": "...", argparse.REMAINDER: "..."}.get(str(action.nargs), "")
    if not action.option_strings:
        return f"{value}{several}", action.nargs not in ("?", "*", argparse.REMAINDER)
    taken = "" if action.nargs == 0 else f" {value}{several}"
    return f"{action.option_strings[-1]}{taken}", action.required


def run() -> str:
    """The keys of a run."""
    from trl_core.cli.train import RunOptions
    from trl_core.options import fields_of

    return _options(fields_of(RunOptions))


def names(module: str) -> str:
    """The public names of a module, with the first sentence of what each says of itself."""
    found = importlib.import_module(module)
    rows = []
    for name in found.__all__:
        value: Any = getattr(found, name)
        described = (inspect.getdoc(value) or "").split("\n\n")[0] if not isinstance(value, str | int | tuple) else ""
        rows.append([f"`{name}`", re.split(r"(?<=\.) ", " ".join(described.split()))[0]])
    return table(["name", "what it is"], rows)


def decisions() -> str:
    """The pages of docs/decisions by their titles."""
    found = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    titles = [(path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "), path.name) for path in found]
    return "\n".join(f"- [{title}]({name})" for title, name in titles)


def promotion() -> str:
    """For each algorithm its tag, and what `trl-core promote` says of it."""
    from trl_core.project import Project
    from trl_core.promotion.criteria import CRITERIA, Candidate, findings, verdict

    criteria = [criterion.__name__.removeprefix("criterion_") for criterion in CRITERIA]
    rows = []
    for folder in [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]:
        project = Project(folder)
        for name, (tag, _) in sorted(project.algorithms.items()):
            found = findings(Candidate(project, name))
            rows.append([f"`{name}`", tag.value, *("yes" if each.met else "no" for each in found), verdict(found)])
    return table(["algorithm", "tag", *criteria, "verdict"], rows)


def migration(part: str = "homes") -> str:
    """Where the names of TRL are here, or those that have no home, as `trl-core migrate` knows it."""
    from trl_core.migration import table, table_of_homeless

    return table_of_homeless() if part == "homeless" else table()


_WRITERS = (
    algorithms,
    hook,
    options,
    all_options,
    fields,
    error,
    matrix,
    composition,
    commands,
    run,
    names,
    decisions,
    migration,
    promotion,
)
WRITERS: dict[str, Callable[..., str]] = {writer.__name__: writer for writer in _WRITERS}


def current(text: str) -> str:
    """A page with all its generated parts written anew."""

    def write(match: re.Match[str]) -> str:
        begin, what, writer, _, end = match.groups()
        return f"{begin}{WRITERS[writer](*what.split()[1:])}\n{end}"

    return _PART.sub(write, text)


def pages() -> dict[Path, str]:
    """Every page with a generated part, and what it should say."""
    found = {path: path.read_text(encoding="utf-8") for pattern in PAGES for path in sorted(ROOT.glob(pattern))}
    return {path: current(text) for path, text in found.items() if _PART.search(text)}


def main() -> int:
    """Write all pages, or with `--check` name those that are not current."""
    parser = argparse.ArgumentParser(description="Write the generated parts of the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is not current")
    check = parser.parse_args().check
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    stale = [path for path, text in pages().items() if text != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not current" if check else f"wrote {path.relative_to(ROOT)}")
        if not check:
            path.write_text(current(path.read_text(encoding="utf-8")), encoding="utf-8")
    if check and stale:
        print("To mend: python tools/gen_docs.py")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
