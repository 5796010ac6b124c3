"""One process of the benchmark: trains a few steps with one library and prints a JSON line of measurements.

python worker.py {trl_core,trl} --work a --model FOLDER --steps 3
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import tempfile
import threading
import time
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

SENTENCE = "The harbour master writes down every ship, its cargo, its flag and the hour at which it came in. "
ANSWER = "A ship came in from the north with timber and salt, and left again at dusk. "


def length_reward(completions: list[str], **_: object) -> list[float]:
    """Different for different texts, so that no group is without signal."""
    return [float(sum(map(ord, text)) % 97) / 97 for text in completions]


def grpo(prompts: int, group: int, repeat: int, new: int) -> dict[str, Any]:
    """Groups of completions of equal length in both libraries, so that the work is the same."""
    rows = [{"prompt": f"Case {i}. {SENTENCE * repeat} In short:"} for i in range(prompts * 64)]
    options = {
        "per_device_train_batch_size": prompts * group,
        "num_generations": group,
        "max_completion_length": new,
        "generation_kwargs": {"min_new_tokens": new},
    }
    return {"name": "GRPO", "rows": rows, "options": options, "trainer": {"reward_funcs": length_reward}}


def dpo() -> dict[str, Any]:
    """Four pairs on prompts of about 220 tokens; completions of about 40 to 90 tokens."""
    rows = [
        {
            "prompt": f"Case {i}. {SENTENCE * 9} In short:",
            "chosen": f" Entry {i}. {ANSWER * (2 + i % 3)}",
            "rejected": f" Note {i}. {ANSWER * (4 - i % 3)}",
        }
        for i in range(4 * 64)
    ]
    return {"name": "DPO", "rows": rows, "options": {"per_device_train_batch_size": 4}, "trainer": {}}


def sft() -> dict[str, Any]:
    """Eight rows of about 100 to 230 tokens, all of them learned."""
    rows = [{"text": f"Case {i}. {SENTENCE * (4 + i % 6)}"} for i in range(8 * 64)]
    return {"name": "SFT", "rows": rows, "options": {"per_device_train_batch_size": 8}, "trainer": {}}


WORKS = {
    # One group of 8 on a prompt of about 220 tokens, 64 new tokens.
    "a": lambda: grpo(prompts=1, group=8, repeat=9, new=64),
    "b": dpo,
    "c": sft,
    # Eight prompts of four completions, short prompts.
    "short": lambda: grpo(prompts=8, group=4, repeat=1, new=32),
}


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
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


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=("trl_core", "trl"))
    parser.add_argument("--work", default="a", choices=WORKS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    options = parser.parse_args()
    work = WORKS[options.work]()
    library = importlib.import_module(options.library)
    peak = Peak()
    peak.start()
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(library, f"{work['name']}Config")(
            output_dir=folder,
            max_steps=options.steps + 1,
            learning_rate=1e-6,
            gradient_checkpointing=options.checkpointing,
            model_init_kwargs={"dtype": "float32"},
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            **work["options"],
        )
        clock = Clock()
        trainer = getattr(library, f"{work['name']}Trainer")(
            model=options.model,
            args=args,
            train_dataset=Dataset.from_list(work["rows"]),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            callbacks=[clock],
            **work["trainer"],
        )
        forwarded = [0]  # tokens that went through the policy, padding included
        trainer.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, args: forwarded.__setitem__(0, forwarded[0] + args[0].numel())
        )
        trainer.train()
        logs = [line for line in trainer.state.log_history if "loss" in line]
    result = {
        "library": options.library,
        "seconds": clock.seconds[1:],  # the first step warms caches
        "peak_gib": max(peak.bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30,
        "tokens": logs[-1]["num_tokens"] / len(logs),
        "forwarded": forwarded[0] / len(logs),
        "losses": [line["loss"] for line in logs],
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
