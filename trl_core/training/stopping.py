"""Stopping in order: signals are noted until somebody looks for them. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from types import FrameType
from typing import Any, Self

_STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_LAUNCHER_REPEATS_WITHIN_S = 3.0


class StopRun(BaseException):
    """Ends the training loop where it is; the trainer says why and raises what its caller knows."""


def say(text: str, *, error: bool = False) -> None:
    """One line about the run, to people; the caller sees to it that one process says it."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def _leave_terminal() -> None:
    """What is written to a terminal that is gone goes nowhere, so that the step and its checkpoint do not fail."""
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)


class Signals:
    """While entered, notes SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is gone), as far as nobody else does.

    A signal that the program ignores, as under `nohup`, or handles itself is left alone. The first is acted upon at
    once unless `held`, the second always: KeyboardInterrupt, or SystemExit(128 + its number), is raised.
    Entered once more while it is, this is the same. Outside the main thread it does nothing.

    Attributes:
        received: the signal that asks to stop, or 0.
        held: whether the first one is only noted, since somebody looks for it at the end of a step.
        told: whether people have been told about it.
        at_once: whether the exception was raised by the signal itself, so that nothing is to be saved any more.
    """

    def __init__(self) -> None:
        self.received, self.held, self.told, self.at_once = 0, False, False, False
        self._depth, self._since, self._process = 0, 0.0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self.received, self.held, self.told, self.at_once, self._process = 0, False, False, False, os.getpid()
            for number in _STOPPING:
                if (before := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, before)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a copy of this process, which is ended as always
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now, second = time.monotonic(), bool(self.received)
        # A launcher passes on what the terminal or the scheduler has sent to all of its processes already.
        if second and "TORCHELASTIC_RUN_ID" in os.environ and now - self._since < _LAUNCHER_REPEATS_WITHIN_S:
            return
        self.received, self._since = number, now
        if second or not self.held:
            self.at_once = True
            self._restore()
            raise self.exception()
        if os.environ.get("RANK", "0") == "0":  # not print, which may be at work at this moment
            try:
                os.write(2, f"\n{self.name}: stopping after this step; once more stops at once.\n".encode())
            except OSError:
                _leave_terminal()

    @property
    def nested(self) -> bool:
        """Whether it is entered more than once, so that another one looks after what comes next."""
        return self._depth > 1

    @property
    def name(self) -> str:
        """Of the signal that was received."""
        return signal.Signals(self.received).name

    def exception(self) -> BaseException:
        """What the signal is in Python."""
        return KeyboardInterrupt() if self.received == signal.SIGINT else SystemExit(128 + self.received)


_signals = Signals()


def signals() -> Signals:
    """The one of the main thread; in another thread one that notes nothing."""
    return _signals if threading.current_thread() is threading.main_thread() else Signals()
