"""The task and the model that every run starts from: put five digits in order.

`40712=` is to be continued by `01247` and the end. The first model learns from a careless teacher, who in four of five
demonstrations sorts all digits but the last and leaves that one at the end. So it gives about a third of right answers
when it is sampled, and the rewards, which know the right answer, have something to teach. Problems are split by the
digits in them: no held-out problem is a rearrangement of one that the first model or any algorithm has seen.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.trainer_callback import PrinterCallback

from trl_core import get_config, get_trainer

DIGITS = 5
CARELESS = 0.8
MAX_NEW_TOKENS = DIGITS + 2  # the digits, the end, and one to go wrong with
TEMPERATURE = 1.0
_SPLIT_SEED = 7


@dataclass(frozen=True)
class Start:
    """How the first model is made; models are kept apart by these settings."""

    hidden_size: int = 128
    num_hidden_layers: int = 2
    steps: int = 200
    problems: int = 8000
    rows_per_step: int = 256
    learning_rate: float = 2e-3
    seed: int = 0


# -- problems ---------------------------------------------------------------------------------------------------------
def problems(train: int = 8000, held_out: int = 500) -> tuple[Dataset, Dataset]:
    """So many rows to train on, with the teacher's `demonstration` and the right `answer`, and so many held out."""
    rng = random.Random(_SPLIT_SEED)
    kept_back = set(rng.sample(list(combinations_with_replacement("0123456789", DIGITS)), 250))
    parts: dict[bool, dict[str, None]] = {True: {}, False: {}}  # dictionaries, for they keep the order
    while len(parts[False]) < train or len(parts[True]) < held_out:
        digits = "".join(rng.choices("0123456789", k=DIGITS))
        parts[tuple(sorted(digits)) in kept_back].setdefault(digits)
    rows = [[_row(digits, rng) for digits in parts[which]] for which in (False, True)]
    return Dataset.from_list(rows[0][:train]), Dataset.from_list(rows[1][:held_out])


def _row(digits: str, rng: random.Random) -> dict[str, str]:
    answer = "".join(sorted(digits))
    careless = "".join(sorted(digits[:-1])) + digits[-1]
    return {"prompt": f"{digits}=", "answer": answer, "demonstration": careless if rng.random() < CARELESS else answer}


def correct(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The reward function: 1 for the right characters, all of them and no more, otherwise 0."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


# -- the model --------------------------------------------------------------------------------------------------------
def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and a pad and an end token."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *"0123456789="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def start_model(start: Start, train: Dataset, cache: Path) -> Path:
    """The folder of a model that supervised training has taken part of the way; made when it is not there yet."""
    digest = hashlib.sha256(json.dumps([asdict(start), DIGITS, CARELESS]).encode()).hexdigest()[:12]
    folder = cache / f"start-{digest}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer = character_tokenizer()
    set_seed(start.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=start.hidden_size,
            intermediate_size=2 * start.hidden_size,
            num_hidden_layers=start.num_hidden_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        args = get_config("sft")(
            output_dir=scratch,
            max_steps=start.steps,
            per_device_train_batch_size=start.rows_per_step,
            learning_rate=start.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            **quiet_options(start.seed),
        )
        demonstrations = train.select_columns(["prompt", "demonstration"]).rename_column("demonstration", "completion")
        trainer = get_trainer("sft")(model=model, args=args, train_dataset=demonstrations, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        done = Path(scratch) / "model"
        trainer.save_model(str(done))
        done.rename(folder)
    return folder


def quiet_options(seed: int) -> dict[str, Any]:
    """Options that every training here has: plain Adam in float32 on the CPU, one log per step, no files."""
    return {
        "seed": seed,
        "use_cpu": True,
        "weight_decay": 0.0,
        "gradient_checkpointing": False,  # the rows are short: memory is no problem, and it would cost time
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


# -- evaluation -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: Dataset, draws: int = 0) -> float:
    """Share of right answers: of so many samples of each problem at the training temperature, or greedy with 0."""
    prompts = tokenizer(list(rows["prompt"]), return_tensors="pt", padding=True, padding_side="left")
    how = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0} if draws else {"do_sample": False}
    training = model.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2024)  # the same draws before and after
        output = model.eval().generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=max(draws, 1),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **how,
        )
    model.train(training)
    texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [answer for answer in rows["answer"] for _ in range(max(draws, 1))]
    return sum(correct(texts, answers)) / len(texts)
