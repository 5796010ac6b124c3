"""The default of every step as plain functions, usable without a trainer.

An algorithm whose loop is another altogether can build on these; plugins may import from here.
"""

from .advantages import group_advantages, normalize_then_sum
from .aggregate import TokenMean, aggregate, token_weights
from .policy_loss import (
    PolicyLossOptions,
    clip_metrics,
    high_entropy_mask,
    kl_penalty,
    off_policy_mask,
    policy_loss,
    sampler_ratio,
    sequence_log_ratio,
)
from .reward_checks import accepted_arguments
from .rewards import weighted_reward

__all__ = [
    "PolicyLossOptions",
    "TokenMean",
    "accepted_arguments",
    "aggregate",
    "clip_metrics",
    "group_advantages",
    "high_entropy_mask",
    "kl_penalty",
    "normalize_then_sum",
    "off_policy_mask",
    "policy_loss",
    "sampler_ratio",
    "sequence_log_ratio",
    "token_weights",
    "weighted_reward",
]
