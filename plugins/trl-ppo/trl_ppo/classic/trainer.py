"""The classic PPO trainer: you draw responses and score them, `step` learns from them (1707.06347, 1909.08593).

Legend: N rows, T response tokens that are learned from, in the order of rows, L longest query with response, V tokens
of the vocabulary.
"""

import contextlib
import inspect
import json
import os
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from trl_core import TokenRows, errors, get_config, require, stages
from trl_core.models import disable_dropout

from ..estimates import gae, value_loss, whiten
from .config import PPOConfig
from .controllers import AdaptiveKLController, FixedKLController, RunningMoments
from .modeling import AutoModelForCausalLMWithValueHead, create_reference_model

_PHASES = ("forward_pass", "compute_rewards", "compute_advantages", "optimize_step", "calc_stats")
_STATE = "ppo_state_{}.json"


class StepInputError(errors.TRLCoreError, ValueError):
    """What was passed to `step` or `generate` has the wrong type, size or value."""


# -- the mathematics ---------------------------------------------------------------------------------------------------
def places(rows: TokenRows) -> tuple[Tensor, Tensor]:
    """Row and step in the response, two (T,), of each learned token."""
    starts = rows.completion_lengths.cumsum(0) - rows.completion_lengths
    steps = torch.arange(rows.completion_ids.numel(), device=starts.device) - starts[rows.row_of_completion_token]
    return rows.row_of_token, steps[rows.loss_mask]


def kl_penalty(kind: str, logps: Tensor, ref_logps: Tensor, logits: Tensor, ref_logits: Tensor) -> Tensor:
    """(T,) penalty of each token, of its (T,) log-probabilities, or with "full" of all (T, V) logits.

    "kl": `d = logp - ref_logp`; "abs": `|d|`; "mse": `d^2 / 2`; "full": `sum_v p (log p - log p_ref)`.
    """
    if kind == "full":
        return F.kl_div(ref_logits.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    difference = logps - ref_logps
    return {"kl": difference, "abs": difference.abs(), "mse": difference.square() / 2}[kind]


def token_rewards(rows: TokenRows, scores: Tensor, kl_coef: float, whitened: bool) -> Tensor:
    """(T,) `-kl_coef kl`, with the score (N,) of a row added at its last learned token."""
    rewards = -kl_coef * rows.notes["kls"]
    rewards[rows.lengths.cumsum(0) - 1] += scores
    return whiten(rewards, shift_mean=False) if whitened else rewards


def estimates(rows: TokenRows, rewards: Tensor, gamma: float, lam: float) -> dict[str, Tensor]:
    """(T,) whitened advantages, and returns; steps that are not learned from have reward and value 0."""
    grid = torch.zeros(2, rows.num_rows, int(rows.completion_lengths.max()), device=rewards.device)
    at = places(rows)
    grid[0][at], grid[1][at] = rewards, rows.notes["values"]
    advantages = gae(grid[0], grid[1], gamma, lam)[at]
    return {"advantages": whiten(advantages), "returns": advantages + rows.notes["values"]}


def ppo_loss(rows: TokenRows, logps: Tensor, values: Tensor, config: PPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a mini-batch, and its statistics without gradient.

    Args:
        rows: with the notes "logps", "values", "advantages" and "returns" of the policy that was sampled from.
        logps: (T,) with gradient.
        values: (T,) with gradient.
        config: clip widths, `vf_coef` and `ratio_threshold`.
    """
    old, advantages, returns = rows.notes, rows.notes["advantages"], rows.notes["returns"]
    log_ratio = logps - old["logps"]
    ratio, clip = log_ratio.exp(), stages.PolicyLossOptions(loss_type="bnpo", epsilon=config.cliprange)
    per_token = stages.policy_loss(rows, advantages, logps, old["logps"], log_ratio, clip)
    errors_, value_clipped = value_loss(values, old["values"], returns, config.cliprange_value)
    policy, value = per_token.mean(), errors_.mean()
    if ratio.mean() > config.ratio_threshold:
        warnings.warn(f"A mini-batch is skipped: its mean ratio is {ratio.mean():.4g}.", stacklevel=2)
        policy = value = 0.0 * (logps + values).sum()  # the losses times 0 would be NaN for an infinite ratio
    loss = policy + config.vf_coef * value
    one = min(1, len(ratio) - 1)  # of a single token the variance is 0
    found = {
        "loss/policy": policy,
        "loss/value": value,
        "loss/total": loss,
        "policy/approxkl": log_ratio.square().mean() / 2,
        "policy/policykl": -log_ratio.mean(),
        "policy/clipfrac": (per_token > -advantages * ratio).float().mean(),
        "policy/advantages": advantages,
        "policy/advantages_mean": advantages.mean(),
        "policy/ratio": ratio,
        "returns/mean": returns.mean(),
        "returns/var": returns.var(correction=one),
        "val/vpred": values.mean(),
        "val/error": (values - returns).square().mean(),
        "val/clipfrac": value_clipped.float().mean(),
        "val/mean": old["values"].mean(),
        "val/var": old["values"].var(correction=one),
    }
    return loss, {name: value.detach() for name, value in found.items()}


# -- the trainer -------------------------------------------------------------------------------------------------------
class PPOTrainer:
    """PPO on responses that the caller draws and scores.

    Forward passes are without dropout, so that the first ratio is 1.

    Args:
        config: see `PPOConfig`.
        model: the policy with its value head.
        ref_model: the reference, with a head or without. None: the model with its adapter switched off if it has one,
            otherwise a frozen copy.
        tokenizer: has the token that ends a response, for `generate`; is saved with the model.
        dataset: what `dataloader` shuffles into batches; a last, smaller batch is dropped.
        optimizer: default: Adam on what requires a gradient.
        data_collator: of `dataloader`.
        num_shared_layers: of `create_reference_model`, if the copy is made here.
        lr_scheduler: stepped once per call of `step`.

    Attributes:
        accelerator: device, processes, precision, trackers.
        kl_ctl: the controller of the KL coefficient.
        running: count, mean and standard deviation of the scores so far.
        current_step: calls of `step` so far.

    Raises:
        ConfigError: the model has no value head, or is its own reference.
        DatasetError: the dataset has fewer rows than a batch.
        StabilityError: what is experimental is refused in this process.
    """

    def __init__(
        self,
        config: PPOConfig,
        model: AutoModelForCausalLMWithValueHead,
        ref_model: nn.Module | None = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: Any = None,
        data_collator: Any = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
    ) -> None:
        get_config("trl-ppo:ppo")  # the distribution's tag holds for this interface too: warns, or is refused
        what = f"PPO needs a model with a value head, got a {type(model).__name__}."
        mend = "Wrap it: AutoModelForCausalLMWithValueHead.from_pretrained(model)."
        require(isinstance(model, AutoModelForCausalLMWithValueHead), what, mend)
        same = any(ref_model is module for module in model.modules())
        require(not same, "The reference is the model that is trained.", "Pass create_reference_model(model), or None.")
        self.config, self.tokenizer, self.current_step = config, tokenizer, 0
        self.accelerator = Accelerator(
            log_with=config.log_with,
            step_scheduler_with_optimizer=False,  # but once per call of `step`
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
            project_config=ProjectConfiguration(**config.project_kwargs or {}),
            **config.accelerator_kwargs or {},
        )
        set_seed(config.seed, device_specific=True)
        if config.log_with is not None:
            plain = {name: value for name, value in asdict(config).items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers(config.tracker_project_name, plain, config.tracker_kwargs or {})
        if ref_model is None and not model.is_peft_model:
            ref_model = create_reference_model(model, num_shared_layers)
        self.ref_model = None if ref_model is None else ref_model.to(self.accelerator.device).eval()
        disable_dropout(model)
        if optimizer is None:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
        self.dataloader = None if dataset is None else self._make_dataloader(dataset, data_collator, model)
        self.model, self.optimizer = self.accelerator.prepare(model.eval(), optimizer)
        self.lr_scheduler = lr_scheduler and self.accelerator.prepare(lr_scheduler)
        self.kl_ctl: Any = FixedKLController(config.init_kl_coef)
        if config.adap_kl_ctrl:
            self.kl_ctl = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        self.running = RunningMoments()

    def _make_dataloader(self, dataset: Any, data_collator: Any, model: nn.Module) -> Any:
        size = self.config.batch_size
        if len(dataset) < size * self.accelerator.num_processes:
            what = f"The dataset has {len(dataset)} rows, fewer than batch_size={size} for each process."
            raise errors.DatasetError(what, mend="Set a smaller batch_size, or bring more rows.")
        if self.config.remove_unused_columns and hasattr(dataset, "column_names"):
            used = {*inspect.signature(model.forward).parameters, "label", "query", "response"}
            dataset = dataset.remove_columns([name for name in dataset.column_names if name not in used])
        loader = DataLoader(dataset, size, True, drop_last=True, collate_fn=data_collator, generator=torch.Generator())
        return self.accelerator.prepare(loader)

    # -- one step ------------------------------------------------------------------------------------------------------
    def step(self, queries, responses, scores, response_masks=None) -> dict[str, Any]:
        """Learn from scored responses.

        Args:
            queries: `batch_size` 1-D tensors of token ids.
            responses: as many 1-D tensors of token ids.
            scores: as many tensors of one number.
            response_masks: as many tensors of 0 and 1, as long as the response; 0: not learned from.

        Returns:
            Statistics by name: numbers, and for some numpy arrays.

        Raises:
            StepInputError: an argument has another form.
            NonFiniteLossError: the loss of a mini-batch is NaN or infinite.
        """
        config, clock = self.config, [time.perf_counter()]
        rows, scores = self._checked(queries, responses, scores, response_masks)
        self._annotate(rows)
        clock.append(time.perf_counter())
        scores = self._scaled(scores)
        rewards = token_rewards(rows, scores, self.kl_ctl.value, config.whiten_rewards)
        clock.append(time.perf_counter())
        rows.notes |= estimates(rows, rewards, config.gamma, config.lam)
        clock.append(time.perf_counter())
        found = self._optimize(rows)
        clock.append(time.perf_counter())
        stats = self._statistics(rows, scores, found)
        clock.append(time.perf_counter())
        if (kl := stats["objective/kl"]) < -1:
            warnings.warn(f"objective/kl is {kl:.2f}, no KL: were some tokens left out in sampling?", stacklevel=2)
        self.kl_ctl.update(kl, config.batch_size * self.accelerator.num_processes)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.current_step += 1
        spans = zip(_PHASES, clock, clock[1:], strict=False)
        stats |= {f"time/ppo/{phase}": end - start for phase, start, end in spans}
        return {**stats, "time/ppo/total": clock[-1] - clock[0]}

    def _checked(self, queries, responses, scores, masks) -> tuple[TokenRows, Tensor]:
        size, given = self.config.batch_size, {"queries": queries, "responses": responses, "scores": scores}
        for name, tensors in (given if masks is None else {**given, "response_masks": masks}).items():
            listed = isinstance(tensors, list) and all(isinstance(each, Tensor) for each in tensors)
            _expect(listed, f"{name} is no list of tensors.", "Pass a list with one tensor per row.")
            _expect(len(tensors) == size, f"{name} has {len(tensors)} entries.", f"Pass batch_size of them, {size}.")
        masks = [torch.ones_like(response) for response in responses] if masks is None else masks
        for i, (query, response, score, mask) in enumerate(zip(queries, responses, scores, masks, strict=True)):
            for name, ids in (("queries", query), ("responses", response)):
                fits = ids.dim() == 1 and len(ids) > 0 and not ids.is_floating_point()
                _expect(fits, f"{name}[{i}] is {_described(ids)}.", "Pass a 1-D tensor of one or more token ids.")
            fits = score.numel() == 1 and score.dim() < 2 and bool(score.isfinite())
            _expect(fits, f"scores[{i}] is {_described(score)}.", "Pass a tensor of one finite number.")
            what = f"response_masks[{i}] is {_described(mask)}, its response {_described(response)}."
            _expect(mask.shape == response.shape and bool(mask.any()), what, "Pass as many entries, not all of them 0.")
        ids, answers = ([each.tolist() for each in tensors] for tensors in (queries, responses))
        kept = [mask.bool().tolist() for mask in masks]
        numbers = torch.tensor([float(score) for score in scores], device=self.accelerator.device)
        return TokenRows.from_lists(ids, answers, loss_mask=kept).to(numbers.device), numbers

    def _scaled(self, scores: Tensor) -> Tensor:
        config = self.config
        if config.use_score_scaling:
            self.running.update(self.accelerator.gather(scores))
            scores = (scores - self.running.mean * config.use_score_norm) / self.running.std
        return scores if config.score_clip is None else scores.clamp(-config.score_clip, config.score_clip)

    def _forward(self, model: nn.Module, rows: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
        """(T, V) float32 logits, (T,) log-probabilities, and (T,) values if the model has a value head."""
        prompts = rows.prompt_ids.split(rows.prompt_lengths.tolist())
        completions = rows.completion_ids.split(rows.completion_lengths.tolist())
        lines = [torch.cat(row) for row in zip(prompts, completions, strict=True)]
        # Padded on the right whatever the tokenizer does: so every model numbers its positions from 0.
        mask = pad_sequence([torch.ones_like(line) for line in lines], batch_first=True)
        with self.accelerator.autocast():
            output = model(input_ids=pad_sequence(lines, batch_first=True), attention_mask=mask, use_cache=False)
        row, step = places(rows)
        at = row, rows.prompt_lengths[row] - 1 + step
        logits = output[0][at].float()
        logps = -F.cross_entropy(logits, rows.completion_ids[rows.loss_mask], reduction="none")
        return logits, logps, output[2][at] if isinstance(output, tuple) else logps

    def _as_reference(self) -> Any:
        """While this is entered, `self.ref_model`, or without one the policy, is the reference."""
        if self.ref_model is not None:
            return contextlib.nullcontext()
        return self.accelerator.unwrap_model(self.model).disable_adapter()

    @torch.no_grad()
    def _annotate(self, rows: TokenRows) -> None:
        """Note what the policy and the reference say before any update, a mini-batch at a time."""
        self.model.eval()
        parts = []
        for part in rows.split(self.config.mini_batch_size):
            logits, logps, values = self._forward(self.model, part)
            with self._as_reference():
                ref_logits, ref_logps, _ = self._forward(self.ref_model or self.model, part)
            kls = kl_penalty(self.config.kl_penalty, logps, ref_logps, logits, ref_logits)
            parts.append((logps, ref_logps, values, kls))
        joined = map(torch.cat, zip(*parts, strict=True))
        rows.notes |= zip(("logps", "ref_logps", "values", "kls"), joined, strict=True)

    def _optimize(self, rows: TokenRows) -> list[dict[str, Tensor]]:
        """`ppo_epochs` passes; the statistics of each mini-batch."""
        config, found = self.config, []
        self.optimizer.zero_grad()  # a step that failed may have left gradients
        # Gradient checkpointing acts in training mode only; with dropout at 0 that mode changes nothing else.
        self.model.train(any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()))
        for _ in range(config.ppo_epochs):
            for window in torch.randperm(rows.num_rows).split(config.backward_batch_size):
                chunks = window.split(config.mini_batch_size)
                for chunk in chunks:
                    part, last = rows.take(chunk), chunk is chunks[-1]
                    with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                        logits, logps, values = self._forward(self.model, part)
                        loss, stats = ppo_loss(part, logps, values, config)
                        if not loss.isfinite():
                            what = f"The loss of a mini-batch is {loss.item()}."
                            raise errors.NonFiniteLossError(what, mend="Lower learning_rate, or set max_grad_norm.")
                        self.accelerator.backward(loss / len(chunks))
                    entropy = torch.special.entr(logits.detach().softmax(-1)).sum(-1).mean()
                    found.append({**stats, "policy/entropy": entropy})
                if config.max_grad_norm is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            moved = found[-1]["policy/policykl"]
            if config.early_stopping and self.accelerator.reduce(moved, "mean") > 1.5 * config.target_kl:
                break
        self.model.eval()
        return found

    def _statistics(self, rows: TokenRows, scores: Tensor, found: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Means over all processes; what has an entry per row is gathered, and what has one per token is local."""
        notes, coefficient = rows.notes, self.kl_ctl.value
        kls = rows.sum_per_row(notes["kls"])
        stats = {
            "objective/kl": kls.mean(),
            "objective/kl_dist": self.accelerator.gather(kls),
            "objective/entropy": -rows.sum_per_row(notes["logps"]).mean(),
            "objective/logprobs": notes["logps"],
            "objective/ref_logprobs": notes["ref_logps"],
            "ppo/mean_non_score_reward": -coefficient * notes["kls"].mean(),
        }
        spread = {"ppo/{}_scores": scores, "tokens/queries_len_{}": rows.prompt_lengths.float()}
        spread["tokens/responses_len_{}"] = rows.completion_lengths.float()
        for name, values in spread.items():
            stats[name.format("mean")] = values.mean()
            stats[name.format("std")] = values.std(correction=min(1, len(values) - 1))  # of a single row: 0
        for name in found[0]:
            each = [mini_batch[name] for mini_batch in found]
            stats[f"ppo/{name}"] = torch.cat(each) if each[0].dim() else torch.stack(each).mean()
        numbers = [name for name, value in stats.items() if not value.dim()]
        means = self.accelerator.reduce(torch.stack([stats[name] for name in numbers]), "mean")
        stats |= zip(numbers, means, strict=True)
        stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
        shown = {name: value.cpu().numpy() if value.dim() else value.item() for name, value in stats.items()}
        rate = self.optimizer.param_groups[0]["lr"]
        return {**shown, "objective/kl_coef": coefficient, "ppo/learning_rate": rate}

    # -- around it -----------------------------------------------------------------------------------------------------
    def generate(
        self, query_tensor, length_sampler=None, batch_size=4, return_prompt=True, generate_ref_response=False, **kwargs
    ):
        """Draw responses.

        Args:
            query_tensor: one 1-D tensor of token ids, or a list of them.
            length_sampler: called for the most new tokens of each batch.
            batch_size: queries drawn for at a time.
            return_prompt: whether the query stands before the response.
            generate_ref_response: also draw from the reference.
            **kwargs: for the model's `generate`.

        Returns:
            (1, L) for one query, a list of 1-D tensors for a list, cut behind the first token that ends them; with
            `generate_ref_response` two such, the policy's and the reference's.

        Raises:
            StepInputError: a query is no 1-D tensor.
        """
        options = (query_tensor, length_sampler, batch_size, return_prompt)
        answer = self._drawn(self.model, *options, **kwargs)
        if not generate_ref_response:
            return answer
        with self._as_reference():
            return answer, self._drawn(self.ref_model or self.model, *options, **kwargs)

    def _drawn(self, model, queries, length_sampler, batch_size, return_prompt, **kwargs):
        model, listed = self.accelerator.unwrap_model(model), queries if isinstance(queries, list) else [queries]
        _expect(all(query.dim() == 1 for query in listed), "A query has not one dimension.", "Pass 1-D tensors.")
        owners = (kwargs.get("generation_config"), model.generation_config, self.tokenizer)
        named = [kwargs.get("eos_token_id"), *(getattr(owner, "eos_token_id", None) for owner in owners)]
        ends = torch.cat([torch.tensor([]), *(torch.tensor(each).reshape(-1) for each in named if each is not None)])
        drawn = []
        for chunk in (listed[i : i + batch_size] for i in range(0, len(listed), batch_size)):
            if length_sampler is not None:
                kwargs["max_new_tokens"] = length_sampler()
            ids = pad_sequence(chunk, batch_first=True, padding_side="left").to(self.accelerator.device)
            mask = pad_sequence([torch.ones_like(query) for query in chunk], batch_first=True, padding_side="left")
            output = model.generate(input_ids=ids, attention_mask=mask.to(ids.device), **kwargs)
            for query, response in zip(chunk, output[:, ids.shape[1] :], strict=True):
                found = torch.isin(response, ends.to(response)).nonzero()
                response = response[: found[0, 0] + 1] if len(found) else response
                drawn.append(torch.cat([query.to(response.device), response]) if return_prompt else response)
        return drawn if isinstance(queries, list) else drawn[0][None]

    def log_stats(self, stats, batch, rewards, columns_to_log=("query", "response")):
        """Send statistics, the mean and spread of the rewards, and a table of the texts to the trackers.

        Args:
            stats: what `step` returned.
            batch: a list of texts for each of `columns_to_log`.
            rewards: one number or tensor per row.
            columns_to_log: columns of the table, for trackers that have tables.

        Raises:
            StepInputError: a column is not in the batch.
        """
        missing = [name for name in columns_to_log if name not in batch]
        _expect(not missing, f"The batch has no {missing}.", "Add them, or name others in columns_to_log.")
        values = torch.tensor([float(reward) for reward in rewards], device=self.accelerator.device)
        every = self.accelerator.gather(values)
        logs = {**stats, "env/reward_mean": every.mean().item(), "env/reward_dist": every.cpu().numpy()}
        logs["env/reward_std"] = every.std(correction=min(1, len(every) - 1)).item()
        self.accelerator.log(logs, step=self.current_step)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_table"):
                data = list(zip(*(batch[name] for name in columns_to_log), values.tolist(), strict=True))
                tracker.log_table("game_log", columns=[*columns_to_log, "reward"], data=data, step=self.current_step)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write model, head and tokenizer to a folder, with the options of their `save_pretrained`."""
        self._each("save_pretrained", save_directory, kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload model, head and tokenizer to the Hub, with the options of their `push_to_hub`."""
        self._each("push_to_hub", repo_id, kwargs)

    def _each(self, method: str, where: Any, options: dict[str, Any]) -> None:
        for part in (self.accelerator.unwrap_model(self.model), self.tokenizer):
            if part is not None and self.accelerator.is_main_process:
                getattr(part, method)(where, **options)

    def save_state(self, folder: str | os.PathLike) -> None:
        """Write all that a run needs to go on as if it had not stopped: weights, optimizer, scheduler, random states,
        KL coefficient, running statistics. Call it between two steps, in every process.
        """
        file = Path(folder) / _STATE.format(self.accelerator.process_index)
        file.unlink(missing_ok=True)
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        state = {"kl_coef": self.kl_ctl.value, "running": vars(self.running), "current_step": self.current_step}
        file.write_text(json.dumps({**state, "random": torch.get_rng_state().tolist()}))  # last: it is complete

    def load_state(self, folder: str | os.PathLike) -> None:
        """Go on from what `save_state` wrote, in as many processes.

        Raises:
            CheckpointError: it was not written to the end.
        """
        file = Path(folder) / _STATE.format(self.accelerator.process_index)
        if not file.exists():
            what = f"There is no {file}: the state was not written to its end, or by fewer processes."
            raise errors.CheckpointError(what, mend="Load an earlier one, in as many processes as wrote it.")
        self.accelerator.load_state(str(folder))
        state = json.loads(file.read_text())
        self.kl_ctl.value, self.current_step = state["kl_coef"], state["current_step"]
        vars(self.running).update(state["running"])
        torch.set_rng_state(torch.tensor(state["random"], dtype=torch.uint8))


def _described(tensor: Tensor) -> str:
    return f"a {tensor.dtype} of shape {tuple(tensor.shape)}"


def _expect(condition: bool, what: str, mend: str) -> None:
    if not condition:
        raise StepInputError(what, mend=mend)
