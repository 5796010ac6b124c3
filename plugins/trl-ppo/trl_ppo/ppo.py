"""PPO (1707.06347) for language models (1909.08593, 2403.17031) on the hooks of trl-core."""

from typing import Any

import torch
from torch import Tensor, nn

from trl_core import Algorithm, HookContext, Rollouts, Samples, hookimpl, stages
from trl_core.models import load_classifier, token_values

from .config import PPOOptions
from .estimates import gae, kl_estimate, value_loss, whiten

CRITIC = "value_model"


class PPO:
    """The hooks of PPO.

    Notes on each loss token: "values" and "returns". A row that ended early has one step more, after its last token;
    what belongs to that step is noted at the last token under "end_values" and "end_returns", and is NaN elsewhere.
    """

    def __init__(self, context: HookContext) -> None:
        self.context, self.args = context, context.args
        self.given = context.arguments[CRITIC]
        if self.given is None:
            context.token_statistics.add("states")
        if self.args.value_learning_rate is not None:
            context.learning_rates[CRITIC] = self.args.value_learning_rate
        self.clip = stages.PolicyLossOptions(loss_type="bnpo", epsilon=self.args.cliprange)

    # -- the critic -----------------------------------------------------------------------------------------------
    @hookimpl
    def extra_models(self, policy: nn.Module) -> dict[str, nn.Module]:
        """The critic: a network of its own, or a linear head on the policy's last hidden states that starts at 0."""
        if self.given is not None:
            return {CRITIC: load_classifier(self.given, None, self.args.trust_remote_code)}
        model: Any = policy
        head = nn.Linear(model.get_output_embeddings().weight.shape[-1], 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return {CRITIC: head}

    def _values(self, rows: Samples) -> tuple[Tensor, Tensor]:
        """(T,) before each token and (N,) after the last."""
        critic = self.context.models[CRITIC]
        if self.given is not None:
            return token_values(critic, rows, pad_token_id=self.context.processing_class.pad_token_id)
        assert rows.states is not None and rows.last_states is not None
        # One call, for a wrapper of distributed training counts them.
        values = critic(torch.cat([rows.states, rows.last_states]).float()).squeeze(-1)
        return values[: len(rows.states)], values[len(rows.states) :]

    @hookimpl
    def annotate(self, samples: Samples) -> dict[str, Tensor]:
        values, after = self._values(samples)
        room = 0 if self.args.score_at_last_token else self.args.response_length
        ends = _is_last(samples) & (samples.completion_lengths < room)[samples.row_of_token]
        return {"values": values, "end_values": samples.expand(after).masked_fill(~ends, float("nan"))}

    # -- rewards and advantages -----------------------------------------------------------------------------------
    @hookimpl
    def keep(self, rollouts: Rollouts) -> Tensor:
        """Rows that no reward function scored teach nothing."""
        return ~rollouts.reward.isnan()

    @hookimpl
    def advantages(self, rollouts: Rollouts, keep: Tensor) -> Tensor:
        args, notes = self.args, rollouts.notes
        keep = keep & ~rollouts.reward.isnan()  # in evaluation nothing is left out before
        row, kept = rollouts.row_of_token, keep[rollouts.row_of_token]
        column = torch.arange(len(row)) - (torch.cumsum(rollouts.lengths, 0) - rollouts.lengths)[row]
        last, ends = _is_last(rollouts), ~notes["end_values"].isnan() & kept
        steps = torch.zeros(rollouts.num_rows, int(rollouts.lengths.max()) + 1, dtype=torch.bool)
        steps[row, column] = kept
        steps[row[ends], column[ends] + 1] = True
        values, rewards = torch.zeros(steps.shape), torch.zeros(steps.shape)
        values[row, column] = notes["values"]
        values[row[ends], column[ends] + 1] = notes["end_values"][ends]
        kl = torch.zeros(len(row))
        assert rollouts.old_logps is not None
        if args.uses_reference:
            assert rollouts.ref_logps is not None
            kl = kl_estimate(rollouts.old_logps, rollouts.ref_logps, args.kl_estimator)
        rewards[row, column] = -args.kl_coef * kl
        scores = self._scores(rollouts)
        rewards[row[last], column[last] + ends[last].long()] += scores[row[last]]
        if args.whiten_rewards:
            rewards[steps] = whiten(rewards[steps], shift_mean=False)
        estimates = gae(rewards * steps, values * steps, args.gamma, args.lam)
        returns = estimates + values
        notes["returns"] = returns[row, column]
        notes["end_returns"] = torch.full(kl.shape, float("nan"))
        notes["end_returns"][ends] = returns[row[ends], column[ends] + 1]
        self._log_objective(rollouts, keep, kl, scores)
        advantages = estimates[row, column]
        advantages[kept] = whiten(advantages[kept])
        return advantages[:, None]

    def _scores(self, rollouts: Rollouts) -> Tensor:
        """(N,) rewards less the penalty for completions without end of sequence."""
        scores = rollouts.reward.nan_to_num()
        if self.args.missing_eos_penalty is None:
            return scores
        return scores - self.args.missing_eos_penalty * ~self._has_eos(rollouts)

    def _has_eos(self, rollouts: Rollouts) -> Tensor:
        found = rollouts.completion_ids == self.context.processing_class.eos_token_id
        counts = torch.zeros(rollouts.num_rows, dtype=torch.long)
        ended = counts.index_add(0, rollouts.row_of_completion_token, found.long()) > 0
        return ended | ~rollouts.truncated if self.args.stop_token == "eos" else ended

    def _log_objective(self, rollouts: Rollouts, keep: Tensor, kl: Tensor, scores: Tensor) -> None:
        if not keep.any():
            return
        assert rollouts.old_logps is not None
        kl_sum = rollouts.sum_per_row(kl)[keep].mean()
        score = scores[keep].mean()
        found = {
            "objective/entropy": -rollouts.sum_per_row(rollouts.old_logps)[keep].mean(),
            "objective/non_score_reward": -self.args.kl_coef * kl_sum,
            "objective/rlhf_reward": score - self.args.kl_coef * kl_sum,
            "objective/scores": score,
            "val/num_eos_tokens": (rollouts.completion_ids == self.context.processing_class.eos_token_id).sum(),
        }
        if self.args.uses_reference:
            found["objective/kl"] = kl_sum
        for name, value in found.items():
            self.context.log(name, value)

    # -- loss -----------------------------------------------------------------------------------------------------
    @hookimpl
    def log_ratio(self, samples: Samples, logps: Tensor) -> Tensor:
        assert samples.old_logps is not None
        return logps - samples.old_logps

    @hookimpl
    def loss_terms(self, samples: Samples, logps: Tensor, log_ratio: Tensor) -> dict[str, Tensor | stages.TokenMean]:
        args, notes, advantages = self.args, samples.notes, samples.advantages
        assert samples.old_logps is not None and samples.entropy is not None
        policy = stages.policy_loss(samples, advantages, logps, samples.old_logps, log_ratio, self.clip)
        values, after = self._values(samples)
        ends = ~notes["end_values"].isnan()
        values = torch.cat([values, after[samples.row_of_token[ends]]])
        old_values, returns = (torch.cat([notes[name], notes[f"end_{name}"][ends]]) for name in ("values", "returns"))
        errors, value_clipped = value_loss(values, old_values, returns, args.cliprange_value)
        if len(logps):
            ratio = log_ratio.detach().exp()
            clipped = -advantages * ratio.clamp(1 - args.cliprange, 1 + args.cliprange) > -advantages * ratio
            found = {
                "loss/policy_avg": policy,
                "loss/value_avg": errors,
                "policy/approxkl_avg": 0.5 * log_ratio.detach().square(),
                "policy/clipfrac_avg": clipped.float(),
                "policy/entropy_avg": samples.entropy,
                "val/clipfrac_avg": value_clipped.float(),
                "val/ratio": ratio,
            }
            for name, entries in found.items():
                self.context.log(name, entries.mean(), entries.numel())
            self.context.log("val/ratio_var", ratio.mean(), ratio.numel(), reduce="variance")
        return {"policy": policy, "value": stages.TokenMean(args.vf_coef * errors)}


def _is_last(rows: Samples | Rollouts) -> Tensor:
    """(T,) bool, the last loss token of each row."""
    row = rows.row_of_token
    return torch.cat([row[1:] != row[:-1], row.new_ones(min(len(row), 1)).bool()])


algorithm = Algorithm(
    name="ppo",
    summary="PPO: a critic, per-token advantages, several passes over each batch, a KL penalty in the reward.",
    extends=None,
    config=PPOOptions,
    hooks=PPO,
    papers={
        "1707.06347": "Proximal Policy Optimization Algorithms",
        "1909.08593": "Fine-Tuning Language Models from Human Preferences",
    },
    arguments={
        "reward_model": "sequence classifier with the policy's tokenizer (id, path or module), or a reward function",
        "value_model": "critic, a sequence classifier with one output (id, path or module); else a head on the policy",
    },
    trainer="trl_ppo.trainer:PPOTrainer",
    config_name="PPOConfig",
    trainer_name="PPOTrainer",
)
