"""Reward functions that other processes call, and the places where they meet: files, since nothing else is shared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def reward(completions, **_):
    """A number that depends on every character."""
    return [float(sum(map(ord, text)) % 7) + 0.1 * len(text) for text in completions]


async def awaited(completions, **_):
    """The same, as a coroutine function."""
    return reward(completions)


def half(completions, **_):
    """Another number."""
    return [0.5 * len(text) for text in completions]


def chatty(completions, completion_ids, log_metric, log_extra, trainer_state, **others):
    """Logs: a metric whose weight differs between batches, and a column."""
    log_metric("chatty/length", sum(map(len, completion_ids)) / len(completions), len(completions[0]))
    log_extra("seen", [trainer_state.global_step] * len(completions))
    assert {"prompts", "prompt_ids", "answer"} <= set(others)
    return [len(ids) + 0.1 * len(answer) for ids, answer in zip(completion_ids, others["answer"], strict=True)]


async def chatty_awaited(**arguments):
    """The same, as a coroutine function."""
    return chatty(**arguments)


def wait_for(path: Any, seconds: float = 30.0) -> None:
    """Until the file is there."""
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.005)


def after_file(completions, wanted):
    """Scores once the file of the column is there; an empty name is no file."""
    if wanted[0]:
        wait_for(wanted[0])
    return reward(completions)


def meets(completions, folder, own, other):
    """Returns once the other one has been called as well."""
    Path(folder[0], own).touch()
    wait_for(Path(folder[0], other))
    return reward(completions)


def left(completions, folder):
    """Waits for `right`."""
    return meets(completions, folder, "left", "right")


def right(completions, folder):
    """Waits for `left`."""
    return meets(completions, folder, "right", "left")


def parts_meet(completions, folder):
    """Waits until a second process is at work on the same batch."""
    Path(folder[0], f"part-{os.getpid()}").touch()
    end = time.monotonic() + 30
    while len(list(Path(folder[0]).glob("part-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.005)
    return reward(completions)


parts_meet.row_by_row = True


def alone(completions, **_):
    """Which process it is called in, and what has been imported there: 1 for torch."""
    return [float("torch" in sys.modules)] * len(completions)


def raises(completions, **_):
    """An error with a value."""
    raise KeyError("no such answer")


class Odd(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def raises_odd(completions, **_):
    """An error that cannot be copied."""
    raise Odd("odd", "indeed")


def dies(completions, **_):
    """Ends its process without a word."""
    os._exit(3)


def hangs(completions, folder):
    """Starts a process of its own and waits for ever, until there is a file `mended`."""
    if Path(folder[0], "mended").exists():
        return reward(completions)
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(folder[0], "pids").write_text(f"{os.getpid()} {started.pid}")
    time.sleep(600)


def short(completions, **_):
    """A value too few."""
    return [0.0] * (len(completions) - 1)


def no_numbers(completions, **_):
    """A word at the end."""
    return [0.0] * (len(completions) - 1) + ["word"]


no_numbers.row_by_row = True


class Counting:
    """A function with a state."""

    __name__ = "counting"

    def __init__(self):
        self.lock = None

    def __call__(self, completions, **_):
        """Zeros."""
        return [0.0] * len(completions)
