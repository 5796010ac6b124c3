"""Helpers for configuration dataclasses: declaring options and checking them with clear errors."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .stability import Deprecation


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

    Args:
        default: the default value.
        text: shown by `trl-core info` and `trl-core train --help`.
        ge: the least value.
        gt: the value must be above this one.
        le: the greatest value.
        lt: the value must be below this one.
        choices: the only values there are.
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
    return field(default=default, repr=not secret, metadata=metadata)


def require(condition: bool, what: str, mend: str) -> None:
    """Raise `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(what, mend=mend)


def require_choice(config: Any, name: str, choices: tuple[str | None, ...]) -> None:
    """Raise `ConfigError` unless the option `name` has one of the values."""
    value = getattr(config, name)
    require(value in choices, f"{name}={value!r} is unknown.", f"Use one of: {', '.join(map(repr, choices))}.")
