"""Every exception and warning of trl-core.

Each error says what happened, what was expected and how to mend it; the mend is a required argument, so no error
can be written without one. Classes also derive from the built-in a Python user would catch (`ValueError`, ...).
"""

from __future__ import annotations

import functools
from typing import Any

from .redaction import hide


def printable(text: str) -> str:
    """The text with every character that acts on a terminal, or cannot be seen, as an escape; lines stay lines."""
    if text.isprintable():
        return text
    kept = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return "".join(kept)


def one_line(text: str, most: int = 1000) -> str:
    """Words that somebody else wrote, in one line that can be shown: printable, and no longer than `most`."""
    line = printable(" ".join(text[: 10 * most].split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def words_of(error: BaseException) -> str:
    """Type and text of an exception of somebody else's, which may fail to say anything."""
    try:
        text = one_line(str(error))
    except Exception as failure:
        text = f"(its text cannot be had: {type(failure).__name__})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class TRLCoreError(Exception):
    """Base of all errors raised by trl-core.

    Args:
        what: what is wrong, naming the thing (option, column, plugin, row) and what was expected. Secrets in it, such
            as the value of an option that is one, are hidden.
        mend: what the user can do about it; kept as the attribute `mend` and appended to the message.
    """

    def __init__(self, what: str, *, mend: str) -> None:
        self.what = what = hide(what)
        self.mend = mend = hide(mend)
        super().__init__(printable(f"{what}\n  To mend: {mend}"))

    def __reduce__(self) -> tuple[Any, ...]:
        """Raised in a worker process, an error travels as a copy; by default it would be made without its mend."""
        return functools.partial(type(self), mend=self.mend), (self.what,)


# -- discovery and stability ------------------------------------------------------------------------------------------
class AlgorithmNotFoundError(TRLCoreError, LookupError):
    """No installed distribution registers this algorithm name."""


class AmbiguousAlgorithmError(TRLCoreError, LookupError):
    """Two or more distributions register the same name; a qualified spelling is needed."""


class BrokenAlgorithmError(TRLCoreError, ImportError):
    """The plugin is installed but unusable: it fails to import, exports the wrong object or excludes this core."""


class StabilityError(TRLCoreError):
    """The production guard refuses an algorithm that is less stable than required."""


# -- composition ------------------------------------------------------------------------------------------------------
class CompositionError(TRLCoreError, ValueError):
    """The algorithms named in a composition do not fit together."""


class PluginConflict(CompositionError):
    """Two composed algorithms provide the same step, or define the same option."""


class InvalidHookError(CompositionError):
    """A hook implementation does not fit the contract in `trl_core.hookspecs`."""


# -- configuration and data -------------------------------------------------------------------------------------------
class ConfigError(TRLCoreError, ValueError):
    """An option, or a combination of options, is invalid."""


class UnknownOptionError(ConfigError, TypeError):
    """A configuration, or a trainer, was given a keyword that it does not know."""


class DatasetError(TRLCoreError, ValueError):
    """The dataset does not have the form the algorithm needs."""


class OutputDirError(TRLCoreError, OSError):
    """The output folder cannot be written, or belongs to another run."""


# -- the run ----------------------------------------------------------------------------------------------------------
class PluginError(TRLCoreError, RuntimeError):
    """Code of a plugin raised an exception: a hook, the making of its hooks, an option's check, or its state."""


class HookResultError(TRLCoreError, ValueError):
    """A hook, filter or backend returned something of the wrong shape, type or value."""


class RewardError(TRLCoreError, RuntimeError):
    """A reward function raised, timed out, wants what nothing gives it, or answered or logged what is no number."""


class NonFiniteLossError(TRLCoreError, ArithmeticError):
    """The loss of a micro-batch is NaN or infinite."""


class CheckpointError(TRLCoreError, ValueError):
    """A checkpoint is incomplete, damaged, or was written by another algorithm or with other options."""


# -- authors ----------------------------------------------------------------------------------------------------------
class ProjectError(TRLCoreError, ValueError):
    """The source folder of a distribution is not found, or its files do not say what they should."""


class ContractError(TRLCoreError, AssertionError):
    """A stable interface changed without a deprecation, or something deprecated outlived its removal version."""


class PromotionError(TRLCoreError, ValueError):
    """A stability tag cannot be moved: criteria are not met, or the order of the steps is wrong."""


# -- conformance ------------------------------------------------------------------------------------------------------
class ConformanceError(TRLCoreError, AssertionError):
    """An algorithm does not keep what `trl_core.testing` checks."""


# -- warnings ---------------------------------------------------------------------------------------------------------
class TRLExperimentalWarning(UserWarning):
    """An experimental algorithm is used; it may change in any release. See `TRL_EXPERIMENTAL_SILENCE`."""


class TRLDeprecationWarning(FutureWarning):
    """Something deprecated is used; the message names its removal version and its replacement."""
