"""Reward functions that other processes call, and the places where they meet: files, since nothing else is shared."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import struct
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


# -- a function whose process misbehaves ------------------------------------------------------------------------------
def request(what: str, rows: int = 3) -> bytes:
    """A packed call of `odd`, as the only function of a process."""
    from trl_core.processes import packed

    return packed((0, {"what": [what] * rows}, []))


def _pipe() -> Any:
    """The worker's end of its pipe, and the number of the request that it works on."""
    frame = sys._getframe()
    while frame.f_code.co_name != "_serve":
        frame = frame.f_back
    return frame.f_locals["pipe"], frame.f_locals["number"]


def _say(number_on: int = 0, values: Any = (8.0, 8.0)) -> None:
    pipe, number = _pipe()
    pipe.send_bytes(json.dumps([number + number_on, None, list(values), []]).encode())


def _fork(act: Any = None) -> None:
    if os.fork() == 0 and act is not None:
        act()


def _later() -> None:
    Path("/dev/null").touch()


def _start_processes() -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_later)
    process.start()
    process.join()


def _raises() -> None:
    raise KeyError("in the copy")


async def _awaits() -> Any:
    await asyncio.sleep(0)
    return [1.0, 2.0]


def _announce(size: int, message: bytes) -> None:
    os.write(_pipe()[0].fileno(), struct.pack("!i", size) + message)


def _half() -> None:
    _announce(1000, b"[1, null")
    os._exit(0)


ACTS: dict[str, Any] = {
    "plain": lambda: [3.0, 4.0, 5.0],
    "forks": lambda: _fork(),
    "fork raises": lambda: _fork(_raises),
    "fork exits": lambda: _fork(sys.exit),
    "starts processes": _start_processes,
    "prints": lambda: print("[1, null, [9.0, 9.0], []]", flush=True),
    "awaits": _awaits,
    "exact": lambda: [0.1, None, float("nan")],
    "text": lambda: [1.0, "0.5"],
    "object": lambda: {1.0, 2.0},
    "huge number": lambda: [1.0, 10**400],
    "garbage": lambda: _pipe()[0].send_bytes(b"no JSON"),
    "pickle": lambda: _pipe()[0].send_bytes(pickle.dumps((None, ([1.0, 2.0], [])))),
    "other number": lambda: _say(1),
    "announces too much": lambda: _announce(2**31 - 1, b""),
    "half an answer": _half,
    "shuts the pipe": lambda: _pipe()[0].close(),
    "exits": lambda: sys.exit(3),
    "answers twice": lambda: _say(values=(1.0, 2.0)),
    "answers late": lambda: _say(-1, (9.0, 9.0)),
    "late": lambda: time.sleep(2.5),
}


def odd(what, log_metric=None, log_extra=None):
    """Does what the column says; 1 and 2 where that gives no values."""
    if what[0] == "metric":
        log_metric("m", "word")
    elif what[0] == "extra object":
        log_extra("c", [object()] * len(what))
    elif what[0] == "long answer":
        log_extra("c", ["x" * 2**25] * len(what))
    result = ACTS[what[0]]() if what[0] in ACTS else None
    result = [1.0, 2.0] if result is None else result
    return result[: len(what)] if isinstance(result, list) else result
