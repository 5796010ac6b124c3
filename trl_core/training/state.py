"""What a checkpoint holds beside the model and the optimizer, and how its completeness is known.

`trl_core_state.json` is written last, atomically, and lists every file of the checkpoint with its size: a checkpoint
without it, or with files that do not fit, was not finished. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError

STATE_FILE = "trl_core_state.json"
TENSOR_FILE = "trl_core_state.safetensors"
RUN_FILE = "trl_core_run.json"
"""Says whose a folder is; see `folder.RunFolder`."""
PARTIAL = ".trl_core_partial"
"""Folder beside checkpoints where they are written, and taken to be deleted, so that one of that name is whole."""
_TENSOR_KEY = "__tensor__"


def split_tensors(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A JSON-able copy of nested dicts and lists; tensors go to `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR_KEY: path}
    if isinstance(value, dict):
        return {str(key): split_tensors(item, tensors, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [split_tensors(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
    return value


def join_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `split_tensors`; tuples come back as lists."""
    if isinstance(value, dict):
        if set(value) == {_TENSOR_KEY}:
            return tensors[value[_TENSOR_KEY]]
        return {key: join_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [join_tensors(item, tensors) for item in value]
    return value


def write_tensors(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Write the tensors of `state` and return its JSON part."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = split_tensors(state, tensors)
    save_file(tensors or {"empty": torch.zeros(1)}, folder / TENSOR_FILE)
    return plain


def write_manifest(folder: Path, record: dict[str, Any]) -> None:
    """Finish a checkpoint: from the moment this file exists it is complete."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != STATE_FILE
    }
    temporary = folder / (STATE_FILE + ".tmp")
    with open(temporary, "w") as file:
        json.dump({**record, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / STATE_FILE)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The record of a complete checkpoint.

    Raises:
        CheckpointError: the folder is missing, was not finished, or a file is missing or cut short.
    """
    folder = Path(folder)
    mend = "Resume from an earlier checkpoint; resume_from_checkpoint=True takes the newest complete one."
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {str(folder)!r}.", mend=mend)
    try:
        record: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
        files: dict[str, int] = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The checkpoint {folder.name!r} is not complete or not from trl-core: {STATE_FILE} is missing or damaged.",
            mend=mend,
        ) from error
    for name, size in files.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise CheckpointError(f"{name} of {folder.name!r} {found}; expected {size} bytes.", mend=mend)
    return record


def read_state(folder: str | Path, record: dict[str, Any]) -> dict[str, Any]:
    """The trainer state in a record, with its tensors."""
    state: dict[str, Any] = join_tensors(record["state"], load_file(Path(folder) / TENSOR_FILE))
    return state


def read_run(folder: str | Path) -> dict[str, Any] | None:
    """The record of the run that a folder or a checkpoint belongs to; None if there is none."""
    try:
        record = json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("run"), str) else None


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint says."""
    return int(checkpoint.name.rpartition("-")[2])


def all_checkpoints(folder: str | Path) -> list[Path]:
    """All `checkpoint-<step>` folders, oldest step first, complete or not, whoever wrote them."""
    inside = Path(folder).iterdir() if Path(folder).is_dir() else []
    found = [path for path in inside if path.is_dir() and re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted(found, key=step_of)


def checkpoints(folder: str | Path) -> list[Path]:
    """Likewise, without those that are known to be of another run than the folder."""
    run = read_run(folder)
    return [p for p in all_checkpoints(folder) if run is None or (read_run(p) or run)["run"] == run["run"]]


def newest_complete(folder: str | Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    return next(filter(is_complete, reversed(checkpoints(folder))), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether `read_manifest` accepts the checkpoint."""
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False
    return True


def publish(partial: Path, checkpoint: Path) -> None:
    """Give a complete checkpoint its name, in the place of an earlier one of this run."""
    if checkpoint.exists():
        discard(checkpoint)
    os.replace(partial, checkpoint)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint so that no part of it is ever seen under its name."""
    (checkpoint.parent / PARTIAL).mkdir(exist_ok=True)
    aside = checkpoint.parent / PARTIAL / f"{checkpoint.name}-{uuid.uuid4().hex}"
    os.replace(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)


def rotate(newest: Path, limit: int | None, best: str | None, owned: Callable[[Path], bool]) -> None:
    """Delete the oldest complete checkpoints of this run beyond the limit, and with them every damaged one of it.

    Neither `newest` nor `best` is deleted, nor what this run did not write.
    """
    if not limit or limit < 1:
        return
    kept = {newest, Path(best or newest)}
    others = [path for path in checkpoints(newest.parent) if path not in kept and owned(path)]
    complete = [path for path in others if is_complete(path)]
    complete.sort(key=lambda path: (path / STATE_FILE).stat().st_mtime)
    surplus = complete[: max(len(complete) + len(kept) - limit, 0)]
    for path in others:
        if path not in complete or path in surplus:
            discard(path)


def check_origin(record: dict[str, Any], composition: list[dict[str, str]], options: dict[str, Any]) -> str | None:
    """What differs between the run that wrote a checkpoint and this one, or None.

    Args:
        record: from `read_manifest`.
        composition: `Composition.provenance()` of this run.
        options: this run's options that shape the mathematics.

    Raises:
        CheckpointError: the checkpoint is from another algorithm, or the same ones in another order.
    """
    theirs = [part["algorithm"] for part in record["composition"]]
    ours = [part["algorithm"] for part in composition]
    if theirs != ours:
        raise CheckpointError(
            f"The checkpoint was written by {'+'.join(theirs)!r}, this run is {'+'.join(ours)!r}.",
            mend="Resume with get_trainer of the same composition, or start a new run from the saved weights.",
        )
    # Compared as JSON, in which they were stored.
    now = json.loads(json.dumps(options, default=str))
    differing = [
        f"{name}: {record['options'].get(name)!r} then, {now.get(name)!r} now"
        for name in sorted({*record["options"], *now})
        if record["options"].get(name) != now.get(name)
    ]
    return "; ".join(differing) or None
