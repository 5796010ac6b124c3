"""The record of an interface: made from the sources of a distribution, kept as `api/<version>.json` beside them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import sys
import types
import typing
from datetime import date
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

import trl_core

from ..algorithm import Algorithm
from ..composition import Composition, Part, default_of
from ..discovery import AlgorithmInfo, core_version
from ..errors import ContractError, ProjectError
from ..hookspecs import HookSpecs, hook_kinds
from ..project import Project, from_source, is_core
from .compare import Change, additions, changes, deprecations, notices

Record = dict[str, Any]

_WIDTH = 118


# -- making one -------------------------------------------------------------------------------------------------------
def record(project: Project) -> Record:
    """The interface of a distribution as its sources say it now.

    Keys: `distribution`, `version`, `core` (version of trl-core), `released` (None); `algorithms`, by name: `tag`,
    `removal` and `replacement`, `extends`, public names `config` and `trainer`, `arguments`, `defaults`, `deprecated`
    and `options`, each with `type`, `default` and what is said of its deprecation; `hooks` of trl-core; `api`, the
    public names of each module as lines of a stub. Of options, those of the distribution itself: what a configuration
    inherits from transformers, and outside trl-core from trl-core, is left out. Two calls give equal records.

    Raises:
        ProjectError: it registers nothing, cannot be imported, or another copy of it is imported in its place.
        ContractError: a deprecation cannot be read.
    """
    from .interface import public_api

    if not project.algorithms:
        raise ProjectError(f"{project.file} registers no algorithm.", mend="Record a distribution that has one.")
    with from_source(project):
        algorithms = {name: _algorithm(project, name) for name in sorted(project.algorithms)}
        tops = {value.partition(":")[0].partition(".")[0] for _, value in project.algorithms.values()}
        api: dict[str, list[str]] = {}
        for top in sorted(tops):
            api |= public_api(map(importlib.import_module, trl_core.PUBLIC_MODULES if is_core(project) else [top]))
    made = {
        "distribution": project.name,
        "version": str(_version(project)),
        "core": project.version if is_core(project) else core_version(),
        "released": None,
        "algorithms": algorithms,
        "hooks": hook_schema() if is_core(project) else {},
        "api": api,
    }
    deprecations(made)  # what cannot be read is better known now than at the next check
    return typing.cast(Record, json.loads(json.dumps(made)))


def _load(project: Project, value: str) -> Algorithm:
    module, _, attribute = value.partition(":")
    try:
        found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as error:
        what = f"{value!r} of {project.file} cannot be imported.\n  {type(error).__name__}: {error}"
        raise ProjectError(what, mend="Correct it, or install what it needs.") from error
    file = getattr(sys.modules[module], "__file__", None)
    if file is None or not Path(file).resolve().is_relative_to(project.folder.resolve()):
        raise ProjectError(
            f"{module!r} is imported from {file}, not from {project.folder}.",
            mend=f"Install this copy, or start again with it first on the path: pip install -e {project.folder}",
        )
    if not isinstance(found, Algorithm):
        raise ProjectError(f"{value!r} of {project.file} is no trl_core.Algorithm.", mend="Correct the entry point.")
    return found


def _version(project: Project) -> Version:
    try:
        return Version(project.version)
    except InvalidVersion:
        raise ProjectError(
            f"{project.file} says no version that can be compared: {project.version!r}.",
            mend='Write version = "0.1.0".',
        ) from None


def _algorithm(project: Project, name: str) -> Record:
    tag, value = project.algorithm(name)
    algorithm = _load(project, value)
    info = AlgorithmInfo(name, tag, project.name, project.version, "")
    named = Composition(name, (Part(info, algorithm),))
    return {
        "tag": tag.value,
        "removal": algorithm.removal,
        "replacement": algorithm.replacement,
        "extends": algorithm.extends,
        "config": named.class_name("Config"),
        "trainer": named.class_name("Trainer"),
        "arguments": sorted(algorithm.arguments),
        "defaults": {key: _plain(value) for key, value in sorted(algorithm.defaults.items())},
        "deprecated": {key: dataclasses.asdict(note) for key, note in sorted(algorithm.deprecated.items())},
        "options": {} if algorithm.config is None else _options(algorithm.config, is_core(project)),
    }


def _options(config: type, core: bool) -> Record:
    foreign = {"transformers"} if core else {"transformers", "trl_core"}
    hints = typing.get_type_hints(config)
    found: dict[str, Record] = {}
    for f in dataclasses.fields(config):
        definer = next(cls for cls in config.__mro__ if f.name in inspect.get_annotations(cls))
        if definer.__module__.partition(".")[0] in foreign:
            continue
        default, note = default_of(f), f.metadata.get("deprecated")
        found[f.name] = {"type": _type_text(hints[f.name])}
        found[f.name] |= {} if default is dataclasses.MISSING else {"default": _plain(default)}
        found[f.name] |= {} if note is None else {"deprecated": dataclasses.asdict(note)}
    return dict(sorted(found.items()))


def _plain(value: Any) -> Any:
    """As JSON holds it, or else its `repr`."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return repr(value)


def _type_text(hint: Any) -> str:
    """A type as one writes it, in one spelling: `float | None`."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        members = sorted(arguments, key=lambda each: each is types.NoneType)
        return " | ".join(_type_text(member) for member in members)
    if hint is types.NoneType or hint is None:
        return "None"
    if origin is typing.Literal:
        return " | ".join(f"Literal[{value!r}]" for value in arguments)
    name = getattr(origin or hint, "__name__", str(hint))
    inner = ", ".join("[...]" if isinstance(each, list) else _type_text(each) for each in arguments)
    return f"{name}[{inner}]" if inner else str(name)


def hook_schema() -> Record:
    """Kind, arguments and answer of every hook of the contract."""
    found = {}
    for name, (kind, refine) in hook_kinds().items():
        spec = getattr(HookSpecs, name)
        notes = getattr(spec, "__deprecations__", {})
        found[name] = {
            "kind": kind,
            "refine": refine,
            "parameters": [each for each in inspect.signature(spec).parameters if each != "self"],
            "returns": str(inspect.signature(spec).return_annotation),
            "deprecated": {parameter or "": dataclasses.asdict(note) for parameter, note in notes.items()},
        }
    return found


# -- keeping them -----------------------------------------------------------------------------------------------------
def records(project: Project) -> list[Record]:
    """The kept records of a distribution, oldest version first.

    Raises:
        ContractError: one cannot be read.
    """
    found = []
    for file in (project.folder / "api").glob("*.json"):
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            found.append((Version(kept["version"]), kept))
        except (OSError, ValueError, KeyError, TypeError) as error:
            mend = "Restore it from the history of the repository; if its version is not released, record it again."
            raise ContractError(f"{file} is no record: {error!r}.", mend=mend) from error
    return [kept for _, kept in sorted(found, key=lambda pair: pair[0])]


def write(project: Project, released: date | None = None) -> Path:
    """Record the interface as `api/<version>.json` and return the file.

    Args:
        project: the distribution.
        released: the day this version is released; None if it is not yet.

    Raises:
        ContractError: the record of a released version would change.
        ProjectError: see `record`.
    """
    made = record(project)
    file = project.folder / "api" / f"{made['version']}.json"
    kept = next((each for each in records(project) if each["version"] == made["version"]), made)
    if kept["released"] is not None and {**kept, "released": None, "core": None} != {**made, "core": None}:
        raise ContractError(
            f"{project.name} {made['version']} was released on {kept['released']} with another interface.",
            mend=f"Raise the version in {project.file}; what is released is history.",
        )
    if kept["released"] is None:
        kept = {**made, "released": released.isoformat() if released else None}
    file.parent.mkdir(exist_ok=True)
    file.write_text(_text(kept) + "\n", encoding="utf-8")
    return file


def _text(value: Any, depth: int = 0) -> str:
    """JSON with what is short on one line, so that a changed option is a changed line."""
    flat = json.dumps(value, ensure_ascii=False)
    if not value or not isinstance(value, dict | list) or (depth > 1 and depth + len(flat) < _WIDTH):
        return flat
    pad, inner = "\n" + " " * depth, "\n" + " " * (depth + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_text(each, depth + 1)}" for key, each in value.items()]
        return f"{{{inner}{f',{inner}'.join(items)}{pad}}}"
    return f"[{inner}{f',{inner}'.join(_text(each, depth + 1) for each in value)}{pad}]"


# -- using them -------------------------------------------------------------------------------------------------------
def check(project: Project, against: str | None = None, today: date | None = None) -> list[Change]:
    """What changed since the records, and what is wrong with the deprecations.

    Compared is the newest record and, where that version is not released, the newest released one as well.

    Args:
        project: the distribution.
        against: version of the only record to compare with.
        today: the day on which the six months of notice are counted; default: today.

    Raises:
        ContractError: there is no such record, or one cannot be read.
        ProjectError: see `record`.
    """
    kept, now = records(project), record(project)
    if against is None:
        unreleased = [each for each in kept[-1:] if not each["released"]]
        baselines = [*[each for each in kept if each["released"]][-1:], *unreleased]
    else:
        baselines = [each for each in kept if each["version"] == against]
    if not baselines:
        known = ", ".join(each["version"] for each in kept) or "none"
        raise ContractError(
            f"{project.folder / 'api'} has no record{f' of {against}' if against else ''}; it has: {known}.",
            mend=f"Make one: trl-core api record {project.folder}",
        )
    found = [change for old in baselines for change in [*changes(old, now), *additions(old, now)]]
    return list(dict.fromkeys([*found, *notices(now, kept, today or date.today())]))


def minors_unchanged(project: Project, algorithm: str) -> tuple[int, str | None]:
    """Over how many minor releases of trl-core an algorithm's own options have stayed as they are now.

    Counted are the minor versions of trl-core among the released records, from the newest backwards as long as the
    options equal the present ones, less one: a record says what was so with one version of the core, two say that it
    stayed so over a step.

    Returns:
        the number, and the version of the distribution whose record is the earliest of these; None if there is none.

    Raises:
        AlgorithmNotFoundError: the project registers no such algorithm.
        ContractError, ProjectError: see `record` and `records`.
    """
    with from_source(project):
        options = json.loads(json.dumps(_algorithm(project, algorithm)["options"]))
    minors, since = set(), None
    for kept in reversed([each for each in records(project) if each["released"]]):
        if kept["algorithms"].get(algorithm, {}).get("options") != options:
            break
        minors.add(Version(kept["core"]).release[:2])
        since = kept["version"]
    return max(len(minors) - 1, 0), since
