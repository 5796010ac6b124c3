"""The demo's task: problems made by reasoning-gym, and a reward that checks the answer.

The default is the sum or difference of two one-digit numbers. That is small on purpose: the model (135M parameters,
quantised to four bits before it was unpacked) gets about half of them right when it decodes greedily but only one in
six when it samples, because it talks instead of answering. So there is something to learn, every group of samples has a
few right answers to learn from, and a few dozen steps on two processor cores show it.

The reward is reasoning-gym's own scorer on the last number of the completion: 1 if it is the answer, 0 if it is not.
Nothing is paid for form or for brevity; that completions get shorter is the work of GFPO's filter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

from datasets import Dataset
from reasoning_gym import create_dataset, get_score_answer_fn

__all__ = ["DEFAULT_TASK", "TASKS", "Task", "correct", "last_number", "make_datasets", "score"]

SYSTEM = "You are a calculator. Reply with the number only."
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def last_number(text: str) -> str:
    """Return the last number in a text, without thousands separators, or an empty string.

    >>> last_number("6 + 5 = 11.")
    '11'
    >>> last_number("It is 1,024")
    '1024'
    """
    found = NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else ""


def same_problem(entry: dict[str, Any]) -> str:
    """Return one key for problems that are one problem: `6 + 5` and `5 + 6` for sums and products of two numbers."""
    terms = str(entry["metadata"].get("expression", entry["question"])).split()
    if len(terms) == 3 and terms[1] in ("+", "*"):
        return f"{terms[1]} {' '.join(sorted((terms[0], terms[2])))}"
    return " ".join(terms)


@dataclass(frozen=True)
class Task:
    """A reasoning-gym data set with a difficulty, and how a completion is read.

    Args:
        source: Name of the data set in reasoning-gym.
        options: Its difficulty settings.
        system: The system message; a short one, because SmolLM2's chat template puts in a longer one of its own if
            there is none.
        extract: Finds the answer in a completion.
    """

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    system: str = SYSTEM
    extract: Callable[[str], str] = last_number

    def problems(self, seed: int, count: int) -> Iterator[dict[str, Any]]:
        """Yield so many problems, the same ones for the same seed; small problems come more than once."""
        yield from create_dataset(self.source, size=count, seed=seed, **self.options)

    def row(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Turn a problem into a row of the training set: a conversation, and the problem itself for the reward."""
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": entry["question"].strip()}]
        return {"prompt": messages, "answer": str(entry["answer"]), "entry": json.dumps(entry)}


DEFAULT_TASK = "chain_sum"
TASKS = {
    "chain_sum": Task("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "chain_sum_3": Task("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    "products": Task("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
}


def make_datasets(
    task: str = DEFAULT_TASK, *, train_size: int = 512, eval_size: int = 48, seed: int = 0, eval_seed: int = 2024
) -> tuple[Dataset, Dataset]:
    """Return a training set and a held-out set that share no problem.

    The held-out set depends on `eval_seed` alone, so runs with different seeds are evaluated on the same problems. It
    holds no problem twice. The training set is drawn with `seed` and may repeat a problem (two one-digit numbers make
    only 200), but never one of the held-out problems, also not with its terms swapped.
    """
    try:
        chosen = TASKS[task]
    except KeyError:
        raise ValueError(f"Unknown task {task!r}; there are: {', '.join(TASKS)}.") from None
    held_out: dict[str, dict[str, Any]] = {}
    for entry in chosen.problems(eval_seed, 20 * eval_size):
        held_out.setdefault(same_problem(entry), entry)
        if len(held_out) == eval_size:
            break
    rest = (entry for entry in chosen.problems(seed, 20 * train_size) if same_problem(entry) not in held_out)
    train = list(islice(rest, train_size))
    if len(held_out) < eval_size or len(train) < train_size:
        raise ValueError(
            f"Task {task!r} has too few different problems: found {len(train)} of {train_size} for training besides "
            f"{len(held_out)} of {eval_size} held out. Ask for fewer, or make the task's options wider."
        )
    return (
        Dataset.from_list([chosen.row(entry) for entry in train]),
        Dataset.from_list([chosen.row(entry) for entry in held_out.values()]),
    )


@lru_cache
def _scorer(source: str) -> Callable[..., float]:
    return get_score_answer_fn(source)


def score(completion: str, entry: str, extract: Callable[[str], str] = last_number) -> float:
    """Return 1.0 if the answer in a completion is right and 0.0 if not.

    reasoning-gym's scorer also gives a little for a wrong answer that contains the right one (0.5 for 17 where 7 was
    asked). That is dropped, so that a mean reward is a share of right answers.
    """
    problem = json.loads(entry)
    value = _scorer(problem["metadata"]["source_dataset"])(extract(completion), problem)
    return 1.0 if value >= 1.0 else 0.0


def correct(completions: list[Any], entry: list[str], **_: Any) -> list[float]:
    """The reward function: one number per completion; conversations and plain texts are both understood."""
    texts = [item if isinstance(item, str) else item[-1]["content"] for item in completions]
    return [score(text, problem) for text, problem in zip(texts, entry, strict=True)]
