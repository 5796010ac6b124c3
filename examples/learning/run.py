"""Every online algorithm of this repository learns to sort five digits: rewards over three seeds, held-out accuracy.

    OMP_NUM_THREADS=1 python examples/learning/run.py [--algorithms grpo ppo ...] [--seeds 0 1 2] [--generations 40]

Runs one after the other in this process, all from one model, which the SFT trainer makes first and which stays in
`.cache/learning`. Leaves `results.json` in `--output`, and `RESULTS.md` and `results.png` there or in `--report`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import platform
import random
import sys
import time
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import torch
import transformers
from curves import write_results
from digits import MAX_NEW_TOKENS, TEMPERATURE, Start, accuracy, correct, problems, quiet_options, start_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_callback import PrinterCallback

from trl_core import get_config, get_trainer

REPOSITORY = Path(__file__).resolve().parents[2]
DRAWS = 4
"""Samples of each held-out problem."""
GROUP = 8
"""Completions of a prompt, for the algorithms that compare them."""


# -- what each algorithm is given -------------------------------------------------------------------------------------
def algorithms(rows: int) -> dict[str, dict[str, Any]]:
    """The options of each, for so many completions per generation.

    Learning rates were chosen by the rewards in training, among a few, with seed 0.
    """
    groups = {"num_generations": GROUP, "per_device_train_batch_size": rows, "learning_rate": 1e-4}
    # The ratio of a whole completion leaves a clip range as narrow as that of GSPO at once, but only if the policy
    # moves between sampling and use: four optimizer steps per generation.
    parts = {"num_generations": GROUP, "per_device_train_batch_size": rows // 4, "steps_per_generation": 4}
    parts["learning_rate"] = 3e-5
    narrow = {"epsilon": 3e-4, "epsilon_high": 4e-4}
    # One completion of each prompt: the critic takes the place of the group.
    passes = {"learning_rate": 3e-5, "max_grad_norm": 1.0}
    return {
        "grpo": groups,
        "gfpo": {**groups, "num_remains_in_group": GROUP // 2},
        "gspo": {**parts, **narrow},
        "gspo_token": {**parts, **narrow},
        "replay": {**groups, "replay_buffer_size": 64},
        # With the usual clip range, for the narrow one takes out nearly all that is replayed: the policy has moved on.
        "gspo_token+gfpo+replay": {**parts, "num_remains_in_group": GROUP // 2, "replay_buffer_size": 64},
        "ppo": {
            **passes,
            "per_device_train_batch_size": rows,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "kl_coef": 0.01,
            "stop_token": "eos",
        },
        "ppo, step by step": {
            **passes,
            "batch_size": rows,
            "mini_batch_size": rows // 2,
            "ppo_epochs": 2,
            "init_kl_coef": 0.01,
            "adap_kl_ctrl": False,
        },
        "grpo, rewards shuffled": groups,
    }


def right_and_wrong(group_completions: list, group_rewards: list[list[float]]) -> list[list[float]]:
    """A filter for GFPO: as many right as wrong answers, as far as there are any of both."""
    return [[-float(rewards[:i].count(reward)) for i, reward in enumerate(rewards)] for rewards in group_rewards]


def from_first_error(
    completions: list[str], completion_ids: list[list[int]], answer: list[str], advantages: list[float]
) -> list[list[float]]:
    """Advantages for GSPO-token: in a wrong answer, what stands before the first wrong character is not blamed."""
    found = []
    for text, ids, right, advantage in zip(completions, completion_ids, answer, advantages, strict=True):
        same = sum(1 for _ in itertools.takewhile(bool, map(operator.eq, text, right)))
        blameless = 0 if text == right else same
        found.append([0.0 if i < blameless else advantage for i in range(len(ids))])
    return found


# -- one run ----------------------------------------------------------------------------------------------------------
class Rewards:
    """The reward function, which keeps the mean of each generation: of all completions, before any are dropped.

    Args:
        shuffled: give the rewards to the wrong completions, as a control.
    """

    __name__ = "correct"

    def __init__(self, shuffled: bool = False) -> None:
        self.shuffled, self.means = shuffled, list[float]()

    def __call__(self, completions: list[str], answer: list[str], **_: Any) -> list[float]:
        found = correct(completions, answer)
        self.means.append(mean(found))
        return random.sample(found, len(found)) if self.shuffled else found


def train(name: str, source: str, problems: Any, rewards: Rewards, args: Any) -> tuple[Any, dict[str, float]]:
    """Train with the trainer of an algorithm, or of several; the model, and what they report of the run."""
    more: dict[str, Any] = {}
    if "gfpo" in name:
        more["group_filter_func"] = right_and_wrong
    if "gspo_token" in name:
        more["advantage_func"] = from_first_error
    if name == "ppo":
        more["value_model"] = source  # with a new head that gives one number
    trainer = get_trainer(name)(model=source, reward_funcs=rewards, args=args, train_dataset=problems, **more)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = {key: [line[key] for line in trainer.state.log_history if key in line] for key in REPORTED}
    return trainer.accelerator.unwrap_model(trainer.model), {REPORTED[key]: mean(log[key]) for key in log if log[key]}


REPORTED = {
    "clip_ratio/region_mean": "clipped",
    "policy/clipfrac_avg": "clipped",
    "replay/replaced_groups": "groups replaced",
}
"""Metrics of the trainers that the table shows, as means over the run."""


def train_step_by_step(
    source: str, problems: Any, rewards: Rewards, generations: int, seed: int, options: dict[str, Any]
) -> tuple[Any, dict[str, float]]:
    """The same with the classic PPO trainer, where drawing and scoring responses is up to the caller."""
    from trl_ppo.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(source)
    trainer = PPOTrainer(PPOConfig(seed=seed, **options), model, tokenizer=tokenizer)
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": MAX_NEW_TOKENS}
    sampling |= {"batch_size": options["batch_size"], "pad_token_id": tokenizer.pad_token_id}
    clipped = []
    for _ in range(generations):
        rows = problems.select(random.sample(range(len(problems)), options["batch_size"]))
        queries = [torch.tensor(ids) for ids in tokenizer(list(rows["prompt"]))["input_ids"]]
        responses = trainer.generate(queries, return_prompt=False, **sampling)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = rewards(texts, list(rows["answer"]))
        stats = trainer.step(queries, responses, [torch.tensor(score) for score in scores])
        clipped.append(float(stats["ppo/policy/clipfrac"]))
    return model.pretrained_model, {"clipped": mean(clipped)}


def run(
    name: str,
    seed: int,
    generations: int,
    options: dict[str, Any],
    source: Path,
    problems: Any,
    held_out: Any,
    output: Path,
) -> dict[str, Any]:
    """One algorithm with one seed: the reward of each generation, and the accuracy on held-out problems after."""
    algorithm, _, variant = name.partition(", ")
    rewards, started = Rewards(shuffled=variant == "rewards shuffled"), time.perf_counter()
    set_seed(seed)
    if variant == "step by step":
        model, reported = train_step_by_step(str(source), problems, rewards, generations, seed, options)
    else:
        args = get_config(algorithm)(
            output_dir=str(output),
            max_completion_length=MAX_NEW_TOKENS,
            temperature=TEMPERATURE,
            lr_scheduler_type="constant",
            **quiet_options(seed),
            **options,
        )
        args.max_steps = generations * args.micro_steps // args.gradient_accumulation_steps
        model, reported = train(algorithm, str(source), problems, rewards, args)
    seconds = time.perf_counter() - started
    return {
        "algorithm": name,
        "seed": seed,
        "rewards": rewards.means,
        **accuracies(model, source, held_out),
        "seconds": seconds,
        "reported": reported,
    }


def accuracies(model: Any, source: Path, held_out: Any) -> dict[str, float]:
    """Shares of right answers to held-out problems."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    return {"sampled": accuracy(model, tokenizer, held_out, DRAWS), "greedy": accuracy(model, tokenizer, held_out)}


# -- all runs ---------------------------------------------------------------------------------------------------------
def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train every online algorithm on a small task with checkable answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = list(algorithms(256))
    parser.add_argument("--algorithms", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--generations", type=int, default=40, help="how often completions are generated")
    parser.add_argument("--rows", type=int, default=256, help="completions per generation, a multiple of 32")
    parser.add_argument("--problems", type=int, default=8000, help="problems to train on")
    parser.add_argument("--held_out", type=int, default=500, help="problems to evaluate on")
    parser.add_argument("--start_steps", type=int, default=Start.steps, help="supervised steps of the first model")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "learning", help="run folder")
    parser.add_argument("--report", type=Path, help="folder of the table and the picture, if it is another")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "learning", help="of the first model")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Make the first model, run everything, write the results."""
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    options.output.mkdir(parents=True, exist_ok=True)
    rows, held_out = problems(options.problems, options.held_out)
    source = start_model(Start(steps=options.start_steps, problems=options.problems), rows, options.cache)
    first = AutoModelForCausalLM.from_pretrained(source)
    found: dict[str, Any] = {
        "conditions": {
            "generations": options.generations,
            "rows": options.rows,
            "groups": options.rows // GROUP,
            "seeds": options.seeds,
            "held_out": len(held_out),
            "draws": DRAWS,
            "temperature": TEMPERATURE,
            "start": {"parameters": first.num_parameters(), "steps": options.start_steps},
            "machine": f"{platform.machine()} CPU, float32, threads: {torch.get_num_threads()}",
            "versions": {name: metadata.version(name) for name in VERSIONS},
            "options": {name: algorithms(options.rows)[name] for name in options.algorithms},
        },
        "before": accuracies(first, source, held_out),
        "runs": [],
    }
    print(f"first model: sampled {found['before']['sampled']:.2f}, greedy {found['before']['greedy']:.2f} right")
    for name in options.algorithms:
        for seed in options.seeds:
            given = found["conditions"]["options"][name]
            done = run(name, seed, options.generations, given, source, rows, held_out, options.output)
            found["runs"].append(done)
            change = f"reward {done['rewards'][0]:.2f} -> {mean(done['rewards'][-5:]):.2f}"
            print(f"{name}, seed {seed}: {change}; held out {done['sampled']:.2f} right; {done['seconds']:.0f} s")
    (options.output / "results.json").write_text(json.dumps(found, indent=1))
    report = options.report or options.output
    report.mkdir(parents=True, exist_ok=True)
    write_results(found, report)


VERSIONS = ("torch", "transformers", "trl-core", "trl-gfpo", "trl-gspo", "trl-ppo", "trl-replay")

if __name__ == "__main__":
    main()
