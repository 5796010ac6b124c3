"""Group Filtered Policy Optimization (arXiv 2508.09726) on the hooks `keep` and `advantages`."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_core import Algorithm, HookContext, Rollouts, errors, hookimpl, option, require
from trl_core.stages import group_advantages

from .adaptive import AdaptiveOptions, Difficulty
from .filters import BUILT_IN, check_remaining, group_scores


@dataclass
class GFPOOptions(AdaptiveOptions):
    """What GFPO adds to the options of GRPO."""

    num_remains_in_group: int | None = option(None, "k, completions of a group to train on; None: all.", ge=2)
    gfpo_denominator: str = option(
        "kept", "Count tokens (and KL) of 'kept' rows, or of 'all' as in the paper.", choices=("kept", "all")
    )
    gfpo_std: str = option(
        "sample",
        "Standard deviation of kept rewards: 'sample', or 'population' as in the paper.",
        choices=("sample", "population"),
    )


class GFPO(Difficulty):
    """The hooks of GFPO."""

    def __init__(self, context: HookContext) -> None:
        super().__init__(context.args)
        self.context, given = context, context.arguments["group_filter_func"]
        self.filter = BUILT_IN.get(given, given) if isinstance(given, str) else given
        self.kept: Tensor | None = None
        self.paper = (self.args.gfpo_denominator, self.args.gfpo_std) != ("kept", "sample")
        fits = not self.paper or self.args.multi_objective_aggregation == "sum_then_normalize"
        require(fits, "gfpo_denominator and gfpo_std do not go with normalize_then_sum.", "Leave their defaults.")
        self.active = check_remaining(self.levels, self.args.num_generations, self.filter)

    @hookimpl
    def keep(self, rollouts: Rollouts) -> Tensor:
        """The k highest scores of each group; ties go to the earlier row, rows without reward come last."""
        if not self.active:
            return torch.ones(rollouts.num_rows, dtype=torch.bool)
        rewards = rollouts.by_group(rollouts.reward)
        ranks = group_scores(self.filter, rollouts, rewards).argsort(dim=1, descending=True, stable=True).argsort(1)
        k = self.remaining(rewards.nanmean(1))
        self.kept = rollouts.flat(ranks < k[:, None])
        self.context.log("gfpo/reward_all", rollouts.reward.nanmean())
        self.context.log("gfpo/kept_fraction", self.kept.float().mean())
        self.context.log("gfpo/mean_kept_length", rollouts.completion_lengths[self.kept].float().mean())
        self.context.log("gfpo/k_mean", k.float().mean())
        return self.kept | (self.args.gfpo_denominator == "all")

    @hookimpl(wrapper=True)
    def advantages(self, rollouts: Rollouts, keep: Tensor) -> Generator[None, Tensor, Tensor]:
        """The core's answer on the kept rows, unless an option follows the paper."""
        result = yield
        if not self.paper or self.kept is None or not self.context.training:
            return result
        own = group_advantages(rollouts, rollouts.reward, keep, self.args.scale_rewards)
        if not torch.equal(result, own):
            what = "gfpo_std and gfpo_denominator form advantages anew, which would drop those of another algorithm."
            raise errors.HookResultError(what, mend="Name gfpo first in the composition, or leave their defaults.")
        correction = 0 if self.args.gfpo_std == "population" else 1
        return group_advantages(rollouts, rollouts.reward, self.kept & keep, self.args.scale_rewards, correction)


algorithm = Algorithm(
    name="gfpo",
    summary="Sample more, keep the best of each group by a filter, train on those.",
    extends="grpo",
    config=GFPOOptions,
    hooks=GFPO,
    papers={"2508.09726": "Sample More to Think Less: Group Filtered Policy Optimization for Concise Reasoning"},
    arguments={"group_filter_func": "function(group_completions, group_rewards, ...) -> scores, or a built-in's name"},
)
