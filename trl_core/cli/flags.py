"""The options of a composed config, by who defines them, and how text becomes their values.

`transformers.HfArgumentParser` takes no `str | bool`, leaves "1e-5" of a YAML file as text, and knows no metadata but
argparse's own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import inspect
import json
import types
import typing
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError
from ..options import Field, checked, fields_of, kinds
from ..redaction import HIDDEN, marked_in, redacted

if TYPE_CHECKING:
    from ..composition import Composition

TRAINER, LIBRARY = "trainer", "transformers.TrainingArguments"
_BOOLS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def groups_of(composition: Composition) -> dict[str, list[Field]]:
    """The options of a composition by who defines them: each algorithm, last first; the trainer; transformers."""
    owners: dict[str, str] = {}
    for part in composition.parts:
        for cls in reversed(part.algorithm.config.__mro__ if part.algorithm.config else ()):
            owner = part.algorithm.name
            if part is composition.parts[0] and cls is not part.algorithm.config:
                owner = LIBRARY if cls.__module__.startswith("transformers.") else TRAINER
            owners |= dict.fromkeys(inspect.get_annotations(cls), owner)
    groups: dict[str, list[Field]] = {part.algorithm.name: [] for part in reversed(composition.parts)}
    groups |= {TRAINER: [], LIBRARY: []}
    for f in map(copy.copy, fields_of(composition.config_class)):
        if redacted({f.name: f.default}, marked=marked_in([f]))[f.name] == HIDDEN:
            f.default = HIDDEN
        groups[owners[f.name]].append(f)
    return {owner: fields for owner, fields in groups.items() if fields}


def is_list(hint: Any) -> bool:
    """Whether a value may be a list."""
    return any(list in (kind, typing.get_origin(kind)) for kind in kinds(hint))


def read(value: Any, f: Field) -> Any:
    """A value of a YAML file or a command line in the first of the option's types that it fits.

    Raises:
        ConfigError: it fits none, or is out of range.
    """
    with contextlib.suppress(TypeError):
        value = _read(value, f.type)
    try:
        return checked(value, f)
    except ConfigError as error:  # a value that is written is text, with quotes or without
        raise ConfigError(error.what, mend=error.mend.replace(", without quotes", "")) from None


def _read(value: Any, hint: Any) -> Any:
    for kind in kinds(hint):
        with contextlib.suppress(TypeError, ValueError, KeyError, RecursionError):
            return _as(kind, typing.get_origin(kind) or kind, value)
    raise TypeError


def _as(kind: Any, origin: Any, value: Any) -> Any:
    if kind is Any or (origin is Literal and value in typing.get_args(kind)):
        return value
    if kind is types.NoneType and str(value).lower() in ("none", "null"):
        return None
    if kind is bool:
        return _BOOLS[str(value).lower()]
    if kind in (int, float) or (kind is str and type(value) in (str, int, float)):
        return kind(str(value))
    if origin is list:
        (item,) = typing.get_args(kind) or (Any,)
        return [_read(entry, item) for entry in (value if isinstance(value, list) else [value])]
    if origin is dict or dataclasses.is_dataclass(origin):
        value = json.loads(value) if isinstance(value, str) else value
        return typing.cast(Any, origin)(**value)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return origin("no" if value is False else value)  # YAML reads a bare `no` as False
    raise TypeError
