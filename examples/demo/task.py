"""The demo's task: sums that a few lines make, and a reward that checks the answer.

The default, `sums`, asks for a one-digit number plus a number below twenty, and leaves twelve tokens to answer. That is
small on purpose: the model (135M parameters, quantised to four bits before it was unpacked) can add such numbers, but
mostly talks until the tokens are used up. So there is something to learn, most groups of samples have a right answer to
learn from, and a few dozen steps on two processor cores show it.

The reward reads the last number of the completion: 1 if it is the answer, 0 if it is not. Nothing is paid for form or
for brevity; that completions get shorter is the work of the limit and of GFPO's filter.

Any other name is one of the data sets of reasoning-gym, a package of its own that the demo does without: see
`MissingTaskError`.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset

__all__ = ["DEFAULT_TASK", "MissingTaskError", "Task", "correct", "find_task", "last_number", "make_datasets"]

DEFAULT_TASK = "sums"
SYSTEM = "You are a calculator. Reply with the number only."
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class MissingTaskError(RuntimeError):
    """There is no such task, or the package that makes it is not installed."""


def last_number(text: str) -> str:
    """Return the last number in a text, without thousands separators, or an empty string.

    >>> last_number("6 + 5 = 11.")
    '11'
    >>> last_number("It is 1,024")
    '1024'
    """
    found = NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else ""


@dataclass(frozen=True)
class Task:
    """Where problems come from, and what an answer may look like; this one makes the sums itself.

    Args:
        name: The task's name, as `--task` gives it.
        system: The system message; a short one, because SmolLM2's chat template puts in a longer one of its own if
            there is none.
        max_new_tokens: How long an answer may be.
    """

    name: str = DEFAULT_TASK
    system: str = SYSTEM
    max_new_tokens: int = 12

    def problems(self, seed: int, count: int) -> Iterator[dict[str, Any]]:
        """Yield so many problems, the same ones for the same seed; a problem may come more than once."""
        draw = random.Random(seed)
        for _ in range(count):
            terms = [draw.randint(1, 9), draw.randint(1, 19)]
            draw.shuffle(terms)
            yield {"question": f"What is {terms[0]} + {terms[1]}?", "answer": str(sum(terms))}

    def is_right(self, text: str, entry: dict[str, Any]) -> bool:
        """Whether a completion gives the answer of a problem."""
        return last_number(text) == entry["answer"]

    def key(self, entry: dict[str, Any]) -> str:
        """One key for problems that are one problem: `6 + 5` and `5 + 6`, `6 * 5` and `5 * 6`."""
        question = str(entry.get("metadata", {}).get("expression", entry["question"]))
        terms = question.removeprefix("What is ").rstrip("?").split()
        if len(terms) == 3 and terms[1] in ("+", "*"):
            return f"{terms[1]} {' '.join(sorted((terms[0], terms[2])))}"
        return " ".join(terms)

    def row(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Turn a problem into a row of the training set: a conversation, and the problem itself for the reward."""
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": entry["question"].strip()}]
        return {"prompt": messages, "answer": str(entry["answer"]), "entry": json.dumps(entry, default=str)}


@dataclass(frozen=True)
class GymTask(Task):
    """A data set of reasoning-gym with its own difficulty and scorer."""

    system: str = "Reply with the answer only."
    max_new_tokens: int = 24

    def problems(self, seed: int, count: int) -> Iterator[dict[str, Any]]:
        """Yield so many problems, the same ones for the same seed."""
        yield from reasoning_gym().create_dataset(self.name, size=count, seed=seed)

    def is_right(self, text: str, entry: dict[str, Any]) -> bool:
        """Whether the completion, or the last number in it, is what the scorer wants.

        The scorers also give a little for a wrong answer that contains the right one. That is dropped, so that a mean
        reward is a share of right answers.
        """
        score = reasoning_gym().get_score_answer_fn(self.name)
        return any(score(answer, entry) >= 1.0 for answer in (text.strip(), last_number(text)))


def reasoning_gym() -> Any:
    """The package reasoning-gym."""
    try:
        import reasoning_gym as package
    except ImportError as error:
        raise MissingTaskError(
            f"A task other than {DEFAULT_TASK!r} comes from the package reasoning-gym, which cannot be imported: "
            f"{error}.\n  It needs packages that exist as source only, and for one of them a C compiler and Python's "
            f"headers.\n  To mend: leave out TASK, or, with a compiler, in the checkout: "
            f"{shlex.quote(sys.executable)} -m pip install -c constraints.txt -e '.[tasks]'"
        ) from None
    return package


def find_task(name: str) -> Task:
    """The task of this name: the demo's own, or one of reasoning-gym."""
    if name == DEFAULT_TASK:
        return Task()
    known = sorted(reasoning_gym().factory.DATASETS)
    if name not in known:
        raise MissingTaskError(f"There is no task {name!r}. There are: {', '.join([DEFAULT_TASK, *known])}.")
    return GymTask(name)


def make_datasets(
    task: Task, *, train_size: int = 512, eval_size: int = 48, seed: int = 0, eval_seed: int = 2024
) -> tuple[Dataset, Dataset]:
    """Return a training set and a held-out set that share no problem.

    The held-out set depends on `eval_seed` alone, so runs with different seeds are evaluated on the same problems. It
    holds no problem twice. The training set is drawn with `seed` and may repeat a problem (there are only some
    130 such sums), but never one of the held-out problems, also not with its terms swapped.
    """
    held_out: dict[str, dict[str, Any]] = {}
    for entry in task.problems(eval_seed, 20 * eval_size):
        held_out.setdefault(task.key(entry), entry)
        if len(held_out) == eval_size:
            break
    rest = (entry for entry in task.problems(seed, 20 * train_size) if task.key(entry) not in held_out)
    train = list(islice(rest, train_size))
    if len(held_out) < eval_size or len(train) < train_size:
        raise MissingTaskError(
            f"Task {task.name!r} has too few different problems: found {len(train)} of {train_size} for training "
            f"besides {len(held_out)} of {eval_size} held out.\n  To mend: hold out fewer (--eval_size)."
        )
    return (
        Dataset.from_list([task.row(entry) for entry in train]),
        Dataset.from_list([task.row(entry) for entry in held_out.values()]),
    )


def correct(completions: list[Any], entry: list[str], task: Task, **_: Any) -> list[float]:
    """One number per completion, 1.0 if it is right; conversations and plain texts are both understood."""
    texts = [item if isinstance(item, str) else item[-1]["content"] for item in completions]
    return [float(task.is_right(text, json.loads(one))) for text, one in zip(texts, entry, strict=True)]
