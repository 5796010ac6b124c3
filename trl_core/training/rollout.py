"""From dataset rows to scored rollouts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, ClassVar, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..answers import marked
from ..batch import Generated, Prompts, Rollouts, Samples, Sampling
from ..composition import DEFAULTS
from ..data import prompts as prompt_data
from ..errors import RewardError, TRLCoreError
from ..hookspecs import hook_kinds, hookimpl
from ..stages.advantages import group_std
from ..stages.generation import generate
from ..stages.reward_checks import LARGEST as LARGEST_REWARD
from ..stages.rewards import RewardFunctions, Scoring, weighted_reward
from .base import CoreTrainer, DefaultHooks
from .completions import CompletionLog
from .config import OnlineConfig, as_dict
from .loader import SparePrompts

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_AFTER_GENERATION = ("reference_logps", "annotate", "advantages", "log_ratio", "loss_terms")


class OnlineDefaults(DefaultHooks):
    """Answers where no algorithm does: generation by transformers, the user's reward functions, no selection."""

    trainer: RolloutSteps

    @hookimpl
    def generate(self, prompts: Prompts, sampling: Sampling) -> Generated:
        """`model.generate` of the bare policy."""
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return generate(policy, prompts, sampling, self.trainer.processing_class)

    @hookimpl
    def score(self, rollouts: Rollouts) -> Tensor:
        """The trainer's reward functions."""
        return self.trainer.start_reward_functions(rollouts).result()

    @hookimpl
    def select(self, samples: Samples) -> Samples:
        """All kept rows."""
        return samples


def _raise(error: Exception) -> Any:
    raise error


def _ignored(column: str, values: Any) -> None:
    """What evaluations log beside rewards has no place in the log of training."""


class RolloutSteps(CoreTrainer):
    """The part of the online trainer that generates and scores."""

    default_hooks = OnlineDefaults
    calls: ClassVar[tuple[str, ...] | None] = tuple(hook for hook in hook_kinds() if hook != "pair_loss")
    args: OnlineConfig
    reward_functions: RewardFunctions
    reward_weights: Tensor
    completion_log: CompletionLog
    spare_prompts: SparePrompts
    terminators: tuple[int, ...]
    prompt_limit: int | None = None
    _warned_unscored = False

    def _sampling(self) -> Sampling:
        args = self.args
        return Sampling(
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            eos_token_ids=self.terminators,
            pad_token_id=self.pad_token_id,
            rows=args.generation_rows,
            extra=as_dict(args.generation_kwargs),
        )

    def _share(self, rows: int) -> list[int]:
        """Which of `rows` adjacent rows are this process's."""
        parts = torch.arange(rows).tensor_split(self.accelerator.num_processes)
        own: list[int] = parts[self.accelerator.process_index].tolist()
        return own

    def roll_out(self, rows: list[dict[str, Any]], generations: int) -> Rollouts:
        """Generate and score `generations` completions of each dataset row.

        Returns:
            the rollouts of all processes, on the CPU, equal in all of them.

        Raises:
            TRLCoreError: it failed, here or in another process; then all processes raise.
        """
        parts = self._of_all(lambda: self._own_rollouts(rows, generations, score=True))
        return self._with_reward(Rollouts.concat([part for part in parts if part.num_rows] or parts[:1]))

    def begin_roll_out(self, rows: list[dict[str, Any]], generations: int) -> tuple[Rollouts, Rollouts]:
        """The first half of `roll_out`: the rollouts of all processes, still without rewards, and those of this one."""
        parts = self._of_all(lambda: self._own_rollouts(rows, generations, score=False))
        rollouts = Rollouts.concat([part for part in parts if part.num_rows] or parts[:1])
        return rollouts, parts[self.accelerator.process_index]

    def end_roll_out(self, rollouts: Rollouts, own_rewards: Callable[[], Tensor]) -> Rollouts:
        """The second half: the rollouts with the rewards of all processes; `own_rewards` is from `start_scoring`."""
        rollouts.rewards = torch.cat(self._of_all(own_rewards))
        return self._with_reward(rollouts)

    @property
    def overlaps(self) -> bool:
        """Whether rewards may be computed beside other work, which no hook notices, so `roll_out` may be divided."""
        return self.args.overlap_rewards and self.reward_functions.overlaps and not self.hooks.changed("score")

    def roll_out_each(
        self, batches: Iterable[list[dict[str, Any]]], generations: int
    ) -> Iterator[tuple[int, Rollouts]]:
        """The number of prompts and the rollouts of each batch, a tick each.

        Where that overlaps, a batch is scored while the next one is generated, unless who generates takes part in a
        later step too, and may remember its latest batch. The policy must not move.
        """
        generators = [impl.plugin for impl in self.hooks.call.generate.get_hookimpls() if impl.plugin_name != DEFAULTS]
        if not self.overlaps or any(marked(plugin, hook) for plugin in generators for hook in _AFTER_GENERATION):
            for batch in batches:
                self.metrics.tick += 1
                yield len(batch), self.roll_out(batch, generations)
            return
        waiting: tuple[int, Rollouts, Callable[[], Tensor]] | None = None
        for tick, rows in enumerate(chain(batches, [None]), self.metrics.tick + 1):
            self.metrics.tick = tick
            try:
                generated = None if rows is None else self.begin_roll_out(rows, generations)
            except Exception:
                if waiting is not None:
                    self.end_roll_out(*waiting[1:])  # what fails here would have failed first
                raise
            self.metrics.tick = tick - 1
            scored = None if waiting is None else (waiting[0], self.end_roll_out(*waiting[1:]))
            if rows is not None and generated is not None:
                waiting = len(rows), generated[0], self.start_scoring(generated[1])
            if scored is not None:
                yield scored

    def start_reward_functions(self, rollouts: Rollouts) -> Scoring:
        """Call the reward functions for rows of this process."""
        return self.reward_functions.start(
            rollouts,
            trainer_state=self.state,
            log_extra=self.completion_log.extra if self.context.training else _ignored,
            log_metric=self.context.log,
        )

    def start_scoring(self, own: Rollouts) -> Callable[[], Tensor]:
        """Begin to score the rows of this process. What is returned waits for the rewards, or raises what failed."""
        start = time.perf_counter()
        try:
            result = self.start_reward_functions(own).result
        except Exception as error:
            result = partial(_raise, error)  # only where all processes raise
        started = time.perf_counter() - start

        def rewards() -> Tensor:
            start = time.perf_counter()
            values = result()
            self._record("time/score", started + time.perf_counter() - start)
            return values

        return rewards

    def _with_reward(self, rollouts: Rollouts) -> Rollouts:
        rollouts.reward = weighted_reward(rollouts.rewards, self.reward_weights)
        if bool((huge := rollouts.reward.abs() > LARGEST_REWARD).any()):
            self.failed_everywhere = True
            row = int(huge.nonzero()[0])
            raise RewardError(
                f"The weighted reward of row {row} is {rollouts.reward[row].item():g}, from "
                f"{dict(zip(self.reward_functions.names, rollouts.rewards[row].tolist(), strict=True))} and "
                f"reward_weights={self.reward_weights.tolist()}; at most {LARGEST_REWARD:g} can be worked with.",
                mend="Lower reward_weights, or scale the rewards.",
            )
        if bool(torch.isnan(rollouts.reward).all()) and not self._warned_unscored:
            self._warned_unscored = True
            logger.warning("No reward function scored any row of a generation batch; such batches teach nothing.")
        return rollouts

    def _of_all(self, work: Callable[[], _T]) -> list[_T]:
        """What `work` makes in each process; if it fails in any, all raise."""
        failure: Exception | None = None
        try:
            own: Any = work()
        except Exception as error:
            failure, own = error, f"Process {self.accelerator.process_index} failed: {error}"
        parts = gather_object([own])
        messages = [part for part in parts if isinstance(part, str)]
        if messages:
            # Raised only now, so that no process waits for one that has stopped.
            self.failed_everywhere = True
            raise failure or TRLCoreError(messages[0], mend="See the error of that process.")
        return list(parts)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `RunTrainer.train`. No process of the reward functions is left afterwards."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.reward_functions.close()
            self.completion_log.flush()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.completion_log.flush()  # before: a run that is resumed does not generate again what came before
        super()._save_checkpoint(model, trial)

    def _own_rollouts(self, rows: list[dict[str, Any]], generations: int, *, score: bool) -> Rollouts:
        """The share of this process."""
        own = self._share(len(rows) * generations)
        mine = [rows[i // generations] for i in own]
        for row, i in zip(mine, own, strict=True):
            prompt_data.check_prompt(prompt_data.prompt_of(row), i // generations, "the dataset")
        template = as_dict(self.args.chat_template_kwargs)
        rendered: dict[int, list[int]] = {}
        for i, row in zip(own, mine, strict=True):
            if i // generations not in rendered:
                arguments = {**template, **prompt_data.template_arguments(row)}
                ids = prompt_data.render(prompt_data.prompt_of(row), self.processing_class, arguments)
                # Streams are not looked through before training.
                prompt_data.check_tokens(len(ids), i // generations, "a generation batch", self.prompt_limit)
                rendered[i // generations] = ids
        prompts = Prompts(
            ids=[rendered[i // generations] for i in own],
            raw=[prompt_data.readable(prompt_data.prompt_of(row), self.processing_class) for row in mine],
            group=torch.tensor([i // generations for i in own], dtype=torch.long),
        )
        start = time.perf_counter()
        generated = self.hooks.call.generate(prompts=prompts, sampling=self._sampling())
        self._record("time/generate", time.perf_counter() - start)
        columns = {name: [row[name] for row in mine] for name in (rows[0] if rows else {}) if name != "prompt"}
        rollouts = self._as_rollouts(prompts, generated, columns)
        if score:
            start = time.perf_counter()
            rollouts.rewards = self._score(rollouts)
            self._record("time/score", time.perf_counter() - start)
        return rollouts

    def _as_rollouts(self, prompts: Prompts, generated: Generated, columns: dict[str, list[Any]]) -> Rollouts:
        ids = generated.completion_ids
        prompt_ids = generated.prompt_ids or prompts.ids
        flat = torch.tensor([token for row in ids for token in row], dtype=torch.long)
        lengths = torch.tensor([len(row) for row in ids], dtype=torch.long)
        truncated = torch.tensor([row[-1] not in (*self.terminators, self.pad_token_id) for row in ids])
        mask = torch.ones_like(flat, dtype=torch.bool)
        if generated.loss_mask is not None:
            mask = torch.tensor([flag for row in generated.loss_mask for flag in row], dtype=torch.bool)
        if self.args.mask_truncated_completions and len(ids):
            mask &= ~torch.repeat_interleave(truncated, lengths)
        logps = generated.logps
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True) if ids else []
        return Rollouts(
            prompt_ids=torch.tensor([token for row in prompt_ids for token in row], dtype=torch.long),
            prompt_lengths=torch.tensor([len(row) for row in prompt_ids], dtype=torch.long),
            completion_ids=flat,
            completion_lengths=lengths,
            loss_mask=mask,
            group=prompts.group,
            prompts=prompts.raw,
            completions=prompt_data.as_completions(prompts.raw, texts),
            columns=columns,
            truncated=truncated.bool(),
            sampling_logps=None if logps is None else torch.tensor([x for row in logps for x in row]),
        ).validate()

    def _score(self, rollouts: Rollouts) -> Tensor:
        rewards: Tensor = self.hooks.call.score(rollouts=rollouts)
        return rewards.float().cpu()

    def _refill(self, rollouts: Rollouts) -> Rollouts:
        """Dynamic sampling: replace groups without any difference in reward by groups of further prompts."""
        generations = self.args.num_generations
        refilled = 0
        for _ in range(self.args.dynamic_sampling_max_rounds):
            flat = torch.nan_to_num(group_std(rollouts, rollouts.reward)) < 1e-8
            if not bool(flat.any()):
                break
            wanted = flat.nonzero().flatten().tolist()
            fresh = self.roll_out(self.spare_prompts.draw(len(wanted)), generations)
            fresh.group = torch.tensor(wanted, dtype=torch.long).repeat_interleave(generations)
            refilled += len(wanted)
            merged = Rollouts.concat([rollouts.take((~flat)[rollouts.group].nonzero().flatten()), fresh])
            rollouts = merged.take(torch.argsort(merged.group, stable=True))
        self._record("dynamic_sampling/refilled_groups", float(refilled))
        return rollouts
