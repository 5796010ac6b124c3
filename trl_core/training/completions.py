"""The log of what was generated: a few Parquet files, and some telling rows on the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..batch import Rollouts
from ..errors import OutputDirError

logger = logging.getLogger(__name__)
# A part is written anew as it grows, in memory until then; this is also what a killed process may lose of it, and what
# the run that is resumed generates again.
_ROWS_AT_A_TIME, _BYTES_AT_A_TIME = 2_000, 2**22
_ROWS_OF_PART, _BYTES_OF_PART = 20_000, 2**24

_TEXT, _LINES = 400, 8


class CompletionLog(TrainerCallback):
    """Writes generation batches to `<output_dir>/completions/part-<number>.parquet`, if asked to.

    Columns: step, prompt, completion, reward, advantage, kept, length, truncated; `rewards/<name>` for each reward
    function, and `extra/<name>` for what these add with `log_extra(name, values)`. Every file can be read at any time.
    A run that is resumed drops the rows of later steps, so each step is there once.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.folder = Path(args.output_dir) / "completions"
        self._extra: dict[str, list[Any]] = {}
        self._new: list[pyarrow.Table] = []
        self._part: pyarrow.Table | None = None  # the part that still grows
        self._number = 1
        self._latest: tuple[int, dict[str, list[Any]]] | None = None

    @property
    def _writes(self) -> bool:
        return bool(self.args.log_completions) and PartialState().is_main_process

    def extra(self, column: str, values: Iterable[Any]) -> None:
        """Add a column to the next batch; given to reward functions as `log_extra`."""
        self._extra.setdefault(str(column), []).extend(values)

    def write(self, rollouts: Rollouts, keep: Tensor, advantages: Tensor, names: Sequence[str], step: int) -> None:
        """Log one generation batch."""
        extra, self._extra = self._extra, {}
        if not self._writes:
            return
        columns: dict[str, list[Any]] = {
            "step": [step + 1] * rollouts.num_rows,
            "prompt": [_text(p) for p in rollouts.prompts],
            "completion": [_text(c) for c in rollouts.completions],
            "reward": rollouts.reward.tolist(),
            "advantage": advantages.tolist(),
            "kept": keep.tolist(),
            "length": rollouts.completion_lengths.tolist(),
            "truncated": rollouts.truncated.tolist(),
        }
        for name, values in zip(names, rollouts.rewards.T.tolist(), strict=True):
            columns[_free(_encodable(f"rewards/{name}"), columns)] = values
        self._latest = (step + 1, dict(columns))
        # Over several processes, and where rows are replaced, a function adds not just those of this batch; they cannot
        # be placed.
        placed = {name: values for name, values in extra.items() if len(values) == rollouts.num_rows}
        columns |= {f"extra/{name}": _plain(values) for name, values in placed.items()}
        self._new.append(pyarrow.table({_encodable(name): values for name, values in columns.items()}))
        if sum(map(len, self._new)) >= _ROWS_AT_A_TIME or sum(t.nbytes for t in self._new) >= _BYTES_AT_A_TIME:
            self.flush()

    # -- files ----------------------------------------------------------------------------------------------------
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop what an earlier run wrote of steps that are still to come."""
        self._new, self._part, self._number, self._latest = [], None, 1, None
        if not self._writes:
            return
        for number in self._parts():
            path, self._number, self._part = self._path(number), number, None
            try:
                part = pyarrow.parquet.read_table(path)
                kept = part.filter(pyarrow.compute.field("step") <= state.global_step)
            except (pyarrow.ArrowException, OSError) as error:
                logger.warning("%s cannot be read (%s); it is set aside.", path, error)
                os.replace(path, path.with_suffix(".damaged"))
                continue
            if not len(kept):
                path.unlink()
            elif len(kept) < len(part):
                self._replace(self._number, kept)
            self._part = kept if len(kept) else None

    def flush(self) -> None:
        """Write what is not yet written.

        Raises:
            OutputDirError: it cannot be written.
        """
        if not self._new:
            return
        tables = self._new if self._part is None else [self._part, *self._new]
        self._new = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Only files of one schema can be read as one dataset, and a function may add another column at any time.
            earlier = {n: pyarrow.parquet.read_schema(self._path(n)) for n in self._parts() if n != self._number}
            schema = _schema([*(known.empty_table() for known in earlier.values()), *tables])
            for number, known in earlier.items():
                if known != schema:
                    self._replace(number, _in(schema, pyarrow.parquet.read_table(self._path(number))))
            part = pyarrow.concat_tables([_in(schema, table) for table in tables]).combine_chunks()
            self._replace(self._number, part)
        except OSError as error:
            raise OutputDirError(
                f"The completions cannot be written to {str(self.folder)!r}: {error.strerror or error}.",
                mend="Make room there, or set log_completions=False.",
            ) from error
        self._part = part
        if len(part) >= _ROWS_OF_PART or part.nbytes >= _BYTES_OF_PART:
            self._number, self._part = self._number + 1, None

    def _parts(self) -> list[int]:
        names = (re.fullmatch(r"part-(\d{5,})\.parquet", path.name) for path in self.folder.glob("part-*.parquet"))
        return sorted(int(name[1]) for name in names if name)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"

    def _replace(self, number: int, table: pyarrow.Table) -> None:
        path = self._path(number)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            pyarrow.parquet.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    # -- terminal -------------------------------------------------------------------------------------------------
    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show some rows of the latest generation batch."""
        latest, self._latest = self._latest, None
        most = 5 if self.args.num_completions_to_print is None else self.args.num_completions_to_print
        if latest is None or most < 1:
            return
        step, columns = latest
        chosen = _telling(columns, most)
        lines = [f"step {step}: {len(chosen)} of {len(columns['step'])} completions"]
        functions = [name for name in columns if name.startswith("rewards/")]
        for row, why in chosen.items():
            numbers = [f"{name.removeprefix('rewards/')} {columns[name][row]:.3g}" for name in ("reward", "advantage")]
            if len(functions) > 1:
                numbers += [f"{name.removeprefix('rewards/')} {columns[name][row]:.3g}" for name in functions]
            cut = ", truncated" * columns["truncated"][row] + ", not kept" * (not columns["kept"][row])
            lines.append(f"  {why}: {_shown(', '.join(numbers))}, {columns['length'][row]} tokens{cut}")
            lines += [f"    {name:<10}  {_shown(columns[name][row])}" for name in ("prompt", "completion")]
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # Through tqdm, so that a progress bar on the same terminal is not torn.
        tqdm.write("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding))


def _telling(columns: dict[str, list[Any]], most: int) -> dict[int, str]:
    """At most so many rows and why they are shown: best, worst, one that was cut off, the median, and some between."""
    ranked = sorted(range(len(columns["step"])), key=lambda row: _rank(columns["reward"][row]), reverse=True)
    asked = [("best", ranked[:1]), ("worst", ranked[-1:])]
    asked += [("cut off", [row for row in ranked if columns["truncated"][row]][:1])]
    asked += [("median", ranked[len(ranked) // 2 :][:1])]
    asked += [("between", ranked[:: max(len(ranked) // most, 1)]), ("between", ranked)]
    chosen: dict[int, str] = {}
    for why, rows in asked:
        for row in rows:
            if len(chosen) < most:
                chosen.setdefault(row, why)
    return chosen


def _rank(reward: float) -> tuple[bool, float]:
    return (reward == reward, reward if reward == reward else 0.0)


def _shown(text: str) -> str:
    """A text as a terminal can show it: short, and nothing in it is taken for a command."""
    if len(text) > _TEXT:
        text = f"{text[: _TEXT // 2]} ... {len(text) - _TEXT} characters ... {text[-_TEXT // 2 :]}"
    text = "".join(c if c.isprintable() or c in "\n\u200c\u200d" else ascii(c)[1:-1] for c in text)
    lines = text.split("\n")
    if len(lines) > _LINES:
        lines = [*lines[: _LINES // 2], f"... {len(lines) - _LINES} lines ...", *lines[-_LINES // 2 :]]
    return "\n                ".join(lines)


# -- columns ----------------------------------------------------------------------------------------------------------
def _text(value: Any) -> str:
    return _encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _encodable(text: str) -> str:
    """A text that UTF-8 can hold: half of a surrogate pair is written as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _free(name: str, taken: Iterable[str]) -> str:
    """The name, or with a number if it is taken."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name} ({number})"
    return found


def _plain(values: list[Any]) -> list[Any]:
    """Values that fit into a column: all truth values, all numbers, or texts."""
    values = [_bare(value) for value in values]
    given = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in given):
        return values
    if all(isinstance(value, float) or (type(value) is int and abs(value) < 2**63) for value in given):
        exact = all(isinstance(value, int) for value in given)
        return values if exact else [value if value is None else float(value) for value in values]
    return [value if value is None else _text(value) for value in values]


def _bare(value: Any) -> Any:
    """A number out of an array or tensor that holds no other."""
    with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
        return value.item()
    return value


def _schema(tables: list[pyarrow.Table]) -> pyarrow.Schema:
    """One that fits all tables: what one of them lacks is empty, and what differs in type becomes text."""
    kinds: dict[str, set[pyarrow.DataType]] = {}
    for field in (field for table in tables for field in table.schema):
        kinds.setdefault(field.name, set()).add(field.type)
    fields = []
    for name, found in kinds.items():
        found = found - {pyarrow.null()} or found
        number = found <= {pyarrow.int64(), pyarrow.float64()}
        other = pyarrow.float64() if number else pyarrow.string()
        fields.append((name, next(iter(found)) if len(found) == 1 else other))
    return pyarrow.schema(fields)


def _in(schema: pyarrow.Schema, table: pyarrow.Table) -> pyarrow.Table:
    columns = [
        table[f.name].cast(f.type) if f.name in table.column_names else pyarrow.nulls(len(table), f.type)
        for f in schema
    ]
    return pyarrow.table(columns, schema=schema)
