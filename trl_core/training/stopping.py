"""Stopping in order: signals are noted until the end of a step, and callbacks that fail there do not cut it short."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Self

from transformers.trainer_callback import CallbackHandler

OUTSIDE, STEP_BEGUN, UPDATING, STEP_ENDED, EPOCH_ENDED = (
    "outside",
    "step begun",
    "updating",
    "step ended",
    "epoch ended",
)
_PHASES = {
    "on_step_begin": STEP_BEGUN,
    "on_pre_optimizer_step": UPDATING,
    "on_step_end": STEP_ENDED,
    "on_epoch_end": EPOCH_ENDED,
    "on_epoch_begin": STEP_ENDED,
}
_CAREFUL = {"on_optimizer_step", "on_step_end", "on_log", "on_evaluate", "on_save", "on_epoch_end"}
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_LAUNCHER_REPEATS_WITHIN_S = 3.0


class StopRun(BaseException):
    """Ends the training loop where it is; the trainer says why and raises what its caller knows."""


def say(text: str, *, error: bool = False) -> None:
    """One line about the run, to people; the caller sees to it that one process says it."""
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


class Signals:
    """While entered, notes SIGINT (Ctrl-C) and SIGTERM, each unless the program has a handler of its own for it.

    The first is acted upon at once unless `held`, the second always: KeyboardInterrupt, or SystemExit(143), is raised.
    Entered once more while it is, this is the same. Outside the main thread it does nothing.

    Attributes:
        received: the signal that asks to stop, or 0.
        held: whether the first one is only noted, since somebody looks for it at the end of a step.
        at_once: whether the exception was raised by the signal itself, so that nothing is to be saved any more.
    """

    def __init__(self) -> None:
        self.received, self.held, self.at_once, self._depth, self._since, self._process = 0, False, False, 0, 0.0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self.received, self.held, self.at_once, self._process = 0, False, False, os.getpid()
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
            if number == signal.SIGTERM:
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
            os.write(2, f"\n{self.name}: stopping after this step; once more stops at once.\n".encode())

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


class CarefulCallbacks(CallbackHandler):
    """Callbacks of which each has its turn at the end of a step, also after one that failed.

    Attributes:
        phase: how far the training loop has come.
        careful: whether failures are kept; otherwise they are raised.
        failure: the first one.
        silent: whether no callback is called at all.
    """

    phase = OUTSIDE
    careful = silent = False
    failure: BaseException | None = None

    @classmethod
    def of(cls, handler: CallbackHandler) -> CarefulCallbacks:
        """One with the callbacks of another handler."""
        made = cls.__new__(cls)
        vars(made).update(vars(handler))
        return made

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Call a method of every callback."""
        if self.silent:
            return control
        if self.careful and event in _CAREFUL:
            for callback in list(self.callbacks):
                alone = copy.copy(self)
                alone.callbacks, alone.careful = [callback], False
                try:
                    control = alone.call_event(event, args, state, control, **kwargs)
                except BaseException as error:
                    self.keep(error)
        else:
            control = super().call_event(event, args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        self.phase = _PHASES.get(event, self.phase)
        return control

    def keep(self, error: BaseException) -> None:
        """Keep a failure for the end of the step, unless it is a signal that stops at once."""
        if signals().at_once:
            raise error
        self.failure = self.failure or error
