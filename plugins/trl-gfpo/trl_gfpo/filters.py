"""Filters: functions that give every completion of every group a score; the highest scores are kept."""

import logging
import reprlib
from typing import Any

import torch
from torch import Tensor

from trl_core import Rollouts, errors, require
from trl_core.stages import accepted_arguments

logger = logging.getLogger(__name__)
Scores = list[list[float]]


def shortest(group_completions: list, group_rewards: Scores, group_completion_ids: list) -> Scores:
    """Minus the number of tokens."""
    return [[-float(len(ids)) for ids in group] for group in group_completion_ids]


def token_efficiency(group_completions: list, group_rewards: Scores, group_completion_ids: list) -> Scores:
    """Reward per token. Among negative rewards longer completions score higher: shift rewards to be positive."""
    pairs = zip(group_rewards, group_completion_ids, strict=True)
    return [[r / len(i) for r, i in zip(rewards, ids, strict=True)] for rewards, ids in pairs]


BUILT_IN = {"shortest": shortest, "token_efficiency": token_efficiency}


def check_remaining(levels: dict[str, Any], generations: int, function: Any) -> bool:
    """Whether anything is filtered; raises `ConfigError` if how many to keep does not fit the group or the filter."""
    if None in levels.values():
        if function is not None:
            logger.warning("group_filter_func is given without num_remains_in_group: nothing is filtered.")
        return False
    what = f"group_filter_func is {function!r}, but a filter is needed for {', '.join(levels)}."
    require(callable(function), what, f"Pass the trainer a function or one of {sorted(BUILT_IN)}.")
    for name, k in levels.items():
        require(2 <= k <= generations, f"{name}={k} is not in 2..num_generations ({generations}).", "Change one.")
    return True


def group_scores(function: Any, rollouts: Rollouts, rewards: Tensor) -> Tensor:
    """Call a filter and check its answer.

    Args:
        function: `f(group_completions, group_rewards, **optional)`; the optional arguments `group_completion_ids` and
            `group_columns` are passed if it accepts them. All are lists of P groups of G entries.
        rollouts: the whole generation batch.
        rewards: (P, G) its rewards, NaN where a row has none.

    Returns:
        (P, G) float64; minus infinity where a row has no reward, whatever the filter says of it.

    Raises:
        HookResultError: the answer has another shape, or an entry that is not finite for a row with a reward.
    """
    grid = rollouts.by_group(torch.arange(rollouts.num_rows), fill=-1).tolist()

    def groups(values: list) -> list[list]:
        return [[values[i] for i in row] for row in grid]

    ids = [row.tolist() for row in rollouts.completion_ids.split(rollouts.completion_lengths.tolist())]
    columns = {name: groups(values) for name, values in rollouts.columns.items()}
    # The first two have whatever names the function gives them.
    extra, _ = accepted_arguments(function, {"group_completion_ids": groups(ids), "group_columns": columns})
    result = function(groups(rollouts.completions), rewards.tolist(), **extra)
    try:
        scores = torch.as_tensor(result, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        scores = torch.zeros(0)
    bad = (~scores.isfinite() & ~rewards.isnan()).nonzero().tolist() if scores.shape == rewards.shape else None
    if bad == []:
        return scores.masked_fill(rewards.isnan(), -torch.inf)
    got = f"{scores[*bad[0]]} for completion {bad[0][1]} of group {bad[0][0]}" if bad else reprlib.repr(result)
    name = getattr(function, "__name__", type(function).__name__)
    what = f"The filter {name!r} returned {got}; expected {len(grid)} lists of {len(grid[0])} finite numbers."
    raise errors.HookResultError(what, mend="Score every completion.")
