"""Which algorithms are installed, read from package metadata, and loading the one that is asked for.

The entry-point group is the stability tag. Until `load` is called no plugin is imported, and nothing here imports
torch, so what is installed can neither slow a process down nor change a run.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import email
import functools
import importlib.util
import keyword
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping
from configparser import RawConfigParser
from contextvars import ContextVar
from dataclasses import dataclass
from email.message import Message
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import importlib_metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from . import install
from .algorithm import Algorithm
from .errors import (
    AlgorithmNotFoundError,
    AmbiguousAlgorithmError,
    BrokenAlgorithmError,
    TRLCoreError,
    one_line,
    words_of,
)
from .stability import Stability

CORE = "trl-core"
GROUPS = {f"trl_core.{stability.value}": stability for stability in Stability}

# Wider than what is valid, so that "trl-core.stable" is reported as a typo.
_OURS = re.compile(r"trl[-_]core(\..*)?", re.IGNORECASE)
_SECTION = re.compile(r"^\s*\[trl[-_]core", re.IGNORECASE | re.MULTILINE)
_VALUE = re.compile(r"([\w.]+)\s*:\s*([\w.]+)\s*(?:\[.*\])?")
# "+" and ":" have a meaning in the spelling of a composition.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_LONGEST_NAME = 100
_STEPS = 12
"""Names and imports that are followed to a definition."""
_LARGEST = 4 * 2**20
"""Bytes of a file that is looked at for the listing."""


@dataclass(frozen=True)
class AlgorithmInfo:
    """What the metadata of a distribution says of one algorithm."""

    name: str
    stability: Stability
    distribution: str
    """Name of the distribution, normalised (`trl-gfpo`)."""
    version: str
    value: str
    """What the entry point refers to, `"module:object"`."""
    summary: str | None = None
    extends: str | None = None
    """Name of the algorithm it builds on; None also where the plugin does not say it as a literal."""
    broken: str | None = None
    """Why it cannot be used, if that can be seen without importing it."""

    @property
    def qualified(self) -> str:
        """The spelling that no other distribution can claim, such as `"trl-gfpo:gfpo"`."""
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        return f"{self.name!r} of {self.distribution} {self.version} (entry point {self.value!r})"


@dataclass(frozen=True)
class UnknownGroup:
    """An entry-point group that looks like one of ours but is none, so what it registers is not found."""

    group: str
    distribution: str
    names: tuple[str, ...]
    suggestion: str | None

    def __str__(self) -> str:
        hint = f"did you mean {self.suggestion!r}?" if self.suggestion else f"known are {', '.join(GROUPS)}."
        return f"{self.distribution} registers {', '.join(self.names)} in the unknown group {self.group!r}: {hint}"


@dataclass(frozen=True)
class Damaged:
    """A distribution of which nothing can be listed."""

    place: str
    """What it is called on the import path."""
    reason: str

    def __str__(self) -> str:
        return f"{self.place} is left out: {self.reason}"


@dataclass(frozen=True)
class _Entry:
    name: str
    value: str
    group: str
    distribution: str
    version: str
    metadata: Message


_scan: ContextVar[list[_Entry] | None] = ContextVar("_scan", default=None)


def core_version() -> str:
    """The version of the installed trl-core.

    Raises:
        TRLCoreError: trl-core is on the import path but not installed, so that nothing can be discovered.
    """
    for distribution in _distributions(name=CORE):
        metadata = _metadata(distribution)
        if metadata is not None and metadata.get("Version"):
            return str(metadata["Version"])
    raise TRLCoreError(
        f"The distribution {CORE} is not installed, so its version and its own algorithms are unknown.",
        mend=f"Install it: {install.how(CORE)}.",
    )


def list_algorithms() -> list[AlgorithmInfo]:
    """Every installed algorithm, usable or not, by name and distribution. Imports no plugin.

    Raises:
        TRLCoreError: trl-core itself is not installed.
    """
    core = core_version()
    infos = [_info(entry, core) for entry in _entries() if entry.group in GROUPS]
    return sorted(infos, key=lambda info: (info.name, info.distribution, info.stability.value))


def damaged() -> list[Damaged]:
    """Distributions whose metadata cannot be read, although they may register an algorithm, with the reason."""
    found = {}
    for distribution in _distributions():
        place, registered = _place(distribution), _registered(distribution)
        if registered is None:
            found[place] = "its entry_points.txt is no text file that can be read"
        elif _SECTION.search(registered) and _read(distribution) is None:
            found[place] = "its METADATA has no name or cannot be read, or its entry_points.txt has another form"
    return [Damaged(one_line(place, _LONGEST_NAME), reason) for place, reason in sorted(found.items())]


def unknown_groups() -> list[UnknownGroup]:
    """Entry-point groups of installed distributions that are probably misspelt."""
    names: dict[tuple[str, str], list[str]] = {}
    for entry in _entries():
        if entry.group not in GROUPS:
            names.setdefault((entry.group, entry.distribution), []).append(entry.name)
    found = []
    for (group, distribution), registered in sorted(names.items()):
        # Compared without the common beginning, which alone would make any two groups look alike.
        close = difflib.get_close_matches(group.lower().rpartition(".")[2], list(Stability), n=1)
        suggestion = f"trl_core.{close[0]}" if close else None
        listed = sorted(registered)[:20] + ["..."] * (len(registered) > 20)
        found.append(UnknownGroup(one_line(group, _LONGEST_NAME), distribution, tuple(listed), suggestion))
    return found


@contextlib.contextmanager
def scanned() -> Iterator[None]:
    """While it is open, what is installed is looked through once, not for each name anew."""
    token = _scan.set(list(_entries()))
    try:
        yield
    finally:
        _scan.reset(token)


def find(name: str) -> AlgorithmInfo:
    """The record of one algorithm. Imports no plugin.

    Args:
        name: `"gfpo"`, or `"trl-gfpo:gfpo"` where several distributions register that name.

    Raises:
        AlgorithmNotFoundError: nothing that is installed registers it.
        AmbiguousAlgorithmError: several distributions register it, or one does so twice.
        TRLCoreError: trl-core itself is not installed.
    """
    distribution, _, short = name.strip().rpartition(":")
    entries = [entry for entry in _scan.get() or _entries() if entry.group in GROUPS]
    matches = [entry for entry in entries if entry.name == short]
    if distribution:
        matches = [entry for entry in matches if entry.distribution == canonicalize_name(distribution)]
    if not matches:
        raise _not_found(name.strip(), entries)
    if len(matches) > 1:
        raise _ambiguous(short, matches)
    return _info(matches[0], core_version())


def load(algorithm: str | AlgorithmInfo) -> Algorithm:
    """Import a plugin and return the algorithm it registers.

    Raises:
        BrokenAlgorithmError: it cannot be used. An error that its import raised is the `__cause__`.
        AlgorithmNotFoundError, AmbiguousAlgorithmError, TRLCoreError: see `find`.
    """
    info = find(algorithm) if isinstance(algorithm, str) else algorithm
    update = f"Install another version of {info.distribution} or {CORE}, or tell the authors of {info.distribution}."
    if info.broken:
        raise BrokenAlgorithmError(f"{info} cannot be used: {info.broken}.", mend=update)
    module, name = _split(info.value) or ("", "")
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    # A plugin that calls sys.exit() while it is imported must not end the run without a word.
    except (Exception, SystemExit) as error:
        mend, missing = update, error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and missing.partition(".")[0] not in (module.partition(".")[0], __package__):
            mend = f"Install what provides the module {missing!r}; often: pip install {missing.partition('.')[0]}"
        what = f"{info} cannot be imported.\n  {words_of(error)}"
        raise BrokenAlgorithmError(what, mend=mend) from error
    if not isinstance(found, Algorithm):
        wrong = f"is an object of type {type(found).__name__!r}; expected a trl_core.Algorithm"
    elif found.name != info.name:
        wrong = f"calls itself {found.name!r}; expected the name of the entry point"
    elif wrong_fields := _wrong_fields(found):
        wrong = f"has {wrong_fields}"
    else:
        return found
    raise BrokenAlgorithmError(f"{info} {wrong}.", mend=update)


_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("config", "hooks"), (type, type(None))),
    **dict.fromkeys(("defaults", "arguments", "deprecated"), (Mapping,)),
    **dict.fromkeys(("extends", "trainer", "config_name", "trainer_name", "removal", "replacement"), (str, type(None))),
    "summary": (str,),
}


def _wrong_fields(algorithm: Algorithm) -> str | None:
    """What an `Algorithm` was given that is of the wrong kind, or None."""
    for name, kinds in _FIELDS.items():
        value = getattr(algorithm, name)
        if not isinstance(value, kinds):
            expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            return f"{name}={one_line(repr(value), 80)}, a {type(value).__name__}; expected: {expected}"
        names = value if isinstance(value, Mapping) else [value] if name.endswith("_name") and value else []
        for each in names:
            if not isinstance(each, str) or not each.isidentifier() or keyword.iskeyword(each):
                return f"in {name} {each!r}, which is no Python name"
    return None


# -- scanning ---------------------------------------------------------------------------------------------------------
def _entries() -> Iterator[_Entry]:
    """Entry points in all groups that look like ours, of each distribution once.

    A distribution whose metadata cannot be read is skipped: it may be half removed, and it must not stop the others.
    """
    # A package that was installed a moment ago, by this very process perhaps, is to be seen.
    importlib.invalidate_caches()
    candidates = [each for each in _distributions() if _SECTION.search(_registered(each) or "")]
    for name, found in sorted({name: each for each in candidates if (name := _name(each))}.items()):
        # Asked for again by name: of several copies on the path the first counts, which need not be the one found
        # above, for it may register nothing. (A folder of another name is not found so.)
        copies = map(_read, (*_distributions(name=name), found))
        yield from next((entries for entries in copies if entries is not None), [])


def _distributions(**name: str) -> Iterator[Any]:
    """All distributions on the import path, or those of a name."""
    path = [entry for entry in sys.path if isinstance(entry, str) and _is_readable(entry or ".", folder=True)]
    try:
        yield from importlib_metadata.distributions(path=path, **name)
    except Exception:  # of a finder that somebody has put on sys.meta_path
        context = importlib_metadata.DistributionFinder.Context(path=path, **name)  # type: ignore[no-untyped-call]
        yield from importlib_metadata.MetadataPathFinder.find_distributions(context)


def _is_readable(path: str | os.PathLike[str], *, folder: bool = False) -> bool:
    """Whether opening it gives text and comes to an end: a pipe would wait for ever."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return False
    return (folder and stat.S_ISDIR(found.st_mode)) or (
        stat.S_ISREG(found.st_mode) and (folder or found.st_size <= _LARGEST)
    )


def _text_of(distribution: Any, file: str) -> str | None:
    """A file of a distribution's metadata; "" if there is none, None if it cannot be read."""
    folder = getattr(distribution, "_path", None)
    try:
        if isinstance(folder, Path):
            path = folder / file if file else folder
            if not os.path.lexists(path) or not folder.is_dir():
                return "" if file else None
            if not _is_readable(path):
                return None
        return distribution.read_text(file) or ""
    except Exception:
        return None


def _registered(distribution: Any) -> str | None:
    return _text_of(distribution, "entry_points.txt")


def _metadata(distribution: Any) -> Message | None:
    text = next((text for file in ("METADATA", "PKG-INFO") if (text := _text_of(distribution, file)) != ""), None)
    return None if text is None else _parsed(text)


@functools.lru_cache(maxsize=128)
def _parsed(text: str) -> Message:
    """Of a text that is the same as before nothing new is to be learned, and parsing takes longer than reading."""
    return email.message_from_string(text)


def _name(distribution: Any) -> str | None:
    metadata = _metadata(distribution)
    name = None if metadata is None else metadata.get("Name")
    return canonicalize_name(name) if isinstance(name, str) and name.strip() else None


def _place(distribution: Any) -> str:
    return str(getattr(getattr(distribution, "_path", None), "name", type(distribution).__name__))


def _read(distribution: Any) -> list[_Entry] | None:
    """Our entry points of a distribution; None if its metadata cannot be read."""
    # Not `distribution.entry_points`: in some versions of importlib_metadata one bad value there raises for all.
    parser = RawConfigParser(delimiters="=", strict=False)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    name, metadata, registered = _name(distribution), _metadata(distribution), _registered(distribution)
    if name is None or metadata is None or registered is None:
        return None
    try:
        parser.read_string(registered)
        version = one_line(str(metadata.get("Version") or "unknown"), 50)
    except Exception:
        return None
    shown = one_line(name, _LONGEST_NAME)
    ours = [group for group in parser.sections() if _OURS.fullmatch(group)]
    return [
        _Entry(one_line(point, _LONGEST_NAME + 1), one_line(value), group, shown, version, metadata)
        for group in ours
        for point, value in parser.items(group)
    ]


def _split(value: str) -> tuple[str, str] | None:
    """Module and object of an entry point's value."""
    if match := _VALUE.fullmatch(value):
        module, name = match.groups()
        if all(part.isidentifier() for part in f"{module}.{name}".split(".")):
            return module, name
    return None


def _info(entry: _Entry, core: str) -> AlgorithmInfo:
    stability, broken = GROUPS[entry.group], _why_broken(entry, core)
    literal, extends = _literals(entry.value)
    summary = one_line(str(literal or entry.metadata.get("Summary") or "")) or None
    extends = None if extends is None else one_line(extends, _LONGEST_NAME)
    return AlgorithmInfo(
        entry.name, stability, entry.distribution, entry.version, entry.value, summary, extends, broken
    )


def _why_broken(entry: _Entry, core: str) -> str | None:
    if len(entry.name) > _LONGEST_NAME:
        return f"its name is longer than {_LONGEST_NAME} characters"
    if not _NAME.fullmatch(entry.distribution):
        return f"the name {entry.distribution!r} of its distribution is none"
    if not _NAME.fullmatch(entry.name):
        return f"its name {entry.name!r} has characters other than letters, digits, '_', '.' and '-'"
    if (where := _split(entry.value)) is None:
        return f"its entry point {entry.value!r} is not of the form 'module:object'"
    for text in entry.metadata.get_all("Requires-Dist") or []:
        if canonicalize_name(re.split(r"[^\w.-]", text.strip(), maxsplit=1)[0]) != CORE:
            continue
        try:
            requirement = Requirement(text)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        except ValueError:
            return f"its requirement {one_line(text, 200)!r} cannot be read"
        if applies and not requirement.specifier.contains(core, prereleases=True):
            return f"it requires {CORE}{requirement.specifier}, and {CORE} {core} is installed"
    top = where[0].partition(".")[0]
    try:
        missing = importlib.util.find_spec(top) is None
    except Exception:
        missing = False
    return f"its module {top!r} is not found" if missing else None


# -- reading the source instead of importing it -----------------------------------------------------------------------
def _literals(value: str) -> tuple[str | None, str | None]:
    """`summary` and `extends` of an exported `Algorithm(...)`, as far as its source says them literally."""
    # This is only for show, and any source file may come by: no oddity in one may stop the listing.
    try:
        found = definition(value)
    except Exception:
        found = None
    if found is None:
        return None, None
    given = dict(zip(("name", "summary", "extends"), found.call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in found.call.keywords if keyword.arg}
    return _text(given.get("summary")), _text(given.get("extends"))


@dataclass(frozen=True)
class Definition:
    """Where the call `Algorithm(...)` of an entry point is written."""

    file: str
    source: str
    call: ast.Call


def definition(value: str) -> Definition | None:
    """The `Algorithm(...)` that an entry point leads to, found in the sources without importing them.

    Names are followed through assignments, imports, submodules and classes; None where the sources do not show it.

    Raises:
        Exception: a source is odd in some way; it may be any file.
    """
    module, name = _split(value) or ("", "")
    spec: Any = None
    tree: Any = None
    for _ in range(_STEPS):
        if tree is None:
            spec = find_spec(module)
            if spec is None or spec.loader is None:
                return None
            source, whole = _tree(spec)
            tree = whole
        first, _, rest = name.partition(".")
        match _binding(tree, first):
            case ast.Call(func=function) as call if not rest and _makes_algorithm(function, whole):
                return Definition(str(spec.origin), source, call)
            case ast.ClassDef() as tree if rest:
                name = rest
            case ast.Name() | ast.Attribute() as other:
                tree, name = whole, _dotted(ast.unparse(other), rest)
            case ast.Import(names=aliases):
                alias = next(each for each in aliases if first == _bound(each))
                tree, module, name = None, alias.name if alias.asname else first, rest
            case ast.ImportFrom(names=aliases, module=of, level=level):
                alias = next(each for each in aliases if first == _bound(each))
                package = spec.name if spec.submodule_search_locations is not None else spec.parent
                origin = importlib.util.resolve_name("." * level + (of or ""), package)
                submodule = f"{origin}.{alias.name}"
                is_module = origin == module or (rest and find_spec(submodule))
                tree, module, name = None, *((submodule, rest) if is_module else (origin, _dotted(alias.name, rest)))
            case None if rest and find_spec(f"{module}.{first}"):
                tree, module, name = None, f"{module}.{first}", rest
            case _:
                return None
    return None


def _bound(alias: ast.alias) -> str:
    """The name that an import binds."""
    return alias.asname or alias.name.partition(".")[0]


def _dotted(*names: str) -> str:
    return ".".join(filter(None, names))


def _makes_algorithm(function: ast.expr, tree: ast.Module) -> bool:
    """Whether what is called is named `Algorithm`, or was where it was imported from."""
    called = ast.unparse(function)
    names = {called.rpartition(".")[2]}
    if isinstance(imported := _binding(tree, called), ast.ImportFrom):
        names |= {alias.name for alias in imported.names if _bound(alias) == called}
    return "Algorithm" in names


_trees: dict[str, tuple[tuple[int, int], str, ast.Module]] = {}


def _tree(spec: ModuleSpec) -> tuple[str, ast.Module]:
    """The source of a module, and its tree; read again only when its file has changed: it may hold many algorithms."""
    origin, version = str(spec.origin), (0, 0)
    if os.path.lexists(origin):
        found = os.stat(origin)
        version = (found.st_mtime_ns, found.st_size)
        if not _is_readable(origin):
            return "", ast.Module([], [])  # a pipe, or too large to be looked at
    known = _trees.get(origin)
    if known is None or known[0] != version or version == (0, 0):
        source = spec.loader.get_source(spec.name) or ""  # type: ignore[union-attr]
        # Python warns of some spellings when it compiles them; that is for whoever imports the plugin.
        with warnings.catch_warnings(action="ignore"):
            known = _trees[origin] = version, source, ast.parse(source)
    return known[1:]


def find_spec(module: str) -> ModuleSpec | None:
    """Like `importlib.util.find_spec`, which however imports the parents of a submodule."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def source_files(value: str) -> dict[str, Path]:
    """The Python files of an algorithm: those beside the module of its entry point, and below it, by relative path.

    Empty if the module is not found.
    """
    spec = find_spec(value.partition(":")[0].strip())
    if spec is None or spec.origin is None:
        return {}
    origin = Path(spec.origin)
    # A module that stands in no package shares its folder with all that is installed.
    alone = spec.parent == "" and spec.submodule_search_locations is None
    files = [origin] if alone else sorted(origin.parent.rglob("*.py"))
    return {file.relative_to(origin.parent).as_posix(): file for file in files}


def _binding(tree: ast.Module | ast.ClassDef, name: str) -> ast.AST | None:
    """What gives a name of a module or class its value, looking also into blocks such as `if TYPE_CHECKING:`."""
    blocks = (ast.If, ast.Try)
    statements = [inner for outer in tree.body for inner in (outer.body if isinstance(outer, blocks) else [outer])]
    for statement in reversed(statements):
        match statement:
            case ast.Assign(targets=targets, value=value):
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return value
            case ast.AnnAssign(target=ast.Name(id=target), value=value) if target == name:
                return value
            case ast.ClassDef(name=target) if target == name:
                return statement
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases) if name in map(_bound, aliases):
                return statement
    return None


def _text(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


# -- messages ---------------------------------------------------------------------------------------------------------
def _not_found(name: str, entries: list[_Entry]) -> AlgorithmNotFoundError:
    spellings = {f"{entry.distribution}:{entry.name}" if ":" in name else entry.name for entry in entries}
    close = difflib.get_close_matches(name.lower()[:_LONGEST_NAME], sorted(spellings), n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    typos = "".join(f"\n  {unknown}" for unknown in unknown_groups() if name.rpartition(":")[2] in unknown.names)
    typos += "".join(f"\n  {each}" for each in damaged())
    return AlgorithmNotFoundError(
        f"No installed distribution registers the algorithm {name!r}.{hint}{typos}",
        mend="Run `trl-core list` to see what is installed, or install the distribution that registers it.",
    )


def _ambiguous(name: str, matches: list[_Entry]) -> AmbiguousAlgorithmError:
    distributions = sorted({entry.distribution for entry in matches})
    if len(distributions) > 1:
        spellings = " or ".join(repr(f"{distribution}:{name}") for distribution in distributions)
        return AmbiguousAlgorithmError(
            f"{len(distributions)} installed distributions register the algorithm {name!r}.",
            mend=f"Write {spellings}, or uninstall what you do not use.",
        )
    groups = " and ".join(sorted(entry.group for entry in matches))
    return AmbiguousAlgorithmError(
        f"{distributions[0]} {matches[0].version} registers the algorithm {name!r} {len(matches)} times, in {groups}.",
        mend="Keep one of the lines in its pyproject.toml and install it again, or install another version of it.",
    )
