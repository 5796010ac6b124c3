"""Dataset types of all algorithms: telling, converting and checking them.

Everything works row by row, so that a stream stays a stream; the functions on whole datasets map the functions on rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.fingerprint import generate_random_fingerprint, get_temporary_cache_files_directory

from ..errors import DatasetError
from .prompts import check_kind, expect, is_conversational

TYPES: dict[str, tuple[str, ...]] = {
    "stepwise": ("prompt", "completions", "labels"),
    "unpaired_preference": ("prompt", "completion", "label"),
    "preference": ("chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "prompt_only": ("prompt",),
    "language_modeling": ("messages",),
}
"""Dataset types and the columns they need, the more specific first. Language modelling may also be text."""

_CHAT = ("conversations", "messages", "prompt", "completion", "chosen", "rejected")
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
_MESSAGES = 'a list of {"role": ..., "content": ...} messages'


# -- telling -----------------------------------------------------------------------------------------------------------
def dataset_type(
    columns: Iterable[str], forms: Sequence[str] = tuple(TYPES), split: str = "The dataset", text_field: str = "text"
) -> str:
    """The type of a dataset by its columns; `is_conversational(row[column])` says in which of the two forms.

    Args:
        columns: their names, or a row.
        forms: the types to tell apart; a type that is not among them is not seen.
        split: how to call the dataset in messages.
        text_field: the column of plain language modelling.

    Raises:
        DatasetError: none of `forms`.
    """
    present = set(columns)
    if text_field in present or "conversations" in present:
        present.add("messages")
    for name, needed in TYPES.items():
        if name in forms and present.issuperset(needed):
            return name
    expected = {form: " + ".join(TYPES[form]) for form in TYPES if form in forms}
    if "language_modeling" in expected:
        expected["language_modeling"] += f", or {text_field}"
    raise DatasetError(
        f"{split} has the columns {sorted(columns)}; expected one of: "
        f"{'; '.join(f'{form} ({needed})' for form, needed in expected.items())}.",
        mend="Rename the columns, for example dataset.rename_column('question', 'prompt').",
    )


def first_row(dataset: Any, split: str) -> dict[str, Any]:
    """The first row; of a stream it is read ahead and comes again.

    Raises:
        DatasetError: no dataset, or an empty one.
    """
    check_kind(dataset, split)
    for row in dataset.with_format(None):
        return dict(row)
    raise DatasetError(f"{split} is empty.", mend="Check how it was loaded or filtered.")


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Column names; a stream that does not know its own is asked for its first row."""
    return list(dataset.column_names or next(iter(dataset), {}))


def uncached(dataset: Dataset | IterableDataset, num_proc: int | None = None) -> dict[str, Any]:
    """Options of `map` that neither look for an earlier result nor leave one behind.

    To find one, `datasets` would hash the function and the tokenizer in it, which takes seconds and fails for some.
    What does not fit the memory goes to the temporary folder of `datasets`, which is emptied at exit.
    """
    if isinstance(dataset, IterableDataset):
        return {}
    name = generate_random_fingerprint()
    file = str(Path(get_temporary_cache_files_directory()) / f"{name}.arrow") if dataset.cache_files else None
    return {"new_fingerprint": name, "cache_file_name": file, "num_proc": num_proc}


# -- converting --------------------------------------------------------------------------------------------------------
def _is_sharegpt(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in value or [0])


def to_chatml(row: dict[str, Any], where: str = "A row") -> dict[str, Any]:
    """A row with its ShareGPT columns as messages, and `conversations` called `messages`; others are left as they are.

    Raises:
        DatasetError: a role that has no counterpart.
    """
    converted = {}
    for column, value in row.items():
        if column in _CHAT and _is_sharegpt(value):
            for message in value:
                role = message["from"]
                expect(role in _ROLES, where, column, role, f"one of the roles {', '.join(_ROLES)}")
            value = [
                {"role": _ROLES[m["from"]], "content": m["value"]} | {k: m[k] for k in m if k not in ("from", "value")}
                for m in value
            ]
        converted["messages" if column == "conversations" else column] = value
    return converted


def maybe_convert_to_chatml(dataset: Any, split: str = "The dataset") -> Any:
    """A dataset in ShareGPT form as messages; any other as it is.

    Raises:
        DatasetError: no dataset, an empty one, or a row with a role that has no counterpart.
    """
    first = first_row(dataset, split)
    if to_chatml(first) == first:
        return dataset
    old = [name for name in columns_of(dataset) if name == "conversations" or _is_sharegpt(first[name])]
    return dataset.map(
        lambda row, i: to_chatml(dict(row), f"Row {i} of {split}"),
        with_indices=True,
        remove_columns=old,
        **uncached(dataset),
    )


def is_implicit(row: dict[str, Any]) -> bool:
    """Whether a preference row has its prompt within chosen and rejected.

    A text prompt beside whole conversations is only their first question once more.
    """
    return "prompt" not in row or (isinstance(row["prompt"], str) and isinstance(row.get("chosen"), list))


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences share from the start."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def check_different(row: dict[str, Any], where: str) -> None:
    """Raise `DatasetError` if chosen and rejected are the same: such a pair prefers nothing."""
    if row["chosen"] == row["rejected"]:
        raise DatasetError(f"{where} has the same text in 'chosen' and 'rejected'.", mend="Drop the row.")


def extract_prompt(row: dict[str, Any], where: str = "A row") -> dict[str, Any]:
    """A preference row with the longest common start of chosen and rejected, in messages or characters, as its prompt.

    A space before the difference stays with the completions, and so does the last message or character of a side that
    the other one continues: no completion is left empty.

    Raises:
        DatasetError: chosen and rejected are the same, share no message, or have not the form of 1.1.
    """
    row = to_chatml(row, where)
    check_row({key: row.get(key) for key in TYPES["preference"]}, where, "preference")
    check_different(row, where)
    chosen, rejected = row["chosen"], row["rejected"]
    shared = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if isinstance(chosen, str):
        shared -= chosen[:shared].endswith(" ")
    elif not shared:
        raise DatasetError(
            f"{where} has no prompt: 'chosen' and 'rejected' do not start with a common message.",
            mend="Add a column 'prompt', or give the whole conversation in both.",
        )
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def maybe_extract_prompt(dataset: Any, split: str = "The dataset") -> Any:
    """A preference dataset with explicit prompts (see `extract_prompt`); any other as it is."""
    first = first_row(dataset, split)
    if not {"chosen", "rejected"} <= set(first) or not is_implicit(to_chatml(first)):
        return dataset
    changed = [name for name in columns_of(dataset) if name in ("prompt", "chosen", "rejected")]
    return dataset.map(
        lambda row, i: extract_prompt(dict(row), f"Row {i} of {split}"),
        with_indices=True,
        remove_columns=changed,
        **uncached(dataset),
    )


def maybe_unpair_preference_dataset(dataset: Any, num_proc: int | None = None, split: str = "The dataset") -> Any:
    """A preference dataset as rows of prompt, completion and label; any other as it is.

    Of each batch of `map` all chosen come first, then all rejected; further columns are kept.
    """
    if not {"chosen", "rejected"} <= set(first_row(dataset, split)):
        return dataset
    dataset = maybe_extract_prompt(dataset, split)
    return dataset.map(_unpair, batched=True, remove_columns=columns_of(dataset), **uncached(dataset, num_proc))


def _unpair(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = len(batch["chosen"])
    rest = {name: batch[name] * 2 for name in batch if name not in ("chosen", "rejected")}
    return {**rest, "completion": batch["chosen"] + batch["rejected"], "label": [True] * rows + [False] * rows}


# -- checking ----------------------------------------------------------------------------------------------------------
def check_rows(dataset: Any, split: str, forms: Sequence[str] = tuple(TYPES), text_field: str = "text") -> str:
    """Check a dataset before training; of a stream only the first row, the others are for `check_row` when they come.

    Args:
        dataset: may have its conversations in ShareGPT form.
        split: how to call it in messages: "train_dataset", ...
        forms: the dataset types that are welcome.
        text_field: the column of plain language modelling.

    Returns:
        Which of `forms` it is.

    Raises:
        DatasetError: no dataset, no row, no columns of a welcome type, a row of another form, or a pair that prefers
            nothing.
    """
    first = first_row(dataset, split)
    kind = dataset_type(first, forms, split, text_field)
    rows = dataset.with_format(None) if isinstance(dataset, Dataset) else [first]
    for i, row in enumerate(rows):
        where = f"Row {i} of {split}"
        check_row(to_chatml(row, where), where, kind, text_field)
        if kind == "preference":
            check_different(row, where)
    return kind


def check_row(row: dict[str, Any], where: str, kind: str, text_field: str = "text") -> None:
    """Check one row, already in ChatML.

    Args:
        row: the values by column.
        where: how to call it in messages: "Row 3 of train_dataset".
        kind: the type that its dataset has.
        text_field: the column of plain language modelling.

    Raises:
        DatasetError: a value of another form, text beside messages, or an empty completion.
    """
    value: Any
    if kind == "language_modeling":
        column = "messages" if "messages" in row else text_field
        value = row.get(column)
        valid = is_conversational(value) if column == "messages" else isinstance(value, str)
        return expect(valid, where, column, value, _MESSAGES if column == "messages" else "a string")
    seen: dict[bool, str] = {}
    for column in dict.fromkeys(("prompt", *TYPES[kind])):
        value = row.get(column)
        plain = isinstance(value, str)
        if column == "label":
            expect(value in (0, 1), where, column, value, "True or False")
        elif column == "completions":
            valid = isinstance(value, list) and bool(value) and all(isinstance(step, str) for step in value)
            expect(valid, where, column, value, "a list of strings")
        elif column == "labels":
            valid = isinstance(value, list) and len(value) == len(row["completions"])
            expect(valid and all(label in (0, 1) for label in value), where, column, value, "one bool per completion")
        elif column != "prompt" or kind != "preference" or not is_implicit(row):
            expect(plain or is_conversational(value), where, column, value, f"a string, or {_MESSAGES}")
            seen[plain] = column
            filled = column == "prompt" or (bool(value) if plain else all(map(_says_something, value)))
            expect(filled, where, column, value, "a completion that is not empty")
    if len(seen) > 1:
        raise DatasetError(
            f"{where} has text in column {seen[True]!r} and messages in column {seen[False]!r}; expected one form.",
            mend="Convert one of the columns to the form of the other.",
        )


def _says_something(message: dict[str, Any]) -> bool:
    return any(value for key, value in message.items() if key != "role")  # a tool call comes without content
