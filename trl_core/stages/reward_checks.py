"""What reward functions may be, ask for and answer."""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import ConfigError, RewardError
from ..hookspecs import REDUCTIONS, TRAINER_METRICS
from ..names import did_you_mean
from ..processes import Noted, scores

PROVIDED = ("prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric")
"""What a reward function gets beside the columns of the dataset."""
_OWN_METRICS = re.compile(
    f"{'|'.join(TRAINER_METRICS)}|num_tokens|total_flos|entropy|kl|reward|reward_std|frac_reward_zero_std"
    "|rewards/.+/(mean|std)|(time|completions|clip_ratio)/.+|(train|eval)_(loss|runtime|reward)"
)
LARGEST = 1e16
"""Largest size of a reward: float32 must hold the sum of the squares of a batch."""
_FORM = "Pass a function (prompts, completions, **columns) -> list of numbers."


def name_of(function: Any) -> str:
    """What a function is called in metrics and messages."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def check_callable(function: Any, name: str) -> None:
    """Raise `ConfigError` unless it can be called with named arguments for a list of numbers."""
    if inspect.isclass(function):
        raise ConfigError(
            f"The reward function {name!r} is a class: calling it makes an object and scores nothing.",
            mend=f"Pass an object of it, {name}(), whose __call__ takes the rows.",
        )
    if not callable(function):
        raise ConfigError(
            f"A reward function must be callable, a model or a model's name; got {type(function).__name__}.",
            mend=_FORM,
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The reward function {name!r} does not say what it takes: {error}.", mend=_FORM) from error
    if fixed := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]:
        raise ConfigError(
            f"The reward function {name!r} takes {fixed} by position only; arguments come by name.", mend=_FORM
        )
    called = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        raise ConfigError(
            f"The reward function {name!r} yields its values one by one.", mend="Let it return a list of them."
        )


def accepted_arguments(function: Callable[..., Any], offered: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Those of the offered arguments that a user's function takes, and the names of what it needs beyond them.

    What a `functools.partial` has bound is neither needed nor replaced.
    """
    args: tuple[Any, ...] = ()
    bound: dict[str, Any] = {}
    inner: Any = function
    while isinstance(inner, functools.partial):  # made anew below, since `update_wrapper` hides what is bound
        inner, args, bound = inner.func, inner.args + args, inner.keywords | bound
    function = functools.partial(inner, *args, **bound) if args or bound else inner
    own, wrapped = _named(function, follow=False), _named(function, follow=True)
    missing = [p.name for p in own[0] if p.default is p.empty and p.name not in offered]
    # A wrapper that takes everything hands it on to a function that may not.
    named, takes_all = (own[0] + wrapped[0], wrapped[1]) if own[1] else own
    taken = offered.keys() if takes_all else {p.name for p in named}
    return {name: value for name, value in offered.items() if name in taken and name not in bound}, missing


def _named(function: Callable[..., Any], *, follow: bool) -> tuple[list[inspect.Parameter], bool]:
    """The parameters that have a name, and whether any other is taken as well."""
    try:
        parameters = inspect.signature(function, follow_wrapped=follow).parameters.values()
    except ValueError:  # a wrapper in C, such as `functools.lru_cache` makes
        parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def refuse_missing(name: str, missing: list[str], offered: Iterable[str], where: str) -> None:
    """Raise `RewardError` if a function wants arguments that nothing gives it."""
    if missing:
        hints = "".join(did_you_mean(word, offered) for word in missing)
        raise RewardError(
            f"The reward function {name!r} wants the arguments {missing}, which {where} has no columns for.{hints}",
            mend=f"Add the columns, or take some of: {', '.join(sorted(offered))}.",
        )


def column(name: str, result: list[Any] | str, rows: range) -> list[float]:
    """The numbers of a function, from its `trl_core.processes.scores`; NaN for None."""
    if isinstance(result, str) or len(result) != len(rows):
        got = result if isinstance(result, str) else f"{len(result)} values"
        raise RewardError(
            f"The reward function {name!r} returned {got} for {len(rows)} rows.",
            mend="Return a list with one number (or None) per completion.",
        )
    for row, value in zip(rows, result, strict=True):
        if value is None or (isinstance(value, float | int) and not abs(value) > LARGEST):  # NaN is not
            continue
        raise RewardError(
            f"The reward function {name!r} returned {value} for row {row}; expected a finite number or None, "
            f"of at most {LARGEST:g} in size.",
            mend="Return numbers, not text or lists; clip the value, or return None for a row that cannot be scored.",
        )
    return [float("nan") if value is None else float(value) for value in result]


def logged(name: str, noted: Noted, rows: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What a function has logged, checked: the function to call, and its arguments.

    Raises:
        RewardError: a metric that is no number, or a column with another number of values than there are rows.
    """
    found: list[tuple[str, tuple[Any, ...]]] = []
    counts: Counter[str] = Counter()
    for call, args, kwargs in noted:
        if call == "log_metric":
            found.append((call, _metric(name, *args, **kwargs)))
        elif call == "log_extra":
            column, values = _extra(name, *args, **kwargs)
            counts[column] += len(values)
            found.append((call, (column, values)))
    for column, count in counts.items():
        if count != rows:
            raise RewardError(
                f"The reward function {name!r} logged {count} values in the column {column!r} for {rows} rows.",
                mend="Give log_extra one value per completion.",
            )
    yield from found


def _metric(function: str, name: Any, value: Any, weight: Any = 1.0, reduce: Any = "mean") -> tuple[Any, ...]:
    numbers: list[Any] = list(scores([value, weight]))
    fits = all(isinstance(number, float) and abs(number) != float("inf") for number in numbers)
    if not (isinstance(name, str) and name and fits and reduce in REDUCTIONS and not numbers[1] < 0):
        raise RewardError(
            f"The reward function {function!r} logged the metric {name!r} with the value {numbers[0]}, the weight "
            f"{numbers[1]} and reduce={reduce!r}; expected a name, a finite number, a weight of at least 0, and one of "
            f"{', '.join(REDUCTIONS)}.",
            mend="Give log_metric(name, value) a number; NaN says that there is none.",
        )
    if _OWN_METRICS.fullmatch(name):
        raise RewardError(
            f"The reward function {function!r} logged the metric {name!r}, which the trainer logs itself.",
            mend=f"Give it another name, such as '{function}/{name}'.",
        )
    return name, *numbers, reduce


def _extra(function: str, column: Any, values: Any) -> tuple[str, list[Any]]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not (isinstance(column, str) and column and isinstance(values, list | tuple)):
        raise RewardError(
            f"The reward function {function!r} logged a {type(values).__name__} in the column {column!r}; expected a "
            "list under a name.",
            mend="Call log_extra(column, values) with one value per completion.",
        )
    return column, list(values)
