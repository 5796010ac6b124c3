"""Calling functions in processes of their own. Such a process imports this module, so it imports nothing heavy."""

from __future__ import annotations

import atexit
import contextlib
import copy
import inspect
import itertools
import json
import multiprocessing
import multiprocessing.util  # its own work at exit waits for all processes, so ours must be registered later
import os
import pickle
import signal
import struct
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from decimal import Decimal
from multiprocessing.connection import Connection
from numbers import Real
from typing import Any

Noted = list[tuple[str, Sequence[Any], dict[str, Any]]]
LARGEST = 2**26
"""Most bytes of an answer."""
_NUMBER = struct.Struct(">Q")
_PLAIN = {int, float, str, bool, type(None)}


def packed(value: Any) -> bytes:
    """What goes to a process of this program; never to be written to a file, nor read from one.

    What comes back is data: numbers, texts, lists and mappings as JSON.
    """
    return pickle.dumps(value)


def copied(value: Any) -> Any:
    """A copy whose lists, mappings and arrays are its own; what else there is, is shared."""
    if isinstance(value, list | tuple):
        if _PLAIN.issuperset(map(type, value)):  # token ids, texts
            return value[:]
        found = [item if type(item) in _PLAIN else copied(item) for item in value]
        return found if isinstance(value, list) else tuple(found)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return copy.deepcopy(value) if hasattr(value, "__array__") else value


def scores(result: Any) -> list[float | str | None] | str:
    """What a reward function returned as plain data: the number of each row, or the text of what is none.

    Of what is no list at all, its kind.
    """
    listed = result.tolist() if hasattr(result, "tolist") else result
    if isinstance(listed, str | bytes | bytearray) or not isinstance(listed, Sequence):
        return f"a {type(result).__name__}"
    return [_score(value) for value in listed]


def _score(value: Any) -> float | str | None:
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return None
    if isinstance(value, Real | Decimal):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    try:
        return f"{value!r}"[:80]
    except Exception:
        return f"a {type(value).__name__}"


def told(error: BaseException) -> str:
    """An error in words, which the error itself may fail to give."""
    try:
        text = str(error)
    except Exception:
        text = "(it has no text)"
    return text if isinstance(error, FunctionFailed) else f"{type(error).__name__}: {text}"[:10000]


class Deferred:
    """Stands for a function that can be called only later, or in another process: notes the calls.

    Args:
        name: of the function.
        noted: gets the name and the arguments of each call, as they are at that time.
    """

    def __init__(self, name: str, noted: Noted) -> None:
        self.name, self.noted = name, noted

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Note a call."""
        self.noted.append((self.name, copied(args), copied(kwargs)))


class ProcessEnded(Exception):
    """A process ended before it answered, or what it sent is no answer."""


class FunctionFailed(Exception):
    """What a function raised in another process, as text; a note has the traceback."""


class Worker:
    """A process that calls the functions it was started with, one call at a time.

    It ends with the process that made it, whatever ends that one, and takes along what it has started itself.

    Args:
        functions: a packed list. A first answer says whether they could be loaded.

    Attributes:
        busy: whether a thread uses it; set by the caller.
    """

    def __init__(self, functions: bytes) -> None:
        # A copy of this process (fork) would have its locks, but not the threads of torch that hold them.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, functions), name="trl-core-worker")
        self._process.start()
        theirs.close()
        self._numbers = itertools.count(1)
        self.busy = False
        _workers.add(self)

    @property
    def ready(self) -> bool:
        """Whether it can be called."""
        return not self.busy and self._process.is_alive()

    def call(self, request: bytes) -> tuple[list[Any] | str, Noted]:
        """The answer to a packed (number of the function, arguments by name, notes): (its `scores`, the notes).

        Raises:
            ProcessEnded: before it answered, or what it sent is no answer; the process is gone then.
            FunctionFailed: the function raised.
        """
        number = next(self._numbers)
        with contextlib.suppress(OSError):  # if it has ended, that is found out next
            self._pipe.send_bytes(_NUMBER.pack(number) + request)
        return self.receive(number)

    def receive(self, number: int = 0) -> tuple[list[Any] | str, Noted]:
        """The answer to the request of this number, 0 for the loading of the functions; see `call`."""
        found = -1
        try:
            while found < number:  # an earlier request was given up, or answered twice
                # What the process has started may keep the pipe open when it is gone.
                while not self._pipe.poll(0.5):
                    if not self._process.is_alive():
                        raise EOFError
                found, error, result, noted = json.loads(self._pipe.recv_bytes(LARGEST))
            fits = found == number and isinstance(result, list | str) and isinstance(noted, list)
            noted = [(str(name), list(args), dict(kwargs)) for name, args, kwargs in noted] if fits else noted
        except (EOFError, OSError, ValueError, TypeError, RecursionError, MemoryError) as reason:
            self._process.join(2 if isinstance(reason, EOFError) else 0.2)
            code = self._process.exitcode
            self.end()
            what = "what its process sent is no answer" if code is None else f"its process ended with exit code {code}"
            raise ProcessEnded(what) from None
        if not fits:
            self.end()
            raise ProcessEnded("what its process sent is no answer")
        if error is not None:
            failed = FunctionFailed(error)
            failed.add_note(f"In the process that ran it:\n{result}")
            raise failed
        return result, noted

    def close(self) -> None:
        """End the process, at once if it is busy."""
        if not self.busy:
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(b"")
            self._process.join(2)
        self.end()

    def end(self) -> None:
        """End the process, and what it has started, at once."""
        if self._process.pid:
            # No group: it has not made one yet, or nothing is left of it; or the system knows none.
            with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for worker in list(_workers):
        worker.close()


# -- in the worker ----------------------------------------------------------------------------------------------------
def _serve(pipe: Connection, functions: bytes) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # can be ended with all it starts, and is not interrupted from the terminal
    threading.Thread(target=_end_with_parent, daemon=True).start()
    loaded: list[Any] = []
    own, number, request = os.getpid(), 0, b""

    def load() -> tuple[Any, Noted]:
        loaded.extend(pickle.loads(functions))
        return [], []

    def call() -> tuple[Any, Noted]:
        which, arguments, noted = pickle.loads(request)
        return awaited(loaded[which](**arguments)), noted

    work: Callable[[], tuple[Any, Noted]] = load
    with contextlib.suppress(EOFError, OSError):  # nobody listens any more
        while True:
            answer = _answer(number, work)
            if os.getpid() != own:
                os._exit(0)  # a copy of this process, which a function has made
            pipe.send_bytes(answer)
            if not (message := pipe.recv_bytes()):
                return
            (number,), request, work = _NUMBER.unpack(message[: _NUMBER.size]), message[_NUMBER.size :], call


def awaited(result: Any) -> Any:
    """The result of a function, which may have to be waited for."""

    async def wait() -> Any:
        return await result

    if not inspect.isawaitable(result):
        return result
    import asyncio

    return asyncio.run(wait())


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _answer(number: int, work: Callable[[], tuple[Any, Noted]]) -> bytes:
    """JSON: the number of the request, None, scores and notes; or the number, what was raised, and the traceback."""
    try:
        result, noted = work()
        message = json.dumps([number, None, scores(result), noted], default=_plain).encode()
        if len(message) > LARGEST:
            raise ProcessEnded(f"its answer has {len(message)} bytes, more than {LARGEST}")
    except BaseException as error:
        text = "".join(traceback.format_exception(error))[-100000:]
        message = json.dumps([number, told(error), text, []]).encode()
    return message


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"log_extra and log_metric take numbers, text, lists and mappings here, no {type(value).__name__}")
