"""Datasets from what a user writes: a file, a folder or a Hub id, and a split where there are several."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)

from ..errors import ConfigError, DatasetError

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


_ENTRY = ("path", "name", "data_dir", "data_files", "split", "columns", "weight")
_MIXTURE = ("datasets", "streaming", "test_split_size", "seed", "stopping_strategy")


def load(
    given: str, config: str | None = None, *, split: str | None = None, default: str = "train", **options: Any
) -> Dataset | IterableDataset:
    """A dataset from a .json, .jsonl, .csv or .parquet file, a folder of such or of `save_to_disk`, or a Hub id.

    Args:
        given: path or id; `path:split` names the split.
        config: configuration of a Hub dataset.
        split: the split, if `given` does not name it.
        default: the split to take when there are several and none is named.
        **options: of `datasets.load_dataset`.

    Raises:
        DatasetError: not found, unreadable, or it is not clear which split is meant.
    """
    given = os.path.expanduser(given)
    match = None if split or Path(given).exists() else re.fullmatch(r"(.+?):(\w[^/\\]*)", given)
    source, split = match.groups() if match else (given, split)
    found = _read(source, config, split, options)
    if not isinstance(found, DatasetDict | IterableDatasetDict):
        return found
    name = split or (next(iter(found)) if len(found) == 1 else default)
    if name not in found:
        raise DatasetError(
            f"The dataset {source!r} has no split {name!r}; it has: {', '.join(found)}.",
            mend=f"Name one, for example {source}:{next(iter(found))}.",
        )
    return found[name]


def _read(source: str, config: str | None, split: str | None, options: dict[str, Any]) -> Any:
    path = Path(source)
    known = path.suffix in _BUILDERS
    looks_there = known or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", source)
    if (path.exists() and not path.is_dir() and not (known and path.is_file())) or (
        not path.exists() and looks_there and "://" not in source
    ):
        raise DatasetError(
            f"{source!r} is no dataset file or folder; expected files to end in {', '.join(_BUILDERS)}.",
            mend=f"Check the path; it is looked up in {str(Path.cwd())!r}.",
        )
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return load_from_disk(source)
        if path.is_file() and config:
            raise ConfigError(
                f"The file {source!r} has no configurations, so none is called {config!r}.",
                mend="Leave dataset_config out; it is for datasets of the Hub.",
            )
        if path.is_file():
            return load_dataset(_BUILDERS[path.suffix], data_files=source, split=split, **options)
        return load_dataset(source, config, split=split, **options)
    except ConfigError:
        raise
    except Exception as error:  # every reader raises its own
        cause = error.__cause__ or error
        raise DatasetError(
            f"The dataset {source!r} cannot be read: {_bad_line(path) or f'{type(cause).__name__}: {cause}'}",
            mend="Give a readable file or folder, or a Hub id that can be reached, with its split and dataset_config.",
        ) from error


def _bad_line(path: Path) -> str:
    """The first line of a file of JSON lines that is none, or that it has none; empty for all else."""
    if not path.is_file() or path.suffix not in _BUILDERS:
        return ""
    if not path.stat().st_size:
        return "it is empty."
    with contextlib.suppress(OSError), path.open("rb") as lines:
        for number, line in enumerate(lines if path.suffix == ".jsonl" else (), 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError) as error:
                return f"line {number} is no JSON: {error}"
            if not isinstance(row, dict):
                return f"line {number} is {line[:80].decode(errors='replace').strip()}, no row ({{...}})."
    return ""


def load_mixture(spec: dict[str, Any]) -> DatasetDict | IterableDatasetDict:
    """Several datasets as one, from what a YAML file says.

    Args:
        spec: `datasets`, a list of entries with `path` (as for `load`) and optionally `name` (the configuration),
            `data_dir`, `data_files`, `split` ("train"), `columns` (those to keep) and `weight`; and optionally
            `streaming`, `test_split_size` (rows or a part of one), `seed` (0) and `stopping_strategy` of
            `datasets.interleave_datasets`. With weights, rows are drawn from the entries in these proportions; without,
            the entries follow one another.

    Returns:
        The split `train`, and `test` if there is a `test_split_size`.

    Raises:
        ConfigError: an unknown or missing key, or keys that exclude each other.
        DatasetError: an entry that cannot be read, or entries whose columns do not go together.
    """
    _check_keys(spec, _MIXTURE, "datasets", "The mixture")
    entries, size, streaming = spec["datasets"], spec.get("test_split_size"), bool(spec.get("streaming"))
    if not isinstance(entries, list):
        raise ConfigError(f"datasets={entries!r} is no list of entries.", mend="Write '- path: ...' for each dataset.")
    if streaming and size is not None:
        raise ConfigError(
            f"test_split_size={size} needs the number of rows, which a stream does not have.",
            mend="Set streaming to False, or load the rows for evaluation from a split of their own.",
        )
    parts = [_load_entry(entry, f"datasets[{i}]", streaming) for i, entry in enumerate(entries)]
    weights, seed = [entry.get("weight") for entry in entries], spec.get("seed", 0)
    weighted = any(weight is not None for weight in weights)
    if weighted and not all(isinstance(weight, int | float) and weight > 0 for weight in weights):
        raise ConfigError(
            f"The weights of the datasets are {weights}; expected a positive number for each, or none at all.",
            mend="Give every entry a weight, or leave out an entry that is not to be drawn from.",
        )
    columns = "; ".join(f"datasets[{i}]: {part.column_names}" for i, part in enumerate(parts))
    mend = "Keep the same columns, of the same types, with `columns`; and check the options of the mixture."
    if len({frozenset(part.column_names) for part in parts if part.column_names}) > 1:  # datasets would fill in None
        raise DatasetError(f"The datasets cannot be mixed: their columns differ: {columns}.", mend=mend)
    try:
        if weighted:
            shares = [weight / sum(weights) for weight in weights]
            stop = spec.get("stopping_strategy", "first_exhausted")
            mixed = interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy=stop)
        else:
            mixed = concatenate_datasets(parts)
        if size is not None:
            return mixed.train_test_split(test_size=size, seed=seed)
    except ValueError as error:
        what = f"The datasets cannot be mixed: {error} Their columns are {columns}."
        raise DatasetError(what, mend=mend) from error
    return (DatasetDict if isinstance(mixed, Dataset) else IterableDatasetDict)({"train": mixed})


def _check_keys(given: Any, known: tuple[str, ...], needed: str, where: str) -> None:
    if not isinstance(given, dict) or not given.get(needed) or not given.keys() <= set(known):
        raise ConfigError(
            f"{where} is {given!r}; expected a mapping with {needed!r}, and of the keys {', '.join(known)} no others.",
            mend=f"Give {needed!r}, and check how the keys are spelled.",
        )


def _load_entry(entry: Any, where: str, streaming: bool) -> Any:
    _check_keys(entry, _ENTRY, "path", where)
    options = {key: entry[key] for key in ("data_dir", "data_files") if entry.get(key)}
    options |= {"streaming": True} if streaming else {}
    try:
        part = load(entry["path"], entry.get("name"), split=entry.get("split"), **options)
    except DatasetError as error:
        raise DatasetError(f"{where}: {error.what}", mend=error.mend) from error
    if streaming and isinstance(part, Dataset):  # from save_to_disk
        part = part.to_iterable_dataset()
    columns, known = entry.get("columns"), part.column_names
    if columns and known and not set(columns) <= set(known):
        raise DatasetError(
            f"{where} ({entry['path']}) lacks some of the columns {columns}; it has {known}.",
            mend="Correct `columns`.",
        )
    return part.select_columns(columns) if columns else part
