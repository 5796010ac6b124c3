"""Trainings on given completions: the first token of each says its reward, the second which generation it is of."""

import os

import torch
from datasets import Dataset
from transformers import TrainerCallback

from trl_core import get_config, get_trainer, hookimpl
from trl_core.testing import FixedRollouts, tiny_model, tiny_tokenizer

EOS, UNSCORED = 1, 99


def reward(completion_ids, **_):
    """What `group` wrote into the first token."""
    return [None if ids[0] == UNSCORED else (ids[0] - 100) / 10 for ids in completion_ids]


def group(rewards, tag=0, lengths=None):
    """Completions with these rewards (None: no reward), of different lengths unless told."""
    firsts = [UNSCORED if value is None else 100 + round(value * 10) for value in rewards]
    lengths = lengths or [3 + place % 4 for place in range(len(rewards))]
    rows = zip(firsts, lengths, strict=True)
    return [[first, 10 + tag, *range(30 + 7 * place, 28 + 7 * place + n)][:n] for place, (first, n) in enumerate(rows)]


def batch(*groups, tag=0):
    """A generation batch of groups of these rewards; each completion ends with the terminator."""
    rows = [row for number, rewards in enumerate(groups) for row in group(rewards, tag + 20 * number)]
    return [[*row, EOS] for row in rows]


class Recorded(FixedRollouts):
    """Replays completions, and notes every micro-batch of the loss and its importance ratios."""

    def __init__(self, batches):
        super().__init__([rows if isinstance(rows, dict) else {"completion_ids": rows} for rows in batches])
        self.seen = []

    @hookimpl
    def loss_terms(self, samples, logps, log_ratio):
        self.seen.append((samples, log_ratio.detach().exp()))
        return {}


class Selected(TrainerCallback):
    """Notes what `select` returns."""

    def __init__(self):
        self.batches = []

    @hookimpl(wrapper=True)
    def select(self, samples):
        result = yield
        self.batches.append(result)
        return result


def make_trainer(folder, batches, algorithm="replay", arguments=None, **options):
    """A trainer that is given one list of completions per generation batch, and descends plainly.

    `arguments` are the trainer's, all else are options.
    """
    recorded = Recorded(batches)
    rows = len(recorded.generations[0]["completion_ids"])
    defaults = {
        "output_dir": str(folder),
        "max_steps": len(batches),
        "num_generations": 4,
        "per_device_train_batch_size": rows,
        "max_completion_length": 16,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    defaults = {**defaults, **options}
    prompts = rows // defaults["num_generations"]
    return get_trainer(algorithm)(
        **{
            "model": tiny_model(),
            "reward_funcs": reward,
            "args": get_config(algorithm)(**defaults),
            "train_dataset": Dataset.from_list([{"prompt": "p" * (i + 1)} for i in range(8 * prompts)]),
            "processing_class": tiny_tokenizer(),
            "rollouts": recorded,
            **(arguments or {}),
        }
    )


def buffer(trainer):
    """The replay buffer of a trainer."""
    return trainer.hooks.objects["replay"].buffer


def seen(trainer):
    """(rows, ratios) of each micro-batch of the loss."""
    return trainer.hooks.objects["rollouts"].seen


def tags(rows):
    """What `batch` wrote into the second token of each row."""
    starts = rows.completion_lengths.cumsum(0) - rows.completion_lengths
    return (rows.completion_ids[starts + 1] - 10).tolist()


def lines(trainer):
    """The log line of each optimizer step."""
    return [line for line in trainer.state.log_history if "loss" in line]


def weights(trainer):
    """All weights of the policy."""
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def same(one, other):
    """Whether two sets of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# -- the same run in any number of processes ---------------------------------------------------------------------------
_FLAT = [0.5] * 4
# Three groups of four: with two processes, or two slices, the one in the middle lies across both.
_STRADDLING = [
    batch([1, 0, 0.5, 0.2], _FLAT, [0.3, 0.9, 0.1, 0], tag=0),
    batch(_FLAT, [0.4, 0.1, 0.1, 0.2], _FLAT, tag=1),
    batch(_FLAT, _FLAT, _FLAT, tag=2),
    batch([0.9, 0, 0, 0.2], _FLAT, [None, 0.5, None, 0.5], tag=3),
]


def run_straddling(folder, resume=None, **options):
    """A trained trainer, whose micro-batches hold six rows over all processes."""
    run = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 16, "beta": 0.1, "learning_rate": 0.02}
    rows = 6 // int(os.environ.get("WORLD_SIZE", "1"))
    run |= {"per_device_train_batch_size": rows, "sample_before_add": True, "save_steps": 7, **options}
    trainer = make_trainer(folder, _STRADDLING, **run)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def ended(trainer):
    """Weights, stored groups and metrics of a run as tensors, by name."""
    held = {f"{n}.{name}": value for _, n, item in buffer(trainer).heap for name, value in item.items()}
    names = ("loss", "replay/size", "replay/replaced_groups", "replay/mean_age")
    logged = {name: torch.tensor([line.get(name, -1.0) for line in lines(trainer)]) for name in names}
    return {name: value.double() for name, value in {**weights(trainer), **held, **logged}.items()}
