"""A folder belongs to a run: who it is, that one process at a time trains in it, and what of it may be deleted."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..discovery import core_version
from ..errors import OutputDirError, TRLCoreError
from .state import (
    PARTIAL,
    RUN_FILE,
    STATE_FILE,
    all_checkpoints,
    check_there,
    checkpoints,
    discard,
    is_complete,
    read_run,
)

LOCK_FILE = ".trl_core.lock"
METRICS_FILE = "metrics.jsonl"
COMPLETIONS = "completions/part-*"
_MEND = "Go on with it (resume_from_checkpoint=True; --resume true), take another output_dir, or replace it"
_MEND += " (overwrite_output_dir=True; --overwrite)."
_T = TypeVar("_T")


def on_main(work: Callable[[], _T]) -> _T:
    """What `work` gives in the main process, in all of them; what it raises there, all raise."""
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = work()
        except (TRLCoreError, OSError) as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    result: _T = answer[0]
    return result


class RunFolder:
    """The folder of a run.

    `trl_core_run.json` says whose it is, and a copy of it lies in each checkpoint. A checkpoint of this name without
    that copy, or with that of another run, is never touched.

    Attributes:
        record: what the file says, or will say: `run`, an id; `composition`, `trl_core`, `started`; `from`, where the
            run began with a checkpoint of another; `steps`, when it has ended; `model`, the step of the saved model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record: dict[str, Any] = {}
        self._lock = FileLock(self.path / LOCK_FILE, is_singleton=True)

    # -- one at a time --------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While active, no other process trains in the folder. The thread that holds it may enter again.

        Raises:
            OutputDirError: another one does, or nothing can be written there.
        """
        locked = on_main(self._acquire)
        try:
            yield
        finally:
            if locked and PartialState().is_main_process:
                self._lock.release()

    def _acquire(self) -> bool:
        check_output_dir(str(self.path))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputDirError(
                f"Another run is training in output_dir={str(self.path)!r} at this moment.",
                mend="Wait until it has ended, or take another output_dir.",
            ) from error
        except (OSError, NotImplementedError) as error:
            warnings.warn(
                f"output_dir={str(self.path)!r} cannot be locked ({error}): see to it that no second run starts there.",
                stacklevel=2,
            )
            return False
        return True

    # -- whose it is ----------------------------------------------------------------------------------------------
    def refuse_another(self, *, overwrite: bool) -> None:
        """Refuse a new run if there is one in the folder that may not be replaced.

        A run that left neither a checkpoint nor a result, because it was killed before, may be.

        Raises:
            OutputDirError: there is one, or a `metrics.jsonl` that no run of this kind wrote.
        """
        known, metrics = read_run(self.path) or {}, self.path / METRICS_FILE
        if not known and metrics.exists() and not _is_ours(metrics):
            raise OutputDirError(
                f"{METRICS_FILE} in output_dir={str(self.path)!r} was not written by trl-core.",
                mend="Move it away, or take another output_dir.",
            )
        found = [path.name for path in all_checkpoints(self.path) if (path / STATE_FILE).exists()]
        what = f"{', '.join(found[-1:])} of " if found else ""
        # What has ended and left nothing behind is in nobody's way.
        ended = not known or known.get("steps")
        left = "model" in known or _has_steps(metrics) or any(self.path.glob(COMPLETIONS))
        if (found or (ended and left)) and not overwrite:
            raise OutputDirError(f"output_dir={str(self.path)!r} holds {what}another run.", mend=_MEND)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to go on from, be it damaged."""
        return any(read_run(path) or (path / STATE_FILE).exists() for path in checkpoints(self.path))

    def check(self, resume: bool | str | None, *, overwrite: bool) -> None:
        """What `begin` will refuse, as far as it is known before anything is loaded.

        Raises:
            CheckpointError: there is no complete checkpoint where one is asked for.
            OutputDirError: as `refuse_another`.
        """
        on_main(self.recover)
        if resume and resume != "auto":
            on_main(lambda: check_there(self.path, resume))
        elsewhere = isinstance(resume, str) and resume != "auto" and not self._holds(Path(resume))
        if not resume or elsewhere or (resume == "auto" and not self.has_checkpoint()):
            on_main(lambda: self.refuse_another(overwrite=overwrite))

    def _holds(self, checkpoint: Path | None) -> bool:
        return checkpoint is not None and checkpoint.resolve().parent == self.path.resolve()

    def begin(
        self, composition: str, *, checkpoint: Path | None = None, overwrite: bool = False, again: bool = False
    ) -> dict[str, Any]:
        """Make the folder this run's; `again` if the same trainer has trained in it before. Returns the record.

        Raises:
            OutputDirError: as `refuse_another`.
        """
        known = read_run(self.path)
        theirs = read_run(checkpoint) if checkpoint else None
        inside = self._holds(checkpoint)
        if inside and (known is None or theirs is None or theirs["run"] == known["run"]):
            self.record = known or theirs or self._new(composition)
        elif again and known is not None:
            self.record = known
        else:
            self.refuse_another(overwrite=overwrite)
            self.record = self._new(composition)
            if theirs:
                self.record["from"] = {"run": theirs["run"], "checkpoint": checkpoint.name if checkpoint else None}
            if overwrite and not inside:
                self.clear()
        self.note()
        return self.record

    def _new(self, composition: str) -> dict[str, Any]:
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {"run": uuid.uuid4().hex, "composition": composition, "trl_core": core_version(), "started": started}

    def note(self, **facts: Any) -> None:
        """Add to the record, and write it if that changes it."""
        self.record |= facts
        if self.record != read_run(self.path):
            write_run(self.path, self.record)

    def owns(self, checkpoint: Path) -> bool:
        """Whether the checkpoint is of this run; one that lost the record of its own is taken for that."""
        theirs = read_run(checkpoint)
        return theirs["run"] == self.record["run"] if theirs else (checkpoint / STATE_FILE).exists()

    # -- what is left of earlier runs -----------------------------------------------------------------------------
    def recover(self) -> None:
        """Put checkpoints that were complete, but for their name, in their place; drop what was not.

        Raises:
            OutputDirError: something else stands where a file of the run has to be.
        """
        for path in all_checkpoints(self.path / PARTIAL):
            if is_complete(path) and not (self.path / path.name).exists():
                os.replace(path, self.path / path.name)
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)
        if not (self.path / PARTIAL).is_dir():  # a file would be in the way of every checkpoint
            (self.path / PARTIAL).unlink(missing_ok=True)
        for name in (RUN_FILE, METRICS_FILE):
            if (self.path / name).exists() and not (self.path / name).is_file():
                raise OutputDirError(
                    f"{name} in output_dir={str(self.path)!r} is no file.",
                    mend="Move it away, or take another output_dir.",
                )

    def clear(self) -> None:
        """Delete what runs of this kind have left: checkpoints, metrics, completions, the record; nothing else."""
        for path in all_checkpoints(self.path):
            if read_run(path) or (path / STATE_FILE).exists():
                discard(path)
        written = [*self.path.glob(COMPLETIONS), *self.path.glob("nonfinite/step-*.json")]
        if _is_ours(self.path / METRICS_FILE):
            written.append(self.path / METRICS_FILE)
        for file in [*written, self.path / RUN_FILE]:
            file.unlink(missing_ok=True)


def check_output_dir(folder: str) -> None:
    """Raise `OutputDirError` unless files can be made in the folder (which is created)."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        what = f"output_dir={folder!r} cannot be written: {reason}."
        raise OutputDirError(what, mend="Choose another folder.") from error


def write_run(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a run into its folder, or into a checkpoint of it."""
    handle, name = tempfile.mkstemp(prefix=f".{RUN_FILE}.", dir=folder)
    with open(handle, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
    os.chmod(name, 0o666 & ~_umask())
    os.replace(name, folder / RUN_FILE)


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def metrics_line(line: str) -> dict[str, Any] | None:
    """A line of `metrics.jsonl` as it was written, or None if it is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def _is_ours(metrics: Path) -> bool:
    try:
        with open(metrics, encoding="utf-8") as file:
            return all(metrics_line(line) for line in [*file][:-1])
    except (OSError, UnicodeError):
        return False


def _has_steps(metrics: Path) -> bool:
    """Whether a run has logged there, and not only an evaluation before it."""
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []
    return any(line["step"] > 0 for line in map(metrics_line, lines) if line)
