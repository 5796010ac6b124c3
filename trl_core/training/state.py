"""What a checkpoint holds beside the model and the optimizer, and how its completeness is known.

`trl_core_state.json` is written last, atomically, and lists every file of the checkpoint with its size and checksum: a
checkpoint without it, or with files that do not fit, was not finished or is damaged. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import CheckpointError, HookResultError, TRLCoreError

STATE_FILE = "trl_core_state.json"
TENSOR_FILE = "trl_core_state.safetensors"
RUN_FILE = "trl_core_run.json"
"""Says whose a folder is; see `folder.RunFolder`."""
PARTIAL = ".trl_core_partial"
"""Folder beside checkpoints where they are written, and taken to be deleted, so that one of that name is whole."""
FORMAT = 2
"""Of the manifest; 1, which says no number, had sizes alone."""
_FREE = ("README.md",)
"""Files that a person may edit."""
_MEND = "Resume from an earlier checkpoint; resume_from_checkpoint=True takes the newest sound one."
_LONGEST_INTEGER = 4096
"""Bits of an integer that is written in decimals; Python refuses to read very long ones."""
_DEEPEST = 100

# What JSON cannot say is a dictionary with one of these as its only key.
_TENSOR, _ITEMS, _FLOAT, _INTEGER, _BYTES = "__tensor__", "__items__", "__float__", "__int__", "__bytes__"
_TUPLE, _SET, _FROZEN = "__tuple__", "__set__", "__frozenset__"
_NUMBERS: dict[Any, Any] = {_FLOAT: float, _INTEGER: lambda text: int(text, 16), _BYTES: bytes.fromhex}
_COLLECTIONS: dict[Any, Any] = {_TUPLE: tuple, _SET: set, _FROZEN: frozenset}
_TAGS = {_TENSOR, _ITEMS, *_NUMBERS, *_COLLECTIONS}


def split_tensors(value: Any, tensors: dict[str, Tensor], path: str = "", *, copy: bool = True) -> Any:
    """A JSON-able copy of nested containers, of which `join_tensors` makes the same again.

    Args:
        value: dicts, lists, tuples, sets, tensors, text, bytes, numbers, True, False and None.
        tensors: gets the tensors, under their path, which no two have in common.
        path: where `value` stands.
        copy: whether tensors are copied to the CPU.

    Raises:
        HookResultError: it holds something else, which would not come back as it is.
    """
    kind = type(value)
    if kind in (str, bool, type(None)) or (kind is int and value.bit_length() <= _LONGEST_INTEGER):
        return value
    if isinstance(value, float | str) and kind.__module__ == "numpy":
        return split_tensors(float(value) if isinstance(value, float) else str(value), tensors, path, copy=copy)
    if kind is float:
        return value if math.isfinite(value) else {_FLOAT: str(value)}
    if kind is int:
        return {_INTEGER: hex(value)}
    if kind is bytes:
        return {_BYTES: value.hex()}
    if path.count("/") > _DEEPEST:
        raise _cannot_hold(path, f"more than {_DEEPEST} containers inside each other")
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.device.type == "meta" or not _is_stored(value.dtype):
            raise _cannot_hold(path, f"a tensor of {value.dtype}, {value.layout} on {value.device}")
        plain = value.detach().resolve_conj().resolve_neg() if copy else value
        tensors[path] = plain.cpu().contiguous().clone() if copy else plain
        return {_TENSOR: path}

    def inner(item: Any, name: str) -> Any:
        return split_tensors(item, tensors, f"{path}/{name}", copy=copy)

    if kind in (dict, OrderedDict):
        if all(type(key) is str for key in value) and not (len(value) == 1 and value.keys() <= _TAGS):
            # Escaped, so that a key with a "/" leads nowhere else.
            return {k: inner(v, k.encode("unicode_escape").decode().replace("/", "\\x2f")) for k, v in value.items()}
        if any(isinstance(key, Tensor) for key in value):
            raise _cannot_hold(path, "a dictionary whose keys are tensors")
        return {_ITEMS: [[inner(k, f"key {i}"), inner(v, str(i))] for i, (k, v) in enumerate(value.items())]}
    for tag, made in {None: list, **_COLLECTIONS}.items():
        if kind is made or (made is tuple and kind is torch.Size):
            items = [inner(item, str(i)) for i, item in enumerate(value)]
            return items if tag is None else {tag: items}
    raise _cannot_hold(path, f"a {kind.__module__}.{kind.__qualname__}")


@functools.cache
def _is_stored(dtype: torch.dtype) -> bool:
    try:
        return bool(save({"": torch.empty(0, dtype=dtype)}))
    except Exception:
        return False


def _cannot_hold(path: str, what: str) -> HookResultError:
    _, _, owner, *place = f"{path}//".split("/")
    whose = f"state_dict of {owner!r} returned, at {'/'.join(place).strip('/')!r}," if "/hooks/" in path else path
    return HookResultError(
        f"{whose} {what}, which a checkpoint cannot hold.",
        mend="Return dicts, lists, tuples or sets of numbers, text, bytes, None and plain tensors: for an array "
        "torch.from_numpy(array), for a number of numpy number.item(), for an object a dict of what it holds.",
    )


def join_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `split_tensors`."""
    if isinstance(value, list):
        return [join_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    (tag, inner), *others = list(value.items()) or [("", None)]
    tag = "" if others else tag
    if tag == _TENSOR:
        return tensors[inner]
    if tag in _NUMBERS:
        return _NUMBERS[tag](inner)
    if tag == _ITEMS:
        return {join_tensors(k, tensors): join_tensors(v, tensors) for k, v in inner}
    if tag in _COLLECTIONS:
        return _COLLECTIONS[tag](join_tensors(item, tensors) for item in inner)
    return {key: join_tensors(item, tensors) for key, item in value.items()}


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


def read_run(folder: str | Path) -> dict[str, Any] | None:
    """The record of the run that a folder or a checkpoint belongs to; None if there is none."""
    file = Path(folder) / RUN_FILE
    try:
        # Of a pipe nothing is read: that would wait for ever.
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("run"), str) else None


def number_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint says."""
    return int(checkpoint.name.rpartition("-")[2])


def all_checkpoints(folder: str | Path) -> list[Path]:
    """All `checkpoint-<step>` folders, oldest step first, complete or not, whoever wrote them."""
    inside = Path(folder).iterdir() if Path(folder).is_dir() else []
    found = [path for path in inside if path.is_dir() and re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name)]
    return sorted(found, key=number_of)


def checkpoints(folder: str | Path) -> list[Path]:
    """Likewise, without those that are known to be of another run than the folder."""
    run = read_run(folder)
    return [p for p in all_checkpoints(folder) if run is None or (read_run(p) or run)["run"] == run["run"]]


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


def none_complete(folder: str | Path, wrong: list[str]) -> CheckpointError:
    """The error for a folder without a checkpoint to go on from, and what is wrong with those that are there."""
    listed = "".join(f"\n  - {what}" for what in wrong)
    return CheckpointError(
        f"There is no complete checkpoint in {str(folder)!r}.{listed}",
        mend="Start without resume_from_checkpoint, or point it to a checkpoint folder.",
    )


def read_named(checkpoint: str, folder: str | Path) -> dict[str, Any]:
    """The record of a checkpoint that a user names, for a run in `folder`; raises what `read_manifest` does."""
    inside = os.path.join(folder, checkpoint)
    if os.path.isdir(inside) and not os.path.isdir(checkpoint):  # asks nothing of names that no file can have
        raise CheckpointError(f"There is no checkpoint folder {checkpoint!r} here.", mend=f"Give {inside!r}.")
    return read_manifest(checkpoint)


def check_there(folder: str | Path, resume: str | bool) -> None:
    """See that there is a checkpoint to go on from, without reading all of its files.

    Args:
        folder: the one of the run.
        resume: a checkpoint folder, or True for one in `folder`.

    Raises:
        CheckpointError: there is none that is complete.
    """
    if resume is not True:
        read_named(str(resume), folder)
        return
    complete, wrong = _complete(checkpoints(folder))
    if not complete:
        raise none_complete(folder, [what for _, _, what in sorted(wrong)])


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
            wrong.append((number_of(path), path, error.what))
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
