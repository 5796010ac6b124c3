"""Stability tags, deprecations, the warnings that go with them, and the production guard."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import importlib_metadata
from packaging.version import InvalidVersion, Version

from .errors import ConfigError, ContractError, StabilityError, TRLDeprecationWarning, TRLExperimentalWarning

if TYPE_CHECKING:
    from .algorithm import Algorithm
    from .discovery import AlgorithmInfo

SILENCE = "TRL_EXPERIMENTAL_SILENCE"
REQUIRE = "TRL_CORE_REQUIRE"

_warned: set[str] = set()
_F = TypeVar("_F", bound=Callable[..., Any])


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
    who = f"The algorithm {info.name!r} of {info.distribution} {info.version}"
    if info.stability is Stability.DEPRECATED:
        removal, replacement = (algorithm.removal, algorithm.replacement) if algorithm else (None, None)
        warn_or_refuse(who, removal, replacement, info.distribution, info.version)
    elif info.stability is Stability.EXPERIMENTAL:
        if os.environ.get(SILENCE, "").strip().lower() not in ("", "0", "false", "no", "off"):
            return
        message = (
            f"{who} is experimental: its options and its results may change, and it may be removed, in "
            f"any release. Pin the version to keep a run repeatable. To silence this warning set {SILENCE}=1."
        )
        _warn_once(info.qualified, message, TRLExperimentalWarning)


# -- deprecations -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Deprecation:
    """What is said of something that will go: `option(..., deprecated=Deprecation(since="0.2", removal="0.4"))`.

    Args:
        since: the version of its distribution that deprecated it.
        removal: the version that removes it, for what is stable at least two minor versions later.
        replacement: what to use instead, as one would write it.

    Raises:
        ContractError: `since` or `removal` is no version.
    """

    since: str
    removal: str
    replacement: str | None = None

    def __post_init__(self) -> None:
        reached(self.since, self.since)
        reached(self.removal, self.since)


def reached(removal: str, version: str) -> bool:
    """Whether a distribution of this version should no longer have what was to be removed in `removal`.

    A pre-release of the removal version counts: it is where the removal is tried. A version that is not known to be
    one (`"unknown"`) has reached nothing.

    Raises:
        ContractError: `removal` is no version.
    """
    try:
        due = Version(removal)
    except InvalidVersion:
        raise ContractError(f"{removal!r} is no version, which a deprecation needs.", mend='Write "0.4".') from None
    try:
        now = Version(version)
    except InvalidVersion:
        return False
    return Version(now.base_version) >= due


def warn_or_refuse(what: str, removal: str | None, replacement: str | None, distribution: str, version: str) -> None:
    """Warn, once per process, that something deprecated is used, or refuse it where its removal version is reached.

    Args:
        what: what is used, as the beginning of a sentence.
        removal: the version that removes it; None where nobody said.
        replacement: what to use instead, or None.
        distribution: name of the distribution it belongs to.
        version: version of that distribution that is installed.

    Raises:
        ContractError: the installed version has reached `removal`.
    """
    instead = f"Use {replacement} instead." if replacement else "No replacement is named."
    if removal and reached(removal, version):
        raise ContractError(
            f"{what} was to be removed in version {removal} of {distribution}, and {version} is installed.",
            mend=f"{instead} Or install {distribution}<{removal}.",
        )
    when = f"in version {removal} of {distribution}" if removal else "in a later version"
    _warn_once(what, f"{what} is deprecated and will be removed {when}. {instead}", TRLDeprecationWarning)


def deprecated(
    *, since: str, removal: str, replacement: str | None = None, parameter: str | None = None
) -> Callable[[_F], _F]:
    """Mark a function, a method, a class, a hook of the contract, or one `parameter` of these, as one that will go.

    Using it warns once per process, and is refused once the distribution has reached `removal`. Write the arguments as
    literals: `trl-core api` reads them from the source. What PEP 702 asks for is set, `__deprecated__`. For a hook, on
    top of its other marks, implementing it warns.

    Args:
        since: see `Deprecation`.
        removal: see `Deprecation`.
        replacement: see `Deprecation`.
        parameter: name of the parameter, if the rest stays.
    """
    note = Deprecation(since, removal, replacement)

    def mark(thing: Any) -> Any:
        what = f"The parameter {parameter!r} of " if parameter else ""
        what += f"{thing.__module__}.{thing.__qualname__}"
        spec = getattr(thing, "trl_core_spec", None)
        if spec is not None:
            warning = TRLDeprecationWarning(f"{what} is deprecated and will be removed in version {removal}.")
            given = spec.get("warn_on_impl_args") or {}
            spec |= {"warn_on_impl_args": {**given, parameter: warning}} if parameter else {"warn_on_impl": warning}
            marked = thing
        elif isinstance(thing, type):
            marked, thing.__init__ = thing, _guarded(thing.__init__, what, note, parameter)  # type: ignore[misc]
        else:
            marked = _guarded(thing, what, note, parameter)
        marked.__deprecations__ = {**vars(marked).get("__deprecations__", {}), parameter: note}
        if parameter is None:
            marked.__deprecated__ = f"Will be removed in {removal}." + (f" Use {replacement}." if replacement else "")
        return marked

    return mark


def _guarded(function: Any, what: str, note: Deprecation, parameter: str | None) -> Any:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if parameter is None or parameter in inspect.signature(function).bind_partial(*args, **kwargs).arguments:
            name = what.rpartition(" of ")[2].partition(".")[0].replace("_", "-")
            try:
                version = importlib_metadata.version(name)
            except importlib_metadata.PackageNotFoundError:
                version = "unknown"
            warn_or_refuse(what, note.removal, note.replacement, name, version)
        return function(*args, **kwargs)

    return guarded


def _warn_once(key: str, message: str, category: type[Warning]) -> None:
    if key not in _warned:
        warnings.warn(message, category, stacklevel=_level_of_caller())
        # Noted only now: where a filter turns the warning into an error, it stays one at every use.
        _warned.add(key)


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
