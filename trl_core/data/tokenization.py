"""From checked rows to token ids: where a prompt ends, what ends a completion, which tokens are trained on.

A prompt is never tokenised apart from its completion and joined: the boundary is where the ids of the prompt and of the
whole stop to agree. Masks come from lengths, never from ids, so that a pad token that is also the end is no trap.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DatasetError
from .formats import (
    check_different,
    check_row,
    columns_of,
    common_prefix,
    dataset_type,
    extract_prompt,
    first_row,
    is_implicit,
    to_chatml,
    uncached,
)
from .packing import pack_dataset
from .prompts import TEMPLATE_COLUMNS, apply_template, expect, render, template_arguments

logger = logging.getLogger(__name__)

_IDS, _MASK = List(Value("int32")), List(Value("int8"))
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_Row = dict[str, Any]


# -- one row -----------------------------------------------------------------------------------------------------------
def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of plain text with the tokenizer's own special tokens, each at most once.

    A tokenizer that adds the beginning or the end itself does not double one that the text has, and a text without
    end, that is a prompt, gets none.
    """
    ids = list(tokenizer(text)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos] and text.startswith(str(tokenizer.bos_token)):
        ids = ids[1:]
    ended = eos is not None and text.endswith(str(tokenizer.eos_token))
    while ids and ids[-1] == eos:
        ids.pop()
    return [*ids, eos] if ended else ids


def whole_ids(
    prompt: Any,
    completion: Any,
    tokenizer: PreTrainedTokenizerBase,
    arguments: _Row,
    where: str,
    *,
    eos_token: str | None = None,
    assistant_mask: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and completion as one sequence, and a mask of ones or, if asked for, of assistant tokens.

    Plain text gets the end-of-sequence token unless it has it; what ends a conversation is up to its template.

    Args:
        prompt: text or messages; "" or [] if there is none.
        completion: in the same form.
        tokenizer: of the model.
        arguments: of the chat template, see `template_arguments`.
        where: how to call the row in messages.
        eos_token: the end, if it is not the tokenizer's own.
        assistant_mask: whether the template marks what the assistant says.

    Raises:
        ConfigError: plain text, but no end-of-sequence token.
        DatasetError: the chat template fails, or marks nothing as the assistant's.
    """
    if isinstance(completion, str):
        end = eos_token or tokenizer.eos_token
        unknown = {None} if end == tokenizer.unk_token else {None, tokenizer.unk_token_id}
        if end is None or tokenizer.convert_tokens_to_ids(end) in unknown:
            raise ConfigError(
                f"{end!r} is no token that can end a completion: it is not in the vocabulary.",
                mend="Set processing_class.eos_token (or eos_token, where there is such an option) to a token it has.",
            )
        ids = text_ids((prompt + completion).removesuffix(end) + end, tokenizer)
        return ids, [1] * len(ids)
    options = {"return_assistant_tokens_mask": True} if assistant_mask else {}
    found = apply_template(_join(prompt, completion), tokenizer, {**options, **arguments}, where)
    if assistant_mask and not any(found["assistant_masks"]):
        raise DatasetError(
            f"{where} has no assistant token to train on (assistant_only_loss=True).",
            mend="Drop rows without assistant messages, and see that the template marks them all.",
        )
    ids = list(found["input_ids"])
    return ids, list(found["assistant_masks"]) if assistant_mask else [1] * len(ids)


def _continued(prompt: Any, completion: Any) -> bool:
    ends = (*prompt[-1:], completion[0])
    forms = {type(message["content"]) for message in ends}  # None, text or parts
    return len(ends) == 2 and forms in ({str}, {list}) and all(message["role"] == "assistant" for message in ends)


def _join(prompt: Any, completion: Any) -> list[_Row]:
    """A completion that continues an assistant message becomes part of it, for apart it would be a new turn."""
    if not _continued(prompt, completion):
        return [*prompt, *completion]
    content = prompt[-1]["content"] + completion[0]["content"]
    return [*prompt[:-1], {**prompt[-1], **completion[0], "content": content}, *completion[1:]]


def boundary(
    prompt: Any,
    completions: Sequence[Any],
    wholes: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    arguments: _Row,
    where: str,
) -> int:
    """How many ids the prompt and all `wholes`, its ids together with each completion, share from the start.

    Warns once if that is not the whole prompt: tokens merge over the boundary, or the generation prompt has something
    that a rendered completion has not, such as an empty thinking block.

    Raises:
        DatasetError: the chat template renders earlier messages otherwise once a completion follows.
    """
    if isinstance(prompt, str):
        ids = text_ids(prompt, tokenizer)
    elif prompt[-1]["role"] != "assistant" or _continued(prompt, completions[0]):
        ids = render(prompt, tokenizer, arguments)
    else:
        ids = list(apply_template(prompt, tokenizer, arguments, where)["input_ids"])
    shared = min(common_prefix(ids, whole) for whole in wholes)
    if shared < len(ids):
        if not isinstance(prompt, str):
            _check_prefix(prompt, completions, tokenizer, {**arguments, "tokenize": False}, where)
        _warn_once(
            "Some prompts have other tokens alone than before their completion: tokens merge, or the generation prompt "
            "adds what the chat template leaves out of completions. The completion starts at the first difference."
        )
    return shared


def _check_prefix(
    prompt: Any, completions: Sequence[Any], tokenizer: PreTrainedTokenizerBase, options: _Row, where: str
) -> None:
    # Text is compared, not ids: merged tokens are no fault of the template.
    for completion in completions:
        kept = prompt[:-1] if _continued(prompt, completion) else prompt
        start = apply_template(kept, tokenizer, options, where) if kept else ""
        if not apply_template(_join(prompt, completion), tokenizer, options, where).startswith(start):
            raise DatasetError(
                f"{where}: the chat template rewrites earlier messages when a completion follows (it is not "
                "prefix-preserving), so that there is no place where the prompt ends.",
                mend="Set a chat template that keeps the history, or switch the rewriting off in chat_template_kwargs.",
            )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def encode_completions(
    prompt: Any,
    completions: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    arguments: _Row | None = None,
    where: str = "A row",
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of one or more completions of it, each ended; all share the same prompt ids.

    Args:
        prompt: text or messages.
        completions: in the same form.
        tokenizer: of the model.
        arguments: of the chat template, see `template_arguments`.
        where: how to call the row in messages.

    Raises:
        ConfigError: plain text, but no end-of-sequence token.
        DatasetError: the chat template fails, or does not keep the prompt.
    """
    arguments = arguments or {}
    wholes = [whole_ids(prompt, each, tokenizer, arguments, where)[0] for each in completions]
    at = boundary(prompt, completions, wholes, tokenizer, arguments, where)
    return wholes[0][:at], [whole[at:] for whole in wholes]


def cut(
    prompt_ids: list[int], completion_ids: list[int], max_length: int | None, truncation_mode: str = "keep_start"
) -> tuple[list[int], list[int]]:
    """Prompt and completion cut to `max_length` tokens together; None cuts nothing.

    Raises:
        ConfigError: the mode is neither "keep_start", the first tokens, nor "keep_end", the last ones.
    """
    if truncation_mode not in ("keep_start", "keep_end"):
        raise ConfigError(
            f"truncation_mode={truncation_mode!r} is unknown.", mend="Use one of: 'keep_start', 'keep_end'."
        )
    over = 0 if max_length is None else max(len(prompt_ids) + len(completion_ids) - max_length, 0)
    if truncation_mode == "keep_end":
        return prompt_ids[over:], completion_ids[max(over - len(prompt_ids), 0) :]
    kept = max(len(completion_ids) - over, 0)
    return prompt_ids[: len(prompt_ids) + len(completion_ids) - over], completion_ids[:kept]


# -- whole datasets ----------------------------------------------------------------------------------------------------
def _tokenize(
    dataset: Any, split: str, tokenized: Callable[[_Row, str], _Row | None], features: _Row, lost: str, num_proc: Any
) -> Any:
    """Map `tokenized`, which gives None for a row to leave out; `lost` says what such rows are."""
    mend = "Raise max_length, or shorten the rows."
    streaming = isinstance(dataset, IterableDataset)
    warned: list[bool] = []

    def rows(batch: _Row, indices: list[int]) -> _Row:
        given = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        found = [tokenized(row, f"Row {i} of {split}") for row, i in zip(given, indices, strict=True)]
        kept = [row for row in found if row is not None]
        if streaming and len(kept) < len(found) and not warned:
            warned.append(True)
            logger.warning(f"Rows of {split} that {lost} are left out. {mend}")
        return {name: [row[name] for row in kept] for name in features}

    prepared = dataset.with_format(None).map(
        rows,
        with_indices=True,
        batched=True,
        batch_size=1 if streaming else 1000,  # a stream gives each row as soon as it has it
        remove_columns=columns_of(dataset),
        features=Features(features),
        **uncached(dataset, num_proc),
    )
    if not streaming and len(prepared) < len(dataset):
        dropped = f"{len(dataset) - len(prepared)} of {len(dataset)} rows of {split} {lost}"
        if len(prepared) == 0:
            raise DatasetError(f"{dropped}: nothing is left to train on.", mend=mend)
        logger.warning(f"{dropped} and are left out. {mend}")
    return prepared


def prepare_language(
    dataset: Any,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_field: str = "text",
    max_length: int | None,
    truncation_mode: str = "keep_start",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    packing: bool = False,
    packing_strategy: str = "bfd",
    num_proc: int | None = None,
    formatting_func: Callable[[_Row], Any] | None = None,
    eos_token: str | None = None,
) -> Any:
    """Rows of text, messages, or prompt and completion, as rows to train a language model on.

    Tokenised rows, with `input_ids` and optionally `labels`, `completion_mask` and `assistant_masks`, are only cut and
    packed; those that are packed, with `seq_lengths`, stay as they are.

    Args:
        dataset: a `datasets.Dataset` or `datasets.IterableDataset`.
        split: how to call it in messages: "train_dataset", ...
        tokenizer: of the model.
        text_field: the column of plain text.
        max_length: tokens of a row, at most; None for no limit.
        truncation_mode: "keep_start" or "keep_end".
        completion_only_loss: None is True for rows of prompt and completion, False for others.
        assistant_only_loss: train only on what the template marks as the assistant's.
        packing: whether to put several rows in one, see `pack_dataset`.
        packing_strategy: one of `packing.STRATEGIES`.
        num_proc: processes of `Dataset.map`.
        formatting_func: makes text or messages of a row.
        eos_token: ends plain text, if it is not the tokenizer's own.

    Returns:
        A dataset of `input_ids` and `loss_mask`, of equal length, and of `seq_lengths` if bfd packed it. The first
        token of a row is never predicted; rows that have no other one to train on are left out, with a warning.

    Raises:
        ConfigError: options that exclude each other, or that the tokenizer has no means for.
        DatasetError: a row that cannot be used, see `check_rows`, or none that has something to train on.
    """
    given = set(first_row(dataset, split))
    tokenised, packed, kind = "input_ids" in given, "seq_lengths" in given, "language_modeling"
    if not tokenised and formatting_func is None:
        kind = dataset_type(given, ("prompt_completion", kind), split, text_field)
    has_completions = kind == "prompt_completion" or (tokenised and bool(given & {"completion_mask", "labels"}))
    if completion_only_loss and not has_completions:
        raise ConfigError(
            f"completion_only_loss=True, but {split} has no completions: its columns are {sorted(given)}"
            f"{', and formatting_func makes one text of them' if formatting_func else ''}.",
            mend="Give the columns prompt and completion without formatting_func, or set completion_only_loss=None.",
        )
    if assistant_only_loss and not tokenised and not _MARKER.search(str(tokenizer.chat_template)):
        raise ConfigError(
            "assistant_only_loss=True, but the chat template has no {% generation %} markers around what the assistant "
            "says.",
            mend="Set a chat template that has them, or give rows of prompt and completion.",
        )
    if packing and max_length is None:
        raise ConfigError("packing=True needs max_length, the length of a packed row.", mend="Set max_length.")
    limit = None if packed or (packing and packing_strategy != "bfd") else max_length
    features = {"input_ids": _IDS, "loss_mask": _MASK} | ({"seq_lengths": _IDS} if packed else {})

    def tokenized(row: _Row, where: str) -> _Row | None:
        if tokenised:
            ids, mask = _given_mask(row, where, completion_only_loss, assistant_only_loss)
        else:
            if formatting_func is not None:
                made = formatting_func(row)
                template = {name: row[name] for name in TEMPLATE_COLUMNS if name in row}
                row = {**template, "messages" if isinstance(made, list) else text_field: made}
            row = to_chatml(row, where)
            check_row(row, where, kind, text_field)
            whole = row["completion"] if has_completions else row["messages"] if "messages" in row else row[text_field]
            if assistant_only_loss and isinstance(whole, str):
                raise ConfigError(
                    f"assistant_only_loss=True needs messages, but {where} has text.", mend="Set it to False."
                )
            prompt, arguments = row["prompt"] if has_completions else whole[:0], template_arguments(row, where)
            ids, mask = whole_ids(
                prompt, whole, tokenizer, arguments, where, eos_token=eos_token, assistant_mask=assistant_only_loss
            )
            if has_completions and completion_only_loss is not False:
                at = boundary(prompt, [whole], [ids], tokenizer, arguments, where)
                mask = [0] * at + mask[at:]
        ids, mask = (cut(values, [], limit, truncation_mode)[0] for values in (ids, mask))
        return {**row, "input_ids": ids, "loss_mask": mask} if any(mask[1:]) else None

    lost = f"have no token to train on within max_length={max_length}"
    prepared = _tokenize(dataset, split, tokenized, features, lost, num_proc)
    return pack_dataset(prepared, max_length, packing_strategy) if packing and max_length and not packed else prepared


def _given_mask(
    row: _Row, where: str, completion_only_loss: bool | None, assistant_only_loss: bool
) -> tuple[list[int], list[int]]:
    """Ids and loss mask of a tokenised row: what all the masks it has agree on."""
    ids = row["input_ids"]
    used = {"assistant_masks": True, "loss_mask": True, "completion_mask": completion_only_loss is not False}
    masks = {name: row[name] for name in used if used[name] and name in row}
    expect("assistant_masks" in row or not assistant_only_loss, where, "assistant_masks", None, "a mask")
    if "labels" in row:
        valid = all(label in (-100, token) for label, token in zip(row["labels"], ids, strict=False))
        expect(valid, where, "labels", row["labels"], "-100 or the token itself, not shifted")
        masks["labels"] = [label != -100 for label in row["labels"]]
    for name, values in masks.items():
        expect(len(values) == len(ids), where, name, values, f"one value for each of {len(ids)} input_ids")
    mask = [int(all(values)) for values in zip([1] * len(ids), *masks.values(), strict=True)]
    documents = row.get("seq_lengths") or [len(ids)]
    expect(sum(documents) == len(ids), where, "seq_lengths", documents, f"the sum {len(ids)}, as there are input_ids")
    for start in itertools.accumulate(documents[:-1]):
        mask[start] = 0
    return ids, mask


def prepare_pairs(
    dataset: Any,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
) -> Any:
    """Preference rows as `prompt_ids`, `chosen_ids` and `rejected_ids`, uncut, and `margin` if there is that column.

    Implicit prompts are extracted. Rows that have these columns already are only filtered.

    Args:
        dataset: a `datasets.Dataset` or `datasets.IterableDataset`.
        split: how to call it in messages.
        tokenizer: of the model.
        max_length: tokens of prompt and completion, at most, see `cut`. Rows that `cut` would leave no completion token
            are left out, with a warning.
        truncation_mode: "keep_start" or "keep_end".
        num_proc: processes of `Dataset.map`.

    Raises:
        ConfigError: unknown truncation mode, or plain text but no end-of-sequence token.
        DatasetError: a row that cannot be used, see `check_rows`, or that prefers nothing; or none that fits.
    """
    cut([], [], max_length, truncation_mode)

    def tokenized(row: _Row, where: str) -> _Row | None:
        if not {"prompt_ids", "chosen_ids", "rejected_ids"} <= row.keys():
            row = to_chatml(row, where)
            check_row(row, where, "preference")
            check_different(row, where)
            row = extract_prompt(row, where) if is_implicit(row) else row
            arguments, completions = template_arguments(row, where), (row["chosen"], row["rejected"])
            prompt, (chosen, rejected) = encode_completions(row["prompt"], completions, tokenizer, arguments, where)
            row = {**row, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        full = truncation_mode == "keep_start" and max_length is not None and len(row["prompt_ids"]) >= max_length
        return None if full else _with_margin(row, where)

    lost = f"have a prompt of max_length={max_length} tokens or more"
    return _prepare_sides(dataset, split, tokenized, ("prompt_ids", "chosen_ids", "rejected_ids"), lost, num_proc)


def prepare_ranked(
    dataset: Any, split: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, num_proc: int | None = None
) -> Any:
    """Preference rows as whole sequences for a reward model: `chosen_ids` and `rejected_ids`, and `margin` if given.

    Rows with a longer side than `max_length` are left out, not cut: the score is read at the last token.

    Args:
        dataset: a `datasets.Dataset` or `datasets.IterableDataset`; rows that have the columns already are filtered.
        split: how to call it in messages.
        tokenizer: of the model.
        max_length: tokens of a side, at most.
        num_proc: processes of `Dataset.map`.

    Raises:
        ConfigError: plain text, but no end-of-sequence token.
        DatasetError: a row that cannot be used, see `check_rows`, or that prefers nothing; or none that fits.
    """

    def tokenized(row: _Row, where: str) -> _Row | None:
        if not {"chosen_ids", "rejected_ids"} <= row.keys():
            row = to_chatml(row, where)
            check_row(row, where, "preference")
            check_different(row, where)
            arguments = template_arguments(row, where)
            for side in ("chosen", "rejected"):
                prompt = row[side][:0] if is_implicit(row) else row["prompt"]
                row[f"{side}_ids"] = whole_ids(prompt, row[side], tokenizer, arguments, where)[0]
        longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        return _with_margin(row, where) if max_length is None or longest <= max_length else None

    lost = f"have a side of more than max_length={max_length} tokens"
    return _prepare_sides(dataset, split, tokenized, ("chosen_ids", "rejected_ids"), lost, num_proc)


def _prepare_sides(
    dataset: Any,
    split: str,
    tokenized: Callable[[_Row, str], _Row | None],
    columns: tuple[str, ...],
    lost: str,
    num_proc: int | None,
) -> Any:
    given = first_row(dataset, split)
    if not given.keys() >= set(columns):
        dataset_type(given, ("preference",), split)
    features = dict.fromkeys(columns, _IDS) | ({"margin": Value("float32")} if "margin" in given else {})
    return _tokenize(dataset, split, tokenized, features, lost, num_proc)


def _with_margin(row: _Row, where: str) -> _Row:
    margin = row.get("margin", 0.0)
    valid = isinstance(margin, int | float) and not isinstance(margin, bool) and math.isfinite(margin)
    expect(valid, where, "margin", margin, "a finite number")
    return row
