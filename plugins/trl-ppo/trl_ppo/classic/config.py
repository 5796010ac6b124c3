"""The options of the classic PPO trainer."""

from dataclasses import dataclass
from typing import Any

from trl_core import check_options, option, require


@dataclass(kw_only=True)
class PPOConfig:
    """Options and defaults of TRL 0.7.11; batch sizes are per process.

    Raises:
        ConfigError: an option, or a combination of options, is invalid.
    """

    model_name: str | None = option(None, "For your script; the trainer only shows it to the trackers.")
    seed: int = option(0, "Set when the trainer is made, plus the number of the process.", ge=0, le=2**32 - 1)
    learning_rate: float = option(1.41e-5, "Of the default optimizer, Adam.", ge=0)
    batch_size: int = option(128, "Rows of one call of step().", ge=1)
    mini_batch_size: int = option(128, "Rows of one forward pass.", ge=1)
    gradient_accumulation_steps: int = option(1, "Mini-batches of one optimizer step.", ge=1)
    ppo_epochs: int = option(4, "Passes over the rows of one call of step().", ge=1)
    adap_kl_ctrl: bool = option(True, "Adapt the KL coefficient so that the KL approaches target.")
    init_kl_coef: float = option(0.2, "First KL coefficient; without adap_kl_ctrl, the only one.", ge=0)
    kl_penalty: str = option(
        "kl",
        "Penalty of a token: 'kl', 'abs', 'mse', or 'full' over the whole vocabulary.",
        choices=("kl", "abs", "mse", "full"),
    )
    target: float = option(6, "KL per row, in nats, that adap_kl_ctrl steers to.", gt=0)
    horizon: float = option(10000, "Rows over which adap_kl_ctrl acts; larger is slower.", gt=0)
    gamma: float = option(1, "Discount.", ge=0, le=1)
    lam: float = option(0.95, "Lambda of the generalised advantage estimate.", ge=0, le=1)
    cliprange: float = option(0.2, "Clip width of the ratio.", ge=0)
    cliprange_value: float = option(0.2, "Clip width of the change of a value.", ge=0)
    vf_coef: float = option(0.1, "Weight of the value loss.", ge=0)
    max_grad_norm: float | None = option(None, "Clip gradients to this norm; None: do not.", ge=0)
    early_stopping: bool = option(False, "End the passes once the policy has moved by more than 1.5 target_kl.")
    target_kl: float = option(1, "See early_stopping.", ge=0)
    ratio_threshold: float = option(10.0, "A mini-batch with a larger mean ratio gets a loss of 0.", gt=0)
    use_score_scaling: bool = option(False, "Divide scores by their running standard deviation.")
    use_score_norm: bool = option(False, "With use_score_scaling, subtract their running mean first.")
    score_clip: float | None = option(None, "Clip scores to plus or minus this; None: do not.", gt=0)
    whiten_rewards: bool = option(False, "Bring the rewards of tokens to variance 1, keeping their mean.")
    remove_unused_columns: bool = option(True, "Give the collator only columns that the model takes, query, response.")
    log_with: Any = option(None, "Trackers of accelerate for log_stats(), such as 'tensorboard'.")
    tracker_project_name: str = option("trl", "Project name for the trackers.")
    tracker_kwargs: dict[str, Any] | None = option(
        None, "Options of each tracker by its name, for init_trackers.", secret=True
    )
    project_kwargs: dict[str, Any] | None = option(None, "Of accelerate's ProjectConfiguration, such as logging_dir.")
    accelerator_kwargs: dict[str, Any] | None = option(None, "Of accelerate's Accelerator, such as mixed_precision.")

    def __post_init__(self) -> None:
        check_options(self)
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps  # rows of an optimizer step
        size = f"mini_batch_size * gradient_accumulation_steps = {self.backward_batch_size}"
        what = f"batch_size={self.batch_size} is no multiple of {size}."
        require(self.batch_size % self.backward_batch_size == 0, what, "With a small batch_size, set the others too.")
        require(
            self.use_score_scaling or not self.use_score_norm, "use_score_norm is set alone.", "Set use_score_scaling."
        )
