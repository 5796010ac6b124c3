"""One process of the benchmark: trains a few steps with one library and prints a JSON line of measurements.

python worker.py {trl_core,trl} --work a --model FOLDER --steps 3
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import threading
import time

import psutil
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

SENTENCE = "The harbour master writes down every ship, its cargo, its flag and the hour at which it came in. "
WORKS = {
    # One group of 8 on a prompt of about 220 tokens, 64 new tokens: design work (a).
    "a": {"prompts": 1, "group": 8, "repeat": 9, "new": 64},
    # Eight prompts of four completions, short prompts.
    "short": {"prompts": 8, "group": 4, "repeat": 1, "new": 32},
}


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.start)


class Peak(threading.Thread):
    """Largest resident memory of this process, sampled."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.process = 0, psutil.Process()

    def run(self) -> None:
        while True:
            self.bytes = max(self.bytes, self.process.memory_info().rss)
            time.sleep(0.05)


def length_reward(completions: list[str], **_: object) -> list[float]:
    """Different for different texts, so that no group is without signal."""
    return [float(sum(map(ord, text)) % 97) / 97 for text in completions]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=("trl_core", "trl"))
    parser.add_argument("--work", default="a", choices=WORKS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    work = WORKS[options.work]
    if options.library == "trl_core":
        from trl_core import GRPOConfig, GRPOTrainer
    else:
        from trl import GRPOConfig, GRPOTrainer
    rows = [{"prompt": f"Case {i}. {SENTENCE * work['repeat']} In short:"} for i in range(work["prompts"] * 64)]
    peak = Peak()
    peak.start()
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=work["prompts"] * work["group"],
            num_generations=work["group"],
            max_completion_length=work["new"],
            # Every completion has the same length in both libraries, so the work is the same.
            generation_kwargs={"min_new_tokens": work["new"]},
            max_steps=options.steps + 1,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        clock = Clock()
        trainer = GRPOTrainer(
            model=options.model,
            reward_funcs=length_reward,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            callbacks=[clock],
        )
        trainer.train()
        logs = [line for line in trainer.state.log_history if "loss" in line]
    result = {
        "library": options.library,
        "seconds": clock.seconds[1:],  # the first step warms caches
        "peak_gib": max(peak.bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30,
        "tokens": logs[-1]["num_tokens"] / len(logs),
        "mean_length": logs[-1]["completions/mean_length"],
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
