"""Losses on preference pairs: DPO (arXiv 2305.18290), what grew out of it, and the loss of reward models.

`pair_quantities` turns token log-probabilities into sums per completion; every entry of `LOSSES` turns these into one
value per pair. All tensors are (P,), one entry per pair, unless a docstring says otherwise, and no loss is a scalar.
Sources: the paper of each loss is in its docstring. `logsigmoid` stands wherever a logarithm of a sigmoid is meant;
the logarithm of a computed sigmoid would be infinite for a reward difference of some -100.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..batch import Pairs

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True, kw_only=True)
class PreferenceLossOptions:
    """The options of this module, named as in the configuration."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    bco_shift: float = 0.0
    ipo_length_normalization: bool = True
    ld_alpha: float | None = None
    ld_alpha_on_reference: bool = True
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5


@dataclass(frozen=True, kw_only=True)
class PairQuantities:
    """What the losses know of P pairs. All (P,); what comes from the policy carries gradient."""

    policy_chosen: Tensor
    """log pi(y_w), summed over the loss tokens of the preferred completion."""
    policy_rejected: Tensor
    """log pi(y_l)."""
    reference_chosen: Tensor
    """log pi_ref(y_w)."""
    reference_rejected: Tensor
    """log pi_ref(y_l)."""
    chosen_score: Tensor
    """s_w, the log-ratio under the f-divergence."""
    rejected_score: Tensor
    """s_l."""
    chosen_length: Tensor
    """n_w, loss tokens of the preferred completion, at least 1."""
    rejected_length: Tensor
    """n_l."""
    chosen_nll: Tensor
    """(), mean of `-logp` over all loss tokens of all preferred completions."""

    @property
    def chosen_ratio(self) -> Tensor:
        """The log-ratio c = log pi(y_w) - log pi_ref(y_w)."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """The log-ratio r = log pi(y_l) - log pi_ref(y_l)."""
        return self.policy_rejected - self.reference_rejected

    @property
    def difference(self) -> Tensor:
        """Delta = s_w - s_l."""
        return self.chosen_score - self.rejected_score

    @property
    def difference_per_token(self) -> Tensor:
        """`s_w / n_w - s_l / n_l`."""
        return self.chosen_score / self.chosen_length - self.rejected_score / self.rejected_length


def pair_quantities(pairs: Pairs, policy: Tensor, reference: Tensor, options: PreferenceLossOptions) -> PairQuantities:
    """The sums per completion and what follows from them.

    Args:
        pairs: the pairs the tokens belong to.
        policy: (T,) token log-probabilities, with gradient.
        reference: (T,) token log-probabilities under the reference model.
        options: `ld_alpha`, `ld_alpha_on_reference` and those of the f-divergence are read.
    """
    chosen_tokens = pairs.is_chosen[pairs.row_of_token]
    nll = -torch.where(chosen_tokens, policy, 0.0).sum() / chosen_tokens.sum().clamp(min=1)
    if options.ld_alpha is not None:
        policy = discount_tails(pairs, policy, options.ld_alpha)
        reference = discount_tails(pairs, reference, options.ld_alpha) if options.ld_alpha_on_reference else reference
    policy_sum, reference_sum = pairs.sum_per_row(policy), pairs.sum_per_row(reference)
    scores = f_divergence_score(policy_sum - reference_sum, options.f_divergence_type, options.f_alpha_divergence_coef)
    (policy_chosen, policy_rejected), (chosen_score, rejected_score) = pairs.sides(policy_sum), pairs.sides(scores)
    reference_chosen, reference_rejected = pairs.sides(reference_sum)
    chosen_length, rejected_length = pairs.sides(pairs.lengths.clamp(min=1))
    return PairQuantities(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        chosen_nll=nll,
    )


def discount_tails(pairs: Pairs, logps: Tensor, ld_alpha: float) -> Tensor:
    """(T,) token log-probabilities, times `ld_alpha` beyond the length of the pair's shorter completion.

    LD-DPO (2409.06411): what a completion says beyond the length of the other one counts less, since its mere
    length moves the sum. 1 changes nothing, 0 removes the tails.
    """
    lengths = pairs.lengths
    first = pairs.expand(torch.cumsum(lengths, 0) - lengths)
    shared = pairs.expand(lengths.reshape(-1, 2).amin(1).repeat_interleave(2))
    tail = torch.arange(logps.numel(), device=logps.device) - first >= shared
    return torch.where(tail, ld_alpha * logps, logps)


def f_divergence_score(log_ratio: Tensor, kind: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """Score of completions under an f-divergence in place of the reverse KL (f-DPO, 2309.16240); any shape.

    With `d` the log-ratio: reverse_kl `d`, forward_kl `1 - exp(-d)`, js_divergence `ln 2 + logsigmoid(d)`,
    alpha_divergence `(exp((a - 1) d) - 1) / (a - 1)`. All are 0 at `d = 0`, with slope 1 (js_divergence: 1/2).

    `a = 1` is the reverse KL and `a = 0` the forward KL, as in TRL 1.x; the paper's alpha is `1 - a`.
    """
    if kind == "js_divergence":
        return math.log(2.0) + logsigmoid(log_ratio)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(kind, alpha - 1.0)
    if abs(power) < 1e-6:
        return log_ratio
    # A completion far less likely than under the reference would overflow; its gradient is cut instead. float16 ends
    # so soon after exp(11) that the division must be allowed for.
    largest = 11.0 + min(0.0, math.log(abs(power))) if log_ratio.dtype == torch.float16 else 80.0
    return torch.expm1((power * log_ratio).clamp(max=largest)) / power


# -- the losses -------------------------------------------------------------------------------------------------------
def _logistic(reward: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of a label that is wrong with probability `label_smoothing`."""
    return -(1.0 - label_smoothing) * logsigmoid(reward) - label_smoothing * logsigmoid(-reward)


def sigmoid(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """Negative log-likelihood of the preference (DPO, 2305.18290 eq. 7).

    `-log sigmoid(beta Delta)`.
    """
    return -logsigmoid(o.beta * q.difference)


def cdpo(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`-(1-eps) log sigmoid(beta Delta) - eps log sigmoid(-beta Delta)` (conservative DPO)."""
    return _logistic(o.beta * q.difference, o.label_smoothing)


def sigmoid_norm(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`-log sigmoid(beta (s_w / n_w - s_l / n_l))` (length-normalised DPO, Tulu 3, 2411.15124)."""
    return -logsigmoid(o.beta * q.difference_per_token)


def hinge(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`max(0, 1 - beta Delta)` (SLiC-HF, 2305.10425; RSO, 2309.06657)."""
    return torch.relu(1.0 - o.beta * q.difference)


def ipo(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`(s_w / n_w - s_l / n_l - 1 / (2 beta))^2` (IPO, 2310.12036 eq. 17).

    The paper says nothing of the lengths; its authors average over tokens. Without normalisation Delta is used.
    """
    difference = q.difference_per_token if o.ipo_length_normalization else q.difference
    return (difference - 1.0 / (2.0 * o.beta)) ** 2


def exo_pair(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """KL of the policy's preference, `(sigmoid(z), sigmoid(-z))`, from `(1-eps, eps)` (EXO, 2402.00856 eq. 16)."""
    reward, eps = o.beta * q.difference, o.label_smoothing
    chosen = torch.sigmoid(reward) * (logsigmoid(reward) - math.log1p(-eps))
    return chosen + torch.sigmoid(-reward) * (logsigmoid(-reward) - math.log(eps))


def nca_pair(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`-log sigmoid(bc) - 1/2 log sigmoid(-bc) - 1/2 log sigmoid(-br)`, b = beta (NCA, 2402.05369)."""
    chosen, rejected = o.beta * q.chosen_ratio, o.beta * q.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`[-(1-eps) log sigmoid(z) + eps log sigmoid(-z)] / (1 - 2 eps)`, z = beta Delta (rDPO, 2403.00409).

    Its mean over labels that are wrong with probability eps is the loss of the right ones.
    """
    reward, eps = o.beta * q.difference, o.label_smoothing
    return (-(1.0 - eps) * logsigmoid(reward) + eps * logsigmoid(-reward)) / (1.0 - 2.0 * eps)


def bco_pair(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`-log sigmoid(beta c - shift) - log sigmoid(shift - beta r)` (BCO, 2404.04656, where shift is a running mean)."""
    return -logsigmoid(o.beta * q.chosen_ratio - o.bco_shift) - logsigmoid(o.bco_shift - o.beta * q.rejected_ratio)


def sppo_hard(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`(c - 1/(2 beta))^2 + (r + 1/(2 beta))^2` (SPPO, 2405.00675 eq. 4.7, with win probabilities of 0 and 1)."""
    target = 1.0 / (2.0 * o.beta)
    return (q.chosen_ratio - target) ** 2 + (q.rejected_ratio + target) ** 2


def aot(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """Logistic loss of the differences of order statistics: margins of the policy against the reference's (2406.05882).

    The i-th entry belongs to the i-th smallest margins of this process's micro-batch, not to pair i.
    """
    policy = (q.policy_chosen - q.policy_rejected).sort().values
    reference = (q.reference_chosen - q.reference_rejected).sort().values
    return _logistic(o.beta * (policy - reference), o.label_smoothing)


def aot_unpaired(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """Like `aot`, log-ratios of preferred completions against those of rejected ones (2406.05882)."""
    difference = q.chosen_ratio.sort().values - q.rejected_ratio.sort().values
    return _logistic(o.beta * difference, o.label_smoothing)


def apo_zero(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`1 - sigmoid(beta c) + sigmoid(beta r)`: preferred ones up, rejected ones down (APO, 2408.06266 eq. 7)."""
    return torch.sigmoid(-o.beta * q.chosen_ratio) + torch.sigmoid(o.beta * q.rejected_ratio)


def apo_down(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`sigmoid(beta c) + 1 - sigmoid(beta (c - r))`: both down, rejected ones further (APO, 2408.06266 eq. 8)."""
    chosen, rejected = o.beta * q.chosen_ratio, o.beta * q.rejected_ratio
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """`-(1-g) log sigmoid(z) + g exp(-z)`, z = beta Delta, g = sigmoid(z / tau) (DiscoPOP, 2406.08414 eq. 5)."""
    reward = o.beta * q.difference
    scaled = reward / o.discopop_tau
    # g exp(-z) as one exponential: apart, they are 0 and infinite for a very negative z.
    return -torch.sigmoid(-scaled) * logsigmoid(reward) + torch.exp(logsigmoid(scaled) - reward)


def sft(q: PairQuantities, o: PreferenceLossOptions) -> Tensor:
    """Mean of `-logp` over all preferred tokens of the micro-batch, the same at every pair (RPO, 2404.19733)."""
    return q.chosen_nll.expand(q.chosen_length.shape)


LOSSES: dict[str, Callable[[PairQuantities, PreferenceLossOptions], Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "cdpo": cdpo,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
}
"""Every loss type of DPO by name, as a function of the quantities and the options."""
ON_DIFFERENCE = ("sigmoid", "sigmoid_norm", "cdpo", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses that see scores only in their difference, where the partition term of any f-divergence cancels."""
SORTED = ("aot", "aot_unpaired")
"""Losses whose entries do not belong to single pairs."""
SMOOTHED = ("cdpo", "exo_pair", "robust", *SORTED)
"""Losses that use `label_smoothing`."""


# -- weights of pairs, reward models ----------------------------------------------------------------------------------
def wpo_weight(pairs: Pairs, logps: Tensor, log_collision: Tensor, max_weight: float | None = None) -> Tensor:
    """(P,) how far the policy itself would write the two completions, without gradient (WPO, 2406.11827 eq. 2).

    `w(y_w) w(y_l)` with `w(y) = exp(mean_t [log p_t - log sum_v p_v^2])`.

    Args:
        pairs: the pairs the tokens belong to.
        logps: (T,) under the policy.
        log_collision: (T,) log of the sum over the vocabulary of the policy's squared probabilities.
        max_weight: upper bound of the product; the paper's formula has none, its authors' code 1.
    """
    chosen, rejected = pairs.sides(pairs.mean_per_row((logps - log_collision).detach()))
    weight = (chosen + rejected).exp()
    return weight if max_weight is None else weight.clamp(max=max_weight)


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center: float | None = None
) -> Tensor:
    """`-log sigmoid(r_w - r_l - margin) + center (r_w + r_l)^2`, the loss of a reward model.

    Margin: Llama 2 (2307.09288 eq. 2). Centering: 2312.09244 eq. 2; it fixes the constant the first term leaves open.

    Args:
        chosen: (P,) rewards of the preferred completions, with gradient.
        rejected: (P,) rewards of the rejected ones.
        margin: (P,) by how much the preferred completion is to be ahead, or None for 0.
        center: weight of the second term, or None for none (the paper: 0.01).
    """
    ahead = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -logsigmoid(ahead)
    return loss if center is None else loss + center * (chosen + rejected) ** 2
