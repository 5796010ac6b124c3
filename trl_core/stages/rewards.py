"""Reward functions: calling what users pass, and adding up what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Rollouts
from ..errors import ConfigError, RewardError
from ..processes import Deferred, Noted, ProcessEnded, Worker, copied, packed, scores, told
from . import reward_checks as checks
from .reward_models import ClassifierReward

_LONGEST = 1e9
"""Seconds; threads cannot wait much longer."""


def weighted_reward(rewards: Tensor, weights: Tensor) -> Tensor:
    """(N, R) and (R,) to (N,): weighted sum over the functions that scored the row; NaN if none did."""
    total = torch.nansum(rewards * weights, 1)
    return total.masked_fill(torch.isnan(rewards).all(1), float("nan"))


class RewardFunctions:
    """All reward functions of a run.

    A function is called as `f(prompts=, completions=, completion_ids=, prompt_ids=, <dataset columns>, trainer_state=,
    log_extra=, log_metric=)`, with those of these arguments that it accepts, and returns a number or None for each row
    of this process. Coroutine functions run concurrently. A sequence classifier (id, path or module) scores the
    rendered prompt and completion.

    With `processes`, functions that are neither coroutine functions nor hold a model are called in processes of their
    own. Each is still called once for all rows, unless it has the attribute `row_by_row` set to True: then the score of
    a row depends on this row alone, and the rows are dealt out to the processes.

    Args:
        functions: callables, model ids or paths, or modules.
        tokenizers: one per function, or None; only classifiers need one.
        timeout: seconds all functions together may take for one batch; None waits for ever.
        device: where classifiers run.
        trust_remote_code: for classifiers loaded by name.
        processes: how many processes call plain functions; 0 calls them in this one.
        load: False to load models and start processes only with `load`.

    Attributes:
        names: of the functions, each another: a second `score` is `score_2`.

    Raises:
        ConfigError: no function was passed, something that is none of these, or one that another process cannot load.
    """

    def __init__(
        self,
        functions: Any,
        tokenizers: Any = None,
        *,
        timeout: float | None = None,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        processes: int = 0,
        load: bool = True,
    ) -> None:
        listed = list(functions) if isinstance(functions, Sequence) and not isinstance(functions, str) else [functions]
        if not listed or listed == [None]:
            raise ConfigError("No reward function was passed.", mend="Pass reward_funcs=your_function or a list.")
        given = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(listed)
        if len(given) != len(listed):
            raise ConfigError(
                f"reward_processing_classes has {len(given)} entries for {len(listed)} reward functions.",
                mend="Give one per function, None for those that are not models.",
            )
        self.timeout = timeout
        self.functions: list[Callable[..., Any]] = []
        self.names: list[str] = []
        for function, tokenizer in zip(listed, given, strict=True):
            if isinstance(function, str | os.PathLike | nn.Module):
                function = ClassifierReward(function, tokenizer, device, trust_remote_code)
            name = checks.name_of(function)
            checks.check_callable(function, name)
            name = next(n for i in range(len(listed)) if (n := f"{name}_{i + 1}" if i else name) not in self.names)
            self.functions.append(function)
            self.names.append(name)
        self._sent = [f for f in self.functions if processes and not _is_awaited(f) and not _holds_model(f)]
        for function in self._sent:
            try:
                packed(function)
            except Exception as error:
                raise self._unsendable([function], error) from error
        by_row = any(getattr(f, "row_by_row", False) for f in self._sent)
        self._count = processes if by_row else min(processes, len(self._sent))
        self._workers: list[Worker] = []
        if load:
            self.load()

    def check_columns(self, columns: Collection[str], where: str) -> None:
        """Raise `RewardError` if a function wants an argument that neither the trainer nor these columns give it."""
        offered = dict.fromkeys((*(column for column in columns if column != "prompt"), *checks.PROVIDED))
        for name, function in zip(self.names, self.functions, strict=True):
            checks.refuse_missing(name, checks.accepted_arguments(function, offered)[1], offered, where)

    def load(self) -> None:
        """Load the classifiers that were given by name, and start the processes.

        Raises:
            ConfigError: a model cannot be loaded, or a function not in another process.
        """
        for function in self.functions:
            if isinstance(function, ClassifierReward):
                function.load()
        self._start_workers()

    @property
    def overlaps(self) -> bool:
        """Whether other work may go on while a batch is scored: a function is awaited, or called elsewhere."""
        return bool(self._sent) or any(map(_is_awaited, self.functions))

    def __call__(self, rollouts: Rollouts, **context: Any) -> Tensor:
        """(N, R) float32 rewards, NaN where a function returned None or NaN.

        Raises:
            RewardError: a function raised, timed out, or returned the wrong number of values, something that is not
                a number, or an infinite one.
        """
        return self.start(rollouts, **context).result()

    def start(self, rollouts: Rollouts, **context: Any) -> Scoring:
        """Call the functions; those that run in this process and are not awaited have returned when this does.

        One batch is scored at a time: what other processes have not finished of an earlier one is given up.
        """
        ids = [part.tolist() for part in rollouts.completion_ids.split(rollouts.completion_lengths.tolist())]
        prompt_ids = [part.tolist() for part in rollouts.prompt_ids.split(rollouts.prompt_lengths.tolist())]
        of_rows = {
            "prompt_ids": prompt_ids,
            **rollouts.columns,
            "prompts": rollouts.prompts,
            "completions": rollouts.completions,
            "completion_ids": ids,
        }
        calls = []
        for number, function in enumerate(self.functions if rollouts.num_rows else []):
            sent = function in self._sent
            parts = min(self._count, rollouts.num_rows) if sent and getattr(function, "row_by_row", False) else 1
            for part in torch.arange(rollouts.num_rows).tensor_split(parts):
                rows = range(int(part[0]), int(part[-1]) + 1)
                call = _Call(number, self.names[number], function, rows)
                # Lists of its own: what a function does to them, nobody else sees.
                offered = {name: copied(list(values[rows.start : rows.stop])) for name, values in of_rows.items()}
                for name, value in context.items():
                    given = _state_copy(value, plain=sent) if is_dataclass(value) else value
                    offered[name] = Deferred(name, call.noted) if callable(value) else given
                call.bind(offered, self._sent.index(function) if sent else None)
                calls.append(call)
        self._start_workers()
        return Scoring(self, calls, rollouts.num_rows, context)

    def _unsendable(self, functions: list[Callable[..., Any]], error: BaseException) -> ConfigError:
        names = [self.names[self.functions.index(function)] for function in functions]
        return ConfigError(
            f"reward_processes: another process cannot load the reward functions {names}: {told(error)}",
            mend="Define them at the top level of a module that can be imported (no lambda, no function inside "
            "another; on a command line module:name, not file.py:name), and put what starts the training under "
            "`if __name__ == '__main__':`. Or set reward_processes=0.",
        )

    def _start_workers(self) -> None:
        """Start those that are missing: all in the beginning, later those that have ended."""
        for worker in self._workers:
            if not worker.ready:
                worker.close()
        self._workers = [worker for worker in self._workers if worker.ready]
        fresh = [Worker(packed(self._sent)) for _ in range(self._count - len(self._workers))]
        for worker in fresh:
            try:
                worker.receive()
            except BaseException as error:
                raise self._unsendable(self._sent, error) from error
        self._workers += fresh

    def take_workers(self, count: int) -> list[Worker]:
        """At most so many workers, which are busy from now on."""
        for worker in (taken := self._workers[:count]):
            worker.busy = True
        return taken

    def close(self) -> None:
        """End the processes; the next batch starts them again."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()


@dataclass(eq=False)
class _Call:
    """One call of a reward function."""

    number: int
    name: str
    function: Callable[..., Any]
    rows: range
    arguments: dict[str, Any] = field(default_factory=dict)
    noted: Noted = field(default_factory=list)
    request: bytes | None = None
    """For another process."""
    done: bool = False
    result: Any = None
    error: RewardError | None = None

    def bind(self, offered: dict[str, Any], sent_as: int | None) -> None:
        """Take those of the arguments that the function accepts, packed if they are to be sent."""
        self.arguments, missing = checks.accepted_arguments(self.function, offered)
        checks.refuse_missing(self.name, missing, offered, "the dataset")
        try:
            self.request = None if sent_as is None else packed((sent_as, self.arguments, self.noted))
        except Exception as error:
            raise RewardError(
                f"The reward function {self.name!r} is called in another process, to which some of its arguments "
                f"({', '.join(self.arguments)}) cannot be sent: {error}",
                mend="Let it take only arguments it needs, without **kwargs, or set reward_processes=0.",
            ) from error

    def fail(self, error: BaseException) -> None:
        """Note what the function raised."""
        mend = "Fix the function, or return None for rows it cannot score."
        if isinstance(error, ValueError) and "main thread" in str(error):  # of `signal`, as a limit of time uses it
            mend = f"Set reward_processes=1: there it is called in a main thread. Or: {mend}"
        self.error = RewardError(f"The reward function {self.name!r} raised {told(error)}", mend=mend)
        self.error.__cause__ = error


class Scoring:
    """The calls of the reward functions for one batch, under way; `result` waits for them.

    What functions log with `log_extra` and `log_metric` is noted, and logged by `result` in the order of the functions.
    """

    def __init__(self, owner: RewardFunctions, calls: list[_Call], rows: int, context: dict[str, Any]) -> None:
        self.owner, self.calls, self.rows, self.context = owner, calls, rows, context
        timeout = None if owner.timeout is None else min(owner.timeout, _LONGEST)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._jobs = deque(call for call in calls if call.request is not None)
        self._called = threading.Event()
        self._threads = [_thread(self._call_in, worker) for worker in owner.take_workers(len(self._jobs))]
        if here := [call for call in calls if call.request is None]:
            self._threads.append(_thread(self._call_here, here))
            self._called.wait(timeout)

    def _call_in(self, worker: Worker) -> None:
        while self._jobs:
            with contextlib.suppress(IndexError):  # another thread was faster
                call = self._jobs.popleft()
                try:
                    call.result, call.noted = worker.call(call.request or b"")
                except ProcessEnded as error:
                    call.fail(error)
                    self._jobs.clear()
                except BaseException as error:
                    call.fail(error)
                call.done = True
        worker.busy = False

    def _call_here(self, calls: list[_Call]) -> None:
        own = os.getpid()

        async def one(call: _Call) -> None:
            try:
                loop = asyncio.get_running_loop()
                asyncio._set_running_loop(None)  # so that a plain function may run one of its own
                try:
                    result = call.function(**call.arguments)
                finally:
                    asyncio._set_running_loop(loop)
                if inspect.isawaitable(result):
                    result = await result
                call.result = scores(result)
            except BaseException as error:
                call.fail(error)
            if os.getpid() != own:
                os._exit(0)  # a copy of this process, which the function has made
            call.done = True

        async def all_calls() -> None:
            # Coroutines overlap while they wait; plain functions run one after the other.
            under_way = asyncio.gather(*map(one, calls))
            asyncio.get_running_loop().call_soon(self._called.set)  # comes after the first step of each
            await under_way

        try:
            asyncio.run(all_calls())
        except Exception as error:  # no event loop
            for call in calls:
                call.fail(error)
        self._called.set()

    def result(self) -> Tensor:
        """(N, R) rewards; see `RewardFunctions`."""
        for thread in self._threads:
            thread.join(None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0))
        late = dict.fromkeys(call.name for call in self.calls if not call.done)
        if late and any(thread.is_alive() for thread in self._threads):
            self._jobs.clear()
            self.owner.close()
            raise RewardError(
                f"The reward functions {list(late)} did not return within reward_timeout={self.owner.timeout} s.",
                mend="Find what hangs, or raise reward_timeout.",
            )
        columns: list[list[float]] = [[] for _ in self.owner.functions]
        for call in self.calls:
            try:
                for name, arguments in checks.logged(call.name, call.noted, len(call.rows)):
                    self.context[name](*arguments)
            except RewardError as error:
                call.error = call.error or error
            except Exception as error:
                call.fail(error)
            if call.error is not None:
                raise call.error
        for call in self.calls:
            columns[call.number] += checks.column(call.name, call.result, call.rows)
        return torch.tensor(columns, dtype=torch.float32).T.reshape(self.rows, len(columns))


def _thread(work: Callable[..., None], *args: Any) -> threading.Thread:
    """Started: it works inside a running event loop (notebooks), and what hangs in it can be given up."""
    thread = threading.Thread(target=work, args=args, name="trl-core-rewards", daemon=True)
    thread.start()
    return thread


def _is_awaited(function: Callable[..., Any]) -> bool:
    return any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004


def _state_copy(state: Any, plain: bool) -> Any:
    """A copy of the trainer's state; a plain one where its class would import torch."""
    own = {name: value.copy() if isinstance(value, list | dict) else value for name, value in vars(state).items()}
    made = SimpleNamespace() if plain else copy.copy(state)
    vars(made).update(own)
    return made


def _holds_model(function: Callable[..., Any]) -> bool:
    owner = getattr(function, "__self__", function)
    held = getattr(owner, "__dict__", {}).values()
    return isinstance(function, ClassifierReward) or any(isinstance(value, nn.Module) for value in held)
