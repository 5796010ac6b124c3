"""Small datasets, and trainers of SFT, reward models and DPO with small, plain defaults."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForSequenceClassification, TrainerCallback

import trl_core
from trl_core.testing import tiny_model, tiny_tokenizer

EOS = 1
TOKENIZER = tiny_tokenizer()
DESCENT = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
"""Plain gradient descent: Adam would hide a wrong factor, and blow up the rounding of gradients near 0."""


# -- data -------------------------------------------------------------------------------------------------------------
def texts(*lengths: int) -> Dataset:
    """Texts of so many characters; a character is a token."""
    lengths = lengths or (9, 3, 14, 6, 11, 4, 8, 5)
    return Dataset.from_list(
        [{"text": "".join(chr(97 + (7 * i + k) % 26) for k in range(n))} for i, n in enumerate(lengths)]
    )


def demonstrations(rows: int = 4) -> Dataset:
    """Prompts with completions, both of different lengths."""
    return Dataset.from_list(
        [{"prompt": "ask " + "abcdefgh"[i:] + "?", "completion": " " + "xyzuvw" * (i % 3 + 1)} for i in range(rows)]
    )


def pairs(rows: int = 4, **columns: Any) -> Dataset:
    """Preference pairs with prompts and completions of different lengths; further columns are lists."""
    found = [
        {
            "prompt": "ask " + "abcdefgh"[i % 8 :] + "?",
            "chosen": " yes" + "!" * (i % 5),
            "rejected": " no" + "o" * (i % 3),
        }
        for i in range(rows)
    ]
    return Dataset.from_list([{**row, **{k: v[i] for k, v in columns.items()}} for i, row in enumerate(found)])


def even_pairs(rows: int = 3) -> Dataset:
    """Preference pairs that all have 8 prompt tokens and two completions of 4 tokens, the end included."""
    return Dataset.from_list(
        [{"prompt": f"question{i}"[-8:], "chosen": "abc", "rejected": f"xy{i}"} for i in range(rows)]
    )


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """Messages from (role, content)."""
    return [{"role": role, "content": content} for role, content in turns]


# -- trainers ---------------------------------------------------------------------------------------------------------
def tiny_classifier(seed: int = 0, **overrides: Any) -> LlamaForSequenceClassification:
    """A reward model of the size of `tiny_model`."""
    config = tiny_model(**{"num_labels": 1, **overrides}).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(config)


DEFAULTS = {"SFT": (tiny_model, texts), "Reward": (tiny_classifier, pairs), "DPO": (tiny_model, pairs)}


def make_trainer(folder: Path | str, kind: str = "SFT", trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    """An `SFTTrainer`, `RewardTrainer` or `DPOTrainer`; `trainer` holds its arguments, all else are options."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        **DESCENT,
        **options,
    }
    model, dataset = DEFAULTS[kind]
    arguments = {"processing_class": TOKENIZER, "model": model, "train_dataset": dataset, **(trainer or {})}
    # Made for each trainer, as a user who starts again would.
    for name in {"model", "ref_model", "train_dataset"} & arguments.keys():
        if callable(arguments[name]) and not isinstance(arguments[name], torch.nn.Module):
            arguments[name] = arguments[name]()
    config, made = _classes(kind)
    return made(args=config(**settings), **arguments)


@functools.cache
def _classes(kind: str) -> tuple[Any, Any]:
    return getattr(trl_core, f"{kind}Config"), getattr(trl_core, f"{kind}Trainer")


def trained(folder: Path | str, kind: str = "SFT", trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    """The same, after training."""
    made = make_trainer(folder, kind, trainer, **options)
    made.train()
    return made


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimizer step, of all trained parameters in one tensor."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [p.grad.double().flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
        self.steps.append(torch.cat(grads))


def gradient(folder: Path | str, kind: str = "SFT", trainer: dict[str, Any] | None = None, **options: Any) -> Tensor:
    """The gradient of the first step."""
    kept = Gradients()
    trained(folder, kind, {**(trainer or {}), "callbacks": [kept]}, **options)
    return kept.steps[0]


def apart(one: Tensor, other: Tensor) -> float:
    """Relative distance of two vectors."""
    return float((one - other).norm() / other.norm())


def weights(trainer: Any) -> Tensor:
    """All parameters of the policy, one after the other, in double precision."""
    return torch.cat([p.detach().double().flatten() for p in trainer.model.parameters()])


def lines(trainer: Any) -> list[dict[str, float]]:
    """The log line of each optimizer step."""
    return [line for line in trainer.state.log_history if "loss" in line]


def losses(trainer: Any) -> list[float]:
    """The loss of each optimizer step."""
    return [line["loss"] for line in lines(trainer)]


# -- the same without any of the core's code --------------------------------------------------------------------------
def ids_of(text: str) -> list[int]:
    """Tokens of a text and the end."""
    return [*TOKENIZER(text)["input_ids"], EOS]


def row_logps(model: Any, ids: list[int], start: int = 1) -> Tensor:
    """Log-probabilities, with gradient, of the tokens of a row from the given place on, from a forward of its own."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    targets = torch.tensor(ids[start:])
    return logits[start - 1 : -1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def tokens_through(model: Any) -> list[int]:
    """A list that is given the number of tokens of every forward pass."""
    counts: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: counts.append(args[0].numel()))
    return counts


# -- the same in any number of processes ------------------------------------------------------------------------------
FIXED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # Four rows a micro-batch over all processes; with two micro-batches the second step ends the epoch.
    "sft": ("SFT", {"eval_dataset": texts()}, {"gradient_accumulation_steps": 2, "max_steps": 3}),
    "sft_last_window": ("SFT", {"train_dataset": lambda: texts(9, 3, 14, 6)}, {"gradient_accumulation_steps": 2}),
    "sft_shuffled": ("SFT", {}, {"train_sampling_strategy": "random", "max_steps": 4}),
    # Eight texts in four rows.
    "sft_packed": ("SFT", {}, {"packing": True, "max_length": 20, "max_steps": 2}),
    "sft_completions": ("SFT", {"train_dataset": lambda: demonstrations(8)}, {"loss_type": "dft", "max_steps": 2}),
    # Six rows: the second batch goes over the end of the stream.
    "sft_stream": ("SFT", {"train_dataset": lambda: texts(9, 3, 14, 6, 11, 4).to_iterable_dataset()}, {"max_steps": 4}),
    "reward": ("Reward", {"eval_dataset": pairs(4)}, {"gradient_accumulation_steps": 2, "max_steps": 3}),
    "dpo": ("DPO", {"eval_dataset": pairs(4)}, {"gradient_accumulation_steps": 2, "max_steps": 3}),
    "dpo_precomputed": (
        "DPO",
        {"ref_model": lambda: tiny_model(seed=1), "eval_dataset": pairs(4), "train_dataset": lambda: pairs(8)},
        # Three chunks for two processes.
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3, "max_steps": 4},
    ),
    "dpo_moving_reference": ("DPO", {}, {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3}),
    "dpo_stream": ("DPO", {"train_dataset": lambda: pairs(6).to_iterable_dataset()}, {"max_steps": 4}),
}
"""Runs that must not depend on the number of processes: trainer, its arguments, options."""


def make_fixed_trainer(folder: Path | str, name: str, processes: int, **more: Any) -> Any:
    """A trainer for one of `FIXED`."""
    kind, trainer, options = FIXED[name]
    rows = {"per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 4 // processes}
    return make_trainer(folder, kind, trainer, **{**rows, **options, **more})
