"""Reward functions: calling what users pass, and adding up what comes back."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..batch import Rollouts
from ..errors import ConfigError, RewardError


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

    Args:
        functions: callables, model ids or paths, or modules.
        tokenizers: one per function, or None; only classifiers need one.
        timeout: seconds all functions together may take for one batch; None waits for ever.
        device: where classifiers run.
        trust_remote_code: for classifiers loaded by name.

    Raises:
        ConfigError: no function was passed, or something that is none of these.
    """

    def __init__(
        self,
        functions: Any,
        tokenizers: Any = None,
        *,
        timeout: float | None = None,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
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
            if isinstance(function, str | nn.Module):
                function = ClassifierReward(function, tokenizer, device, trust_remote_code)
            if not callable(function):
                raise ConfigError(
                    f"A reward function must be callable, a model or a model's name; got {type(function).__name__}.",
                    mend="Pass a function (prompts, completions, **columns) -> list of numbers.",
                )
            self.functions.append(function)
            self.names.append(str(getattr(function, "__name__", type(function).__name__)))

    def __call__(self, rollouts: Rollouts, **context: Any) -> Tensor:
        """(N, R) float32 rewards, NaN where a function returned None or NaN.

        Raises:
            RewardError: a function raised, timed out, or returned the wrong number of values, something that is not
                a number, or an infinite one.
        """
        if not rollouts.num_rows:
            return torch.zeros(0, len(self.functions))
        ids = [part.tolist() for part in rollouts.completion_ids.split(rollouts.completion_lengths.tolist())]
        prompt_ids = [part.tolist() for part in rollouts.prompt_ids.split(rollouts.prompt_lengths.tolist())]
        arguments = {
            "prompt_ids": prompt_ids,
            **rollouts.columns,
            **context,
            "prompts": rollouts.prompts,
            "completions": rollouts.completions,
            "completion_ids": ids,
        }
        results = self._run([_bind(function, arguments) for function in self.functions])
        columns = [_column(*pair, rollouts.num_rows) for pair in zip(self.names, results, strict=True)]
        return torch.tensor(columns, dtype=torch.float32).T.reshape(rollouts.num_rows, len(columns))

    def _run(self, calls: list[Callable[[], Any]]) -> list[Any]:
        async def one(call: Callable[[], Any]) -> Any:
            value = call()
            return await value if inspect.isawaitable(value) else value

        async def all_calls() -> list[Any]:
            # Coroutines overlap while they wait; plain functions run one after the other.
            return await asyncio.gather(*(one(call) for call in calls), return_exceptions=True)

        outcome: dict[str, Any] = {}

        def work() -> None:
            try:
                outcome["results"] = asyncio.run(all_calls())
            except BaseException as error:
                outcome["error"] = error

        # A thread of its own: works inside a running event loop (notebooks), and a hanging call can be given up.
        thread = threading.Thread(target=work, name="trl-core-rewards", daemon=True)
        thread.start()
        thread.join(self.timeout)
        if thread.is_alive():
            raise RewardError(
                f"The reward functions {self.names} did not return within reward_timeout={self.timeout} s.",
                mend="Find what hangs, or raise reward_timeout.",
            )
        for name, result in zip(self.names, outcome.get("results", [outcome.get("error")]), strict=False):
            if isinstance(result, BaseException):
                raise RewardError(
                    f"The reward function {name!r} raised {type(result).__name__}: {result}",
                    mend="Fix the function, or return None for rows it cannot score.",
                ) from result
        return list(outcome["results"])


def accepted_arguments(function: Callable[..., Any], offered: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Those of the offered arguments that a user's function takes, and the names of what it needs beyond them."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return offered, []
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in offered]
    return {name: offered[name] for name in parameters if name in offered}, missing


def _bind(function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], Any]:
    """A call of `function` with those of the arguments that it accepts."""
    accepted, missing = accepted_arguments(function, arguments)
    if missing:
        name = getattr(function, "__name__", type(function).__name__)
        raise RewardError(
            f"The reward function {name!r} wants the arguments {missing}, which the dataset has no columns for.",
            mend=f"Add the columns, or take some of: {', '.join(sorted(arguments))}.",
        )
    return lambda: function(**accepted)


def _column(name: str, result: Any, rows: int) -> list[float]:
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple) or len(values) != rows:
        got = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise RewardError(
            f"The reward function {name!r} returned {got} for {rows} rows.",
            mend="Return a list with one number (or None) per completion.",
        )
    column = []
    for row, value in enumerate(values):
        try:
            number = float("nan") if value is None else float(value)
        except (TypeError, ValueError):
            number = math.inf
        if math.isinf(number):
            raise RewardError(
                f"The reward function {name!r} returned {value!r} for row {row}; expected a finite number or None.",
                mend="Clip the value, or return None for a row that cannot be scored.",
            )
        column.append(number)
    return column


class ClassifierReward:
    """A sequence classifier with one output as a reward function."""

    def __init__(self, model: str | nn.Module, tokenizer: Any, device: Any, trust_remote_code: bool) -> None:
        if isinstance(model, str):
            name = model
            try:
                loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                    model, num_labels=1, dtype=torch.float32, trust_remote_code=trust_remote_code
                )
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"The reward model {model!r} cannot be loaded: {error}",
                    mend="Pass a function, or a sequence classifier: a Hub id you can reach, a folder, or a module.",
                ) from error
        else:
            loaded = model
            name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        self.__name__ = name.rstrip("/").split("/")[-1]
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        self.model = loaded.to(device).eval()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        """One score per row."""
        texts, special = [], True
        for prompt, completion in zip(prompts, completions, strict=True):
            if isinstance(prompt, str):
                texts.append(prompt + completion)
            else:
                special = False  # a chat template writes them itself
                texts.append(self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
        sequences = [self.tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
        device = next(self.model.parameters()).device
        scores = []
        # Row by row: the score is read at the last token, which padding may hide (a pad token that equals the
        # terminator, or none at all).
        pad_token_id, self.model.config.pad_token_id = self.model.config.pad_token_id, None
        try:
            for ids in sequences:
                scores.append(self.model(input_ids=torch.tensor([ids], device=device)).logits[0, 0].item())
        finally:
            self.model.config.pad_token_id = pad_token_id
        return scores
