"""Does GFPO curb the growth of answers under GRPO, at equal accuracy? The paper's claim, on a toy, over several seeds.

    export OMP_NUM_THREADS=1
    python plugins/trl-gfpo/examples/shorter_answers.py --report plugins/trl-gfpo/evidence/decaying_rate

The task: add six digits from 0 to 4, modulo 5. A small model may think aloud before it answers: `403112=422341#1` has
the running totals, a marker, and the answer. With few totals it can only guess; with all six the answer is there to be
copied; more of them (the teacher starts again) cost tokens and help nobody. The first model learns from a teacher who
writes any number of totals from none to twice the six. So its longer answers are more often right, and GRPO, whose
reward only asks whether the answer is right, has a reason to lengthen them. GFPO samples more and trains on the
shortest.

What is compared, all from the same first model, each with one optimizer step per generation of the same prompts:

- `grpo k`: groups of k, so as many rows are trained on as with GFPO
- `grpo G`: groups of G, so as many rows are sampled as with GFPO
- `gfpo shortest`: the k shortest of G
- `gfpo token efficiency`: the k of G with the highest reward per token
- `gfpo random`: k of G at random, a control

Fixed before the reported runs, on problems that were never trained on, with sampled answers. The spread is the largest
distance between two seeds of one arm, the larger one of the two arms that are compared. The claim counts as reproduced
if, on every seed and for both GRPO arms,

1. GRPO lengthens answers: its mean length is above the first model's by more than the spread,
2. `gfpo shortest` has a mean length below GRPO's by more than the spread,
3. its accuracy is not below GRPO's by more than the spread,

and if the control, which is `grpo k` with rows drawn in another way, is neither shorter than `grpo k` nor less accurate
by more than the spread on any seed. The same is reported of token efficiency. As the paper's measure, the excess length
reduction: how much of the growth under GRPO is gone.

Options were set with pilot runs from another first model, on another seed (100; `grpo k` and `gfpo shortest`, and token
efficiency with the largest learning rate), so that both arms have levelled off: 60 steps with a learning rate of 1e-4
were too few for either, after 150 with 1e-4, 2e-4 and 4e-4 GRPO was right in 0.96, 0.98 and 0.98 of the answers, with
15 tokens, and GFPO in 0.90, 0.93 and 0.87, with 9; hence 2e-4, and more steps. A first form of the task, modulo 10, was
given up: supervised training hardly taught the first model to add (0.18 right).

There are two reports. In the first (`--schedule constant`, seeds 0 to 2) the learning rate stayed as it was. Answers
were shorter on every seed, but the accuracy of the last weights could not be compared: rewards still dropped from 0.99
to 0.91 from one step to the next, and the control, then held to its length only, ended up to 0.065 below `grpo k`,
further than the filter by length. The second, once and on new seeds (10 to 12), lets the learning rate fall to 0 over
the same steps and asks for the accuracy of the control too. Nothing else was changed. Both say that answers are shorter
on every seed, and neither that accuracy is equal on every seed.
"""

import argparse
import json
import platform
import random
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import mean

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.trainer_callback import PrinterCallback

from trl_core import get_config, get_trainer

BASE, DIGITS = 5, 6
MAX_NEW_TOKENS = 4 * DIGITS  # the teacher takes at most 2 * DIGITS + 3: room to grow
DRAWS = 4  # sampled answers to each held-out problem
VERSIONS = ("torch", "transformers", "trl-core", "trl-gfpo")


# -- the task ---------------------------------------------------------------------------------------------------------
def problems(train, held_out):
    """Rows to train on and rows held out, no problem in both; each has a teacher's demonstration."""
    rng, rows = random.Random(7), {}
    while len(rows) < train + held_out:
        digits = "".join(rng.choices("0123456789"[:BASE], k=DIGITS))
        totals = [str(sum(map(int, digits[: i + 1])) % BASE) for i in range(DIGITS)]
        thinking = "".join((totals * 2)[: rng.randint(0, 2 * DIGITS)])
        row = {"prompt": f"{digits}=", "answer": totals[-1], "completion": f"{thinking}#{totals[-1]}"}
        rows.setdefault(digits, row)
    rows = list(rows.values())
    return Dataset.from_list(rows[:train]), Dataset.from_list(rows[train:])


def correct(completions, answer, **_):
    """The reward: 1 if the right digit, and nothing else, follows the marker; the thinking is not looked at."""
    return [float(text.partition("#")[2] == right) for text, right in zip(completions, answer, strict=True)]


def at_random(group_completions, group_rewards):
    """A filter that knows nothing."""
    return [[random.random() for _ in group] for group in group_completions]


# -- the first model --------------------------------------------------------------------------------------------------
def new_model():
    """A small Llama without any training, and a tokenizer with one token per character."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *"0123456789=#"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **shape, **tokens)
    return LlamaForCausalLM(config), tokenizer


def quiet(seed, folder):
    """Options that every training here has: plain Adam in float32 on the CPU, no files."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "use_cpu": True,
        "weight_decay": 0.0,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def first_model(rows, options, folder):
    """Supervised training on the teacher's demonstrations, which stops while totals are still often wrong."""
    set_seed(options.start_seed)
    model, tokenizer = new_model()
    args = get_config("sft")(
        **quiet(options.start_seed, folder),
        max_steps=options.start_steps,
        per_device_train_batch_size=256,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
    )
    rows = rows.select_columns(["prompt", "completion"])
    trainer = get_trainer("sft")(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(folder / "first"))
    return folder / "first", tokenizer


# -- one run ----------------------------------------------------------------------------------------------------------
def arms(options):
    """Group size, how many of the group are kept, and the filter."""
    large, k = options.num_generations, options.num_remains_in_group
    return {
        "grpo k": (k, None, None),
        "grpo G": (large, None, None),
        "gfpo shortest": (large, k, "shortest"),
        "gfpo token efficiency": (large, k, "token_efficiency"),
        "gfpo random": (large, k, at_random),
    }


def run(name, seed, first, tokenizer, rows, held_out, options, folder):
    """Train one arm with one seed; its rewards and lengths in training, and what it does with held-out problems."""
    generations, kept, filter_func = arms(options)[name]
    algorithm = "gfpo" if kept else "grpo"
    more = {"num_remains_in_group": kept} if kept else {}
    args = get_config(algorithm)(
        **quiet(seed, folder),
        **more,
        max_steps=options.steps,
        num_generations=generations,
        per_device_train_batch_size=options.prompts * generations,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=1.0,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
    )
    set_seed(seed)
    started = time.perf_counter()
    trainer = get_trainer(algorithm)(
        model=str(first),
        reward_funcs=correct,
        args=args,
        train_dataset=rows.select_columns(["prompt", "answer"]),
        **({"group_filter_func": filter_func} if kept else {}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = time.perf_counter() - started
    log = [line for line in trainer.state.log_history if "completions/mean_length" in line]
    return {
        "arm": name,
        "seed": seed,
        **evaluate(trainer.model, tokenizer, held_out),
        "seconds": seconds,
        "reward_by_tenth": tenths([line["gfpo/reward_all" if kept else "reward"] for line in log]),
        "length_by_tenth": tenths([line["completions/mean_length"] for line in log]),
        "groups_without_signal": mean(line["frac_reward_zero_std"] for line in log),
    }


def tenths(values):
    """The mean of each tenth of a run, or the values themselves if there are fewer than ten."""
    size = max(1, len(values) // 10)
    return [round(mean(values[i : i + size]), 4) for i in range(0, len(values), size)]


@torch.no_grad()
def evaluate(model, tokenizer, rows):
    """Share right and mean tokens, marker and end included, of sampled answers; both also by tokens of thinking."""
    prompts = tokenizer(list(rows["prompt"]), return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2026)  # the same draws for every model
        output = model.eval().generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=DRAWS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )
    completions = output[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    right = correct(texts, [answer for answer in rows["answer"] for _ in range(DRAWS)])
    by_thinking = {}
    for text, score in zip(texts, right, strict=True):
        by_thinking.setdefault(len(text.partition("#")[0]), []).append(score)
    return {
        "accuracy": mean(right),
        "length": (completions != tokenizer.pad_token_id).sum(1).float().mean().item(),
        "by_thinking": {size: [len(found), mean(found)] for size, found in sorted(by_thinking.items())},
    }


# -- the verdict ------------------------------------------------------------------------------------------------------
def verdict(before, runs):
    """For both filters: whether each part of the criterion held against each GRPO arm, and the numbers behind it."""
    found = {}
    for name in ("gfpo shortest", "gfpo token efficiency"):
        for base in ("grpo k", "grpo G"):
            grpo, gfpo = runs[base], runs[name]
            lengths, right = spread(grpo, gfpo, "length"), spread(grpo, gfpo, "accuracy")
            pairs = list(zip(grpo, gfpo, strict=True))
            grown = [a["length"] - before["length"] for a in grpo]
            removed = [
                (a["length"] - b["length"]) / by if by > 0 else None for (a, b), by in zip(pairs, grown, strict=True)
            ]
            found[f"{name} against {base}"] = {
                "grpo lengthens": all(a["length"] - before["length"] > spread(grpo, grpo, "length") for a in grpo),
                "shorter": all(a["length"] - b["length"] > lengths for a, b in pairs),
                "as accurate": all(a["accuracy"] - b["accuracy"] <= right for a, b in pairs),
                "spread of length": lengths,
                "spread of accuracy": right,
                "excess length reduction": removed,
            }
    grpo, control = runs["grpo k"], runs["gfpo random"]
    lengths, right = spread(grpo, control, "length"), spread(grpo, control, "accuracy")
    found["control"] = {
        "not shorter": all(a["length"] - b["length"] <= lengths for a, b in zip(grpo, control, strict=True)),
        "as accurate": all(a["accuracy"] - b["accuracy"] <= right for a, b in zip(grpo, control, strict=True)),
        "spread of length": lengths,
        "spread of accuracy": right,
    }
    needed = [found[f"gfpo shortest against {base}"] for base in ("grpo k", "grpo G")]
    held = all(part[key] for part in needed for key in ("grpo lengthens", "shorter", "as accurate"))
    found["reproduced"] = held and found["control"]["not shorter"] and found["control"]["as accurate"]
    return found


def spread(first, second, what):
    """The largest distance between two seeds, in the arm where it is larger."""
    return max(max(run[what] for run in arm) - min(run[what] for run in arm) for arm in (first, second))


# -- the report -------------------------------------------------------------------------------------------------------
def report(found):
    """The lines of `RESULTS.md`."""
    at, before, runs = found["conditions"], found["before"], found["runs"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    lines = [
        "# Does GFPO curb the growth of answers?",
        "",
        "Written by [shorter_answers.py](../../examples/shorter_answers.py), whose first lines say what the task is, "
        "what is compared, and which criterion was fixed before these runs.",
        "",
        f"Sums of {DIGITS} digits modulo {BASE}; {at['steps']} optimizer steps, each on a generation of "
        f"{at['prompts']} prompts; k = {at['num_remains_in_group']}, G = {at['num_generations']}; learning rate "
        f"{at['learning_rate']}, {at['schedule']}; seeds {', '.join(map(str, at['seeds']))}. The first model has "
        f"{at['parameters']:,} weights and {at['start_steps']} supervised steps behind it. {at['machine']}. "
        f"{versions}. {at['date']}; {at['minutes']:.1f} minutes in all.",
        "",
        f"Of the claim: {'reproduced' if found['verdict']['reproduced'] else 'not reproduced'}, by the criterion.",
        "",
        "## Held-out problems",
        "",
        f"{at['held_out']} problems, {DRAWS} sampled answers each. Length in tokens, marker and end included; all "
        f"{DIGITS} totals make {DIGITS + 3}. Before: length {before['length']:.2f}, right {before['accuracy']:.3f}. "
        "After, per seed:",
        "",
        "| arm | length | mean | right | mean | groups without signal | seconds |",
        "|---|---|---:|---|---:|---:|---|",
    ]
    for name, group in runs.items():
        cells = [name, each(group, "length", 2), f"{mean(run['length'] for run in group):.2f}"]
        cells += [each(group, "accuracy", 3), f"{mean(run['accuracy'] for run in group):.3f}"]
        cells += [f"{mean(run['groups_without_signal'] for run in group):.2f}", each(group, "seconds", 0)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The seconds are no measurement: the machine did other work at the same time.",
        "",
        "## The criterion",
        "",
        "| | GRPO lengthens | shorter | as accurate | spread of length, right | excess length reduction, per seed |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in found["verdict"].items():
        if "against" in name:
            says = ["yes" if part[key] else "no" for key in ("grpo lengthens", "shorter", "as accurate")]
            sizes = f"{part['spread of length']:.2f}, {part['spread of accuracy']:.3f}"
            removed = ", ".join(
                "no growth" if value is None else f"{value:.0%}" for value in part["excess length reduction"]
            )
            lines.append(f"| {' | '.join([name, *says, sizes, removed])} |")
    control = found["verdict"]["control"]
    lines += [
        "",
        "The control, k of G at random, against `grpo k`: "
        f"{'not shorter' if control['not shorter'] else 'shorter'} by more than the spread "
        f"({control['spread of length']:.2f}), {'as' if control['as accurate'] else 'less'} accurate by it "
        f"({control['spread of accuracy']:.3f}).",
        "",
        "## How much thinking it takes",
        "",
        "Answers by the number of tokens before the marker: share of all answers, and in brackets the share right; for "
        "the trained models over all seeds.",
        "",
        "| thinking | first model | " + " | ".join(runs) + " |",
        "|---:|" + "---|" * (1 + len(runs)),
    ]
    columns = [[before], *runs.values()]
    for size in range(2 * DIGITS + 1):
        cells = [thinking_cell(group, lambda found, size=size: int(found) == size) for group in columns]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    cells = [thinking_cell(group, lambda found: int(found) > 2 * DIGITS) for group in columns]
    return [*lines, f"| more | {' | '.join(cells)} |"]


def each(group, what, digits):
    return ", ".join(f"{run[what]:.{digits}f}" for run in group)


def thinking_cell(group, fits):
    """Share of the answers whose thinking has a size that fits, and the share of these that is right."""
    counted = [(size, *pair) for run in group for size, pair in run["by_thinking"].items()]
    chosen = [(number, share) for size, number, share in counted if fits(size)]
    number, everything = sum(n for n, _ in chosen), sum(n for _, n, _ in counted)
    if not number:
        return "0"
    return f"{number / everything:.2f} ({sum(n * share for n, share in chosen) / number:.2f})"


# -- all runs ---------------------------------------------------------------------------------------------------------
def parse(arguments):
    head = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=head)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    parser.add_argument("--steps", type=int, default=240, help="generations, with one optimizer step each")
    parser.add_argument("--prompts", type=int, default=16, help="prompts per generation")
    parser.add_argument("--num_generations", type=int, default=16, help="G")
    parser.add_argument("--num_remains_in_group", type=int, default=8, help="k")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--schedule", choices=("linear", "constant"), default="linear", help="of the learning rate")
    parser.add_argument("--problems", type=int, default=8000, help="problems to train on")
    parser.add_argument("--held_out", type=int, default=500, help="problems to evaluate on")
    parser.add_argument("--start_steps", type=int, default=300, help="supervised steps of the first model")
    parser.add_argument("--start_seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="folder for RESULTS.md and results.json")
    return parser.parse_args(arguments)


def main(arguments=None):
    options, began = parse(arguments), time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    rows, held_out = problems(options.problems, options.held_out)
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        first, tokenizer = first_model(rows, options, Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(first)
        before = evaluate(model, tokenizer, held_out)
        print(f"first model: length {before['length']:.2f}, right {before['accuracy']:.3f}", flush=True)
        for name in arms(options):
            for seed in options.seeds:
                done = run(name, seed, first, tokenizer, rows, held_out, options, scratch)
                runs.setdefault(name, []).append(done)
                print(f"{name}, seed {seed}: length {done['length']:.2f}, right {done['accuracy']:.3f}", end="")
                print(f"; {done['seconds']:.0f} s", flush=True)
    conditions = {name: value for name, value in vars(options).items() if name != "report"}
    conditions |= {
        "parameters": model.num_parameters(),
        "machine": f"{platform.machine()} CPU, float32, threads: {torch.get_num_threads()}",
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "date": time.strftime("%Y-%m-%d"),
        "minutes": (time.perf_counter() - began) / 60,
    }
    found = {"conditions": conditions, "before": before, "runs": runs, "verdict": verdict(before, runs)}
    lines = report(found)
    if options.report:
        options.report.mkdir(parents=True, exist_ok=True)
        (options.report / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.report / "RESULTS.md").write_text("\n".join(lines) + "\n")
    else:
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
