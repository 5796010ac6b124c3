"""DPO: move the helper from worse answers to better ones, straight from pairs.

    .venv/bin/python examples/shell-helper/sft.py
    .venv/bin/python examples/shell-helper/dpo.py [--epochs 1] [--learning_rate 5e-6] [--beta 0.1] [--loss_type sigmoid]

Starts from the weights that `sft.py` left in its run folder, or else from the base model. Held-out pairs are evaluated
before and after, and two questions are answered greedily.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from common import (
    REPOSITORY,
    adapter,
    answers,
    callbacks,
    console,
    parser,
    quiet,
    read_rows,
    settings,
    show,
    show_answers,
)

from trl_core import DPOConfig, DPOTrainer

SFT_MODEL = REPOSITORY / "runs" / "shell-helper-sft"


def main() -> None:
    """Evaluate, train, evaluate, save."""
    command_line = parser(__doc__.splitlines()[0], "dpo", epochs=1, batch_size=8, learning_rate=5e-6, lora_rank=0)
    start = SFT_MODEL if (SFT_MODEL / "model.safetensors").exists() else "smollm2"
    command_line.set_defaults(model=str(start))
    command_line.add_argument("--beta", type=float, default=0.1)
    command_line.add_argument("--loss_type", nargs="+", default=["sigmoid"], help="one or several")
    command_line.add_argument("--loss_weights", nargs="+", type=float, help="one for each loss")
    options = command_line.parse_args()
    console.print(f"Starting from {options.model}")
    train, held_out = read_rows("preferences_train"), read_rows("preferences_test", options.eval_size)
    trainer = quiet(
        DPOTrainer(
            model=options.model,
            args=DPOConfig(
                beta=options.beta,
                loss_type=options.loss_type,
                loss_weights=options.loss_weights,
                # The reference does not move: score the pairs once, and let go of its weights.
                precompute_ref_log_probs=True,
                **settings(options),
            ),
            train_dataset=train,
            eval_dataset=held_out,
            peft_config=adapter(options),
            callbacks=callbacks(options),
        )
    )
    prompts = held_out["prompt"][:2]
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    before, old = evaluate(trainer), answers(model, tokenizer, prompts)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    after, new = evaluate(trainer), answers(model, tokenizer, prompts)
    trainer.save_model()

    show_answers(prompts, old, new)
    show(f"DPO: {len(held_out)} held-out pairs", [(name, before[name], after[name]) for name in before])
    console.print(f"{trainer.state.global_step} steps in {seconds:.0f} s; the model is in {options.output}")
    results = {"options": vars(options), "before": before, "after": after, "train_seconds": round(seconds, 1)}
    Path(options.output, "results.json").write_text(json.dumps(results, indent=1))


def evaluate(trainer: DPOTrainer) -> dict[str, float]:
    """Figures on held-out pairs; before training policy and reference agree, so no pair counts as right."""
    metrics = trainer.evaluate()
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen")
    return {name: metrics[f"eval_{name}"] for name in names}


if __name__ == "__main__":
    main()
