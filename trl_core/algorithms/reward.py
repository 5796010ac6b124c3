"""Reward modelling on preference pairs: Bradley-Terry, with margins (2307.09288) and centring (2312.09244)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..algorithm import Algorithm
from ..batch import Pairs
from ..hookspecs import HookContext, hookimpl
from ..options import option
from ..stages.preference_loss import bradley_terry
from ..training.config import OfflineConfig


@dataclass
class RewardConfig(OfflineConfig):
    """Options of reward modelling; names and defaults are TRL's."""

    learning_rate: float = option(1e-4, "Initial learning rate.")
    max_length: int | None = option(
        1024, "Rows with more tokens are left out; cutting would remove the scored place.", ge=2
    )
    disable_dropout: bool = option(True, "Set every dropout probability to 0.")
    center_rewards_coefficient: float | None = option(
        None, "Weight of the squared sum of the two scores, which keeps their mean at 0; the paper uses 0.01.", ge=0
    )


class Reward:
    """The hooks of reward modelling."""

    def __init__(self, context: HookContext) -> None:
        self.args: RewardConfig = context.args

    @hookimpl
    def pair_loss(self, pairs: Pairs, policy: Tensor) -> Tensor:
        """Bradley-Terry, with the dataset's margins."""
        chosen, rejected = pairs.sides(policy)
        margin = None if pairs.margin is None else pairs.sides(pairs.margin)[0]
        return bradley_terry(chosen, rejected, margin, self.args.center_rewards_coefficient)


algorithm = Algorithm(
    name="reward",
    summary="Reward modelling: a classifier with one output that scores the preferred completion higher.",
    extends=None,
    config=RewardConfig,
    hooks=Reward,
    config_name="RewardConfig",
    trainer_name="RewardTrainer",
    trainer="trl_core.training.pairs:ScoreTrainer",
)
