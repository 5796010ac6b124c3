"""Helpers for configuration dataclasses: declaring options and checking them with clear errors."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .stability import Deprecation


def option(default: Any, text: str, *, resume: bool = True, deprecated: Deprecation | None = None) -> Any:
    """A dataclass field with its help text.

    Args:
        default: the default value.
        text: shown by `trl-core info` and `trl-core train --help`.
        resume: False if a run may be resumed with another value, because the option does not shape the mathematics.
        deprecated: when the option goes. Giving it a value other than its default then warns.
    """
    return field(default=default, metadata={"help": text, "resume": resume, "deprecated": deprecated})


def require(condition: bool, what: str, mend: str) -> None:
    """Raise `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(what, mend=mend)


def require_choice(config: Any, name: str, choices: tuple[str | None, ...]) -> None:
    """Raise `ConfigError` unless the option `name` has one of the values."""
    value = getattr(config, name)
    require(value in choices, f"{name}={value!r} is unknown.", f"Use one of: {', '.join(map(repr, choices))}.")
