"""Reward model: learn from pairs which of two answers about the shell is better.

    .venv/bin/python examples/shell-helper/reward.py [--epochs 1] [--learning_rate 5e-5] [--lora_rank 0]

The language model gets a new head with one output. Held-out pairs are evaluated before and after, once as they are and
once as a control: with the good explanation under both commands, so that only the commands differ. Then the trained
model scores a good and a bad answer to a question that is in none of the files.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from common import adapter, callbacks, command_of, console, parser, quiet, read_rows, settings, show
from datasets import Dataset

from trl_core import RewardConfig, RewardTrainer

QUESTION = "How many lines of app.log contain the word timeout?"
ANSWERS = {
    "good": "`grep -cw timeout app.log`\n-c counts matching lines, not matches.",
    "bad": "`grep timeout app.log | rm -f app.log`\nReads the log, finds the word and then counts all of the lines.",
}


def main() -> None:
    """Evaluate, train, evaluate, save, score."""
    command_line = parser(__doc__.splitlines()[0], "reward", epochs=1, batch_size=8, learning_rate=5e-5, lora_rank=0)
    command_line.add_argument("--center", type=float, default=0.01, help="center_rewards_coefficient")
    options = command_line.parse_args()
    train, held_out = read_rows("preferences_train"), read_rows("preferences_test", options.eval_size)
    trainer = quiet(
        RewardTrainer(
            model=options.model,
            args=RewardConfig(center_rewards_coefficient=options.center, **settings(options)),
            train_dataset=train,
            eval_dataset=held_out,
            peft_config=adapter(options, "SEQ_CLS"),
            callbacks=callbacks(options),
        )
    )
    control = same_explanation(held_out)
    before = evaluate(trainer, control)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    after = evaluate(trainer, control)
    trainer.save_model()

    title = f"Reward model: {len(held_out)} held-out pairs, {len(control)} in the control"
    show(title, [(name, before[name], after[name]) for name in before])
    console.print(f"\n[bold]{QUESTION}[/]")
    scores = {name: score(trainer, QUESTION, text) for name, text in ANSWERS.items()}
    for name, text in ANSWERS.items():
        console.print(f"{name}, score {scores[name]:+.2f}:\n{text}", markup=False)
    console.print(f"{trainer.state.global_step} steps in {seconds:.0f} s; the model is in {options.output}")
    results = {"options": vars(options), "before": before, "after": after, "train_seconds": round(seconds, 1)}
    Path(options.output, "results.json").write_text(json.dumps(results | {"scores": scores}, indent=1))


def evaluate(trainer: RewardTrainer, control: Dataset) -> dict[str, float]:
    """Figures on held-out pairs, and on the control."""
    metrics = trainer.evaluate()
    names = {"loss": "loss", "accuracy": "chosen above rejected", "margin": "margin", "mean_reward": "mean score"}
    figures = {label: metrics[f"eval_{name}"] for name, label in names.items()}
    return figures | {"control: chosen above rejected": trainer.evaluate(control)["eval_accuracy"]}


def same_explanation(pairs: Dataset) -> Dataset:
    """The pairs with the form and different commands on both sides, the explanation of the good one in both."""

    def replaced(row: dict) -> dict:
        command = row["rejected"][0]["content"].split("\n")[0]
        explanation = row["chosen"][0]["content"].split("\n")[1]
        return {**row, "rejected": [{"role": "assistant", "content": f"{command}\n{explanation}"}]}

    def differs(row: dict) -> bool:
        commands = [command_of(row[side][0]["content"]) for side in ("chosen", "rejected")]
        return None not in commands and commands[0] != commands[1]

    return Dataset.from_list([replaced(row) for row in pairs if differs(row)])


@torch.no_grad()
def score(trainer: RewardTrainer, question: str, answer: str) -> float:
    """The score of one answer, as whoever loads the saved model computes it."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    inputs = trainer.processing_class.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    return float(model(**inputs.to(model.device)).logits[0, 0])


if __name__ == "__main__":
    main()
