"""The options of the classic PPO trainer."""

from dataclasses import dataclass
from typing import Any

from trl_core import option, require, require_choice

_ABOVE_ZERO = ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "target", "horizon")


@dataclass(kw_only=True)
class PPOConfig:
    """Options and defaults of TRL 0.7.11; batch sizes are per process.

    Raises:
        ConfigError: an option, or a combination of options, is invalid.
    """

    model_name: str | None = option(None, "For your script; the trainer only shows it to the trackers.")
    seed: int = option(0, "Set when the trainer is made, plus the number of the process.")
    learning_rate: float = option(1.41e-5, "Of the default optimizer, Adam.")
    batch_size: int = option(128, "Rows of one call of step().")
    mini_batch_size: int = option(128, "Rows of one forward pass.")
    gradient_accumulation_steps: int = option(1, "Mini-batches of one optimizer step.")
    ppo_epochs: int = option(4, "Passes over the rows of one call of step().")
    adap_kl_ctrl: bool = option(True, "Adapt the KL coefficient so that the KL approaches target.")
    init_kl_coef: float = option(0.2, "First KL coefficient; without adap_kl_ctrl, the only one.")
    kl_penalty: str = option("kl", "Penalty of a token: 'kl', 'abs', 'mse', or 'full' over the whole vocabulary.")
    target: float = option(6, "KL per row, in nats, that adap_kl_ctrl steers to.")
    horizon: float = option(10000, "Rows over which adap_kl_ctrl acts; larger is slower.")
    gamma: float = option(1, "Discount.")
    lam: float = option(0.95, "Lambda of the generalised advantage estimate.")
    cliprange: float = option(0.2, "Clip width of the ratio.")
    cliprange_value: float = option(0.2, "Clip width of the change of a value.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    max_grad_norm: float | None = option(None, "Clip gradients to this norm; None: do not.")
    early_stopping: bool = option(False, "End the passes once the policy has moved by more than 1.5 target_kl.")
    target_kl: float = option(1, "See early_stopping.")
    ratio_threshold: float = option(10.0, "A mini-batch with a larger mean ratio gets a loss of 0.")
    use_score_scaling: bool = option(False, "Divide scores by their running standard deviation.")
    use_score_norm: bool = option(False, "With use_score_scaling, subtract their running mean first.")
    score_clip: float | None = option(None, "Clip scores to plus or minus this; None: do not.")
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
        require_choice(self, "kl_penalty", ("kl", "abs", "mse", "full"))
        for name in _ABOVE_ZERO:
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}.", "Set it above 0.")
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps  # rows of an optimizer step
        size = f"mini_batch_size * gradient_accumulation_steps = {self.backward_batch_size}"
        what = f"batch_size={self.batch_size} is no multiple of {size}."
        require(self.batch_size % self.backward_batch_size == 0, what, "With a small batch_size, set the others too.")
        require(
            self.use_score_scaling or not self.use_score_norm, "use_score_norm is set alone.", "Set use_score_scaling."
        )
        require(self.score_clip is None or self.score_clip > 0, f"score_clip is {self.score_clip}.", "Set it above 0.")
