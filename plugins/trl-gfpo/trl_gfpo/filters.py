"""Filters: functions that give every completion of every group a score; the highest scores are kept."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trl_core import Rollouts, errors, require

logger = logging.getLogger(__name__)
Scores = list[list[float]]


def shortest(group_completions: list, group_rewards: Scores, group_completion_ids: list) -> Scores:
    """Minus the number of tokens."""
    return [[-float(len(ids)) for ids in group] for group in group_completion_ids]


def token_efficiency(group_completions: list, group_rewards: Scores, group_completion_ids: list) -> Scores:
    """Reward per token. Among negative rewards longer completions score higher: shift rewards to be positive."""
    pairs = zip(group_rewards, group_completion_ids, strict=True)
    return [[r / len(i) if r == r else 0.0 for r, i in zip(rewards, ids, strict=True)] for rewards, ids in pairs]


BUILT_IN = {"shortest": shortest, "token_efficiency": token_efficiency}


def find_filter(given: Any) -> Any:
    """The function, or the built-in one of this name."""
    return BUILT_IN.get(given, given) if isinstance(given, str) else given


def check_remaining(levels: tuple[int | None, ...], generations: int, function: Any) -> bool:
    """Whether anything is filtered; raises `ConfigError` if how many to keep does not fit the group or the filter."""
    if levels == (None,):
        if function is not None:
            logger.warning("group_filter_func is given without num_remains_in_group: nothing is filtered.")
        return False
    what, mend = f"num_remains_in_group={levels}", f"Pass the trainer a function or one of {sorted(BUILT_IN)}."
    require(callable(function), f"{what} is set, but group_filter_func is {function!r}.", mend)
    in_range = all(2 <= k <= generations for k in levels if k is not None)
    require(in_range, f"{what} is not in 2..num_generations ({generations}).", "Choose how many to keep in that range.")
    return True


def group_scores(function: Callable[..., Scores], rollouts: Rollouts) -> Tensor:
    """Call a filter and check its answer.

    Args:
        function: `f(group_completions, group_rewards, **optional)`; the optional arguments `group_completion_ids` and
            `group_columns` are passed if it accepts them. All are lists of P groups of G entries.
        rollouts: the whole generation batch.

    Returns:
        (P, G) float64.

    Raises:
        HookResultError: the answer has another shape or an entry that is not finite.
    """
    grid = rollouts.by_group(torch.arange(rollouts.num_rows), fill=-1).tolist()

    def groups(values: list) -> list[list]:
        return [[values[i] for i in row] for row in grid]

    ids = [row.tolist() for row in rollouts.completion_ids.split(rollouts.completion_lengths.tolist())]
    columns = {name: groups(values) for name, values in rollouts.columns.items()}
    extra: dict[str, Any] = {"group_completion_ids": groups(ids), "group_columns": columns}
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        extra = {name: value for name, value in extra.items() if name in parameters}
    result = function(groups(rollouts.completions), groups(rollouts.reward.tolist()), **extra)
    got = _fault(result, len(grid), len(grid[0]))
    if got:
        name = getattr(function, "__name__", type(function).__name__)
        expected = f"expected {len(grid)} lists of {len(grid[0])} finite numbers"
        raise errors.HookResultError(f"The filter {name!r} returned {got}; {expected}.", mend="Score every completion.")
    return torch.tensor(result, dtype=torch.float64)


def _fault(result: Any, prompts: int, size: int) -> str | None:
    if not isinstance(result, list) or [len(group) for group in result] != [size] * prompts:
        shape = [len(group) for group in result] if isinstance(result, list) else type(result).__name__
        return f"groups of {shape}"
    bad = [(g, i, s) for g, row in enumerate(result) for i, s in enumerate(row) if not -1e300 < s < 1e300]
    return f"{bad[0][2]} for completion {bad[0][1]} of group {bad[0][0]}" if bad else None
