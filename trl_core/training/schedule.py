"""Taking up an optimizer and its schedule with other values than they were saved with."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

logger = logging.getLogger(__name__)
_OF_ANY_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
_RATES = re.compile(r"learning_rate|^lr_|^warmup|^optimizers$|^eval_|^metric_for|^greater_is")


def depends_on_length(args: Any) -> bool:
    """Whether the learning rate of a step depends on how many steps the run has."""
    warmup = args.warmup_steps or 0
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) not in _OF_ANY_LENGTH or 0 < warmup < 1


def optimizer_class(optimizer: Any) -> str | None:
    """Its class, below what accelerate wraps around it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return None if inner is None else f"{type(inner).__module__}.{type(inner).__qualname__}"


class _Untouched:
    """Stands for what keeps its own state while another is loaded."""

    def load_state_dict(self, state: Any) -> None:
        """Nothing."""


def _sizes(state: dict[str, Any]) -> list[int]:
    return [len(group["params"]) for group in state["param_groups"]]


def _has_groups(optimizer: torch.optim.Optimizer, folder: Path) -> bool:
    """Whether the groups of parameters are as large as those of a checkpoint; True where shards do not say it."""
    file = folder / OPTIMIZER_NAME
    saved = torch.load(file, map_location="meta", weights_only=True) if file.exists() else None
    return saved is None or _sizes(optimizer.state_dict()) == _sizes(saved)


def load_with_new_values(
    trainer: Any, folder: Path, record: dict[str, Any], changed: Collection[str], load: Callable[[str], None]
) -> None:
    """Load the states with `load`, and let the values of this run act: those of the optimizer and the learning rates.

    The state of an optimizer of another class, or with other groups, is of no use; it starts anew. A schedule that is a
    function of the step goes on at its step; another one whose learning rates changed starts anew.
    """
    optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    of_steps = isinstance(schedule, LambdaLR)
    new_rates = any(map(_RATES.search, changed))
    new_class = record.get("optimizer") not in (None, optimizer_class(optimizer))
    new_groups = not new_class and not _has_groups(optimizer, folder)
    keep_optimizer, keep_schedule = not (new_class or new_groups), not (of_steps or new_rates)
    trainer.optimizer = optimizer if keep_optimizer else _Untouched()
    trainer.lr_scheduler = schedule if keep_schedule else _Untouched()
    try:
        load(str(folder))
    finally:
        trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in own.items() if name != "lr" or not keep_schedule})
    if new_class:
        logger.warning("The optimizer is another one (%s): its state starts anew.", optimizer_class(optimizer))
    elif new_groups:
        logger.warning("The optimizer has other groups of parameters: its state starts anew.")
    if of_steps:
        saved = torch.load(folder / SCHEDULER_NAME, weights_only=True)
        schedule.last_epoch = saved.get("last_epoch", trainer.state.global_step)
        schedule._step_count = schedule.last_epoch + 1
        rates = [
            base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
    elif new_rates:
        logger.warning("The schedule %s starts anew.", type(schedule).__name__)
