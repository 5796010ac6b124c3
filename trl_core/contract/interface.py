"""Public Python names as text: what a stub file would say, which griffe reads again to compare it.

Sources are read, not run. Left out is what no user relies on: docstrings, values, private members, and options, which
are recorded as a schema of their own.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ContractError
from ..project import needed

needed("griffe")
import griffe  # noqa: E402  after the error that names the extra

_MARK = "@deprecated("
_UNPROMISED = {"__post_init__", "__reduce__", "__repr__", "__str__"}


# -- writing ----------------------------------------------------------------------------------------------------------
def public_api(modules: Iterable[ModuleType]) -> dict[str, list[str]]:
    """The public names (`__all__`) of modules, all of one package, as lines of a stub, by module."""
    pending = {module.__name__: module for module in modules}
    top = next(iter(pending)).partition(".")[0]
    package, stubs = _load(top, Path(str(pending[top].__file__)).parent.parent), {}
    while pending:
        path, module = pending.popitem()
        source = package[path.partition(".")[2]] if "." in path else package
        public = getattr(module, "__all__", None) or [name for name, each in source.members.items() if each.is_public]
        found: dict[str, Any] = {}
        for name in sorted(public):
            thing = _resolve(source, name)
            if isinstance(thing, griffe.Module) and inspect.ismodule(inner := getattr(module, name)):
                pending[inner.__name__] = inner  # a module that is a public name has public names itself
            else:  # a function may hide the module of the same name that it is imported from
                found[name] = _resolve(thing, name) if isinstance(thing, griffe.Module) else thing
        stubs[path] = [line for name in found for line in _lines(name, found)]
    return dict(sorted(stubs.items()))


def _resolve(module: Any, name: str) -> Any:
    """The definition behind a public name; None if only running the code would tell."""
    try:
        found = module[name]
        return found.final_target if found.is_alias else found
    except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None


def _lines(name: str, found: dict[str, Any]) -> list[str]:
    thing = found[name]
    if not isinstance(thing, griffe.Class):
        return _member(name, thing)
    public = {other.path: each for each, other in sorted(found.items()) if isinstance(other, griffe.Class)}
    public |= {other.path: each for each, other in found.items() if other is not None and other.name == each}
    if public[thing.path] != name:
        return [f"class {name}({public[thing.path]}): ..."]
    bases = ", ".join(dict.fromkeys(_bases(thing, public)))
    body = [line for member in _members(thing, public) for line in _member(*member)]
    head = f"class {name}({bases}):" if bases else f"class {name}:"
    return [*_marks(thing), *([head, *(f"    {line}" for line in body)] if body else [f"{head} ..."])]


def _bases(owner: Any, public: dict[str, str]) -> Iterator[str]:
    """Public names of the classes it derives from; behind a private one, those of that one."""
    resolved = {base.path: base for base in owner.resolved_bases}
    for base in owner.bases:
        found = next((each for path, each in resolved.items() if path.rpartition(".")[2] == str(base)), None)
        if found is None or found.path in public:
            yield public[found.path] if found else str(base)
        else:
            yield from _bases(found, public)


def _members(owner: Any, public: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Public members, without those inherited from classes that are public names themselves."""
    everything = {name: m.final_target if m.is_alias else m for name, m in owner.all_members.items()}
    ancestors = [base for base in owner.mro() if base.path in public and base is not owner]
    inherited = {(m.final_target if m.is_alias else m).path for base in ancestors for m in base.all_members.values()}
    is_config = any(_is_option(member) for member in everything.values())
    for name, member in sorted(everything.items()):
        private = name.startswith("_") and not (name.startswith("__") and name not in _UNPROMISED)
        # What griffe makes up for a dataclass has no line. The fields of a config are its options, recorded as such.
        schema = is_config and (not member.lineno or (member.is_attribute and member.annotation and member.value))
        if not (private or schema or member.path in inherited):
            yield name, member


def _is_option(member: Any) -> bool:
    return member.is_attribute and re.match(r"(\w+\.)*option\(", str(member.value or "")) is not None


def _member(name: str, thing: Any) -> list[str]:
    if isinstance(thing, griffe.Function):
        kind = "async def" if "async" in thing.labels else "def"
        # A default that a private function makes has no meaning to others.
        signature = re.sub(r" = _\w+\([^()]*\)", " = ...", thing.signature(return_type=True, name=name))
        return [*_marks(thing), f"{kind} {signature}: ..."]
    if isinstance(thing, griffe.Class):
        return [*_marks(thing), f"class {name}: ..."]
    return [f"{name}: {getattr(thing, 'annotation', None) or 'Any'}"]


def _marks(thing: Any) -> list[str]:
    """The decorators that matter to whoever calls it."""
    kept = sorted(thing.labels & {"classmethod", "staticmethod"})
    for each in thing.decorators:
        if each.callable_path.rpartition(".")[2] == "deprecated":
            kept.append("deprecated(" + str(each.value).partition("(")[2])
    return [f"@{mark}" for mark in kept]


# -- reading ----------------------------------------------------------------------------------------------------------
def _tree(package: str, stubs: dict[str, list[str]]) -> Any:
    files = {f"{path.partition('.')[2].replace('.', '/')}.py": lines for path, lines in stubs.items() if "." in path}
    files["__init__.py"] = stubs.get(package, [])
    sources = {file: "\n".join(lines) + "\n" for file, lines in files.items()}
    with griffe.temporary_pypackage(package, sources) as written:
        return _load(package, written.tmpdir)


def _load(package: str, folder: Path) -> Any:
    # A name is also taken for a path in the current folder, which may be that of the sources, if not told otherwise.
    return griffe.load(package, search_paths=[folder], try_relative_path=False, allow_inspection=False)


def _packages(api: dict[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    return {
        top: {path: lines for path, lines in api.items() if path.partition(".")[0] == top}
        for top in dict.fromkeys(path.partition(".")[0] for path in api)
    }


def names(api: dict[str, list[str]]) -> list[str]:
    """Every public object as it is named in messages, `'trl_core.Samples.take'`."""
    return [repr(path) for top, stubs in _packages(api).items() for path, _ in _walk(_tree(top, stubs))]


def _walk(owner: Any) -> Iterator[tuple[str, Any]]:
    for member in owner.members.values():
        if not member.is_alias and member.name != "__init__":
            yield member.path, member
            yield from _walk(member)


def deprecations(api: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What is marked `@deprecated`: its name, or `argument 'x' of 'f'`, to the arguments of the mark.

    Raises:
        ContractError: an argument is no literal.
    """
    found: dict[str, dict[str, Any]] = {}
    marked = {path: lines for path, lines in api.items() if any(_MARK in line for line in lines)}
    for top, stubs in _packages(marked).items():
        for path, thing in _walk(_tree(top, stubs)):
            for mark in getattr(thing, "decorators", ()):
                if _MARK in f"@{mark.value}":
                    note = _arguments(str(mark.value), path)
                    parameter = note.pop("parameter", None)
                    found[f"argument {parameter!r} of {path!r}" if parameter else repr(path)] = note
    return found


def _arguments(mark: str, path: str) -> dict[str, Any]:
    call = ast.parse(mark, mode="eval").body
    try:
        assert isinstance(call, ast.Call)
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return {"since": given.pop("since"), "removal": given.pop("removal"), "replacement": None} | given
    except (AssertionError, KeyError, ValueError) as error:
        raise ContractError(
            f"What {path!r} is marked with cannot be read: @{mark}.",
            mend='Mark it with trl_core.deprecated, in literals: @deprecated(since="0.2", removal="0.4").',
        ) from error


def breakages(old: dict[str, list[str]], new: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """What is broken: a sentence, and the names that a deprecation may have had, from the narrowest out."""
    for top, stubs in _packages(old).items():
        before, after = _tree(top, stubs), _tree(top, _packages(new).get(top, {}))
        for path, lost in _lost_bases(before, after):
            yield f"{path!r} does not derive from {lost} any more", _enclosing(path)
        for found in griffe.find_breaking_changes(before, after):
            if found.kind is griffe.BreakageKind.CLASS_REMOVED_BASE:
                continue  # it counts the bases, and knows neither which nor those further up
            path = found.obj.path.removesuffix(".__init__")
            subjects = _enclosing(path)
            values = [value for value in (found.old_value, found.new_value) if isinstance(value, griffe.Parameter)]
            if values:
                subjects.insert(0, f"argument {values[0].name!r} of {path!r}")
            text = {
                griffe.BreakageKind.OBJECT_REMOVED: " was removed",
                griffe.BreakageKind.PARAMETER_REMOVED: " was removed",
                griffe.BreakageKind.PARAMETER_ADDED_REQUIRED: " was added without a default",
                griffe.BreakageKind.PARAMETER_CHANGED_DEFAULT: f" changed its default{_from_to(values)}",
            }.get(found.kind, f": {found.kind.value.lower()}")
            yield f"{subjects[0]}{text}", subjects


def _lost_bases(before: Any, after: Any) -> Iterator[tuple[str, str]]:
    new = {path: _ancestors(thing) for path, thing in _walk(after) if thing.is_class}
    for path, thing in _walk(before):
        if thing.is_class and path in new:
            yield from ((path, lost) for lost in sorted(_ancestors(thing) - new[path]))


def _ancestors(owner: Any) -> set[str]:
    return {str(base) for each in (owner, *owner.mro()) for base in each.bases}


def _enclosing(path: str) -> list[str]:
    return [repr(path.rsplit(".", depth)[0]) for depth in range(path.count("."))]


def _from_to(values: list[Any]) -> str:
    return " from {} to {}".format(*(value.default for value in values)) if len(values) == 2 else ""
