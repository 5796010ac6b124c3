"""The online trainer with the arguments that users of TRL's PPO know."""

import logging
import time
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from trl_core import OnlineTrainer, TokenRows, errors
from trl_core.models import load_classifier, row_scores

logger = logging.getLogger(__name__)


class RewardModel:
    """A sequence classifier that scores prompt and completion token by token as they were sampled.

    Args:
        model: id, path or module, with one output.
        args: the configuration.

    Raises:
        ConfigError: it cannot be loaded, or has not one output.
    """

    def __init__(self, model: Any, args: Any) -> None:
        self.model: Any = load_classifier(model, None, args.trust_remote_code).to(args.device)
        self.model.requires_grad_(False).eval()
        self.rows_at_a_time = args.local_rollout_forward_batch_size
        self.__name__ = "reward_model"

    @torch.no_grad()
    def __call__(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """One score per row, read at its last token."""
        largest = max(max(row) for rows in (prompt_ids, completion_ids) for row in rows if row)
        known = self.model.get_input_embeddings().weight.shape[0]
        if largest >= known:
            raise errors.ConfigError(
                f"The reward model knows {known} tokens, but number {largest} is in a prompt or was sampled.",
                mend="Pass a reward model with another tokenizer in reward_funcs: there it scores the text.",
            )
        numbers: dict[tuple[int, ...], int] = {}
        group = [numbers.setdefault(tuple(ids), len(numbers)) for ids in prompt_ids]
        rows = TokenRows.from_lists(prompt_ids, completion_ids, group=group).to(next(self.model.parameters()).device)
        parts = rows.split(self.rows_at_a_time)
        return [x for part in parts for x in row_scores(self.model, part, pad_token_id=0)[0].tolist()]


class _Evaluations(TrainerCallback):
    """Evaluates `num_sample_generations` times in a run."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        batches = state.max_steps // args.steps_per_batch
        every = max(batches // args.num_sample_generations, 1) * args.steps_per_batch
        if state.global_step % every == 0:
            control.should_evaluate = True


class PPOTrainer(OnlineTrainer):
    """PPO with a reward and a value model.

    Args:
        model: the policy: id, path or module.
        reward_funcs: as of every trainer that generates: functions, or classifiers that score the text.
        args: `PPOConfig`.
        train_dataset, eval_dataset, processing_class, **more: see `trl_core.OnlineTrainer`; `ref_model` is the
            reference, by default a copy of the policy, or the policy without its adapter.
        reward_model: a sequence classifier that shares the policy's tokenizer and scores the sampled tokens (id, path
            or module), or a reward function; added to `reward_funcs`.
        value_model: the critic: a sequence classifier with one output (id, path or module); default: a linear head on
            the policy's last hidden states.
    """

    args: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        reward_model: Any = None,
        value_model: Any = None,
        **more: Any,
    ) -> None:
        args = self._checked_args(args)
        listed = [] if reward_funcs is None else reward_funcs
        listed = list(listed) if isinstance(listed, list | tuple) else [listed]
        others = (model, reward_model, more.get("ref_model"), *listed)
        if isinstance(value_model, nn.Module) and any(value_model is other for other in others):
            raise errors.ConfigError(
                "value_model is also the policy, a reward model or the reference, which would then be trained too.",
                mend="Load it again, or pass its path.",
            )
        if reward_model is not None:
            own = RewardModel(reward_model, args) if isinstance(reward_model, str | nn.Module) else reward_model
            reward_funcs = [own, *listed]
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class, value_model=value_model, **more
        )
        if args.num_sample_generations and eval_dataset is not None and args.eval_strategy == "no":
            self.add_callback(_Evaluations)
        if not self.terminators:
            logger.warning(
                "Neither stop_token nor stop_token_id is set: every completion has response_length=%d tokens, also "
                "behind an end of sequence. Set stop_token='eos' to stop there.",
                args.response_length,
            )
        self._began = (time.perf_counter(), 0)

    def find_terminators(self, tokenizer: Any, policy: nn.Module, args: Any) -> tuple[int, ...]:
        """Those that the options name; by default none."""
        if args.stop_token == "eos":
            return super().find_terminators(tokenizer, policy, args)
        return () if args.stop_token_id is None else (args.stop_token_id,)

    @property
    def rows_per_forward(self) -> int:
        return int(self.args.local_rollout_forward_batch_size)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also under the names of TRL: learning rate, episodes so far, and episodes per second of this process."""
        if "learning_rate" in logs:
            start, done = self._began
            batch = self.args.generation_batch_size
            rate = (self.generations - done) * batch / (time.perf_counter() - start)
            logs = {**logs, "lr": logs["learning_rate"], "episode": self.generations * batch, "eps": rate}
        super().log(logs, start_time)

    def load_state_of_run(self, state: dict[str, Any]) -> None:
        super().load_state_of_run(state)
        self._began = (time.perf_counter(), self.generations)

    def generate_completions(self, sampling: bool = False) -> None:
        """Evaluate on `eval_dataset`, if there is one: what TRL's scripts call at their end."""
        if self.eval_dataset is not None:
            self.evaluate()
