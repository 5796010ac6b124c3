"""Prompt-only datasets: checks before training, and rendering to token ids."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..errors import DatasetError

_FORM = (
    'a string, or a list of {"role": ..., "content": ...} messages that ends with a user or tool turn; in place of '
    "the column, 'input_ids' may hold token ids"
)
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that go to the chat template of their row."""
TOKENS = "input_ids"
"""Column that may take the place of `prompt`, with tokenised prompts."""


def prompt_column(names: Collection[str]) -> str:
    """The column that holds the prompts: `prompt`, or the token ids where there is none."""
    return TOKENS if TOKENS in names and "prompt" not in names else "prompt"


def prompt_of(row: dict[str, Any]) -> Any:
    """The prompt of a dataset row; its token ids where it has no `prompt`."""
    return row.get(prompt_column(row))


def is_tokenised(prompt: Any) -> bool:
    """Whether a prompt is a non-empty list of token ids."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(token, int) for token in prompt)


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a non-empty list of messages."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(m, dict) and "role" in m and "content" in m for m in prompt)
    )


def expect(condition: bool, where: str, column: str, value: Any, expected: str) -> None:
    """Raise `DatasetError` about a value in a column unless the condition holds."""
    if not condition:
        raise DatasetError(
            f"{where} has {repr(value)[:80]} ({type(value).__name__}) in column {column!r}; expected {expected}.",
            mend="Convert the column, or drop the row.",
        )


def check_prompt(prompt: Any, row: int | str, split: str) -> None:
    """Raise `DatasetError` unless the prompt is text, messages or token ids."""
    fits = isinstance(prompt, str) or is_conversational(prompt) or is_tokenised(prompt)
    expect(fits, f"Row {row} of {split}", "prompt", prompt, _FORM)


def check_kind(dataset: Any, split: str) -> None:
    """Raise `DatasetError` unless it is a map-style or a streaming dataset."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DatasetError(
            f"{split} is a {type(dataset).__name__}; expected a datasets.Dataset or datasets.IterableDataset.",
            mend="Build one, for example with datasets.Dataset.from_list([{'prompt': ...}, ...]); of a DatasetDict "
            "take one split, such as dataset['train'].",
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
        DatasetError: no dataset, neither a column `prompt` nor `input_ids`, no row, a row of another form, or a prompt
            over the limit.
    """
    check_kind(dataset, split)
    column = prompt_column(dataset.column_names or ())
    if dataset.column_names is not None and column not in dataset.column_names:
        raise DatasetError(
            f"{split} has no column 'prompt'; its columns are {dataset.column_names}. Expected in 'prompt': {_FORM}.",
            mend="Rename the column: dataset.rename_column('...', 'prompt').",
        )
    if isinstance(dataset, IterableDataset):
        return
    if len(dataset) == 0:
        raise DatasetError(f"{split} is empty.", mend="Check how it was loaded or filtered.")
    for row, prompt in enumerate(dataset[column]):
        check_prompt(prompt, row, split)
        if limit is not None and _bytes(prompt) > limit:
            check_length(prompt, row, split, tokenizer, limit, {**template_kwargs, **_row_kwargs(dataset, row)})


def _row_kwargs(dataset: Dataset, row: int) -> dict[str, Any]:
    if not set(TEMPLATE_COLUMNS) & set(dataset.column_names):
        return {}
    return template_arguments(dataset[row])


def template_arguments(row: dict[str, Any], where: str = "A row") -> dict[str, Any]:
    """What a dataset row adds to the chat template's arguments.

    Args:
        row: may have `tools`, a list or its JSON string, and `chat_template_kwargs`, a mapping.
        where: how to call the row in messages.

    Raises:
        DatasetError: one of the two is something else.
    """
    tools, kwargs = row.get("tools") or [], row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):  # refused below, as the string it is
            tools = json.loads(tools)
    expect(isinstance(tools, list), where, "tools", tools, "a list of tools, or the JSON string of one")
    expect(isinstance(kwargs, dict), where, "chat_template_kwargs", kwargs, "a mapping of template options")
    return dict(_without_none({**({"tools": tools} if tools else {}), **kwargs}))


def _without_none(value: Any) -> Any:
    # Arrow gives every message, tool and mapping the keys of all of them; a template that asks whether a key is
    # defined would find what the row never had.
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _bytes(prompt: Any) -> int:
    """Upper bound of the tokens of a prompt's text: no tokenizer makes more tokens than bytes (plus the template's)."""
    if is_tokenised(prompt):
        return len(prompt)
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
    continued instead. Text gets the tokenizer's own special tokens. Token ids stay as they are.

    Raises:
        DatasetError: messages, but the tokenizer has no chat template, or the template fails on them.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if is_tokenised(prompt):
        return list(prompt)
    continued = prompt[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not continued, "continue_final_message": continued}
    return list(apply_template(prompt, tokenizer, {**template_kwargs, **options})["input_ids"])


def readable(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A prompt as rewards and logs get it: token ids as their text without special tokens, all else as it is."""
    return tokenizer.decode(prompt, skip_special_tokens=True) if is_tokenised(prompt) else prompt


def apply_template(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], where: str = "A prompt"
) -> Any:
    """Messages through the chat template: `input_ids` and what else is asked for, or with `tokenize=False` text.

    Args:
        messages: one conversation.
        tokenizer: has the template.
        options: of `apply_chat_template`, and what the template itself takes.
        where: how to call the row in messages.

    Raises:
        DatasetError: there is no chat template, or it fails on the messages.
    """
    if tokenizer.chat_template is None:
        raise DatasetError(
            "The prompts are conversations but the tokenizer has no chat template.",
            mend="Set processing_class.chat_template, or give the prompts as text.",
        )
    try:
        return tokenizer.apply_chat_template(
            _without_none(messages), **{"return_dict": options.get("tokenize", True), **options}
        )
    except Exception as error:  # templates raise what they like
        raise DatasetError(
            f"{where} does not go through the chat template: {type(error).__name__}: {error}",
            mend="Give the messages the roles, order and keys that the template knows, or set another template.",
        ) from error


def as_completions(prompts: Iterable[Any], texts: Iterable[str]) -> list[Any]:
    """Decoded texts in the form of their prompts: text, or one assistant message."""
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
