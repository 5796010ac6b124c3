"""GRPO: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300) and the losses that grew out of it."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import install
from ..algorithm import Algorithm
from ..batch import Rollouts, Samples
from ..hookspecs import HookContext, hookimpl
from ..options import option, require
from ..stages.advantages import group_advantages, normalize_then_sum
from ..stages.aggregate import TokenMean
from ..stages.policy_loss import (
    LOSS_TYPES,
    PolicyLossOptions,
    clip_metrics,
    high_entropy_mask,
    kl_penalty,
    off_policy_mask,
    policy_loss,
    sampler_ratio,
    sequence_log_ratio,
    vespo_weight,
)
from ..training.config import OnlineConfig, ReferenceOptions

logger = logging.getLogger(__name__)
SAMPLER_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass
class GRPOConfig(ReferenceOptions, OnlineConfig):
    """Options of GRPO; names and defaults are TRL's."""

    learning_rate: float = option(1e-6, "Initial learning rate.")
    num_generations: int = option(8, "G, completions per prompt.", ge=2)
    beta: float = option(0.0, "Weight of the KL term; 0 loads no reference model.", ge=0)
    use_bias_correction_kl: bool = option(
        True, "Multiply the KL estimate by the ratio (DeepSeek-V3.2); TRL up to 1.10 did not."
    )
    epsilon: float = option(0.2, "Lower clip width of the ratio, and the upper one unless epsilon_high is set.", ge=0)
    epsilon_high: float | None = option(None, "Upper clip width (DAPO: 0.28); for cispo the absolute cap (5.0).", ge=0)
    delta: float | None = option(None, "Upper bound of the ratio for negative advantages (two-sided clipping).", gt=0)
    importance_sampling_level: str = option(
        "token",
        "'token', 'sequence' (GSPO), or with the algorithm gspo_token 'sequence_token'.",  # plugins add levels
    )
    loss_type: str = option("dapo", "grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo.", choices=LOSS_TYPES)
    scale_rewards: str | bool = option(
        "group",
        "Divide advantages by the std of the 'group' (True), the 'batch', or 'none' (False).",
        choices=("group", "batch", "none", True, False),
    )
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        "'sum_then_normalize', or 'normalize_then_sum' (GDPO).",
        choices=("sum_then_normalize", "normalize_then_sum"),
    )
    sapo_temperature_pos: float = option(1.0, "sapo: temperature for positive advantages.", gt=0)
    sapo_temperature_neg: float = option(1.05, "sapo: temperature for the others.", gt=0)
    vespo_k_pos: float = option(2.0, "vespo: exponent for non-negative advantages.", ge=0)
    vespo_lambda_pos: float = option(3.0, "vespo: decay for non-negative advantages.", ge=0)
    vespo_k_neg: float = option(3.0, "vespo: exponent for negative advantages.", ge=0)
    vespo_lambda_neg: float = option(2.0, "vespo: decay for negative advantages.", ge=0)
    top_entropy_quantile: float = option(
        1.0, "Share of tokens, by entropy, that the policy term trains (0.2).", ge=0, le=1
    )
    off_policy_mask_threshold: float | None = option(
        None, "Leave out rows with negative advantage that drifted further than this (mean log-ratio).", ge=0
    )
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    use_adaptive_entropy: bool = option(False, "Adapt entropy_coef to entropy_target (Skywork-OR1).")
    entropy_coef_min: float = option(0.0, "Least adaptive coefficient.")
    entropy_coef_max: float = option(1.0, "Largest adaptive coefficient.")
    entropy_coef_delta: float = option(0.005, "Change of the adaptive coefficient per optimizer step.", ge=0)
    entropy_target: float = option(0.2, "Entropy below which the adaptive bonus acts.", ge=0)
    vllm_importance_sampling_correction: bool = option(
        True, "Correct for a sampler whose log-probabilities differ; acts when the generation backend reports them."
    )
    vllm_importance_sampling_mode: str = option(
        "sequence_mask",
        "What happens to ratios beyond their bounds, per token or per completion.",
        choices=SAMPLER_MODES,
    )
    vllm_importance_sampling_clip_max: float | None = option(3.0, "Upper bound of the sampler's ratio.", gt=0)
    vllm_importance_sampling_clip_min: float | None = option(None, "Lower bound of the sampler's ratio.", ge=0)

    minimum_generations = 2
    importance_sampling_levels = ("token", "sequence")

    @property
    def uses_reference(self) -> bool:
        """Only a KL term needs one."""
        return self.beta != 0.0

    @property
    def entropy_needs_grad(self) -> bool:
        """Whether the entropy bonus is on."""
        return self.entropy_coef != 0.0 or self.use_adaptive_entropy

    @property
    def policy_loss_options(self) -> PolicyLossOptions:
        """The part of the options that `policy_loss` reads."""
        names = [f.name for f in dataclasses.fields(PolicyLossOptions)]
        return PolicyLossOptions(**{name: getattr(self, name) for name in names})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        require(
            self.loss_type != "cispo" or (self.epsilon_high or 0.0) >= 1.0,
            f"loss_type='cispo' with epsilon_high={self.epsilon_high}: there it is the absolute cap of the ratio, and "
            "a cap below 1 would only rescale the loss.",
            "Set epsilon_high, for example to 5.0.",
        )
        truncates = self.vllm_importance_sampling_mode.endswith("truncate")
        bounds = (self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max)
        require(
            not truncates or bounds != (None, None),
            f"vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r} has no bound to truncate at.",
            "Set vllm_importance_sampling_clip_max or _clip_min.",
        )
        self._check_order("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max")
        self._check_order("entropy_coef_min", "entropy_coef_max")

    def _check_order(self, low: str, high: str) -> None:
        least, most = getattr(self, low), getattr(self, high)
        fits = least is None or most is None or least <= most
        require(fits, f"{low}={least} is above {high}={most}.", "Change one of them.")


class GRPO:
    """The hooks of GRPO."""

    def __init__(self, context: HookContext) -> None:
        self.context = context
        self.args: GRPOConfig = context.args
        self.options = self.args.policy_loss_options
        level, levels = self.args.importance_sampling_level, self.args.importance_sampling_levels
        require(
            level in levels,
            f"importance_sampling_level={level!r} is none of this trainer's: {', '.join(map(repr, levels))}.",
            "Use one of these; for 'sequence_token' take the trainer of trl-gspo: from trl_gspo import GRPOTrainer; "
            f"to install it: {install.how('trl-gspo')}.",
        )
        if level != "token" and self.args.loss_type not in ("grpo", "sapo", "luspo"):
            logger.warning(
                "importance_sampling_level=%r with loss_type=%r weights each sequence by its length; the GSPO paper "
                "uses loss_type='grpo'.",
                level,
                self.args.loss_type,
            )
        self.entropy_coef = self.args.entropy_coef
        self.last_entropy = float("inf")
        self._entropy_sums = torch.zeros(2, dtype=torch.float64)

    @hookimpl
    def advantages(self, rollouts: Rollouts, keep: Tensor) -> Tensor:
        """Group-relative advantages of the row rewards, or of each reward function (GDPO)."""
        if self.args.multi_objective_aggregation == "sum_then_normalize":
            return group_advantages(rollouts, rollouts.reward, keep, str(self.args.scale_rewards))
        given = self.args.reward_weights
        weights = torch.ones(rollouts.rewards.shape[1]) if given is None else torch.tensor(given)
        return normalize_then_sum(rollouts, rollouts.rewards, weights, keep)

    @hookimpl
    def log_ratio(self, samples: Samples, logps: Tensor) -> Tensor:
        """Per token, or the row's mean at each of its tokens."""
        assert samples.old_logps is not None
        ratio = logps - samples.old_logps
        return sequence_log_ratio(samples, ratio) if self.args.importance_sampling_level == "sequence" else ratio

    @hookimpl
    def loss_terms(self, samples: Samples, logps: Tensor, log_ratio: Tensor) -> dict[str, Any]:
        """The policy term with its masks, the KL term, and the entropy bonus."""
        assert samples.old_logps is not None and samples.entropy is not None
        args = self.args
        correction = self._sampler_correction(samples)
        loss = policy_loss(samples, samples.advantages, logps, samples.old_logps, log_ratio, self.options, correction)
        if args.off_policy_mask_threshold is not None:
            loss = loss * off_policy_mask(samples, logps, args.off_policy_mask_threshold)
        entropy_mask = None
        if args.top_entropy_quantile < 1.0:
            entropy = samples.entropy.detach()
            entropy_mask = high_entropy_mask(entropy, self.context.gather(entropy), args.top_entropy_quantile)
            loss = loss * entropy_mask
        if correction is not None and args.loss_type != "vespo":
            loss = loss * correction
        terms: dict[str, Any] = {"policy": loss}
        if args.beta != 0.0:
            terms["kl"] = args.beta * self._kl(samples, logps, log_ratio)
        if args.entropy_needs_grad:
            terms["entropy"] = self._entropy_bonus(samples.entropy, entropy_mask)
        self._log_clipping(samples, logps, log_ratio, correction)
        return terms

    def _kl(self, samples: Samples, logps: Tensor, log_ratio: Tensor) -> Tensor:
        assert samples.ref_logps is not None
        kl = kl_penalty(logps, samples.ref_logps, log_ratio.exp() if self.args.use_bias_correction_kl else None)
        self.context.log("kl", kl.mean(), kl.numel())
        return kl

    def _sampler_correction(self, samples: Samples) -> Tensor | None:
        args = self.args
        if samples.sampling_logps is None or not args.vllm_importance_sampling_correction:
            return None
        assert samples.old_logps is not None
        difference = torch.nan_to_num(samples.old_logps - samples.sampling_logps)
        ratio = sampler_ratio(
            samples,
            difference,
            args.vllm_importance_sampling_mode,
            args.vllm_importance_sampling_clip_min,
            args.vllm_importance_sampling_clip_max,
        )
        prefix, count = "sampling/sampling_logp_difference", difference.numel()
        if not count:
            return ratio
        self.context.log(f"{prefix}/mean", difference.abs().mean(), count)
        self.context.log(f"{prefix}/max", difference.abs().max(), reduce="max")
        for name, value in (("min", ratio.min()), ("max", ratio.max())):
            self.context.log(f"sampling/importance_sampling_ratio/{name}", value, reduce=name)
        self.context.log("sampling/importance_sampling_ratio/mean", ratio.mean(), count)
        return ratio

    def _entropy_bonus(self, entropy: Tensor, mask: Tensor | None) -> TokenMean:
        bonus = TokenMean(-self.entropy_coef * entropy, mask)
        if self.args.use_adaptive_entropy:
            if self.last_entropy > self.args.entropy_target:
                bonus.values = bonus.values * 0.0
            if self.context.training:
                acting = entropy.detach()[bonus.mask]
                self._entropy_sums += torch.tensor([acting.sum().item(), acting.numel()], dtype=torch.float64)
        self.context.log("entropy_coef", self.entropy_coef)
        return bonus

    @hookimpl
    def after_step(self) -> None:
        """Adapt the entropy coefficient to the entropy of the step's tokens over all processes."""
        if not self.args.use_adaptive_entropy:
            return
        total, count = self.context.gather(self._entropy_sums).reshape(-1, 2).sum(0).tolist()
        self._entropy_sums.zero_()
        self.last_entropy = total / max(count, 1.0)
        change = self.args.entropy_coef_delta * (1 if self.last_entropy <= self.args.entropy_target else -1)
        self.entropy_coef = min(max(self.entropy_coef + change, self.args.entropy_coef_min), self.args.entropy_coef_max)

    def _log_clipping(self, samples: Samples, logps: Tensor, log_ratio: Tensor, correction: Tensor | None) -> None:
        if not logps.numel():
            return
        advantages = samples.advantages
        sequence_level = self.args.importance_sampling_level == "sequence"
        shares = clip_metrics(samples, advantages, log_ratio, self.options, sequence_level)
        for name, (value, weight, reduce) in shares.items():
            self.context.log(name, value, weight, reduce)
        if self.args.loss_type == "vespo":
            assert samples.old_logps is not None
            phi = vespo_weight(samples, advantages, logps.detach() - samples.old_logps, self.options, correction)
            self.context.log("vespo/phi_seq_mean", samples.mean_per_row(phi).mean(), samples.num_rows)

    def state_dict(self) -> dict[str, Any]:
        """State of the adaptive entropy coefficient."""
        finite = None if self.last_entropy == float("inf") else self.last_entropy
        return {"entropy_coef": self.entropy_coef, "last_entropy": finite}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._entropy_sums.zero_()
        self.entropy_coef = state["entropy_coef"]
        self.last_entropy = float("inf") if state["last_entropy"] is None else state["last_entropy"]


algorithm = Algorithm(
    name="grpo",
    summary="Group-relative policy optimisation: advantages are rewards compared inside a group of completions.",
    extends=None,
    config=GRPOConfig,
    hooks=GRPO,
    trainer="trl_core.training.online:OnlineTrainer",
    papers={"2402.03300": "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"},
)
