"""What a checkpoint holds beside the model and the optimizer, and how its completeness is known.

`trl_core_state.json` is written last, atomically, and lists every file of the checkpoint with its size: a checkpoint
without it, or with files that do not fit, was not finished. Nothing is pickled.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from ..errors import CheckpointError, HookResultError

STATE_FILE = "trl_core_state.json"
TENSOR_FILE = "trl_core_state.safetensors"
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


def checkpoints(folder: str | Path) -> list[Path]:
    """All `checkpoint-<step>` folders, oldest step first, complete or not."""
    found = [
        (int(match[1]), path)
        for path in (Path(folder).iterdir() if Path(folder).is_dir() else [])
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


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
