"""Group-relative advantages (GRPO, arXiv 2402.03300 eq. 3; GDPO, arXiv 2601.05242)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import TokenRows

EPSILON = 1e-4
"""Added to every standard deviation that divides an advantage."""


# Statistics are formed in double precision: there the mean of equal float32 rewards is exactly their value, so that a
# group without any difference has deviation 0 and advantage 0, not a rounding error divided by another.
def _nan_std(values: Tensor, dim: int | None, correction: int) -> Tensor:
    """Standard deviation over the finite entries, float64; NaN where fewer than `correction + 1` remain."""
    values = values.double()
    present = ~torch.isnan(values)
    count = present.sum() if dim is None else present.sum(dim)
    mean = torch.nanmean(values) if dim is None else torch.nanmean(values, dim, keepdim=True)
    squares = torch.where(present, (values - mean) ** 2, 0.0)
    total = squares.sum() if dim is None else squares.sum(dim)
    return torch.where(count > correction, (total / (count - correction).clamp(min=1)).sqrt(), float("nan"))


def group_std(rows: TokenRows, reward: Tensor, keep: Tensor | None = None) -> Tensor:
    """(P,) sample standard deviation of each group's scored (and kept) rewards; NaN where fewer than two."""
    return _nan_std(rows.by_group(_masked(reward, keep)), 1, 1).float()


def _masked(reward: Tensor, keep: Tensor | None) -> Tensor:
    return reward if keep is None else reward.masked_fill(~keep, float("nan"))


def group_advantages(
    rows: TokenRows, reward: Tensor, keep: Tensor | None = None, scale: str = "group", correction: int = 1
) -> Tensor:
    """`(r - group mean) / (std + 1e-4)` over the kept, scored rows of each group.

    Args:
        rows: says which rows form a group.
        reward: (N,) row rewards; NaN marks rows without a score. They and rows not kept get advantage 0 and do not
            enter any statistic.
        keep: (N,) bool or None for all.
        scale: "group" (std of the group), "batch" (std of all kept rows; arXiv 2508.08221) or "none"
            (Dr. GRPO, arXiv 2503.20783).
        correction: 1 for the sample standard deviation, 0 for the population's.

    Returns:
        (N,) float32.
    """
    reward = _masked(reward, keep).double()
    grid = rows.by_group(reward)
    advantage = grid - torch.nanmean(grid, 1, keepdim=True)
    if scale == "group":
        advantage = advantage / (torch.nan_to_num(_nan_std(grid, 1, correction))[:, None] + EPSILON)
    elif scale == "batch":
        advantage = advantage / (torch.nan_to_num(_nan_std(reward, None, correction)) + EPSILON)
    return torch.nan_to_num(rows.flat(advantage)).float()


def normalize_then_sum(rows: TokenRows, rewards: Tensor, weights: Tensor, keep: Tensor | None = None) -> Tensor:
    """GDPO: z-score each reward function inside its group, add with weights, z-score over the whole batch.

    Args:
        rows: says which rows form a group.
        rewards: (N, R), NaN where a function gave no score.
        weights: (R,).
        keep: (N,) bool or None for all.

    Returns:
        (N,) float32; 0 for rows without any score or not kept.
    """
    columns = [group_advantages(rows, column, keep) for column in rewards.unbind(1)]
    summed = (torch.stack(columns, 1) * weights).sum(1)
    summed = _masked(summed.masked_fill(torch.isnan(rewards).all(1), float("nan")), keep)
    z = (summed - torch.nanmean(summed)) / (torch.nan_to_num(_nan_std(summed, None, 1)) + EPSILON)
    return torch.nan_to_num(z)
