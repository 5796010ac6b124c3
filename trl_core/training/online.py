"""The trainer of algorithms that generate: prompts, rollouts, rewards, advantages, micro-batches, loss."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from ..batch import Rollouts, Samples
from ..data import prompts as prompt_data
from ..errors import ConfigError, HookResultError
from ..models.loading import max_positions
from ..models.logprobs import STATES, TokenScores, token_logps
from ..models.parts import joined, without_output
from ..stages.aggregate import Counters, aggregate, token_weights
from ..stages.rewards import RewardFunctions
from .base import rows_for_inspection
from .completions import CompletionLog
from .config import as_dict
from .loader import PromptLoader, SparePrompts, as_is, permutation, prompt_loader
from .metrics import rollout_metrics
from .rollout import RolloutSteps

logger = logging.getLogger(__name__)
_SHAPING_WINDOWS = {
    "generation_batch_size",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_processes",
}
"""Options without which a generation batch that is under way cannot be used on."""


@dataclass
class Window:
    """A generation batch while it is being trained on: the same in every process, so one process can save it."""

    samples: Samples
    counters: Counters
    number: int
    used: int = 0
    """Micro-steps done."""


class OnlineTrainer(RolloutSteps):
    """Trainer of algorithms that generate their own training data.

    Takes the arguments TRL's users know; see `CoreTrainer` for the common ones.

    Args:
        model: the policy: id, path or module.
        reward_funcs: one or several of: function, coroutine function, sequence classifier (id, path or module).
        reward_processing_classes: tokenizers of the classifiers, in the order of `reward_funcs`.
        rollouts: a generation backend: an object with the hook `generate` (see `trl_core.hookspecs`); default:
            `model.generate`.
        **arguments: further arguments of the composed algorithms, such as `group_filter_func`.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        ref_model: Any = None,
        rollouts: Any = None,
        **arguments: Any,
    ) -> None:
        checked = self._checked_args(args)
        self._checked_arguments(arguments)
        self.reward_functions = RewardFunctions(
            reward_funcs,
            reward_processing_classes,
            timeout=checked.reward_timeout,
            device=checked.device,
            trust_remote_code=checked.trust_remote_code,
            processes=checked.reward_processes,
            load=False,
        )
        self.note_inputs(reward_funcs=self.reward_functions.functions)
        self.reward_weights = _reward_weights(checked.reward_weights, self.reward_functions.names)
        self.completion_log = CompletionLog(checked)
        self.window: Window | None = None
        self.generations = 0
        self.num_tokens = 0
        # Whether rows without advantage have been seen to have a gradient all the same, such as that of a KL term.
        self.still_rows_count = False
        super().__init__(
            model,
            checked,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            ref_model=ref_model,
            providers=None if rollouts is None else {"rollouts": rollouts},
            arguments=arguments,
        )
        self.spare_prompts = SparePrompts(train_dataset, self._data_seed)
        self.add_callback(self.completion_log)
        self.hooks.facts |= {
            "rewards": len(self.reward_functions.names),
            "rows": self._rows_per_slice * self.args.slices,
        }

    # -- data -----------------------------------------------------------------------------------------------------
    def check_datasets(self, train: Any, evaluation: Any, model: Any, tokenizer: Any, args: Any) -> None:
        """Check the form of all rows before the model is loaded, and the length of prompts after."""
        splits = {"eval_dataset": evaluation} if not isinstance(evaluation, dict) else evaluation
        limit = None
        if model is not None and (positions := max_positions(model)) is not None:
            limit = positions - args.max_completion_length
            if limit <= 0:
                raise ConfigError(
                    f"max_completion_length={args.max_completion_length} leaves no room for prompts in the model's "
                    f"{positions} positions.",
                    mend="Lower max_completion_length.",
                )
        self.prompt_limit = limit
        for split, dataset in {"train_dataset": train, **splits}.items():
            if dataset is not None and (tokenizer is None or limit is not None):
                prompt_data.check_dataset(dataset, split, tokenizer, limit, as_dict(args.chat_template_kwargs))
            if dataset is not None and tokenizer is None and dataset.column_names is not None:
                self.reward_functions.check_columns(dataset.column_names, split)

    def load_beside(self) -> None:
        """The classifiers among the reward functions, and the processes that call others."""
        self.reward_functions.load()

    @property
    def _data_seed(self) -> int | None:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return int(seed) if self.args.shuffle_dataset else None

    def get_train_dataloader(self) -> PromptLoader:
        """Prompts of each generation batch, repeated for every micro-step that uses it; the same in all processes."""
        if self.train_dataset is None:
            raise ConfigError("train() needs a train_dataset.", mend="Pass train_dataset=...")
        args = self.args
        return prompt_loader(
            self.train_dataset,
            prompts=self._rows_per_slice * args.slices // args.num_generations,
            repeats=args.micro_steps,
            seed=self._data_seed,
            split="train_dataset",
        )

    @property
    def _rows_per_slice(self) -> int:
        return int(self.args.per_device_train_batch_size * self.accelerator.num_processes)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> PromptLoader:
        """Prompts for evaluation, in order."""
        if isinstance(eval_dataset, str):
            eval_dataset = cast(dict[str, Any], self.eval_dataset)[eval_dataset]
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ConfigError("evaluate() needs an eval_dataset.", mend="Pass eval_dataset=...")
        rows = self.args.per_device_eval_batch_size * self.accelerator.num_processes
        per_batch = max(rows // self._eval_generations, 1)
        return PromptLoader(dataset, batch_size=per_batch, collate_fn=as_is)

    @property
    def _eval_generations(self) -> int:
        return int(self.args.num_generations_eval or self.args.num_generations)

    # -- from rollouts to samples ---------------------------------------------------------------------------------
    def _new_window(self, rows: list[dict[str, Any]]) -> Window:
        args = self.args
        measured = None
        if self._measures_all:
            unscored, own = self.begin_roll_out(rows, args.num_generations)
            own_rewards = self.start_scoring(own)
            measured = self._measured(unscored)
            rollouts = self.end_roll_out(unscored, own_rewards)
        else:
            rollouts = self.roll_out(rows, args.num_generations)
        if args.dynamic_sampling:
            rollouts = self._refill(rollouts)
        keep = torch.ones(rollouts.num_rows, dtype=torch.bool)
        for answer in self.hooks.call.keep(rollouts=rollouts):
            keep &= answer.cpu()
        if any(other != keep.tolist() for other in gather_object([keep.tolist()])):
            raise HookResultError(
                "The hook keep answered differently in different processes.",
                mend="Make filters give the same answer for the same rows: no random numbers, no clock.",
            )
        samples = self._samples(rollouts, keep, measured)
        samples = self.hooks.call.select(samples=samples)
        self._follow_policy(samples)
        self.num_tokens += int(rollouts.prompt_lengths.sum() + rollouts.completion_lengths.sum())
        self._record("num_tokens", float(self.num_tokens))
        self.generations += 1
        return Window(samples, _counters(samples, args.slices), self.generations - 1)

    @property
    def _measures_all(self) -> bool:
        """Whether rows can be measured while their rewards are computed: all are kept, and no hook sees a reward."""
        free = self.overlaps and not self.args.dynamic_sampling
        return free and not any(map(self.hooks.changed, ("keep", "reference_logps", "annotate")))

    def _measured(self, rollouts: Rollouts, keep: Tensor | None = None) -> Samples:
        """The kept rows, or all, with what the models say about them."""
        sampling_logps, rows = rollouts.sampling_logps, rollouts.num_rows
        samples = Samples(
            **{f: getattr(rollouts, f) for f in ("prompt_ids", "prompt_lengths", "completion_ids")},
            **{f: getattr(rollouts, f) for f in ("completion_lengths", "loss_mask", "group")},
            reward=torch.full((rows,), float("nan")) if rollouts.reward is None else rollouts.reward,
            advantages=torch.zeros(int(rollouts.loss_mask.sum())),
            position=torch.arange(rows),
            generation=torch.full((rows,), self.generations),
            sampling_logps=None if sampling_logps is None else sampling_logps[rollouts.loss_mask],
        ).take(torch.arange(rows) if keep is None else keep.nonzero().flatten())
        self._measure(samples)
        return samples

    def _samples(self, rollouts: Rollouts, keep: Tensor, measured: Samples | None = None) -> Samples:
        """The kept rows with advantages and the log-probabilities the loss needs, over all processes."""
        samples = measured or self._measured(rollouts, keep)
        samples.reward = rollouts.reward[keep]
        kept_tokens = keep[rollouts.row_of_token]

        def of_all_rows(values: Tensor) -> Tensor:
            return values.new_zeros(kept_tokens.shape).masked_scatter(kept_tokens, values)

        rollouts.old_logps, rollouts.ref_logps = (
            None if values is None else of_all_rows(values) for values in (samples.old_logps, samples.ref_logps)
        )
        rollouts.notes = {name: of_all_rows(values) for name, values in samples.notes.items()}
        advantages = self.hooks.call.advantages(rollouts=rollouts, keep=keep)
        per_token = rollouts.expand(advantages.float().cpu())
        samples.advantages = per_token[kept_tokens]
        samples.notes = {name: values[kept_tokens] for name, values in rollouts.notes.items()}
        for name, value in rollout_metrics(rollouts, keep, self.reward_functions.names).items():
            self._record(name, value)
        if self.context.training:
            row_advantage = rollouts.mean_per_row(per_token)
            self.completion_log.write(
                rollouts, keep, row_advantage, self.reward_functions.names, self.state.global_step
            )
        return samples

    def _measure(self, samples: Samples) -> None:
        """Fill in what the models say about the rows: log-probabilities and notes."""
        own = samples.take(self._share(samples.num_rows)).to(self.args.device)
        found: dict[str, list[Tensor]] = {}
        if self.args.uses_reference:
            logps = self.hooks.call.reference_logps(samples=own) if own.num_rows else own.advantages
            own.ref_logps = logps.float()
            found["ref_logps"] = [own.ref_logps.cpu()]
        policy = self.accelerator.unwrap_model(self.model)
        if self._needs_old_logps(samples):
            found["old_logps"] = []
        asked = [STATES] if STATES in self.token_statistics and self.hooks.changed("annotate") else []
        with self.evaluating(policy):
            for rows in self._parts(own):
                if asked or "old_logps" in found:
                    scores = token_logps(
                        policy,
                        rows,
                        pad_token_id=self.pad_token_id,
                        temperature=self.args.temperature,
                        statistics=asked,
                        layouts=self.exact_layouts,
                    )
                    rows.old_logps, rows.states, rows.last_states = scores.logps, scores.states, scores.last_states
                    found.setdefault("old_logps", []).append(scores.logps.cpu())
                for name, values in _notes(self.hooks.call.annotate(samples=rows)).items():
                    found.setdefault(f"notes.{name}", []).append(values.float().cpu())
        joined = {name: torch.cat([torch.zeros(0), *pieces]) for name, pieces in found.items()}
        parts: list[dict[str, Tensor]] = gather_object([joined])
        gathered = {name: torch.cat([part[name] for part in parts]) for name in joined}
        samples.old_logps, samples.ref_logps = gathered.pop("old_logps", None), gathered.pop("ref_logps", None)
        samples.notes = {name.removeprefix("notes."): values for name, values in gathered.items()}

    def _parts(self, rows: Samples) -> list[Samples]:
        """As many rows at a time as go through a model; without any, one that has no loss tokens, to name notes."""
        if not rows.num_rows:
            return [_placeholder(self.pad_token_id, ()).to(self.args.device)]
        return rows.split(self.rows_per_forward)

    def _moves_before_use(self, samples: Samples) -> bool:
        """Whether the loss needs log-probabilities of the time of sampling: the policy moves meanwhile, or differs."""
        if not self.context.training:
            return samples.sampling_logps is not None
        args = self.args
        stale = args.gradient_accumulation_steps % args.micro_steps != 0
        return stale or samples.sampling_logps is not None

    def _needs_old_logps(self, samples: Samples) -> bool:
        selects = self.context.training and self.hooks.changed("select")
        return self._moves_before_use(samples) or self.args.uses_old_logps or selects

    def _follow_policy(self, samples: Samples) -> None:
        """Of rows just sampled by the policy that is trained, forget the log-probabilities: the loss has them anyway.

        So a run in which nothing is replayed equals one of the base algorithm to the last bit.
        """
        if samples.old_logps is not None and not self._moves_before_use(samples):
            fresh = samples.generation == self.generations
            samples.old_logps = samples.old_logps.masked_fill(fresh[samples.row_of_token], float("nan"))

    # -- micro-batches --------------------------------------------------------------------------------------------
    def _prepare_inputs(self, inputs: Any) -> Samples:  # type: ignore[override]
        """The next micro-batch of this process; generates when the last generation batch is used up."""
        if isinstance(inputs, Samples):
            return inputs
        micro_steps = self.args.micro_steps
        if self.window is None or self.window.used >= micro_steps:
            self.window = None
            self.window = self._new_window(inputs)
        self.window.used += 1
        return self._micro_batch(self.window)

    def _micro_batch(self, window: Window) -> Samples:
        args = self.args
        passed, slice_index = divmod(window.used - 1, args.slices)
        per_slice = self._rows_per_slice
        generation_batch = per_slice * args.slices
        pass_number = passed if args.reshuffles else 0
        order = torch.tensor(self._row_order(window.number, pass_number, generation_batch, per_slice))
        place = torch.empty_like(order)
        place[order] = torch.arange(generation_batch)
        # Rows keep their step even when others of the slice were dropped; what is left is dealt out evenly.
        mine = place[window.samples.position]
        in_slice = (mine // per_slice == slice_index).nonzero().flatten()
        in_slice = in_slice[torch.argsort(mine[in_slice])]
        own = in_slice.tensor_split(self.accelerator.num_processes)[self.accelerator.process_index]
        # Side by side, rows of a group share their prompt. What their order is changes nothing else.
        own = own[torch.argsort(window.samples.group[own], stable=True)]
        return window.samples.take(own).to(args.device)

    def _row_order(self, number: int, pass_number: int, rows: int, per_slice: int) -> list[int]:
        """The order in which a generation batch is cut into slices: whole groups are shuffled where they fit."""
        if self._data_seed is None or rows == per_slice:
            return list(range(rows))
        block = self.args.num_generations if per_slice % self.args.num_generations == 0 else 1
        seeds = (self._data_seed, number, 2) if pass_number == 0 else (self._data_seed, number, 2, pass_number)
        blocks = permutation(rows // block, seeds)
        return [b * block + i for b in blocks for i in range(block)]

    # -- loss -----------------------------------------------------------------------------------------------------
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a micro-batch, already scaled for accumulation and processes."""
        assert self.window is not None
        training = self.context.training
        args = self.args
        samples: Samples = inputs
        accumulation = self.current_gradient_accumulation_steps if training else 1
        weights = token_weights(
            samples,
            args.loss_type,
            self.window.counters,
            max_completion_length=args.max_completion_length,
            accumulation=accumulation,
            processes=self.accelerator.num_processes,
            normalizer=args.token_normalizer,
        )
        if not samples.num_rows:
            # Nothing of this slice was kept: a row without loss tokens keeps all processes in step.
            samples = _placeholder(self.pad_token_id, samples.notes).to(self.args.device)
            weights = torch.zeros(0, device=self.args.device)
        still = self._still_rows(samples)
        scores, probe = self._score_moving(model, samples, still)
        logps, output = scores.logps, scores.output
        samples.entropy = scores.statistics["entropy"]
        samples.states, samples.last_states = scores.states, scores.last_states
        old, current = samples.old_logps, logps.detach()
        samples.old_logps = current if old is None else torch.where(old.isnan(), current, old)
        log_ratio = self.hooks.call.log_ratio(samples=samples, logps=logps)
        loss = aggregate(self.loss_terms(samples, logps, log_ratio), weights, accumulation)
        self.check_gradient(loss)
        if probe is not None:
            loss = self._with_still_rows(model, loss, samples, still, probe)
        loss = self._add_router_loss(loss, output, accumulation)
        self._record("entropy", samples.entropy.detach().mean(), logps.numel())
        if training:
            loss = self.guard_loss(loss, lambda: rows_for_inspection(samples, self.processing_class))
        return (loss, output) if return_outputs else loss

    def _still_rows(self, samples: Samples) -> Tensor:
        """(N,) bool: rows of groups that have no advantage anywhere in the micro-batch, so may teach nothing."""
        if (
            not self.context.training
            or self.still_rows_count
            or getattr(self.args, "entropy_needs_grad", False)
            or STATES in self.token_statistics
            or self._forward_kwargs()  # a router's loss counts every token
            or self.is_sharded
            or self.layouts.drops  # the noise would be another one
        ):
            return torch.zeros_like(samples.group, dtype=torch.bool)
        moved = samples.sum_per_row((samples.advantages != 0).float()) > 0
        return ~torch.isin(samples.group, samples.group[moved])

    def _score_moving(self, model: Any, samples: Samples, still: Tensor) -> tuple[TokenScores, Tensor | None]:
        """Scores of a micro-batch, and the part of their log-probabilities that was computed without gradient.

        That part takes part in the loss as if it were parameters, so that its gradient tells whether it counts.
        """
        score = partial(
            self.score,
            temperature=self.args.temperature,
            entropy_grad=getattr(self.args, "entropy_needs_grad", False),
        )
        if not bool(still.any()):
            return score(model, samples, "entropy"), None
        resting, moving = still.nonzero().flatten(), (~still).nonzero().flatten()
        with torch.no_grad():
            found = without_output(score(self.accelerator.unwrap_model(model), samples.take(resting), "entropy"))
        found.logps.requires_grad_()
        rest = samples.take(moving) if moving.numel() else _placeholder(self.pad_token_id, ()).to(self.args.device)
        return joined([found, score(model, rest, "entropy")], samples, [resting, moving]), found.logps

    def _with_still_rows(self, model: Any, loss: Tensor, samples: Samples, still: Tensor, probe: Tensor) -> Tensor:
        """The loss with the gradient of rows that were scored without, if they have one: then they do from now on."""
        (gradient,) = torch.autograd.grad(loss, probe, retain_graph=True, allow_unused=True)
        if gradient is None or not bool(gradient.count_nonzero()):
            return loss
        self.still_rows_count = True
        policy, rows = self.accelerator.unwrap_model(model), samples.take(still.nonzero().flatten())
        late = (self.score(policy, rows, temperature=self.args.temperature).logps * gradient).sum()
        return loss + late - late.detach()

    # -- evaluation -----------------------------------------------------------------------------------------------
    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Generate, score and compute the loss on all prompts; nothing is filtered, selected or stored."""
        kept = (self.window, self.generations, self.num_tokens)
        try:
            return super().evaluation_loop(self.roll_out_each(dataloader, self._eval_generations), *args, **kwargs)
        finally:
            self.window, self.generations, self.num_tokens = kept

    def _evaluate_batch(self, batch: tuple[int, Rollouts]) -> int:
        prompts, rollouts = batch
        samples = self._samples(rollouts, torch.ones(rollouts.num_rows, dtype=torch.bool))
        self.window = Window(samples, _counters(samples), 0)
        own = samples.take(self._share(samples.num_rows)).to(self.args.device)
        self._record("loss", self.compute_loss(self.model, own))
        return prompts

    # -- state ----------------------------------------------------------------------------------------------------
    def _prepare_for_training(self, *args: Any) -> Any:
        self.window = None
        return super()._prepare_for_training(*args)

    def state_of_run(self) -> dict[str, Any]:
        """Also the part-used generation batch and the counters."""
        window = self.window
        used_up = window is None or window.used >= self.args.micro_steps
        saved = None
        if window is not None and not used_up:
            counters = vars(window.counters)
            saved = {"samples": window.samples.tensors(), "counters": counters, "number": window.number}
            saved["used"] = window.used
        return super().state_of_run() | {
            "window": saved,
            "generations": self.generations,
            "num_tokens": self.num_tokens,
            "still_rows_count": self.still_rows_count,
            "spare_prompts": self.spare_prompts.drawn,
        }

    def taken_up(self, state: dict[str, Any]) -> dict[str, Any]:
        """Without the part-used generation batch, if batches are of another shape now."""
        if state.get("window") is not None and _SHAPING_WINDOWS & self._changed:
            logger.warning("The part-used generation batch of the checkpoint is dropped: batches are others now.")
            return {**state, "window": None}
        if state.get("window") is not None and self._changed:
            left = self.args.micro_steps - state["window"]["used"]
            logger.warning("Micro-steps that still use a generation batch from before the change: %d.", left)
        return state

    def load_state_of_run(self, state: dict[str, Any]) -> None:
        """The inverse of `state_of_run`."""
        super().load_state_of_run(state)
        self.generations, self.num_tokens = state["generations"], state["num_tokens"]
        self.still_rows_count = state.get("still_rows_count", False)
        self.spare_prompts.restore(state["spare_prompts"])
        saved = state["window"]
        self.window = None
        if saved is not None:
            samples = Samples.from_tensors(saved["samples"])
            self.window = Window(samples, Counters(**saved["counters"]), saved["number"], saved["used"])


def _notes(answers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    notes: dict[str, Tensor] = {}
    for answer in answers:
        if twice := notes.keys() & answer.keys():
            raise HookResultError(
                f"Two algorithms note {sorted(twice)}.", mend="Begin the name with that of the algorithm."
            )
        notes |= answer
    return notes


def _counters(samples: Samples, slices: int = 1) -> Counters:
    return Counters(
        rows=samples.num_rows,
        tokens=int(samples.lengths.sum()),
        completion_tokens=int(samples.completion_lengths.sum()),
        slices=slices,
    )


def _reward_weights(weights: list[float] | None, names: list[str]) -> Tensor:
    if weights is not None and len(weights) != len(names):
        raise ConfigError(
            f"reward_weights has {len(weights)} entries for {len(names)} reward functions.",
            mend="Give one per function.",
        )
    return torch.tensor([1.0] * len(names) if weights is None else weights, dtype=torch.float32)


def _placeholder(token: int, notes: Iterable[str]) -> Samples:
    none = torch.zeros(0)
    return Samples.from_lists(
        [[token]],
        [[token]],
        loss_mask=[[0]],
        notes=dict.fromkeys(notes, none),
        advantages=none,
        position=torch.zeros(1, dtype=torch.long),
        generation=torch.zeros(1, dtype=torch.long),
        reward=torch.zeros(1),
        ref_logps=none,
        sampling_logps=none,
    )
