"""The trainers of algorithms that learn from preference pairs: with a language model, or with a reward model."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from ..batch import Pairs, TokenRows
from ..data.formats import common_prefix
from ..data.tokenization import cut, prepare_pairs, prepare_ranked
from ..errors import CheckpointError, ConfigError
from ..models.loading import load_classifier
from ..models.logprobs import row_scores
from ..options import require
from ..stages.aggregate import pair_mean
from .offline import OfflineTrainer
from .state import read_state

logger = logging.getLogger(__name__)
_REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class _OnPairs(OfflineTrainer):
    """What trainers of pairs share."""

    forms: ClassVar[tuple[str, ...]] = ("preference",)
    calls: ClassVar[tuple[str, ...] | None] = ("extra_models", "reference_logps", "pair_loss", "after_step")

    def loss_weight(self, rows: TokenRows) -> float:
        """A micro-batch counts by its pairs."""
        return rows.num_rows / 2

    def pair_losses(self, pairs: Pairs, policy: Tensor, reference: Tensor | None) -> Tensor:
        """(P,) loss of each pair."""
        losses: Tensor = self.hooks.call.pair_loss(pairs=pairs, policy=policy, reference=reference)
        self.loss_parts = {f"pair_loss of {' and '.join(self.hooks.acting('pair_loss'))}": losses.detach()}
        return losses


class PairTrainer(_OnPairs):
    """Preference optimisation of a language model.

    Takes the arguments TRL's users know; see `CoreTrainer` for the common ones.

    Args:
        model: the policy: id, path or module.
        ref_model: the reference: id, path or module; default: a copy of the weights that are passed, or the policy
            without its adapter.
        **arguments: further arguments of the composed algorithms.

    A dataset holds rows of `prompt`, `chosen` and `rejected`, text or messages; without `prompt` it is what the two
    have in common.
    """

    tokenised: ClassVar[tuple[str, ...]] = ("prompt_ids", "chosen_ids", "rejected_ids")
    reference_released = False
    """Whether there is no reference any more for rows it has not scored."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **arguments: Any) -> None:
        # By dataset; flat, for the state of the run is asked for before each step.
        self.ref_logps: dict[str, dict[str, Tensor]] = {}
        super().__init__(model, args, ref_model=ref_model, **arguments)

    # -- data -----------------------------------------------------------------------------------------------------
    def tokenize(self, dataset: Any, split: str, tokenizer: Any, args: Any) -> Any:
        """Rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, not cut yet."""
        if args.precompute_ref_log_probs and not isinstance(dataset, Dataset):
            raise ConfigError(
                f"precompute_ref_log_probs=True, but {split} is a stream, which has no end to compute before.",
                mend="Leave it off, or load the dataset without streaming.",
            )
        return prepare_pairs(
            dataset,
            split,
            tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
        )

    def collate(self, rows: list[dict[str, Any]]) -> Pairs:
        """Pairs cut to `max_length`, the preferred row of each first."""
        args = self.context.args
        sides = [
            cut(row["prompt_ids"], row[side], args.max_length, args.truncation_mode)
            for row in rows
            for side in ("chosen_ids", "rejected_ids")
        ]
        pairs: Pairs = _pairs([prompt for prompt, _ in sides], [completion for _, completion in sides], rows)
        if rows and all(name in rows[0] for name in _REF_COLUMNS):
            values = [value for row in rows for name in _REF_COLUMNS for value in row[name]]
            pairs.ref_logps = torch.tensor(values, dtype=torch.float32)
        return pairs

    # -- the reference --------------------------------------------------------------------------------------------
    @property
    def rows_per_forward(self) -> int:
        """Both rows of each pair go together."""
        precomputing = self.args.precompute_ref_log_probs and self.args.precompute_ref_batch_size
        return 2 * int(precomputing or self.args.per_device_train_batch_size)

    def _precompute(self) -> None:
        """Score all pairs with the reference, in their order, and let go of its weights.

        A resumed run takes the values from the checkpoint: its model may not be the one the first run started from.
        """
        if not self.args.precompute_ref_log_probs or self.reference is None or self.ref_logps:
            return
        if self._resume is not None:
            if "train_dataset" in self._changed:
                raise CheckpointError(
                    "The checkpoint has the reference's log-probabilities of another train_dataset.",
                    mend="Resume with the dataset the run was started with, or without precompute_ref_log_probs.",
                )
            self.ref_logps = read_state(*self._resume)["ref_logps"]
        for split, dataset in self._named_datasets().items():
            if split not in self.ref_logps:
                self.ref_logps[split] = self._reference_pass(dataset)
            saved = self.ref_logps[split]
            rows = saved["logps"].split(saved["lengths"].tolist())
            if len(rows) != 2 * len(dataset):
                raise CheckpointError(
                    f"The checkpoint has the reference's log-probabilities of {len(rows) // 2} pairs; the dataset "
                    f"has {len(dataset)}.",
                    mend="Resume with the dataset the run was started with.",
                )
            for side, name in enumerate(_REF_COLUMNS):
                dataset = dataset.add_column(name, [row.numpy() for row in rows[side::2]])
            self._set_dataset(split, dataset)
        if self.reference.module is not None:
            self.reference.release()
            self.reference_released = True

    def _named_datasets(self) -> dict[str, Any]:
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        named = {"train": self.train_dataset, **{f"eval:{name}": dataset for name, dataset in evaluation.items()}}
        return {split: dataset for split, dataset in named.items() if dataset is not None}

    def _set_dataset(self, split: str, dataset: Any) -> None:
        if split == "train":
            self.train_dataset = dataset
        elif split == "eval:":
            self.eval_dataset = dataset
        else:
            self.eval_dataset[split.removeprefix("eval:")] = dataset  # type: ignore[index]

    @torch.no_grad()
    def _reference_pass(self, dataset: Any) -> dict[str, Tensor]:
        """The log-probabilities of all loss tokens, and how many each row has; each process scores its share."""
        size = self.rows_per_forward // 2
        starts = list(range(0, len(dataset), size))
        mine = starts[self.accelerator.process_index :: self.accelerator.num_processes]
        found: dict[int, list[Tensor]] = {}
        for start in mine:
            pairs = self.collate([dataset[i] for i in range(start, min(start + size, len(dataset)))])
            pairs = pairs.to(self.args.device)
            logps = self.hooks.call.reference_logps(samples=pairs).float()
            found[start] = list(logps.cpu().split(pairs.lengths.tolist()))
        everywhere = {start: rows for part in gather_object([found]) for start, rows in part.items()}
        rows = [row for start in starts for row in everywhere[start]]
        return {"logps": torch.cat(rows), "lengths": torch.tensor([row.numel() for row in rows])}

    def get_train_dataloader(self) -> Any:
        """As in `transformers.Trainer`."""
        self._precompute()
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `transformers.Trainer`; a dataset that is given here is tokenised."""
        if eval_dataset is self.eval_dataset:
            eval_dataset = None  # what the loop passes; it is about to get its columns
        self._precompute()
        if self.reference_released and isinstance(eval_dataset, Dataset | IterableDataset):
            raise ConfigError(
                "evaluate() got a new dataset, but the reference is gone: precompute_ref_log_probs=True let go of it.",
                mend="Pass the dataset as eval_dataset when the trainer is made.",
            )
        return super().get_eval_dataloader(eval_dataset)

    def _reference_logps(self, pairs: Pairs) -> Tensor | None:
        if not self.args.uses_reference:
            return None
        if pairs.ref_logps is not None:
            return pairs.ref_logps
        with torch.no_grad():
            logps: Tensor = self.hooks.call.reference_logps(samples=pairs)
        return logps.float()

    # -- loss -----------------------------------------------------------------------------------------------------
    def batch_loss(self, model: Any, rows: Pairs, accumulation: int) -> tuple[Tensor, Any]:
        """The mean over pairs of `pair_loss`."""
        reference = self._reference_logps(rows)
        scores = self.score(model, rows, "entropy", "accuracy", "mean_logit")
        rows.log_collision = scores.statistics.get("log_collision")
        losses = self.pair_losses(rows, scores.logps, reference)
        chosen = rows.expand(rows.is_chosen)
        for side, mask in (("chosen", chosen), ("rejected", ~chosen)):
            self._record(f"logits/{side}", scores.statistics["mean_logit"][mask].mean(), int(mask.sum()))
        self._record("entropy", scores.statistics["entropy"].mean(), scores.logps.numel())
        self._record("mean_token_accuracy", scores.statistics["accuracy"][chosen].mean(), int(chosen.sum()))
        return pair_mean(losses, accumulation), scores.output

    # -- state ----------------------------------------------------------------------------------------------------
    def _further_models(self) -> dict[str, nn.Module]:
        """Without the reference that precomputed values take the place of."""
        models = super()._further_models()
        return {n: m for n, m in models.items() if n != "reference" or not self.args.precompute_ref_log_probs}

    def state_of_run(self) -> dict[str, Any]:
        """Also the reference's log-probabilities, where they were computed before training."""
        return super().state_of_run() | {"ref_logps": self.ref_logps}


class ScoreTrainer(_OnPairs):
    """Training of a reward model: a sequence classifier with one output, read at the last token.

    Takes the arguments TRL's users know; see `CoreTrainer` for the common ones.

    Args:
        model: id, path or module of a sequence classifier, or id or path of a language model, which gets a new head.
        **arguments: further arguments of the composed algorithms.

    A dataset holds rows of `chosen` and `rejected`, with or without `prompt`, text or messages; a column `margin`, if
    there is one, says by how much the preferred completion is to be ahead.
    """

    tokenised: ClassVar[tuple[str, ...]] = ("chosen_ids", "rejected_ids")
    new_head = "score"

    def _check_parts(self, args: Any) -> None:
        require(
            args.max_tokens_per_forward is None,
            f"max_tokens_per_forward={args.max_tokens_per_forward} does not act on reward models.",
            "Leave it out, and lower per_device_train_batch_size.",
        )

    def _load_model(self, model: Any, args: Any) -> nn.Module:
        return load_classifier(model, args.model_init_kwargs, args.trust_remote_code)

    def _load_tokenizer(self, given: Any, policy: nn.Module, args: Any) -> Any:
        tokenizer = super()._load_tokenizer(given, policy, args)
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            self._separate_padding(tokenizer)
        # What loads the model later finds the last token by this id.
        policy.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # type: ignore[operator,union-attr]
        policy.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
        return tokenizer

    @staticmethod
    def _separate_padding(tokenizer: Any) -> None:
        """Pad with another special token than the terminator, or a batched score would be read before it."""
        own = {tokenizer.eos_token_id, tokenizer.bos_token_id}
        others = [token for token in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(token) not in own]
        used = tokenizer.chat_template or ""
        others = [token for token in others if token not in used] or others
        if others:
            tokenizer.pad_token = others[0]
            logger.info("The reward model pads with %r, since its pad token was the terminator.", others[0])
        else:
            logger.warning(
                "The pad token is the terminator %r, and there is no other special token. Training is not affected, "
                "but transformers will read batched scores before the terminator; set pad_token.",
                tokenizer.eos_token,
            )

    def _router_coefficient(self) -> float:
        return 0.0  # classifiers of transformers do not give that loss

    # -- data -----------------------------------------------------------------------------------------------------
    def tokenize(self, dataset: Any, split: str, tokenizer: Any, args: Any) -> Any:
        """Rows of `chosen_ids` and `rejected_ids`; those that are too long are left out."""
        return prepare_ranked(dataset, split, tokenizer, max_length=args.max_length, num_proc=args.dataset_num_proc)

    def collate(self, rows: list[dict[str, Any]]) -> Pairs:
        """Pairs whose prompt is the tokens that both rows start with."""
        prompts, completions = [], []
        for row in rows:
            sides = row["chosen_ids"], row["rejected_ids"]
            # Each side keeps a token of its own, whose score it is.
            shared = max(min(common_prefix(*sides), *(len(side) - 1 for side in sides)), 0)
            prompts += [side[:shared] for side in sides]
            completions += [side[shared:] for side in sides]
        return _pairs(prompts, completions, rows)

    # -- loss -----------------------------------------------------------------------------------------------------
    def batch_loss(self, model: Any, rows: Pairs, accumulation: int) -> tuple[Tensor, Any]:
        """The mean over pairs of `pair_loss`, of one score per row."""
        scores, output = row_scores(model, rows, pad_token_id=self.pad_token_id, layouts=self.layouts)
        losses = self.pair_losses(rows, scores, None)
        found = scores.detach()
        chosen, rejected = rows.sides(found)
        for name, value, reduce in (("min", found.min(), "min"), ("max", found.max(), "max")):
            self._record(f"{name}_reward", value, rows.num_rows, reduce)
        self._record("mean_reward", found.mean(), rows.num_rows)
        self._record("accuracy", (chosen > rejected).float().mean(), rows.num_pairs)
        self._record("margin", (chosen - rejected).mean(), rows.num_pairs)
        return pair_mean(losses, accumulation), output


def _pairs(prompts: list[list[int]], completions: list[list[int]], rows: list[dict[str, Any]]) -> Pairs:
    groups = [number for number in range(len(rows)) for _ in range(2)]
    margins = [row.get("margin") for row in rows for _ in range(2)]
    margin = None if None in margins else torch.tensor(margins, dtype=torch.float32)
    return Pairs.from_lists(prompts, completions, group=groups, margin=margin)
