"""Prompt-only datasets: checks before training, and rendering to token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..errors import DatasetError

_FORM = 'a string, or a list of {"role": ..., "content": ...} messages that ends with a user or tool turn'
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that go to the chat template of their row."""


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a non-empty list of messages."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(m, dict) and "role" in m and "content" in m for m in prompt)
    )


def check_prompt(prompt: Any, row: int | str, split: str) -> None:
    """Raise `DatasetError` unless the prompt has one of the two forms."""
    if isinstance(prompt, str) or is_conversational(prompt):
        return
    shown = repr(prompt)[:80]
    raise DatasetError(
        f"Row {row} of {split} has {shown} ({type(prompt).__name__}) in column 'prompt'; expected {_FORM}.",
        mend="Convert the column, or drop the row.",
    )


def check_dataset(
    dataset: Any, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None, template_kwargs: dict[str, Any]
) -> None:
    """Check a prompt-only dataset before training.

    Args:
        dataset: a `datasets.Dataset`; of an `IterableDataset` only the column names, if known, are checked.
        split: how to call it in messages: "train_dataset", ...
        tokenizer: to count the tokens of prompts that might be too long.
        limit: tokens a prompt may have, or None.
        template_kwargs: options of the chat template.

    Raises:
        DatasetError: no dataset, no column `prompt`, no row, a row of another form, or a prompt over the limit.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DatasetError(
            f"{split} is a {type(dataset).__name__}; expected a datasets.Dataset or datasets.IterableDataset.",
            mend="Build one, for example with datasets.Dataset.from_list([{'prompt': ...}, ...]).",
        )
    if dataset.column_names is not None and "prompt" not in dataset.column_names:
        raise DatasetError(
            f"{split} has no column 'prompt'; its columns are {dataset.column_names}. Expected in 'prompt': {_FORM}.",
            mend="Rename the column: dataset.rename_column('...', 'prompt').",
        )
    if isinstance(dataset, IterableDataset):
        return
    if len(dataset) == 0:
        raise DatasetError(f"{split} is empty.", mend="Check how it was loaded or filtered.")
    for row, prompt in enumerate(dataset["prompt"]):
        check_prompt(prompt, row, split)
        if limit is not None and _bytes(prompt) > limit:
            check_length(prompt, row, split, tokenizer, limit, {**template_kwargs, **_row_kwargs(dataset, row)})


def _row_kwargs(dataset: Dataset, row: int) -> dict[str, Any]:
    if not set(TEMPLATE_COLUMNS) & set(dataset.column_names):
        return {}
    return template_arguments(dataset[row])


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """What a dataset row adds to the chat template's arguments."""
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    return {**({"tools": tools} if tools else {}), **(kwargs or {})}


def _bytes(prompt: Any) -> int:
    """Upper bound of the tokens of a prompt's text: no tokenizer makes more tokens than bytes (plus the template's)."""
    text = prompt if isinstance(prompt, str) else "".join(str(m["content"]) for m in prompt)
    return len(text.encode()) + (16 if isinstance(prompt, str) else 64 + 32 * len(prompt))


def check_length(
    prompt: Any, row: int | str, split: str, tokenizer: PreTrainedTokenizerBase, limit: int, kwargs: dict[str, Any]
) -> None:
    """Raise `DatasetError` if the prompt has more than `limit` tokens."""
    check_tokens(len(render(prompt, tokenizer, kwargs)), row, split, limit)


def check_tokens(tokens: int, row: int | str, split: str, limit: int | None) -> None:
    """Raise `DatasetError` if a prompt of so many tokens is over the limit."""
    if limit is not None and tokens > limit:
        raise DatasetError(
            f"Row {row} of {split}: the prompt has {tokens} tokens; at most {limit} fit beside max_completion_length "
            "in the model's positions.",
            mend="Drop or shorten the row, or lower max_completion_length.",
        )


def render(prompt: Any, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> list[int]:
    """Token ids of a prompt.

    Messages go through the chat template as a whole, with the generation prompt; a final assistant message is
    continued instead. Text gets the tokenizer's own special tokens.

    Raises:
        DatasetError: messages, but the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise DatasetError(
            "The prompts are conversations but the tokenizer has no chat template.",
            mend="Set processing_class.chat_template, or give the prompts as text.",
        )
    continued = prompt[-1]["role"] == "assistant"
    messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    ids = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=not continued,
        continue_final_message=continued,
        tokenize=True,
        return_dict=False,
        **template_kwargs,
    )
    return list(ids)


def as_completions(prompts: Iterable[Any], texts: Iterable[str]) -> list[Any]:
    """Decoded texts in the form of their prompts: text, or one assistant message."""
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
