"""Calling functions in processes of their own. Such a process imports this module, so it imports nothing heavy."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.util  # its own work at exit waits for all processes, so ours must be registered later
import os
import pickle
import signal
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Noted = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


def packed(value: Any) -> bytes:
    """As it travels between two processes of one program; never to be written to a file, nor read from one."""
    return pickle.dumps(value)


class Deferred:
    """Stands for a function that can be called only later, or in another process: notes the calls.

    Args:
        name: of the function.
        noted: gets the name and the arguments of each call.
    """

    def __init__(self, name: str, noted: Noted) -> None:
        self.name, self.noted = name, noted

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Note a call."""
        self.noted.append((self.name, args, kwargs))


class ProcessEnded(Exception):
    """A process ended before it answered."""


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
        self.busy = False
        _workers.add(self)

    @property
    def ready(self) -> bool:
        """Whether it can be called."""
        return not self.busy and self._process.is_alive()

    def call(self, request: bytes) -> Any:
        """The answer to a packed (number of the function, arguments by name, notes): (its result, the notes).

        Raises:
            ProcessEnded: before it answered.
            BaseException: what the function raised; a note has the traceback of the process.
        """
        with contextlib.suppress(OSError):  # if it has ended, that is found out next
            self._pipe.send_bytes(request)
        return self.receive()

    def receive(self) -> Any:
        """The next answer; see `call`."""
        try:
            # What the process has started may keep the pipe open when it is gone.
            while not self._pipe.poll(0.5):
                if not self._process.is_alive():
                    raise EOFError
            error, answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._process.join(2)
            raise ProcessEnded(f"its process ended with exit code {self._process.exitcode}") from None
        if error is not None:
            error.add_note(f"In the process that ran it:\n{answer}")
            raise error
        return answer

    def close(self) -> None:
        """End the process, at once if it is busy."""
        if not self.busy:
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(b"")
            self._process.join(2)
        if (pid := self._process.pid) and self._process.is_alive():
            with contextlib.suppress(ProcessLookupError, AttributeError):  # no group yet; a system without
                os.killpg(pid, signal.SIGKILL)
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

    def call() -> tuple[Any, Noted]:
        number, arguments, noted = pickle.loads(request)
        return loaded[number](**arguments), noted

    with contextlib.suppress(EOFError, OSError):  # nobody listens any more
        pipe.send_bytes(_answer(lambda: loaded.extend(pickle.loads(functions))))
        while request := pipe.recv_bytes():
            pipe.send_bytes(_answer(call))


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _answer(work: Callable[[], Any]) -> bytes:
    """Packed: (None, what it returns), or (what it raises, the traceback)."""
    try:
        return packed((None, work()))
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        try:
            pickle.loads(answer := packed((error, text)))
        except Exception:
            answer = packed((RuntimeError(f"{type(error).__name__}: {error}"), text))
        return answer
