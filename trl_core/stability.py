"""Stability tags, the warnings that go with them, and the production guard."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from .errors import ConfigError, StabilityError, TRLDeprecationWarning, TRLExperimentalWarning

if TYPE_CHECKING:
    from .algorithm import Algorithm
    from .discovery import AlgorithmInfo

SILENCE = "TRL_EXPERIMENTAL_SILENCE"
REQUIRE = "TRL_CORE_REQUIRE"

_warned: set[str] = set()


class Stability(StrEnum):
    """What a distribution promises about an algorithm, the weakest promise first.

    It is the distribution's own word, so show the two together.
    """

    DEPRECATED = "deprecated"
    """Still works, and will be removed in a version that is named."""
    EXPERIMENTAL = "experimental"
    """May change or go in any release."""
    STABLE = "stable"
    """Semantic versioning holds."""

    def satisfies(self, required: Stability) -> bool:
        """Whether this tag promises at least as much as `required`.

        A deprecated algorithm promises less than an experimental one: that one may stay, this one will go.
        """
        order = list(Stability)
        return order.index(self) >= order.index(required)


def warn_on_use(info: AlgorithmInfo, algorithm: Algorithm | None = None) -> None:
    """Warn, once per algorithm and process, that an algorithm is experimental or deprecated.

    Args:
        info: the algorithm's record.
        algorithm: the loaded algorithm; says for a deprecated one when it goes and what replaces it.
    """
    who = f"{info.name!r} of {info.distribution} {info.version}"
    category: type[Warning]
    if info.stability is Stability.EXPERIMENTAL:
        if os.environ.get(SILENCE, "").strip().lower() not in ("", "0", "false", "no", "off"):
            return
        category = TRLExperimentalWarning
        message = (
            f"The algorithm {who} is experimental: its options and its results may change, and it may be removed, in "
            f"any release. Pin the version to keep a run repeatable. To silence this warning set {SILENCE}=1."
        )
    elif info.stability is Stability.DEPRECATED:
        category = TRLDeprecationWarning
        removal, replacement = (algorithm.removal, algorithm.replacement) if algorithm else (None, None)
        when = f"in version {removal} of {info.distribution}" if removal else "in a later version"
        instead = f"Use {replacement} instead." if replacement else "No replacement is named."
        message = f"The algorithm {who} is deprecated and will be removed {when}. {instead}"
    else:
        return
    if info.qualified not in _warned:
        warnings.warn(message, category, stacklevel=_level_of_caller())
        # Noted only now: where a filter turns the warning into an error, it stays one at every use.
        _warned.add(info.qualified)


def _level_of_caller() -> int:
    """The `stacklevel`, seen from the function that calls this one, of the first frame outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    return level


def guard(infos: Sequence[AlgorithmInfo], require: str | Stability | None = None) -> None:
    """Refuse algorithms that are less stable than required.

    Args:
        infos: records of everything that a run is made of.
        require: "stable" or "experimental". The environment variable `TRL_CORE_REQUIRE` does the same for a whole
            process; where both are set, both must hold.

    Raises:
        StabilityError: at least one algorithm is less stable than required; all of them are named.
        ConfigError: `require` or the variable has another value.
    """
    demands = {"require": require, f"the environment variable {REQUIRE}": os.environ.get(REQUIRE) or None}
    levels = {source: _level(source, value) for source, value in demands.items() if value is not None}
    for source, level in levels.items():
        refused = [info for info in infos if not info.stability.satisfies(level)]
        if refused:
            listing = ", ".join(f"{i.qualified} {i.version} is {i.stability.value}" for i in refused)
            raise StabilityError(
                f"At least {level.value!r} is required by {source}, but {listing}.",
                mend=f"Use other algorithms (`trl-core list` shows the tags), or relax {source}.",
            )


def _level(source: str, value: str | Stability) -> Stability:
    # "deprecated" would let everything pass: a guard that guards nothing is more likely a mistake than a wish.
    allowed = [Stability.STABLE.value, Stability.EXPERIMENTAL.value]
    text = value.value if isinstance(value, Stability) else str(value).strip().lower()
    if text not in allowed:
        raise ConfigError(f"{value!r} is no value for {source}.", mend=f"Use one of: {', '.join(allowed)}.")
    return Stability(text)
