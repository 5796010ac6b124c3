"""The options of PPO, under the names of TRL's trainer with a reward and a value model."""

import logging
import math
from dataclasses import dataclass

from trl_core import OnlineConfig, option, require

logger = logging.getLogger(__name__)


@dataclass
class PPOOptions(OnlineConfig):
    """Options of PPO.

    A batch is `per_device_train_batch_size x gradient_accumulation_steps` completions per process. It is generated,
    scored and then trained on `num_ppo_epochs` times, with an optimizer step after each of `num_mini_batches` parts.
    `max_steps`, `logging_steps` and the like count optimizer steps; without `max_steps` or `total_episodes` a run goes
    `num_train_epochs` times over the dataset.
    """

    learning_rate: float = option(3e-6, "Initial learning rate.")
    value_learning_rate: float | None = option(None, "That of the critic; None: the policy's.", ge=0)
    max_grad_norm: float = option(0.0, "Clip gradients of policy and critic to this norm; 0: never, as in TRL's loop.")
    disable_dropout: bool = option(True, "Set every dropout probability to 0, so that log-probabilities agree.")
    temperature: float = option(0.7, "Sampling temperature; every log-probability is computed at it as well.", gt=0)
    num_generations: int = option(1, "Completions per prompt.", ge=1)
    loss_type: str = option(
        "bnpo",
        "How the policy term is averaged: bnpo, over the tokens of a micro-batch; or dapo, grpo, dr_grpo, luspo.",
        choices=("bnpo", "dapo", "grpo", "dr_grpo", "luspo"),
    )
    response_length: int = option(53, "W, most tokens of a completion.", ge=1)
    max_completion_length: int | None = option(None, "The core's name of response_length; give one of them.", ge=1)  # type: ignore[assignment]
    num_ppo_epochs: int = option(4, "How often each batch is trained on.", ge=1)
    num_iterations: int | None = option(None, "The core's name of num_ppo_epochs; give one of them.", ge=1)  # type: ignore[assignment]
    num_mini_batches: int = option(1, "Parts of a batch, with an optimizer step after each.", ge=1)
    total_episodes: int | None = option(None, "Completions to generate in all; sets max_steps.", ge=1, resume=False)
    kl_coef: float = option(
        0.05, "Weight of the KL penalty in the reward of each token; 0 loads no reference model.", ge=0
    )
    kl_estimator: str = option("k1", "'k1', the log-ratio, or 'k3', never negative.", choices=("k1", "k3"))
    cliprange: float = option(0.2, "Clip width of the ratio.", ge=0)
    cliprange_value: float = option(
        0.2, "How far the critic may move from its old values before its loss is clipped.", ge=0
    )
    vf_coef: float = option(0.1, "Weight of the critic's loss.", ge=0)
    gamma: float = option(1.0, "Discount.", ge=0, le=1)
    lam: float = option(0.95, "Lambda of the generalised advantage estimates.", ge=0, le=1)
    whiten_rewards: bool = option(False, "Divide the rewards of the tokens by their standard deviation.")
    score_at_last_token: bool = option(
        False, "Give the score to the last token; otherwise, as in TRL, to the place after it where there is room."
    )
    missing_eos_penalty: float | None = option(
        None, "Taken from the score of completions without end of sequence.", gt=0
    )
    stop_token: str | None = option(
        None,
        "'eos': a completion ends there. None: none ends before response_length tokens, as in TRL.",
        choices=("eos",),
    )
    stop_token_id: int | None = option(None, "Another token that ends completions.", ge=0)
    local_rollout_forward_batch_size: int = option(64, "Rows at a time in passes without gradient.", ge=1, resume=False)
    num_sample_generations: int = option(
        10,
        "How often a run evaluates on eval_dataset, when one is given and eval_strategy is 'no'.",
        ge=0,
        resume=False,
    )

    reshuffles = True
    uses_old_logps = True

    @property
    def uses_reference(self) -> bool:
        """Only the KL penalty needs one."""
        return self.kl_coef != 0.0

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps for which a batch is used."""
        return self.num_mini_batches * self.num_ppo_epochs

    def __post_init__(self) -> None:
        self._same("response_length", "max_completion_length", 53)
        self._same("num_ppo_epochs", "num_iterations", 4)
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self._split_batch()
        require(
            self.stop_token is None or self.stop_token_id is None,
            "stop_token and stop_token_id are both given.",
            "Give one of them.",
        )
        super().__post_init__()
        parts = self.gradient_accumulation_steps * self.num_mini_batches
        require(
            self.slices == parts,
            f"A batch has {self.slices} micro-batches, but gradient_accumulation_steps x num_mini_batches is {parts}.",
            "Leave steps_per_generation and generation_batch_size out: they follow from the other options.",
        )
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        require(
            not self.whiten_rewards or rows >= 8,
            f"whiten_rewards=True with mini-batches of {rows} rows, too few for a standard deviation.",
            "Use at least 8 rows per mini-batch.",
        )
        if self.total_episodes is not None:
            steps = math.ceil(self.total_episodes / int(self.generation_batch_size or 1)) * self.steps_per_batch
            if self.max_steps not in (-1, steps):
                logger.warning("total_episodes=%d sets max_steps to %d.", self.total_episodes, steps)
            self.max_steps = steps

    def _same(self, known: str, ours: str, default: int) -> None:
        """Two names of one option."""
        value, other = getattr(self, known), getattr(self, ours)
        require(
            other in (None, value) or value == default, f"{known}={value} and {ours}={other} differ.", "Give only one."
        )
        setattr(self, known, value if other is None else other)
        setattr(self, ours, getattr(self, known))

    def _split_batch(self) -> None:
        """Micro-batches that make up a mini-batch exactly, none larger than asked for."""
        micro, rows = (
            self.per_device_train_batch_size,
            self.per_device_train_batch_size * self.gradient_accumulation_steps,
        )
        require(
            rows % self.num_mini_batches == 0,
            f"num_mini_batches={self.num_mini_batches} does not divide the {rows} rows of a batch "
            "(per_device_train_batch_size x gradient_accumulation_steps).",
            "Change one of them.",
        )
        mini = rows // self.num_mini_batches
        self.per_device_train_batch_size = math.gcd(micro, mini)
        self.gradient_accumulation_steps = mini // self.per_device_train_batch_size
        self.steps_per_generation = rows // self.per_device_train_batch_size
