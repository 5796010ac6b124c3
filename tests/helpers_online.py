"""Rows written by hand, and a trainer of small, plain defaults that takes them or samples its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from trl_core import Samples, get_config, get_trainer, hookimpl
from trl_core.testing import FixedRollouts, tiny_model, tiny_tokenizer

EOS = 1
TOKENIZER = tiny_tokenizer()


def make_rows(lengths: Sequence[int], group: Sequence[int] | None = None, **fields: Any) -> Samples:
    """Samples of these completion lengths, two prompt tokens each, all in one group unless told; tokens count up."""
    counts = torch.tensor(lengths, dtype=torch.long)
    rows, tokens = len(lengths), int(counts.sum())
    given: dict[str, Any] = {
        "prompt_ids": torch.arange(2 * rows) + 100,
        "prompt_lengths": torch.full((rows,), 2),
        "completion_ids": torch.arange(tokens) + 10,
        "completion_lengths": counts,
        "loss_mask": torch.ones(tokens, dtype=torch.bool),
        "group": torch.tensor(group if group is not None else [0] * rows),
        "position": torch.arange(rows),
        "reward": torch.zeros(rows),
        "generation": torch.zeros(rows, dtype=torch.long),
        "advantages": None,
        **fields,
    }
    if given["advantages"] is None:
        given["advantages"] = torch.zeros(int(given["loss_mask"].sum()))
    return Samples(**given).validate()


def flat(rows: Sequence[Sequence[float]]) -> Tensor:
    """Nested lists, one per row, as a flat tensor."""
    return torch.tensor([value for row in rows for value in row])


def prompts(count: int = 4, **columns: Any) -> Dataset:
    """Short prompts of different lengths; further columns are lists."""
    rows = [{"prompt": "say " + "abcdefgh"[: i + 1]} for i in range(count)]
    return Dataset.from_list([{**row, **{k: v[i] for k, v in columns.items()}} for i, row in enumerate(rows)])


def completions(*lengths: int, start: int = 10) -> dict[str, Any]:
    """One generation: completions of these lengths, different everywhere, each ending with the terminator."""
    ids, token = [], start
    for length in lengths:
        ids.append([*range(token, token + length - 1), EOS])
        token += length
    return {"completion_ids": ids}


def table(*values: float | None) -> Any:
    """A reward function that gives each row of a generation its own value, again and again."""

    def reward(completions: list[Any], **_: Any) -> list[float | None]:
        return [values[i % len(values)] for i in range(len(completions))]

    return reward


class Recorder(FixedRollouts):
    """Replays completions, and notes which prompts were asked for and every micro-batch of the loss."""

    def __init__(self, generations: dict[str, Any] | list[dict[str, Any]], *, cycle: bool = False) -> None:
        super().__init__([generations] if isinstance(generations, dict) else generations, cycle=cycle)
        self.prompts: list[list[list[int]]] = []
        self.micro_batches: list[Samples] = []

    @hookimpl
    def generate(self, prompts, sampling):
        self.prompts.append(prompts.ids)
        return super().generate(prompts, sampling)

    @hookimpl
    def loss_terms(self, samples, logps):
        self.micro_batches.append(samples)
        return {}


class Sampled(Recorder):
    """Only notes what the loss gets; the model samples."""

    generate = None

    def __init__(self) -> None:
        super().__init__([])


def make_trainer(folder: Path | str, algorithm: str = "grpo", trainer: dict[str, Any] | None = None, **options: Any):
    """A trainer without shuffling, saving and output; `trainer` holds its arguments, all else are options."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        **options,
    }
    arguments = {
        "model": None,
        "reward_funcs": table(1.0, 0.0, 0.5, -1.0),
        "train_dataset": prompts(),
        "processing_class": TOKENIZER,
        **(trainer or {}),
    }
    if arguments["model"] is None:
        arguments["model"] = tiny_model()
    if isinstance(arguments.get("rollouts"), list | dict):
        recorded = arguments["rollouts"]
        arguments["rollouts"] = FixedRollouts([recorded] if isinstance(recorded, dict) else recorded, cycle=True)
    return get_trainer(algorithm)(args=get_config(algorithm)(**settings), **arguments)


def weights(trainer: Any) -> Tensor:
    """All parameters of the policy, one after the other, in double precision."""
    return torch.cat([p.detach().double().flatten() for p in trainer.model.parameters()])


def log_lines(trainer: Any) -> list[dict[str, float]]:
    """The log line of each optimizer step."""
    return [line for line in trainer.state.log_history if "loss" in line]


def plain_logps(
    model: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """Log-probabilities of one completion from one forward over its row, without any of the core's code."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0].float() / temperature
    places = range(len(prompt_ids) - 1, ids.shape[1] - 1)
    return [logits[i].log_softmax(-1)[token].item() for i, token in zip(places, completion_ids, strict=True)]
