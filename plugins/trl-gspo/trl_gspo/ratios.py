"""GSPO and GSPO-token (arXiv 2507.18071): importance ratios of whole completions, on the hook `log_ratio`."""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from trl_core import Algorithm, HookContext, Rollouts, Samples, hookimpl, require
from trl_core.stages import sequence_log_ratio

from .credit import token_advantages

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@dataclass
class GSPOTokenOptions:
    """No option is new, but one has a further value."""

    importance_sampling_levels = ("token", "sequence", "sequence_token")


class GSPOToken:
    """The hooks of GSPO-token."""

    def __init__(self, context: HookContext) -> None:
        self.level, loss_type = context.args.importance_sampling_level, context.args.loss_type
        self.function = context.arguments["advantage_func"]
        what = f"importance_sampling_level='sequence_token' with loss_type={loss_type!r}, which clips no ratio."
        mend = f"Use one of {', '.join(map(repr, CLIPPED))}, or another importance_sampling_level."
        require(self.level != "sequence_token" or loss_type in CLIPPED, what, mend)
        usable = self.function is None or callable(self.function)
        require(usable, f"advantage_func={self.function!r} cannot be called.", "Pass a function, or leave it out.")

    @hookimpl(wrapper=True)
    def advantages(self, rollouts: Rollouts, keep: Tensor) -> Generator[None, Tensor, Tensor]:
        """Those of the user's function, if there is one."""
        result = yield
        return result if self.function is None else token_advantages(self.function, rollouts, result, keep)

    @hookimpl(wrapper=True)
    def log_ratio(self, samples: Samples, logps: Tensor) -> Generator[None, Tensor, Tensor]:
        """`sg[mean log-ratio of the row] + logp - sg[logp]` (section 4.3): the row's ratio, the token's gradient."""
        result = yield
        if self.level != "sequence_token":
            return result
        return sequence_log_ratio(samples, result.detach()) + (logps - logps.detach())


_PAPERS = {"2507.18071": "Group Sequence Policy Optimization"}
gspo = Algorithm(
    name="gspo",
    summary="GRPO with one importance ratio per completion, and the clip widths that go with it.",
    extends="grpo",
    papers=_PAPERS,
    defaults=dict(importance_sampling_level="sequence", loss_type="grpo", beta=0.0, epsilon=3e-4, epsilon_high=4e-4),
)

gspo_token = Algorithm(
    name="gspo_token",
    summary="GSPO with a gradient of each token, whose advantages may differ inside a completion.",
    extends="grpo",
    config=GSPOTokenOptions,
    hooks=GSPOToken,
    papers=_PAPERS,
    defaults={"importance_sampling_level": "sequence_token", "loss_type": "grpo"},
    arguments={"advantage_func": "function(completion_ids, advantages, ...) -> per completion, a number per token"},
    config_name="GSPOTokenConfig",
    trainer_name="GSPOTokenTrainer",
)
