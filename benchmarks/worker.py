"""One process of the benchmark: trains a few steps with one library and prints a JSON line of measurements.

python worker.py {trl_core,trl} --work a --model FOLDER --steps 5
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import flops
import torch
import works
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.generation.stopping_criteria import EosTokenCriteria

# Where each library keeps its trainers; PPO is a plugin here and was experimental there.
HOMES = {"trl_core": "trl_core", "trl": "trl", ("trl_core", "PPO"): "trl_ppo", ("trl", "PPO"): "trl.experimental.ppo"}


class Clock(TrainerCallback):
    """Seconds from the end of a step to the end of the next, the part of them in each phase, and tokens."""

    def __init__(self, device: str) -> None:
        self.synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.seconds: list[float] = []
        self.spent: list[Counter] = []
        self.current: Counter = Counter()

    def now(self) -> float:
        self.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = self.now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.update = self.now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.current["optimizer"] += self.now() - self.update

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        end = self.now()
        self.seconds.append(end - self.start)
        self.spent.append(self.current)
        self.start, self.current = end, Counter()

    def timed(self, owner: Any, name: str, phase: str) -> None:
        """Count the seconds of a method of this object as that phase's."""
        method = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = method(*args, **kwargs)
            self.current[phase] += self.now() - start
            return result

        setattr(owner, name, call)

    def count(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        """Of the embeddings of the policy: its tokens, padding included."""
        self.current["forwarded"] += args[0].numel()


class Ends:
    """Ends sampled rows at set lengths, the same in both libraries, whatever their loops do with rows.

    Both ask the same criterion of `transformers` after each token which rows have ended. Here it first writes the
    terminator over the last token of rows whose time has come, and then does what it does; the options of the work keep
    terminators from being drawn otherwise. A row is known by its tokens so far, so rows may come, go and change places.
    """

    def __init__(self, lengths: Callable[[list[int]], list[int]], terminator: int) -> None:
        self.lengths, self.terminator, self.ended = lengths, terminator, 0
        self.left: dict[tuple[int, ...], list[int]] = {}

    def install(self) -> None:
        """For the whole process."""
        criterion: Any = EosTokenCriteria
        judge = criterion.__call__

        def call(own: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.end(input_ids)
            return judge(own, input_ids, *args, **kwargs)

        criterion.__call__ = call

    def end(self, ids: torch.Tensor) -> None:
        """Of (n, L) ids the last column is new. Rows of equal tokens may swap what is left to them."""
        for place, row in enumerate(ids.tolist()):
            before = tuple(row[:-1])
            waiting = self.left.pop(before, None) or self.lengths(row[:-1])
            left = waiting.pop(0) - 1
            if waiting:
                self.left[before] = waiting
            if left == 0:
                ids[place, -1] = row[-1] = self.terminator
                self.ended += 1
            self.left.setdefault(tuple(row), []).append(left)


def build(work: works.Work, options: argparse.Namespace, tokenizer: Any, folder: str, clock: Clock) -> Any:
    """The trainer."""
    ppo = work.algorithm == "PPO"
    home = importlib.import_module(HOMES.get((options.library, work.algorithm), HOMES[options.library]))
    steps = options.steps + 1
    length = {"total_episodes": steps * work.batch} if ppo else {"max_steps": steps}
    # Trainers that generate order their prompts themselves.
    order = {} if work.algorithm in ("GRPO", "PPO") else {"train_sampling_strategy": "sequential"}
    loading = {} if ppo else {"model_init_kwargs": {"dtype": options.dtype}}
    args = getattr(home, f"{work.algorithm}Config")(
        output_dir=folder,
        learning_rate=1e-6,
        gradient_checkpointing=options.checkpointing,
        bf16=options.dtype == "bfloat16",
        use_cpu=options.device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **order,
        **length,
        **loading,
        **work.options,
    )
    models: dict[str, Any] = {"model": options.model}
    if ppo:
        torch.manual_seed(0)  # new heads

        def load(kind: Any, **kwargs: Any) -> Any:
            return kind.from_pretrained(options.model, dtype=options.dtype, **kwargs)

        classifier = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
        models = {
            "model": load(AutoModelForCausalLM),
            "ref_model": load(AutoModelForCausalLM),
            "reward_model": load(AutoModelForSequenceClassification, **classifier),
            "value_model": load(AutoModelForSequenceClassification, **classifier),
        }
    return getattr(home, f"{work.algorithm}Trainer")(
        args=args,
        train_dataset=Dataset.from_list(work.rows),
        processing_class=tokenizer,
        callbacks=[clock],
        **models,
        **work.rewards,
    )


def needed(work: works.Work, size: flops.Size, tokenizer: Any, steps: int) -> dict[str, Any]:
    """Operations and bytes that a measured step needs, on average; known for GRPO of equal lengths and DPO."""
    rows = work.rows[work.batch : work.batch * (steps + 1)]

    def tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    if work.algorithm == "DPO":  # completions end with a terminator
        pairs = [(tokens(row["prompt"]), [tokens(row[side]) + 1 for side in ("chosen", "rejected")]) for row in rows]
        found, moved = flops.dpo(size, pairs), flops.least_bytes(size, 0)
    elif work.algorithm == "GRPO" and work.lengths is None and "varies" not in rows[0]:
        new, group = work.options["max_completion_length"], work.options["num_generations"]
        found = flops.grpo(size, [(tokens(row["prompt"]), [new] * group) for row in rows])
        moved = flops.least_bytes(size, new)
    else:
        return {}
    counted = len(rows) / work.batch
    return {"flops": {phase: value / counted for phase, value in found.items()}, "bytes": moved}


def measured(work: works.Work, clock: Clock, logs: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """What the steps after the first took; the first warms caches."""
    each = len(clock.seconds) // (steps + 1)  # optimizer steps of a step; TRL's PPO calls back once for a batch
    seconds, phases = [], []
    for i in range(each, len(clock.seconds), each):
        seconds.append(sum(clock.seconds[i : i + each]))
        spent: Counter = sum(clock.spent[i : i + each], Counter())
        generate = spent["generate"] or sum(line.get("time/generate", 0.0) for line in logs[i : i + each])
        phase = {"generate": generate}
        if spent["training_step"]:
            phase["prepare"] = spent["prepare"] - generate
            phase["update"] = spent["training_step"] - spent["prepare"]
            phase["optimizer"] = spent["optimizer"]
        phase["rest"] = seconds[-1] - sum(phase.values())
        phases.append(phase | {"forwarded": spent["forwarded"]})
    result = {
        "seconds": seconds,
        "phases": {name: statistics.median(p[name] for p in phases) for name in phases[0] if name != "forwarded"},
        "forwarded": statistics.mean(p["forwarded"] for p in phases),
    }
    if "num_tokens" in logs[-1]:
        result["tokens"] = (logs[-1]["num_tokens"] - logs[0]["num_tokens"]) / (len(logs) - 1)
    if "completions/mean_length" in logs[-1] and work.algorithm == "GRPO":
        rows = work.batch * work.options["num_generations"]
        result["new"] = rows * statistics.mean(line["completions/mean_length"] for line in logs[1:])
    if work.algorithm == "PPO":
        own = work.batch * work.options["response_length"]
        result |= {"new": own, "tokens": own + work.batch * statistics.mean(len(r["input_ids"]) for r in work.rows)}
    return result


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("trl_core", "trl"))
    parser.add_argument("--work", default="a", choices=[name for name in works.TITLES if name != "h"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256, help="of work f")
    parser.add_argument("--group", type=int, default=8, help="of work f")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    work = works.make(options.work, tokenizer, options.prompt, options.group)
    if work.algorithm == "PPO":
        tokenizer.padding_side = "left"  # TRL's leaves it to the user
    clock = Clock(options.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(work, options, tokenizer, folder, clock)
        policy = getattr(trainer, "policy_model", trainer.model)
        policy.get_input_embeddings().register_forward_pre_hook(clock.count)
        clock.timed(trainer, "training_step", "training_step")
        clock.timed(trainer, "_prepare_inputs", "prepare")
        if options.library == "trl":  # trl-core logs it
            clock.timed(policy, "generate", "generate")
        ends = Ends(work.lengths or (lambda prompt: []), tokenizer.eos_token_id)
        if work.lengths is not None:
            ends.install()
        trainer.train()
        told = "loss/policy_avg" if work.algorithm == "PPO" else "loss"
        logs = [line for line in trainer.state.log_history if told in line]
    if work.lengths is not None and ends.ended != (options.steps + 1) * work.batch * work.options["num_generations"]:
        raise SystemExit(f"{ends.ended} rows were ended where they should, which is not all of them.")
    on_gpu = options.device == "cuda"
    if on_gpu:
        peak, memory = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    result = {
        "peak_gib": peak / 2**30,
        "memory_gib": memory / 2**30,
        **measured(work, clock, logs, options.steps),
        **needed(work, flops.size_of(policy), tokenizer, options.steps),
        "losses": [line[told] for line in logs],
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in (options.library.replace("_", "-"), "torch", "transformers")},
        },
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
