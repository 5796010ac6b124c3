"""Datasets from what a user writes: a file, a folder or a Hub id, and a split where there are several."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..errors import DatasetError

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load(given: str, config: str | None = None, *, default: str = "train") -> Dataset:
    """A dataset from a .json, .jsonl, .csv or .parquet file, a folder of such or of `save_to_disk`, or a Hub id.

    Args:
        given: path or id; `path:split` names the split.
        config: configuration of a Hub dataset.
        default: the split to take when there are several and none is named.

    Raises:
        DatasetError: not found, unreadable, or it is not clear which split is meant.
    """
    match = None if Path(given).exists() else re.fullmatch(r"(.+?):(\w[^/\\]*)", given)
    source, split = match.groups() if match else (given, None)
    found = _read(source, config, split)
    if not isinstance(found, DatasetDict):
        return found
    name = split or (next(iter(found)) if len(found) == 1 else default)
    if name not in found:
        raise DatasetError(
            f"The dataset {source!r} has no split {name!r}; it has: {', '.join(found)}.",
            mend=f"Name one, for example {source}:{next(iter(found))}.",
        )
    return found[name]


def _read(source: str, config: str | None, split: str | None) -> Any:
    path = Path(source)
    known = path.suffix in _BUILDERS
    if (path.is_file() and not known) or (not path.exists() and (known or source[0] in "./~")):
        raise DatasetError(
            f"{source!r} is no dataset file or folder; expected files to end in {', '.join(_BUILDERS)}.",
            mend=f"Check the path; it is looked up in {str(Path.cwd())!r}.",
        )
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return load_from_disk(source)
        if path.is_file():
            return load_dataset(_BUILDERS[path.suffix], data_files=source, split=split)
        return load_dataset(source, config, split=split)
    except Exception as error:  # every reader raises its own
        cause = error.__cause__ or error
        raise DatasetError(
            f"The dataset {source!r} cannot be read: {type(cause).__name__}: {cause}",
            mend="Give a readable file or folder, or a Hub id that can be reached, with its split and dataset_config.",
        ) from error
