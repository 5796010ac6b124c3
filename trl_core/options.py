"""Options of configuration dataclasses: declaring them, and checking their values with clear errors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import inspect
import json
import math
import operator
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Union

from .errors import ConfigError, UnknownOptionError
from .names import did_you_mean
from .redaction import is_named_secret

if TYPE_CHECKING:
    from .stability import Deprecation

Field = dataclasses.Field[Any]
_WORDS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("of at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}


# -- declaring --------------------------------------------------------------------------------------------------------
def option(
    default: Any,
    text: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] | None = None,
    secret: bool = False,
    resume: bool = True,
    deprecated: Deprecation | None = None,
) -> Any:
    """A dataclass field with its help text and the values it takes.

    Type, range and choices are checked when a configuration is made, those of the items too where the value is a list.
    A number is never NaN or infinite.

    Args:
        default: the default value; a list or dictionary is copied for each configuration.
        text: shown by `trl-core info` and `trl-core train --help`.
        ge: the least value.
        gt: the value must be above this one.
        le: the greatest value.
        lt: the value must be below this one.
        choices: the only values there are; of an option with a range, the only ones that are no numbers.
        secret: True if the value is never written to a file or shown (a password, the token of a service).
        resume: False if a run may be resumed with another value, because the option does not shape the mathematics.
        deprecated: when the option goes. Giving it a value other than its default then warns.
    """
    metadata = {
        "help": text,
        "range": {"ge": ge, "gt": gt, "le": le, "lt": lt},
        "choices": choices,
        "secret": secret,
        "resume": resume,
        "deprecated": deprecated,
    }
    if default.__hash__ is None:
        return dataclasses.field(
            default_factory=functools.partial(copy.deepcopy, default), repr=not secret, metadata=metadata
        )
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


@functools.cache
def fields_of(config: type) -> tuple[Field, ...]:
    """Copies of the fields of a dataclass: `type` resolved, `default` filled in, the range of the class added.

    A class may say in `limits` what options take that it inherits from elsewhere: by name, keywords of `option`, and

    - `whole_from`: values from 1 on are whole numbers, and this is the least of them; those below are a share;
    - `types`: further types;
    - `file`: text may be the path of a JSON file.

    Raises:
        ConfigError: the type of an option cannot be resolved.
    """
    hints, found = hints_of(config), [copy.copy(f) for f in dataclasses.fields(config)]
    known: Mapping[str, dict[str, Any]] = getattr(config, "limits", {})
    for f in found:
        f.type, limits = hints[f.name], known.get(f.name, {})
        own = {bound: value for bound, value in f.metadata.get("range", {}).items() if value is not None}
        bounds = own or {bound: limits[bound] for bound in (*_BOUNDS, "whole_from") if bound in limits}
        f.default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        choices = tuple(f.metadata.get("choices") or limits.get("choices") or ())
        more = {"range": bounds, "choices": choices, "owner": definer(config, f.name)}
        f.metadata = types.MappingProxyType({**limits, **f.metadata, **more})
    return tuple(found)


def hints_of(config: type) -> dict[str, Any]:
    """The types of the options by name.

    Raises:
        ConfigError: see `fields_of`.
    """
    try:
        return typing.get_type_hints(config)
    except Exception as error:
        what = f"The type of an option of {config.__name__} cannot be resolved: {error}."
        mend = "Import it in the module of the class that has the option, not only for type checkers."
        raise ConfigError(what, mend=mend) from error


def help_of(f: Field) -> str:
    """The help of an option, as one line, and what it takes as far as the help does not say it."""
    text = " ".join(str(f.metadata.get("help", "")).replace("%%", "%").split())
    choices = f.metadata.get("choices") or ()
    bounds = _bounds(f.metadata.get("range") or {}).removeprefix("of ")
    more = [bounds[:1].upper() + bounds[1:]] if bounds else []
    if "whole_from" in (f.metadata.get("range") or {}):
        more = ["A whole number, or a share of the run below 1"]
    if not all(str(choice) in text for choice in choices):
        more.append(f"One of: {', '.join(map(str, choices))}")
    return " ".join([text, *(f"{each}." for each in more)]).strip()


def definer(config: type, name: str) -> type:
    """The class whose option it is; a composed class defines none."""
    classes = [cls for cls in config.__mro__ if name in inspect.get_annotations(cls)]
    return next((cls for cls in classes if cls.__module__ != f"{__package__}.composition"), config)


# -- types ------------------------------------------------------------------------------------------------------------
def kinds(hint: Any) -> list[Any]:
    """The types that a value may have in the order to try them: None first, and text, which everything is, last."""
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return sorted(
        typing.get_args(hint) if union else (hint,), key=lambda kind: (kind is str) - (kind is types.NoneType)
    )


def type_name(hint: Any) -> str:
    """A type as one writes it: `float | None`."""
    return re.sub(r"\w+\.|<\w+ '|'>", "", str(hint)).replace("NoneType", "None")


# -- checking ---------------------------------------------------------------------------------------------------------
def check_options(config: Any) -> None:
    """Check all options of a configuration dataclass against their types, ranges and choices; see `option`.

    Numbers of numpy and torch, members of enumerations where text is expected, paths and tuples become plain values;
    2.0 becomes 2 where a whole number is expected.

    Raises:
        ConfigError: a value does not fit.
    """
    cls: Any = type(config)
    for f in fields_of(cls):
        value = getattr(config, f.name)
        plain = checked(value, f)
        if plain is not value:
            setattr(config, f.name, plain)


def check_names(config: type, given: Iterable[str]) -> None:
    """Raise `UnknownOptionError` unless all names are options of a configuration dataclass."""
    known = [f.name for f in dataclasses.fields(config) if f.init]
    for name in given:
        if name not in known:
            what = f"{config.__name__} has no option {name!r}.{did_you_mean(name, known)}"
            raise UnknownOptionError(what, mend="Check the spelling; `trl-core info NAME --all` lists all options.")


def checked(value: Any, f: Field) -> Any:
    """The value of an option of `fields_of` as a plain one; `ConfigError` if it does not fit."""
    try:
        return _fitted(value, f)
    except TypeError:
        raise _refusal(f, value) from None


def fits_itself(f: Field) -> bool:
    """Whether the bounds of an option of `fields_of` are numbers, and its default is within them."""
    try:
        _fitted(f.default, f)
    except TypeError:
        return False
    bounds = (f.metadata.get("range") or {}).values()
    return all(isinstance(bound, int | float) and not math.isnan(bound) for bound in bounds)


def _fitted(value: Any, f: Field) -> Any:
    """The value as a plain one of the first of the option's types that it fits; `TypeError` if it fits none."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        with contextlib.suppress(RuntimeError):  # of a tensor without data
            value = value.item()
    allowed = [*kinds(f.type), *f.metadata.get("types", ())]
    if any(map(_is_enum, allowed)):
        allowed = [kind for kind in allowed if kind is not str]  # only the names of members
    for kind in [kind for kind in allowed if kind is type(value)] or allowed:
        with contextlib.suppress(TypeError, ValueError, OverflowError, RecursionError):
            return _of_kind(value, kind, f)
    raise TypeError


def _of_kind(value: Any, kind: Any, f: Field) -> Any:
    origin = typing.get_origin(kind) or kind
    if origin is list and hasattr(value, "tolist") and getattr(value, "ndim", None) == 1:
        value = value.tolist()
    if origin is list and isinstance(value, list | tuple):
        item = copy.copy(f)
        item.type = (typing.get_args(kind) or (Any,))[0]
        items = [_fitted(each, item) for each in value]
        return value if type(value) is list and all(map(operator.is_, items, value)) else items
    if _is_enum(kind):
        kind(value)  # raises if there is no such member
    elif origin is Literal:
        _expect(_is_among(value, typing.get_args(kind)))
    elif kind not in _WORDS:
        _expect(origin is Any or not isinstance(origin, type) or isinstance(value, origin))
    else:
        value = _plain(value, kind, f)
        bounds, choices = f.metadata.get("range") or {}, f.metadata.get("choices")
        if kind in (int, float):
            _expect(all(holds(value, bounds[bound]) for bound, (_, holds) in _BOUNDS.items() if bound in bounds))
        _expect(not choices or bool(kind in (int, float) and bounds) or _is_among(value, choices))
    return value


def _plain(value: Any, kind: type, f: Field) -> Any:
    """A truth value, a finite number, of at most 64 bits if it is a whole one, or text."""
    if kind is str:
        value = value.value if isinstance(value, enum.Enum) else value
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if _is_mapping(f) and isinstance(value, str):
            is_file = f.metadata.get("file") and os.path.isfile(value)
            _expect(is_file or (value.startswith("{") and isinstance(json.loads(value), dict)))
    elif kind is not bool:
        _expect(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))
        least = (f.metadata.get("range") or {}).get("whole_from")
        if kind is int or (least is not None and value >= 1):
            _expect(value == int(value) and abs(value) < 2**63)
            value = int(value)
    _expect(isinstance(value, (int, float) if kind is float else kind))
    return value


def _expect(condition: Any) -> None:
    if not condition:
        raise ValueError


def _is_among(value: Any, choices: Iterable[Any]) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _is_mapping(f: Field) -> bool:
    return any(dict in (kind, typing.get_origin(kind)) for kind in kinds(f.type))


# -- saying what is expected ------------------------------------------------------------------------------------------
def _bounds(limits: Mapping[str, Any]) -> str:
    return " and ".join(
        f"{word} {limits[bound]}" for bound, (word, _) in _BOUNDS.items() if limits.get(bound) is not None
    )


def _choices(f: Field) -> list[Any]:
    """The values that are told apart by name: those of the option, of enumerations, and literal ones."""
    found = [*f.metadata["choices"]]
    for kind in kinds(f.type):
        found += [member.value for member in kind] if _is_enum(kind) else []
        found += typing.get_args(kind) if typing.get_origin(kind) is Literal else []
    return found


def _word(kind: Any) -> str:
    return "a mapping" if typing.get_origin(kind) is dict else _WORDS.get(kind, f"a {type_name(kind)}")


def _expected(f: Field) -> str:
    """What an option takes, in words."""
    limits, choices = f.metadata["range"], list(map(repr, _choices(f)))
    words, bounds = [], _bounds(limits)
    for kind in kinds(f.type):
        origin = typing.get_origin(kind) or kind
        if kind in (int, float) and (bounds or not choices):
            words.append(f"{_WORDS[kind]} {bounds}".strip())
        elif origin is list:
            items = [f"of {_word(item).removeprefix('a ')}s" for item in typing.get_args(kind)]
            words.append(" ".join(["a list", *items, bounds]).strip())
        elif origin is dict:
            words.append("a mapping, or the same as JSON text" if str in kinds(f.type) else "a mapping")
        elif kind in _WORDS and (choices or _is_mapping(f)):
            continue
        elif not _is_enum(kind) and origin not in (Literal, types.NoneType):
            words.append(_word(kind))
    if "whole_from" in limits:
        words = [f"a whole number of at least {limits['whole_from']}", f"a share of the run {bounds} and below 1"]
    words += [f"one of {', '.join(choices)}"] if choices else []
    words += ["None"] if types.NoneType in kinds(f.type) else []
    return ", or ".join(words)


def _refusal(f: Field, value: Any) -> ConfigError:
    expected, owner = _expected(f), f.metadata["owner"]
    named = is_named_secret(f.name) and not f.metadata["choices"]
    hidden = f.metadata.get("secret") or named or _is_mapping(f)
    shown = "..." if hidden else reprlib.repr(value)
    if not isinstance(value, int | float | None) or isinstance(value, enum.Enum):
        shown += f" ({type(value).__name__})"
    if isinstance(value, int) and abs(value) >= 2**63:
        expected += ", in 64 bits"
    what = f"{f.name}={shown} is not {expected}; it is an option of {owner.__name__} in {owner.__module__}."
    hint = ", without quotes" if isinstance(value, str) and "number" in expected else ""
    words = [word for word in (value if isinstance(value, list | tuple) else [value]) if isinstance(word, str)]
    hint += "." + next((did_you_mean(word, _choices(f)) for word in words if word not in _choices(f)), "")
    given = "one of these" if len(expected) > 100 else expected
    return ConfigError(what, mend=f"Give {given}{hint} {f.name}: {help_of(f)}")


def require(condition: bool, what: str, mend: str) -> None:
    """Raise `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(what, mend=mend)


def require_choice(config: Any, name: str, choices: tuple[str | None, ...]) -> None:
    """Raise `ConfigError` unless the option `name` has one of the values."""
    value = getattr(config, name)
    require(value in choices, f"{name}={value!r} is unknown.", f"Use one of: {', '.join(map(repr, choices))}.")
