"""What a checkpoint holds beside the model and the optimizer, and how its completeness is known.

`trl_core_state.json` is written last, atomically, and lists every file of the checkpoint with its size and checksum: a
checkpoint without it, or with files that do not fit, was not finished or is damaged. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import CheckpointError, TRLCoreError

STATE_FILE = "trl_core_state.json"
TENSOR_FILE = "trl_core_state.safetensors"
FORMAT = 2
"""Of the manifest; 1, which says no number, had sizes alone."""
_FREE = ("README.md",)
"""Files that a person may edit."""
_MEND = "Resume from an earlier checkpoint; resume_from_checkpoint=True takes the newest sound one."
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
    """Finish a checkpoint: from the moment this file exists it is complete, and all of it is on the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync(path)
        elif path.name not in (STATE_FILE, *_FREE):
            _sync(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path)}
    _sync(folder)
    record = json.loads(json.dumps({**record, "format": FORMAT, "files": files}))
    temporary = folder / (STATE_FILE + ".tmp")
    with open(temporary, "w") as file:
        json.dump({**record, "checksum": _checksum(record)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / STATE_FILE)
    _sync(folder)


def _sync(path: Path) -> None:
    """Let what was written reach the disk; where that cannot be asked of a folder, it is not."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(record: dict[str, Any]) -> str:
    """Of everything that a manifest says, however its text is laid out."""
    rest = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The record of a complete checkpoint, whose files are there and as long as they should be.

    Raises:
        CheckpointError: the folder is missing, was not finished, or is damaged, or a later version wrote it.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # asks nothing of names that no file can have
        raise CheckpointError(f"There is no checkpoint folder {str(folder)!r}.", mend=_MEND)
    try:
        # Of a pipe nothing is read: that would wait for ever.
        record = json.loads((folder / STATE_FILE).read_text()) if (folder / STATE_FILE).is_file() else None
        number = record.get("format", 1) if isinstance(record, dict) else 1
        later = type(number) is int and number > FORMAT
        files = {} if later else _files_of(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        files = None
    if files is None:
        raise CheckpointError(
            f"The checkpoint {folder.name!r} is not complete or not from trl-core: {STATE_FILE} is missing or damaged.",
            mend=_MEND,
        )
    if later:
        raise CheckpointError(
            f"The checkpoint {folder.name!r} has format {number}, of a later version of trl-core; this one reads up "
            f"to {FORMAT}.",
            mend="Update trl-core.",
        )
    for name, size in files.items():
        path = folder / name
        actual = path.stat().st_size if os.path.isfile(path) else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise CheckpointError(f"{name} of {folder.name!r} {found}; expected {size} bytes.", mend=_MEND)
    return dict(record or {})


def _files_of(record: Any) -> dict[str, int] | None:
    """The sizes of all files of a record; None, or any error, if it does not have the form of one, or was changed."""
    number = record.get("format", 1)
    files = {name: entry["size"] if number > 1 else entry for name, entry in record["files"].items()}
    kinds: dict[str, type] = {"composition": list, "options": dict, "state": dict}
    kinds |= {"step": int, "inputs": dict} if number > 1 else {}
    parts = (
        number == 1 or record["checksum"] == _checksum(record),
        all(isinstance(record[name], kind) for name, kind in kinds.items()),
        all(isinstance(part["algorithm"], str) for part in record["composition"]),
        all(type(size) is int for size in (number, *files.values())),
        all(not PurePath(name).is_absolute() and ".." not in PurePath(name).parts for name in files),
        {TENSOR_FILE, TRAINER_STATE_NAME} <= files.keys(),
    )
    return files if all(parts) else None


def verify(folder: Path, record: dict[str, Any]) -> None:
    """Compare the contents of a checkpoint's files with what was written; a record of format 1 has sizes alone.

    Raises:
        CheckpointError: a file has other contents.
    """
    for name, entry in record["files"].items():
        if isinstance(entry, dict):
            with loading(folder, name):
                same = _digest(folder / name) == entry["sha256"]
            if not same:
                raise CheckpointError(f"{name} of {folder.name!r} is damaged: its checksum is another.", mend=_MEND)


@contextlib.contextmanager
def loading(folder: str | Path, what: str) -> Iterator[None]:
    """What fails in the block is told as a fault of the checkpoint."""
    try:
        yield
    except TRLCoreError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{what} of {Path(folder).name!r} cannot be loaded: {reason}", mend=_MEND) from error


def read_state(folder: str | Path, record: dict[str, Any]) -> dict[str, Any]:
    """The trainer state in a record, with its tensors."""
    with loading(folder, TENSOR_FILE):
        state: dict[str, Any] = join_tensors(record["state"], load_file(Path(folder) / TENSOR_FILE))
    return state


def step_of(folder: Path, record: dict[str, Any]) -> int:
    """The optimizer steps done when the checkpoint was written, whatever the name of its folder says now."""
    if "step" not in record:
        with loading(folder, TRAINER_STATE_NAME):
            return int(TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step)
    return int(record["step"])


def checkpoints(folder: str | Path) -> list[Path]:
    """All `checkpoint-<step>` folders, oldest step first, complete or not."""
    found = [
        (int(match[1]), path)
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else [])
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d{1,18})", path.name, re.ASCII))
    ]
    return [path for _, path in sorted(found)]


def newest_complete(folder: str | Path) -> Path | None:
    """The complete checkpoint with the highest step; its contents are not compared."""
    return next((path for _, path, _ in _complete(checkpoints(folder))[0]), None)


def newest_sound(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the highest step that can be resumed from, and what is wrong with those after it."""
    complete, wrong = _complete(checkpoints(folder))
    for step, path, record in complete:
        try:
            check_resumable(path, record)
            verify(path, record)
        except CheckpointError as error:
            wrong.append((step, path, error.what))
        else:
            return path, [what for number, _, what in sorted(wrong) if number >= step]
    return None, [what for _, _, what in sorted(wrong)]


def _complete(
    folders: list[Path],
) -> tuple[list[tuple[int, Path, dict[str, Any]]], list[tuple[int, Path, str]]]:
    """(step, folder, record) of the complete ones, highest step first; and (number, folder, what) of the others."""
    complete, wrong = [], []
    for path in folders:
        try:
            record = read_manifest(path)
            complete.append((step_of(path, record), path, record))
        except CheckpointError as error:
            wrong.append((int(path.name.rpartition("-")[2]), path, error.what))
    return sorted(complete, key=lambda found: found[0], reverse=True), wrong


def check_resumable(folder: Path, record: dict[str, Any]) -> None:
    """Raise `CheckpointError` if a checkpoint holds no more than weights."""
    if record.get("save_only_model"):
        raise CheckpointError(
            f"{folder.name!r} holds no optimizer state: it was written with save_only_model=True.",
            mend="Start a new run from its weights: pass the folder as `model`.",
        )


def is_complete(checkpoint: Path) -> bool:
    """Whether `read_manifest` accepts the checkpoint."""
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False
    return True


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest complete checkpoints beside `newest` beyond the limit, and with them every incomplete one.

    Neither `newest` nor `best` is deleted.
    """
    if not limit or limit < 1:
        return
    kept = {newest, Path(best or newest)}
    others = [path for path in checkpoints(newest.parent) if path not in kept]
    complete = [path for path in others if is_complete(path)]
    complete.sort(key=lambda path: (path / STATE_FILE).stat().st_mtime)
    surplus = complete[: max(len(complete) + len(kept) - limit, 0)]
    for path in others:
        if path not in complete or path in surplus:
            shutil.rmtree(path, ignore_errors=True)
