"""The trainer of algorithms that learn from a dataset of texts, and what supervised training adds to it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import Sampler

from ..batch import Texts, TokenRows
from ..data import formats
from ..data.tokenization import prepare_language
from ..errors import ConfigError
from ..models.loading import customize_tokenizer, load_tokenizer
from ..options import require
from ..stages.aggregate import Counters, aggregate, token_weights
from .base import CoreTrainer, rows_for_inspection
from .loader import EndlessStream, permutation


class EpochSampler(Sampler[int]):
    """All rows, in an order that depends on the seed and the epoch alone, so that a resumed run sees the same.

    Args:
        size: number of rows.
        seed: of the shuffle.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(permutation(self.size, (self.seed, self.epoch)))

    def __len__(self) -> int:
        return self.size


class OfflineTrainer(CoreTrainer):
    """Supervised fine-tuning, and the base of every trainer that learns from a dataset.

    Takes the arguments TRL's users know; see `CoreTrainer` for the common ones.

    Args:
        model: the policy: id, path or module.
        formatting_func: gives the text (or the messages) of a dataset row.
        **arguments: further arguments of the composed algorithms.

    A dataset holds rows of `text`, of `messages`, of `prompt` and `completion`, or of `input_ids`.
    """

    forms: ClassVar[tuple[str, ...]] = ("language_modeling", "prompt_completion")
    """Dataset types that `check_datasets` accepts."""
    calls: ClassVar[tuple[str, ...] | None] = ("extra_models", "loss_terms", "after_step")
    tokenised: ClassVar[tuple[str, ...]] = ("input_ids",)
    """Columns of rows that are tokenised already."""

    def __init__(
        self,
        model: Any,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], Any] | None = None,
        ref_model: Any = None,
        **arguments: Any,
    ) -> None:
        self.formatting_func = formatting_func
        self.note_inputs(formatting_func=formatting_func)
        self.num_tokens = 0
        self.window = torch.zeros(2, dtype=torch.long)
        self._arriving = 0
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            ref_model=ref_model,
            arguments=arguments,
        )
        require(
            not self.args.router_aux_loss_coef or self._router_coefficient() != 0.0,
            f"router_aux_loss_coef={self.args.router_aux_loss_coef}, but there is no such loss: the model is no "
            "mixture of experts, or a classifier.",
            "Leave it out.",
        )

    # -- data -----------------------------------------------------------------------------------------------------
    def check_datasets(self, train: Any, evaluation: Any, model: Any, tokenizer: Any, args: Any) -> None:
        """Check the form of the rows before the model is loaded."""
        if self.formatting_func is not None and "language_modeling" not in self.forms:
            raise ConfigError(
                f"{self.composition.name!r} takes no formatting_func: its rows are no single text.",
                mend="Give the dataset the columns it needs, for example with dataset.map.",
            )
        for split, dataset in _splits(train, evaluation) if model is None and self.formatting_func is None else ():
            if not formats.first_row(dataset, split).keys() >= set(self.tokenised):
                formats.check_rows(dataset, split, self.forms, getattr(args, "dataset_text_field", "text"))

    def _load_tokenizer(self, given: Any, policy: nn.Module, args: Any) -> Any:
        customize = functools.partial(
            customize_tokenizer,
            eos_token=args.eos_token,
            pad_token=args.pad_token,
            chat_template=args.chat_template_path,
            trust_remote_code=args.trust_remote_code,
        )
        return load_tokenizer(given, policy, args.trust_remote_code, customize)

    def prepare_datasets(self, train: Any, evaluation: Any, tokenizer: Any, args: Any) -> tuple[Any, Any]:
        """Tokenise, in every process at the same time; a stream is repeated, for the loop takes it for one epoch."""
        prepared = {
            split: self.tokenize(dataset, split, tokenizer, args) for split, dataset in _splits(train, evaluation)
        }
        if isinstance(train, IterableDataset):
            prepared["train_dataset"] = EndlessStream(prepared["train_dataset"], "train_dataset")
        if isinstance(evaluation, dict):
            evaluation = {name: prepared[f"eval_dataset[{name!r}]"] for name in evaluation}
        else:
            evaluation = prepared.get("eval_dataset")
        return prepared.get("train_dataset"), evaluation

    def tokenize(self, dataset: Any, split: str, tokenizer: Any, args: Any) -> Any:
        """Rows of `input_ids` and `loss_mask`; packed rows also have `seq_lengths`."""
        training = split == "train_dataset"
        packing = args.packing if training or args.eval_packing is None else args.eval_packing
        if training and args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        return prepare_language(
            dataset,
            split,
            tokenizer,
            text_field=args.dataset_text_field,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            packing=packing,
            packing_strategy=args.packing_strategy,
            num_proc=args.dataset_num_proc,
            formatting_func=self.formatting_func,
        )

    def collate(self, rows: list[dict[str, Any]]) -> TokenRows:
        """Documents of a micro-batch: of a packed row, each of its documents is a row."""
        ids, masks = [], []
        for row in rows:
            tokens, mask, start = row["input_ids"], row["loss_mask"], 0
            for size in row.get("seq_lengths") or [len(tokens)]:
                ids.append(tokens[start : start + size])
                masks.append(mask[start : start + size])
                start += size
        return Texts.from_lists(
            [row[:1] for row in ids],
            [row[1:] for row in ids],
            loss_mask=[mask[1:] for mask in masks],
            first_learned=torch.tensor([bool(mask[:1] and mask[0]) for mask in masks]),
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(len(dataset), int(seed))

    def get_train_dataloader(self) -> Any:
        """As in `transformers.Trainer`."""
        if self.train_dataset is None:
            raise ConfigError("train() needs a train_dataset.", mend="Pass train_dataset=...")
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `transformers.Trainer`; a dataset that is given here is tokenised."""
        if eval_dataset is self.eval_dataset:
            eval_dataset = None  # what the loop passes; it is tokenised
        if isinstance(eval_dataset, Dataset | IterableDataset):
            _, eval_dataset = self.prepare_datasets(None, eval_dataset, self.processing_class, self.args)
        elif eval_dataset is None and self.eval_dataset is None:
            raise ConfigError("evaluate() needs an eval_dataset.", mend="Pass eval_dataset=...")
        return super().get_eval_dataloader(eval_dataset)

    # -- steps ----------------------------------------------------------------------------------------------------
    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        """Count the tokens of an optimizer step over all processes, for the denominators."""
        counts = torch.zeros(2, dtype=torch.long, device=self.args.device)
        for rows in batch_samples:
            counts += torch.stack([self._denominator(rows), (rows.prompt_lengths + rows.completion_lengths).sum()])
        self.window = self.accelerator.reduce(counts, "sum").cpu()
        self._arriving = int(self.window[1])

    def _denominator(self, rows: Any) -> Tensor:
        """() int64, what a micro-batch adds to the denominator of its optimizer step."""
        if getattr(self.args, "token_normalizer", "predicted") == "labels":
            return rows.loss_mask.sum() + rows.first_learned.sum()  # type: ignore[no-any-return]
        return rows.loss_mask.sum()  # type: ignore[no-any-return]

    def _prepare_inputs(self, inputs: Any) -> Any:
        self.num_tokens += self._arriving
        self._arriving = 0
        return inputs.to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a micro-batch, already scaled for accumulation and processes."""
        training = self.context.training
        accumulation = self.current_gradient_accumulation_steps if training else 1
        context = torch.autograd.graph.save_on_cpu(pin_memory=True) if self._offloads else contextlib.nullcontext()
        with context:
            loss, output = self.batch_loss(model, inputs, accumulation)
        loss = self._add_router_loss(loss, output, accumulation)
        if training:
            loss = self.guard_loss(loss, lambda: rows_for_inspection(inputs, self.processing_class))
        return (loss, output) if return_outputs else loss

    @property
    def _offloads(self) -> bool:
        return bool(self.args.activation_offloading) and self.args.device.type == "cuda" and self.context.training

    def _router_coefficient(self) -> float:
        config = self.accelerator.unwrap_model(self.model).config
        if not hasattr(config, "output_router_logits"):
            return 0.0
        given = self.args.router_aux_loss_coef
        return float((getattr(config, "router_aux_loss_coef", None) or 0.0) if given is None else given)

    def batch_loss(self, model: Any, rows: Any, accumulation: int) -> tuple[Tensor, Any]:
        """The loss of a micro-batch, and what the model returned: the sum over tokens of all `loss_terms`.

        The denominator is the number of loss tokens of the whole optimizer step, over all processes.
        """
        scores = self.score(model, rows, "entropy", "accuracy")
        rows.entropy, rows.mean_logps = scores.statistics["entropy"], scores.statistics.get("mean_logp")
        processes = self.accelerator.num_processes if self.context.training else 1
        tokens = int(self.window[0] if self.context.training else self._denominator(rows))
        counters = Counters(rows=rows.num_rows, tokens=tokens, completion_tokens=tokens, slices=accumulation)
        weights = token_weights(
            rows, "dapo", counters, max_completion_length=1, accumulation=accumulation, processes=processes
        )
        terms = self.loss_terms(rows, scores.logps, None)
        self._record("entropy", _mean(scores.statistics["entropy"]), scores.logps.numel())
        self._record("mean_token_accuracy", _mean(scores.statistics["accuracy"]), scores.logps.numel())
        return aggregate(terms, weights, accumulation), scores.output

    def loss_weight(self, rows: TokenRows) -> float:
        """How much a micro-batch counts in the mean loss of an evaluation."""
        return float(rows.loss_mask.sum())

    def _evaluate_batch(self, batch: Any) -> int:
        # All batches of an evaluation are one tick of the metrics, so that their means are weighted.
        batch = batch.to(self.args.device)
        self._record("loss", self.compute_loss(self.model, batch), self.loss_weight(batch))
        return int(batch.num_rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also the number of tokens seen up to now, which is no mean over the logging interval."""
        super().log(logs | {"num_tokens": float(self.num_tokens)} if "loss" in logs else logs, start_time)

    # -- state ----------------------------------------------------------------------------------------------------
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `CoreTrainer.train`."""
        self.num_tokens = self._arriving = 0
        return super().train(*args, **kwargs)

    def state_of_run(self) -> dict[str, Any]:
        """Also the number of tokens seen."""
        return super().state_of_run() | {"num_tokens": self.num_tokens}

    def load_state_of_run(self, state: dict[str, Any]) -> None:
        """The inverse of `state_of_run`."""
        super().load_state_of_run(state)
        self.num_tokens = state["num_tokens"]


def _splits(train: Any, evaluation: Any) -> list[tuple[str, Any]]:
    named = (
        {f"eval_dataset[{name!r}]": dataset for name, dataset in evaluation.items()}
        if isinstance(evaluation, dict)
        else {"eval_dataset": evaluation}
    )
    return [(name, dataset) for name, dataset in {"train_dataset": train, **named}.items() if dataset is not None]


def _mean(values: Tensor) -> Tensor:
    return values.detach().sum() / max(values.numel(), 1)
