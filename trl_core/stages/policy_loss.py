"""Per-token policy losses of the GRPO family. Sources: specification of each loss in its docstring line.

All functions take and return flat (T,) tensors (see `trl_core.batch`); none forms a scalar.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Samples, TokenRows

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types that clip the ratio as PPO does; they differ only in aggregation."""
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")


@dataclass(frozen=True, kw_only=True)
class PolicyLossOptions:
    """The options of `policy_loss`, named as in the configuration."""

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    @property
    def high(self) -> float:
        """Upper clip width, or the cap of cispo."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


def sequence_log_ratio(rows: TokenRows, log_ratio: Tensor) -> Tensor:
    """(T,) mean log-ratio of each row at each of its tokens: the length-normalised ratio of GSPO (2507.18071 eq. 7)."""
    return rows.expand(rows.mean_per_row(log_ratio))


def policy_loss(
    rows: TokenRows,
    advantages: Tensor,
    logps: Tensor,
    old_logps: Tensor,
    log_ratio: Tensor,
    options: PolicyLossOptions,
    sampler_correction: Tensor | None = None,
) -> Tensor:
    """Per-token loss of one of `LOSS_TYPES`.

    clipped family: `-min(rho' A, clip(rho, 1-eps, 1+eps_high) A)`, `rho' = min(rho, delta)` (PPO 1707.06347;
    two-sided clipping 2505.07291). cispo (2506.13585): `-sg[min(rho, eps_high)] A logp`, eps_high an absolute cap.
    sapo (2511.20347): `-(4/tau) sigmoid(tau (rho - 1)) A`. vespo (2602.10693): `-phi A logp`.

    Args:
        rows: the rows the tokens belong to.
        advantages: (T,).
        logps: (T,) with gradient.
        old_logps: (T,) under the sampling policy.
        log_ratio: (T,) log importance ratio at the level the algorithm chose.
        options: see `PolicyLossOptions`.
        sampler_correction: (T,) ratio of `sampler_ratio`; only vespo uses it here, the others multiply it afterwards.
    """
    ratio = log_ratio.exp()
    if options.loss_type in CLIPPED:
        clipped = ratio.clamp(1 - options.epsilon, 1 + options.high)
        if options.delta is not None:
            ratio = ratio.clamp(max=options.delta)
        return -torch.min(ratio * advantages, clipped * advantages)
    if options.loss_type == "cispo":
        return -ratio.clamp(max=options.high).detach() * advantages * logps
    if options.loss_type == "sapo":
        tau = torch.where(advantages > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    phi = vespo_weight(rows, advantages, logps.detach() - old_logps, options, sampler_correction)
    return -phi * advantages * logps


def vespo_weight(
    rows: TokenRows,
    advantages: Tensor,
    log_ratio: Tensor,
    options: PolicyLossOptions,
    sampler_correction: Tensor | None = None,
) -> Tensor:
    """(T,) `phi = exp(lambda + k log w - lambda w)` without gradient, `log w` the clipped sum of token log-ratios."""
    log_w = rows.sum_per_row(log_ratio.clamp(-20.0, 20.0))
    floor = -18.420680743952367  # log(1e-8)
    if sampler_correction is not None:
        log_is = sampler_correction.clamp(min=1e-8).log()
        # A sequence-level ratio is repeated on every token and must enter once.
        log_w = (
            log_w + rows.mean_per_row(log_is) if _constant_in_rows(rows, log_is) else log_w + rows.sum_per_row(log_is)
        )
    log_w = rows.expand(log_w.clamp(floor, 20.0))
    positive = advantages >= 0
    k = torch.where(positive, options.vespo_k_pos, options.vespo_k_neg)
    lam = torch.where(positive, options.vespo_lambda_pos, options.vespo_lambda_neg)
    return torch.exp(lam + k * log_w - lam * log_w.exp()).detach()


def _constant_in_rows(rows: TokenRows, values: Tensor) -> bool:
    return torch.allclose(values, rows.expand(rows.mean_per_row(values)))


def kl_penalty(logps: Tensor, ref_logps: Tensor, ratio: Tensor | None = None) -> Tensor:
    """(T,) the k3 estimate `exp(ref - logp) - (ref - logp) - 1` (>= 0).

    With `ratio` (differentiable, policy over sampling policy) the estimate is multiplied by it: on policy its
    gradient is then that of the reverse KL (DeepSeek-V3.2, 2512.02556).
    """
    difference = ref_logps - logps
    estimate = difference.exp() - difference - 1
    return estimate if ratio is None else estimate * ratio


def high_entropy_mask(entropy: Tensor, all_entropy: Tensor, quantile: float) -> Tensor:
    """(T,) bool: tokens in the top `quantile` of entropy (2506.01939); 0 keeps only the maximum.

    Args:
        entropy: (T,) of this process's tokens.
        all_entropy: entropies of the micro-batch over all processes; the threshold is their linearly interpolated
            `1 - quantile` quantile.
        quantile: share of tokens to keep.
    """
    if all_entropy.numel() == 0:
        return torch.ones_like(entropy, dtype=torch.bool)
    ordered = all_entropy.float().sort().values  # torch.quantile refuses more than 2**24 values
    place = (1.0 - quantile) * (ordered.numel() - 1)
    low = int(place)
    high = min(low + 1, ordered.numel() - 1)
    threshold = torch.lerp(ordered[low], ordered[high], place - low)
    return entropy >= threshold


def off_policy_mask(samples: Samples, logps: Tensor, threshold: float) -> Tensor:
    """(T,) bool: False where the advantage is negative and the row's mean `sampling - current` log-prob exceeds it.

    `samples.sampling_logps` is compared, or the old log-probs when the sampler reported none.
    """
    sampled = samples.old_logps if samples.sampling_logps is None else samples.sampling_logps
    assert sampled is not None
    drift = samples.expand(samples.mean_per_row(sampled - logps.detach()))
    return (samples.advantages >= 0) | (drift <= threshold)


def sampler_ratio(
    rows: TokenRows,
    difference: Tensor,
    mode: str,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> Tensor:
    """(T,) importance ratio between the trainer's and an external sampler's log-probs (both before any update).

    Args:
        rows: the rows the tokens belong to.
        difference: (T,) `old_logps - sampling_logps`; NaN counts as 0.
        mode: "token_truncate" (clamp), "token_mask" (zero outside the bounds), "sequence_truncate" or
            "sequence_mask" (the same with the product over the row, at each of its tokens).
        clip_min: lower bound of the ratio or None.
        clip_max: upper bound of the ratio or None.
    """
    difference = torch.nan_to_num(difference)
    level, _, action = mode.partition("_")
    ratio = (rows.expand(rows.sum_per_row(difference)) if level == "sequence" else difference).exp()
    low = 0.0 if clip_min is None else clip_min
    high = float("inf") if clip_max is None else clip_max
    if action == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def clip_metrics(
    rows: TokenRows, advantages: Tensor, log_ratio: Tensor, options: PolicyLossOptions, sequence_level: bool
) -> dict[str, tuple[Tensor, Tensor, str]]:
    """Shares of clipped ratios as `{name: (value, weight, reduction over processes)}`.

    With sequence-level ratios a row counts once, otherwise every token counts. "low" is `rho < 1-eps` with a negative
    advantage, "high" is `rho > 1+eps_high` with a positive one.
    """
    ratio = log_ratio.detach().exp()
    if options.loss_type == "cispo":
        above = ((ratio > options.high) & (advantages > 0)).float()
        return {"cispo_clip_ratio": _mean(rows, above, sequence_level, "mean")}
    if options.loss_type not in CLIPPED:
        return {}
    if options.delta is not None:
        ratio = ratio.clamp(max=options.delta)
    low = ((ratio < 1 - options.epsilon) & (advantages < 0)).float()
    high = ((ratio > 1 + options.high) & (advantages > 0)).float()
    return {
        "clip_ratio/low_mean": _mean(rows, low, sequence_level, "mean"),
        "clip_ratio/low_min": _mean(rows, low, sequence_level, "min"),
        "clip_ratio/high_mean": _mean(rows, high, sequence_level, "mean"),
        "clip_ratio/high_max": _mean(rows, high, sequence_level, "max"),
        "clip_ratio/region_mean": _mean(rows, low + high, sequence_level, "mean"),
    }


def _mean(rows: TokenRows, values: Tensor, sequence_level: bool, reduce: str) -> tuple[Tensor, Tensor, str]:
    if sequence_level:
        counted = rows.lengths > 0
        return rows.mean_per_row(values)[counted].mean(), counted.sum(), reduce
    return values.mean(), torch.tensor(values.numel()), reduce
