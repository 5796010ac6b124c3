"""The demo: GFPO on a small chat model and sums that can be checked, on a CPU in minutes.

    python examples/demo/run.py [--model FOLDER_OR_HUB_ID] [--task sums] [--seed 0] [--steps 60]

Uses the public API only. Leaves in the run folder: the last checkpoint, the trained model, `metrics.jsonl`,
`completions/*.parquet`, `curves.png`, `before_after.json` and `summary.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from functools import partial, update_wrapper
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib
import torch
from model import REPOSITORY, MissingWeightsError, resolve_model
from rich.console import Console
from rich.table import Table
from task import DEFAULT_TASK, MissingTaskError, Task, correct, find_task, make_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trl_core import JsonlMetricsCallback, StepLineCallback
from trl_gfpo import GFPOConfig, GFPOTrainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

console = Console(highlight=False)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train GFPO on a small model and a task with checkable answers.")
    parser.add_argument("--model", default="smollm2", help="'smollm2', a folder, or a Hub id")
    parser.add_argument("--task", default=DEFAULT_TASK, help="which problems: 'sums', or a data set of reasoning-gym")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--prompts", type=int, default=4, help="problems per step")
    parser.add_argument("--num_generations", type=int, default=8, help="completions per problem")
    parser.add_argument("--keep", type=int, default=4, help="completions of each group that are trained on")
    parser.add_argument("--filter", default="shortest", choices=("shortest", "token_efficiency"))
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--eval_size", type=int, default=48, help="held-out problems")
    parser.add_argument("--output", help="run folder; default runs/demo-<task>-seed<seed>")
    return parser.parse_args()


@torch.no_grad()
def answer(model: Any, tokenizer: Any, rows: Any, task: Task, *, sample: bool) -> list[str]:
    """One completion per held-out problem."""
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in rows["prompt"]]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch = batch.to(model.device)
    model.eval()
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
    output = model.generate(**batch, max_new_tokens=task.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **options)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(model: Any, tokenizer: Any, rows: Any, task: Task) -> dict[str, Any]:
    """Share of right answers on held-out problems, decoded greedily and sampled, and what was answered."""
    set_seed(2024)  # the same draws before and after
    greedy, sampled = (answer(model, tokenizer, rows, task, sample=flag) for flag in (False, True))
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in sampled]
    return {
        "greedy_accuracy": sum(correct(greedy, rows["entry"], task)) / len(rows),
        "sampled_accuracy": sum(correct(sampled, rows["entry"], task)) / len(rows),
        "sampled_tokens": sum(lengths) / len(rows),
        "greedy": greedy,
        "sampled": sampled,
    }


def configure(options: argparse.Namespace, task: Task, folder: Path) -> GFPOConfig:
    """The options of the run."""
    return GFPOConfig(
        output_dir=str(folder),
        overwrite_output_dir=True,  # the demo may be run again
        per_device_train_batch_size=options.prompts * options.num_generations,
        num_generations=options.num_generations,
        num_remains_in_group=options.keep,
        max_completion_length=task.max_new_tokens,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        gradient_checkpointing=False,
        seed=options.seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=options.steps,
        save_total_limit=1,
        log_completions=True,
        num_completions_to_print=0,
        report_to="none",
    )


def draw_curves(folder: Path) -> None:
    """Reward and completion length over the steps, from `metrics.jsonl`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "reward" in line]
    steps = [line["step"] for line in lines]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    top.plot(steps, [line.get("gfpo/reward_all", line["reward"]) for line in lines], label="all completions")
    top.plot(steps, [line["reward"] for line in lines], label="kept completions", alpha=0.6)
    top.set(ylabel="reward (share right)", ylim=(0, 1), title="GFPO: reward and length of training completions")
    bottom.plot(steps, [line["completions/mean_length"] for line in lines], label="all completions")
    if "gfpo/mean_kept_length" in lines[0]:
        bottom.plot(steps, [line["gfpo/mean_kept_length"] for line in lines], label="kept completions", alpha=0.6)
    bottom.set(ylabel="tokens", xlabel="optimizer step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)


def show(rows: Any, task: Task, before: dict[str, Any], after: dict[str, Any], count: int = 8) -> None:
    """A table of sampled completions before and after."""
    table = Table(title="Sampled completions on held-out problems", show_lines=True)
    for column in ("problem", "right answer", "before", "after"):
        table.add_column(column, overflow="fold")
    for i in range(min(count, len(rows))):
        problem, right = rows["prompt"][i][-1]["content"], rows["answer"][i]
        texts = []
        for result in (before, after):
            text = result["sampled"][i]
            mark = "[green]right[/] " if correct([text], [rows["entry"][i]], task)[0] else "[red]wrong[/] "
            texts.append(mark + text.strip().replace("[", "\\[").replace("\n", " "))
        table.add_row(problem.rpartition(":")[2].strip(), right, *texts)
    console.print(table)


def main() -> None:
    """Prepare, evaluate, train, evaluate, report."""
    options = parse()
    task = find_task(options.task)
    folder = Path(options.output or REPOSITORY / "runs" / f"demo-{options.task}-seed{options.seed}")
    if not options.output:  # what an earlier demo left
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    console.rule("preparing")
    source = resolve_model(options.model)
    console.print(f"model {options.model}; task {options.task}; seed {options.seed}; {torch.get_num_threads()} threads")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    train, held_out = make_datasets(task, seed=options.seed, eval_size=options.eval_size)
    before = evaluate(model, tokenizer, held_out, task)
    console.print(f"before: greedy {before['greedy_accuracy']:.2f}, sampled {before['sampled_accuracy']:.2f} right")

    console.rule("training")
    trainer = GFPOTrainer(
        model=model,
        reward_funcs=update_wrapper(partial(correct, task=task), correct),
        args=configure(options, task, folder),
        train_dataset=train,
        processing_class=tokenizer,
        group_filter_func=options.filter,
        callbacks=[JsonlMetricsCallback(), StepLineCallback([("gfpo/reward_all", "of all", "{:.3f}")])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    train_started = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - train_started
    trainer.save_model(str(folder / "model"))

    console.rule("after")
    after = evaluate(trainer.accelerator.unwrap_model(trainer.model), tokenizer, held_out, task)
    draw_curves(folder)
    show(held_out, task, before, after)
    summary = {
        "options": {k: v for k, v in vars(options).items() if k != "output"},
        "before": {k: v for k, v in before.items() if isinstance(v, float)},
        "after": {k: v for k, v in after.items() if isinstance(v, float)},
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl-core", "trl-gfpo")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {trainer.args.device}",
    }
    (folder / "before_after.json").write_text(json.dumps({"before": before, "after": after}, indent=1))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    for name, text in (
        ("greedy_accuracy", "right, greedy"),
        ("sampled_accuracy", "right, sampled"),
        ("sampled_tokens", "tokens, sampled"),
    ):
        console.print(f"{text:>16}: {before[name]:6.2f} -> {after[name]:6.2f}   ({len(held_out)} held-out problems)")
    if after["sampled_accuracy"] <= before["sampled_accuracy"]:
        console.print("[yellow]No improvement was seen in this run.[/]")
    console.print(f"{options.steps} steps in {train_seconds:.0f} s; everything is in {folder}")


class QuietProgress(ProgressCallback):
    """The progress bar alone: the log lines are printed by StepLineCallback."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


if __name__ == "__main__":
    try:
        main()
    except (MissingTaskError, MissingWeightsError) as error:
        sys.exit(f"{error}")
