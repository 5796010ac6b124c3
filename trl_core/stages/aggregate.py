"""The one place where a loss becomes a scalar.

Every token gets a weight before any forward pass; the loss of a micro-batch is `sum(weight * term)`. Denominators,
gradient accumulation and the number of processes live in the weights alone, so a micro-batch may be split in any way
and no plugin can get a denominator wrong.

Data-parallel training averages gradients over K processes, hence the factor K; micro-batch gradients are added up.
Counters are those of the whole generation batch over all processes, rescaled to one optimizer step (`A / S`). When all
slices hold equally many rows this is the usual "mean over the micro-batch, divided by A".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import TokenRows

ROW_MEAN = ("grpo", "sapo")
TOKEN_SUM = ("dapo", "cispo", "vespo")


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Denominators of one generation batch, over all processes, of the rows that are trained on."""

    rows: int
    """Kept rows, rows without loss tokens included."""
    tokens: int
    """Their loss tokens."""
    completion_tokens: int
    """Their completion tokens, those of masked truncated rows included."""
    slices: int = 1
    """S, micro-batches the generation batch is split into."""


class TokenMean:
    """A loss term that is averaged over the micro-batch's tokens whatever the algorithm's aggregation.

    Args:
        values: (T,), or any number of entries.
        mask: as many bool or None, the ones that enter the mean.
    """

    def __init__(self, values: Tensor, mask: Tensor | None = None) -> None:
        self.values = values
        self.mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask


def token_weights(
    rows: TokenRows,
    loss_type: str,
    counters: Counters,
    *,
    max_completion_length: int,
    accumulation: int = 1,
    processes: int = 1,
    normalizer: str = "step",
) -> Tensor:
    """(T,) weight of each loss token of a micro-batch.

    Args:
        rows: the micro-batch of this process.
        loss_type: grpo, sapo: mean over rows of the row's token mean. bnpo: mean over the micro-batch's tokens.
            dr_grpo: sum over rows times the maximum length. dapo, cispo, vespo: mean over all tokens of the step.
            luspo: mean over rows of the row's token sum.
        counters: of the generation batch.
        max_completion_length: constant length of dr_grpo.
        accumulation: A, micro-batches of this optimizer step.
        processes: K.
        normalizer: "step", or "generation" for dapo, cispo and vespo as TRL up to 1.10 divided: by the completion
            tokens of the whole generation batch, masked ones included, however many steps share it.
    """
    lengths = rows.lengths
    per_step = accumulation / counters.slices / processes
    if loss_type in ROW_MEAN:
        row_weight = 1.0 / (lengths.clamp(min=1) * (max(counters.rows, 1) * per_step))
    elif loss_type == "bnpo":
        row_weight = torch.ones_like(lengths) / (max(int(lengths.sum()), 1) * accumulation)
    elif loss_type == "dr_grpo":
        row_weight = torch.ones_like(lengths) / (max(counters.rows, 1) * max_completion_length * per_step)
    elif loss_type in TOKEN_SUM and normalizer == "generation":
        row_weight = torch.ones_like(lengths) / (max(counters.completion_tokens, 1) / processes)
    elif loss_type in TOKEN_SUM:
        row_weight = torch.ones_like(lengths) / (max(counters.tokens, 1) * per_step)
    else:  # luspo
        row_weight = torch.ones_like(lengths) / (max(counters.rows, 1) * per_step)
    return rows.expand(row_weight.float())


def aggregate(terms: Mapping[Any, Tensor | TokenMean], weights: Tensor, accumulation: int = 1) -> Tensor:
    """Scalar loss of a micro-batch: the weighted sum of all terms over its tokens."""
    loss = weights.new_zeros(())
    for term in terms.values():
        if isinstance(term, TokenMean):
            loss = loss + (term.values * term.mask).sum() / term.mask.sum().clamp(min=1) / accumulation
        else:
            loss = loss + (term * weights).sum()
    return loss


def pair_mean(losses: Tensor, accumulation: int = 1) -> Tensor:
    """Scalar loss of a micro-batch: the mean of the (P,) losses, divided by the micro-batches of a step."""
    return losses.sum() / max(losses.numel(), 1) / accumulation
