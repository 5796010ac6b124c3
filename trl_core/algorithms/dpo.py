"""DPO: direct preference optimisation (arXiv 2305.18290) and the losses that grew out of it."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from dataclasses import dataclass

from torch import Tensor

from ..algorithm import Algorithm
from ..batch import Pairs
from ..errors import TRLDeprecationWarning
from ..hookspecs import HookContext, hookimpl
from ..options import option, require
from ..stages.preference_loss import (
    F_DIVERGENCES,
    LOSSES,
    ON_DIFFERENCE,
    SMOOTHED,
    SORTED,
    PairQuantities,
    PreferenceLossOptions,
    pair_quantities,
    wpo_weight,
)
from ..training.config import PairConfig, ReferenceOptions

logger = logging.getLogger(__name__)
DEPRECATED_LOSSES = {"aot_pair": "aot_unpaired"}
"""Names of TRL up to 0.26."""


@dataclass
class DPOConfig(ReferenceOptions, PairConfig):
    """Options of DPO; names and defaults are TRL's."""

    learning_rate: float = option(1e-6, "Initial learning rate.")
    disable_dropout: bool = option(True, "Set every dropout probability to 0, in the policy and the reference.")
    beta: float = option(0.1, "How closely the policy is held to the reference; for ipo the paper's tau.", gt=0)
    loss_type: list[str] | str = option(["sigmoid"], "One or several to add up.", choices=(*LOSSES, *DEPRECATED_LOSSES))
    loss_weights: list[float] | None = option(None, "One weight per loss; default all 1. MPO: 0.8, 0.2, 1.0.")
    label_smoothing: float = option(
        0.0,
        "Share of labels taken to be wrong: cdpo, robust (0.1), aot, aot_unpaired; exo_pair's epsilon (0.001).",
        ge=0,
        lt=0.5,
    )
    ld_alpha: float | None = option(
        None, "Weight of the tokens beyond the length of the pair's shorter completion (LD-DPO: 0.5).", ge=0, le=1
    )
    ld_alpha_on_reference: bool = option(
        True, "Use ld_alpha for the reference too; TRL up to 0.26 used it for the policy only."
    )
    f_divergence_type: str = option(
        "reverse_kl", "Which divergence from the reference is limited.", choices=F_DIVERGENCES
    )
    f_alpha_divergence_coef: float = option(
        0.5, "alpha_divergence: 1 is reverse_kl, 0 forward_kl. The paper and TRL up to 0.26 call 1 - this alpha."
    )
    use_weighting: bool = option(False, "Weight each pair by how likely the policy is to write it (WPO).")
    wpo_max_weight: float | None = option(None, "Upper bound of that weight; the authors of WPO use 1.", gt=0)
    rpo_alpha: float | None = option(None, "Short for one more loss, sft, with this weight (RPO).", ge=0)
    discopop_tau: float = option(0.05, "discopop: temperature of the blend.", gt=0)
    bco_shift: float = option(0.0, "bco_pair: subtracted from both rewards.")
    ipo_length_normalization: bool = option(True, "ipo: compare means over tokens, not sums.")

    @property
    def uses_reference(self) -> bool:
        """Always."""
        return True

    @property
    def token_statistics(self) -> tuple[str, ...]:
        """The weights of WPO need the collision probabilities."""
        return ("log_collision",) if self.use_weighting else ()

    @property
    def weighted_losses(self) -> list[tuple[str, float]]:
        """Every loss with its weight."""
        return list(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    @property
    def preference_loss_options(self) -> PreferenceLossOptions:
        """The part of the options that the losses read."""
        names = [f.name for f in dataclasses.fields(PreferenceLossOptions)]
        return PreferenceLossOptions(**{name: getattr(self, name) for name in names})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._resolve_losses()
        self._check_smoothing()
        other = [name for name in self.loss_type if name not in ON_DIFFERENCE]
        require(
            self.f_divergence_type == "reverse_kl" or not other,
            f"f_divergence_type={self.f_divergence_type!r} does not go with {', '.join(other)}: the partition term "
            "cancels only in the difference of two scores.",
            f"Use reverse_kl, or losses among {', '.join(ON_DIFFERENCE)}.",
        )
        ordered = [name for name in self.loss_type if name in SORTED]
        require(
            not (self.use_weighting and ordered),
            f"use_weighting=True does not go with {', '.join(ordered)}: it sorts the micro-batch, so its values do not "
            "belong to single pairs.",
            "Turn use_weighting off or use another loss.",
        )

    def _resolve_losses(self) -> None:
        """`loss_type` and `loss_weights` as lists that fit, of names in use today."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        for old in set(names) & set(DEPRECATED_LOSSES):
            message = f"loss_type={old!r} is now called {DEPRECATED_LOSSES[old]!r}; use that name."
            warnings.warn(message, TRLDeprecationWarning, stacklevel=5)  # who made the composed config
        self.loss_type = [DEPRECATED_LOSSES.get(name, name) for name in names]
        require(bool(names), "loss_type is empty.", f"Use one or several of: {', '.join(map(repr, LOSSES))}.")
        count = len(names) if self.loss_weights is None else len(self.loss_weights)
        require(
            count == len(names),
            f"loss_weights has {count} entries and loss_type has {len(names)}: {', '.join(names)}.",
            "Give one weight per loss.",
        )
        if self.rpo_alpha is None:
            return
        require(
            "sft" not in names,
            f"rpo_alpha={self.rpo_alpha} adds the loss 'sft', which loss_type already names.",
            "Give its weight in loss_weights and leave rpo_alpha out.",
        )
        self.loss_weights = [*(self.loss_weights or [1.0] * len(names)), self.rpo_alpha]
        self.loss_type.append("sft")
        self.rpo_alpha = None  # done; a config that is restored or replaced is resolved again

    def _check_smoothing(self) -> None:
        smoothed = [name for name in self.loss_type if name in SMOOTHED]
        if self.label_smoothing and not smoothed:
            logger.warning(
                "label_smoothing=%s has no effect on %s; 'cdpo' is 'sigmoid' with label smoothing.",
                self.label_smoothing,
                ", ".join(self.loss_type),
            )
        require(
            "exo_pair" not in smoothed or self.label_smoothing > 0,
            "loss_type 'exo_pair' with label_smoothing=0 is infinite.",
            "Set label_smoothing; the paper recommends 0.001.",
        )


class DPO:
    """The hooks of DPO."""

    def __init__(self, context: HookContext) -> None:
        self.context = context
        self.args: DPOConfig = context.args
        self.losses = self.args.weighted_losses
        self.options = self.args.preference_loss_options

    @hookimpl
    def pair_loss(self, pairs: Pairs, policy: Tensor, reference: Tensor | None) -> Tensor:
        """The weighted sum of the losses, times the pair's weight (WPO)."""
        assert reference is not None
        quantities = pair_quantities(pairs, policy, reference, self.options)
        values = [(name, weight, LOSSES[name](quantities, self.options)) for name, weight in self.losses]
        loss = sum((weight * value for _, weight, value in values), policy.new_zeros(pairs.num_pairs))
        if self.args.use_weighting:
            assert pairs.log_collision is not None
            loss = loss * wpo_weight(pairs, policy, pairs.log_collision, self.args.wpo_max_weight)
        if pairs.num_pairs:
            self._log_metrics(quantities, pairs.num_pairs)
            for name, _, value in values if len(values) > 1 else ():
                self.context.log(f"loss/{name}", value.detach().mean(), pairs.num_pairs)
        return loss

    def _log_metrics(self, quantities: PairQuantities, count: int) -> None:
        # The plain log-ratios, whatever the divergence: so curves of different ones can be compared.
        chosen = self.args.beta * quantities.chosen_ratio.detach()
        rejected = self.args.beta * quantities.rejected_ratio.detach()
        self.context.log("logps/chosen", quantities.policy_chosen.detach().mean(), count)
        self.context.log("logps/rejected", quantities.policy_rejected.detach().mean(), count)
        self.context.log("rewards/chosen", chosen.mean(), count)
        self.context.log("rewards/rejected", rejected.mean(), count)
        self.context.log("rewards/margins", (chosen - rejected).mean(), count)
        self.context.log("rewards/accuracies", (chosen > rejected).float().mean(), count)


algorithm = Algorithm(
    name="dpo",
    summary="Direct preference optimisation: a classification loss on pairs of preferred and rejected completions.",
    extends=None,
    config=DPOConfig,
    hooks=DPO,
    trainer="trl_core.training.pairs:PairTrainer",
    papers={"2305.18290": "Direct Preference Optimization: Your Language Model is Secretly a Reward Model"},
)
