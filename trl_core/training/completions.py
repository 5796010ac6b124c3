"""The log of what was generated: Parquet files, and a sample on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..batch import Rollouts


class CompletionLog:
    """Writes a generation batch to `<output_dir>/completions/completions_<step>.parquet`, if asked to.

    Columns: step, prompt, completion, one per reward function, reward, advantage, kept, length, and what reward
    functions add with `log_extra(column, values)`.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self._extra: dict[str, list[Any]] = {}

    def extra(self, column: str, values: list[Any]) -> None:
        """Add a column to the next file; given to reward functions as `log_extra`."""
        self._extra.setdefault(column, []).extend(values)

    def write(self, rollouts: Rollouts, keep: Tensor, advantages: Tensor, names: list[str], step: int) -> None:
        """Write and print one generation batch."""
        extra, self._extra = self._extra, {}
        if not self.args.log_completions or not PartialState().is_main_process:
            return
        table: dict[str, list[Any]] = {
            "step": [step + 1] * rollouts.num_rows,
            "prompt": [_text(p) for p in rollouts.prompts],
            "completion": [_text(c) for c in rollouts.completions],
            **dict(zip(names, rollouts.rewards.T.tolist(), strict=True)),
            "reward": rollouts.reward.tolist(),
            "advantage": advantages.tolist(),
            "kept": keep.tolist(),
            "length": rollouts.completion_lengths.tolist(),
        }
        # Over several processes a function only adds its own rows; they cannot be placed.
        table |= {name: values for name, values in extra.items() if len(values) == rollouts.num_rows}
        folder = Path(self.args.output_dir) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"completions_{step + 1:06d}.parquet")
        if self.args.num_completions_to_print != 0:
            self._print(table, names, step)

    def _print(self, table: dict[str, list[Any]], names: list[str], step: int) -> None:
        shown = Table(title=f"step {step + 1}", show_lines=True)
        for name in ("prompt", "completion", *names, "advantage"):
            shown.add_column(name, overflow="fold")
        for row in range(min(self.args.num_completions_to_print or 5, len(table["prompt"]))):
            numbers = [f"{table[name][row]:.2f}" for name in (*names, "advantage")]
            shown.add_row(table["prompt"][row], table["completion"][row], *numbers)
        Console().print(shown)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
