"""What the three examples share: the model, the rows, greedy answers, the check of an answer, and the printed table."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import torch
from datasets import Dataset
from model import resolve_model  # examples/demo/model.py
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trl_core import JsonlMetricsCallback, StepLineCallback

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
console = Console(highlight=False)
_ANSWER = re.compile(r"`([^`\n]+)`\n([^\n]+)")


def parser(description: str, name: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all three examples have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--model", type=resolve_model, default="smollm2", help="'smollm2', a folder, or a Hub id")
    found.add_argument("--output", default=str(REPOSITORY / "runs" / f"shell-helper-{name}"), help="run folder")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--epochs", type=float, default=defaults["epochs"], help="times that every row is seen")
    found.add_argument("--batch_size", type=int, default=defaults["batch_size"], help="rows, or pairs, per step")
    found.add_argument("--learning_rate", type=float, default=defaults["learning_rate"])
    found.add_argument("--lora_rank", type=int, default=defaults["lora_rank"], help="0 trains all weights")
    found.add_argument("--eval_size", type=int, default=40, help="held-out rows, at most 40")
    return found


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `transformers.TrainingArguments` that follow from the command line, the same in all examples."""
    return {
        "output_dir": options.output,
        "overwrite_output_dir": True,  # an example may be run again
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "weight_decay": 0.0,
        "max_length": 256,
        "gradient_checkpointing": False,  # the rows are short: memory is no problem, and it would cost time
        "seed": options.seed,
        "logging_steps": 5,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "report_to": "none",
    }


def adapter(options: argparse.Namespace, task: str = "CAUSAL_LM") -> Any:
    """A LoRA configuration, or None to train all weights."""
    if not options.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear", task_type=task
    )


def read_rows(name: str, limit: int | None = None) -> Dataset:
    """The rows of one of the files beside this one."""
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    return Dataset.from_list([json.loads(line) for line in lines])


def callbacks(options: argparse.Namespace) -> list[Any]:
    """One line per log on the screen, and all metrics in a new `metrics.jsonl`."""
    Path(options.output, "metrics.jsonl").unlink(missing_ok=True)
    return [JsonlMetricsCallback(), StepLineCallback()]


def quiet(trainer: Any) -> Any:
    """The trainer without the bar and the printed dictionaries of transformers."""
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int = 64) -> list[str]:
    """One greedy answer per conversation."""
    training = model.training
    model.eval()
    found = []
    for start in range(0, len(prompts), 20):
        texts = tokenizer.apply_chat_template(prompts[start : start + 20], tokenize=False, add_generation_prompt=True)
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        output = model.generate(
            **batch.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        found += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(training)
    return found


def command_of(answer: str) -> str | None:
    """The command of an answer in the fixed form, a line in backticks and one more line; None for any other answer."""
    match = _ANSWER.fullmatch(answer.strip())
    return match.group(1) if match else None


def parses(command: str | None) -> bool:
    """Whether bash accepts the syntax of a command; it is read, not run."""
    if command is None:
        return False
    return subprocess.run(["bash", "-n", "-c", command], capture_output=True, timeout=10).returncode == 0


def show(title: str, lines: list[tuple[str, float, float]]) -> None:
    """A table of figures before and after."""
    table = Table(title=title)
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    for name, before, after in lines:
        table.add_row(name, f"{before:.3f}", f"{after:.3f}")
    console.print(table)


def show_answers(prompts: list[Any], before: list[str], after: list[str]) -> None:
    """Answers before and after, under their questions."""
    for prompt, old, new in zip(prompts, before, after, strict=True):
        console.print(f"\n[bold]{escape(prompt[-1]['content'])}[/]", soft_wrap=True)
        for label, text in (("before", old), ("after", new)):
            console.print(f"[dim]{label}:[/]")
            console.print(text.strip(), markup=False, soft_wrap=True)
