"""Callbacks for people who watch a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .folder import METRICS_FILE, metrics_line


class JsonlMetricsCallback(TrainerCallback):
    """Append every log line to `<output_dir>/metrics.jsonl`; a resumed run drops those beyond its step."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the lines of steps that are done once more, and a last one that was cut short."""
        file = Path(str(args.output_dir)) / METRICS_FILE
        if not state.is_world_process_zero or state.is_hyper_param_search or not file.exists():
            return
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
        lines = text.splitlines(keepends=True)
        found = [metrics_line(line) for line in lines]
        # What is no such line is somebody else's, unless it is the end of the file.
        kept = [
            line if line.endswith("\n") else f"{line}\n"
            for line, entry in zip(lines, found, strict=True)
            if (0 < entry["step"] <= state.global_step if entry else line.endswith("\n"))
        ]
        if kept != lines:
            temporary = file.with_name(f".{file.name}.tmp")
            temporary.write_text("".join(kept), encoding="utf-8", errors="surrogateescape")
            os.replace(temporary, file)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write one line."""
        if not state.is_world_process_zero or not logs:
            return
        folder = str(args.output_dir)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, METRICS_FILE), "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class StepLineCallback(TrainerCallback):
    """Print one readable line per log: rewards, length, KL, loss, accuracy, and where the time went.

    Metrics that a log does not have are left out; those of an evaluation are marked as such.

    Args:
        extra: further metrics to show after the reward, as (name, label, format).
    """

    _SHOWN = (
        ("reward", "reward", "{:.3f}"),
        ("completions/mean_length", "length", "{:.1f}"),
        ("kl", "kl", "{:.4f}"),
        ("loss", "loss", "{:.4f}"),
        ("rewards/accuracies", "accuracy", "{:.3f}"),
        ("rewards/margins", "margin", "{:.3f}"),
        ("accuracy", "accuracy", "{:.3f}"),
        ("margin", "margin", "{:.3f}"),
        ("mean_token_accuracy", "token accuracy", "{:.3f}"),
        ("grad_norm", "grad", "{:.2f}"),
        ("step_time", "step", "{:.1f}s"),
        ("time/generate", "generate", "{:.1f}s"),
        ("time/score", "score", "{:.1f}s"),
        ("time/update", "update", "{:.1f}s"),
    )

    def __init__(self, extra: Sequence[tuple[str, str, str]] = ()) -> None:
        self.shown = (self._SHOWN[0], *extra, *self._SHOWN[1:])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Print the line."""
        if not state.is_world_process_zero or not logs:
            return
        of = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        named = [(of + name, of.replace("_", " ") + label, form) for name, label, form in self.shown]
        parts = [f"{label} {form.format(logs[name])}" for name, label, form in named if name in logs]
        if parts:
            # Through tqdm, so that a progress bar on the same terminal is not torn.
            tqdm.write(f"step {state.global_step:>4}/{state.max_steps}  " + "  ".join(parts))
