"""SFT: teach a small chat model to answer questions about the shell in a fixed form.

    .venv/bin/python examples/shell-helper/sft.py [--epochs 1] [--learning_rate 2e-4] [--lora_rank 0] [--packing]

Held-out rows are evaluated before and after: the loss, and greedy answers to the questions. The model is saved in the
run folder, from where `dpo.py` goes on.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from common import (
    FOLDER,
    adapter,
    answers,
    callbacks,
    command_of,
    console,
    parser,
    parses,
    quiet,
    read_rows,
    settings,
    show,
    show_answers,
)

from trl_core import SFTConfig, SFTTrainer


def main() -> None:
    """Evaluate, train, evaluate, save."""
    command_line = parser(__doc__.splitlines()[0], "sft", epochs=1, batch_size=8, learning_rate=2e-4, lora_rank=0)
    command_line.add_argument("--packing", action="store_true", help="put several rows into one of 256 tokens")
    options = command_line.parse_args()
    train, held_out = read_rows("sft_train"), read_rows("sft_test", options.eval_size)
    trainer = quiet(
        SFTTrainer(
            model=options.model,
            args=SFTConfig(
                # Learn only what the assistant says. The model's own chat template does not mark that; this one,
                # otherwise equal, does.
                assistant_only_loss=True,
                chat_template_path=str(FOLDER / "template.jinja"),
                packing=options.packing,
                eval_packing=False,
                **settings(options),
            ),
            train_dataset=train,
            eval_dataset=held_out,
            peft_config=adapter(options),
            callbacks=callbacks(options),
        )
    )
    questions = [row["messages"][:-1] for row in held_out]

    before, old = evaluate(trainer, questions)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    after, new = evaluate(trainer, questions)
    trainer.save_model()

    show_answers(questions[:2], old[:2], new[:2])
    show(f"SFT: {len(held_out)} held-out rows", [(name, before[name], after[name]) for name in before])
    console.print(f"{trainer.state.global_step} steps in {seconds:.0f} s; the model is in {options.output}")
    results = {"options": vars(options), "before": before, "after": after, "train_seconds": round(seconds, 1)}
    Path(options.output, "results.json").write_text(json.dumps(results, indent=1))


def evaluate(trainer: SFTTrainer, questions: list) -> tuple[dict[str, float], list[str]]:
    """Figures on held-out rows, and the greedy answers."""
    metrics = trainer.evaluate()
    found = answers(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, questions)
    commands = [command_of(text) for text in found]
    figures = {
        "loss": metrics["eval_loss"],
        "token accuracy": metrics["eval_mean_token_accuracy"],
        "answers in the form": sum(command is not None for command in commands) / len(commands),
        "... that pass bash -n": sum(map(parses, commands)) / len(commands),
    }
    return figures, found


if __name__ == "__main__":
    main()
