"""What is trained in each work: the same rows, options and rewards for both libraries."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SENTENCE = "The harbour master writes down every ship, its cargo, its flag and the hour at which it came in. "
ANSWER = "A ship came in from the north with timber and salt, and left again at dusk. "
TITLES = {
    "a": "GRPO, one group of 8, prompt of about 205 tokens, 64 new tokens",
    "b": "DPO, 4 pairs, prompt of about 205 tokens, completions of about 40 to 90",
    "c": "SFT, 8 rows of about 100 to 230 tokens",
    "d": "GRPO, 8 short prompts of 4, completions of 16 to 256 tokens, 4 micro-batches",
    "e": "GRPO, 4 groups of 4, three of them without variance, beta 0, prompt of about 120 tokens, 48 new tokens",
    "f": "GRPO, one group, growth with its size and with the prompt, 32 new tokens",
    "g": "PPO, 4 prompts of about 100 tokens, 32 new tokens, 2 passes over each batch",
    "h": "Start-up of fresh processes",
}
# Of f: the group grows, the prompt grows, and completions with almost no prompt, as a yardstick.
POINTS = [
    *({"prompt": 256, "group": group} for group in (2, 4, 8, 16, 32)),
    *({"prompt": prompt, "group": 8} for prompt in (64, 512, 1024)),
    *({"prompt": 1, "group": group} for group in (8, 32)),
]
GROWTH_NEW = 32
LONGEST = 256


@dataclass
class Work:
    """One work for the trainer of one algorithm."""

    algorithm: str
    rows: list[dict[str, Any]]
    options: dict[str, Any]
    rewards: dict[str, Any] = field(default_factory=dict)
    """Arguments of the trainer."""
    batch: int = 1
    """Dataset rows of a step."""
    lengths: Callable[[list[int]], list[int]] | None = None
    """Lengths of a prompt's completions, from its tokens, where they are not all the longest."""


def text_reward(completions: list[str], **_: object) -> list[float]:
    """Different for different texts, so that no group is without signal."""
    return [float(sum(map(ord, text)) % 97) / 97 for text in completions]


def some_reward(completions: list[str], varies: list[bool], **_: object) -> list[float]:
    """As `text_reward` for the prompts that say so; nothing for the others."""
    return [value if told else 0.0 for value, told in zip(text_reward(completions), varies, strict=True)]


def various_lengths(prompt: list[int], pad: int, group: int) -> list[int]:
    """Lengths between 16 and 256, evenly on a logarithmic scale, drawn from the prompt's tokens."""
    draw = random.Random(",".join(str(token) for token in prompt if token != pad))
    return [round(16 * (LONGEST / 16) ** draw.random()) for _ in range(group)]


def grpo(rows: list[dict[str, Any]], prompts: int, group: int, new: int, **options: Any) -> Work:
    """Groups of completions of a set length in both libraries, so that the work is the same."""
    standard = {
        "per_device_train_batch_size": prompts * group,
        "num_generations": group,
        "max_completion_length": new,
        "generation_kwargs": {"min_new_tokens": new},
        "shuffle_dataset": False,
    }
    return Work("GRPO", rows, standard | options, {"reward_funcs": text_reward}, batch=prompts)


def cases(count: int, repeat: int) -> list[dict[str, Any]]:
    """Prompts of about 20 tokens for each repetition."""
    return [{"prompt": f"Case {i}. {SENTENCE * repeat} In short:"} for i in range(count)]


def dpo() -> Work:
    """Four pairs on prompts of about 205 tokens; completions of about 40 to 90 tokens."""
    rows = [
        {
            "prompt": f"Case {i}. {SENTENCE * 9} In short:",
            "chosen": f" Entry {i}. {ANSWER * (2 + i % 3)}",
            "rejected": f" Note {i}. {ANSWER * (4 - i % 3)}",
        }
        for i in range(4 * 64)
    ]
    return Work("DPO", rows, {"per_device_train_batch_size": 4}, batch=4)


def sft() -> Work:
    """Eight rows of about 100 to 230 tokens, all of them learned."""
    rows = [{"text": f"Case {i}. {SENTENCE * (4 + i % 6)}"} for i in range(8 * 64)]
    return Work("SFT", rows, {"per_device_train_batch_size": 8}, batch=8)


def various(tokenizer: Any) -> Work:
    """Completions of very different lengths, in micro-batches of 8: 32 rows of the longest would need over 20 GiB."""
    work = grpo(cases(8 * 64, 1), prompts=8, group=4, new=LONGEST, per_device_train_batch_size=8)
    work.options["gradient_accumulation_steps"] = 4
    work.lengths = lambda prompt: various_lengths(prompt, tokenizer.pad_token_id, group=4)
    return work


def flat() -> Work:
    """Of four groups three get the same reward for all their completions."""
    rows = [row | {"varies": i % 4 == 0} for i, row in enumerate(cases(4 * 64, 5))]
    work = grpo(rows, prompts=4, group=4, new=48, beta=0.0)
    work.rewards = {"reward_funcs": some_reward}
    return work


def growth(tokenizer: Any, prompt: int, group: int) -> Work:
    """One group on a prompt of that many tokens."""
    ids = tokenizer(SENTENCE * (1 + prompt // 10), add_special_tokens=False)["input_ids"][:prompt]
    return grpo([{"prompt": tokenizer.decode(ids)}] * 16, prompts=1, group=group, new=GROWTH_NEW)


def ppo(tokenizer: Any) -> Work:
    """Policy, reference, critic and reward model are four models of one size."""
    rows = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in cases(4 * 64, 4)]
    options = {
        "per_device_train_batch_size": 4,
        "response_length": 32,
        "num_ppo_epochs": 2,
        "num_sample_generations": 0,
    }
    return Work("PPO", rows, options, batch=4)


def make(name: str, tokenizer: Any, prompt: int, group: int) -> Work:
    """The work of this name; `prompt` and `group` are for f."""
    makers: dict[str, Callable[[], Work]] = {
        "a": lambda: grpo(cases(64, 9), prompts=1, group=8, new=64),
        "b": dpo,
        "c": sft,
        "d": lambda: various(tokenizer),
        "e": flat,
        "f": lambda: growth(tokenizer, prompt, group),
        "g": lambda: ppo(tokenizer),
    }
    return makers[name]()
