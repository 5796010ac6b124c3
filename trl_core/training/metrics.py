"""Metrics: collected per micro-batch, joined over processes and averaged when a log line is written."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..batch import Rollouts
from ..stages.advantages import group_std

Entry = tuple[int, float | Tensor, float | Tensor, str]


class Metrics:
    """Entries of the current logging interval; training and evaluation are kept apart.

    Attributes:
        tick: number of the micro-step, the same in all processes; what they record in one tick is joined.
    """

    def __init__(self) -> None:
        self.tick = 0
        self._entries: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))

    def record(self, mode: str, name: str, value: Any, weight: Any = 1.0, reduce: str = "mean") -> None:
        """Add one entry; see `HookContext.log`. Tensors are read only when the log line is written."""
        entry = tuple(x.detach() if isinstance(x, Tensor) else x for x in (value, weight))
        self._entries[mode][name].append((self.tick, entry[0], entry[1], reduce))

    def drain(self, mode: str) -> dict[str, float]:
        """Averages over the interval, equal in all processes; forgets the entries."""
        local = {
            name: [(tick, float(value), float(weight), reduce) for tick, value, weight, reduce in entries]
            for name, entries in self._entries.pop(mode, {}).items()
        }
        everywhere = gather_object([local])
        averages = {}
        for name in dict.fromkeys(name for process in everywhere for name in process):
            by_tick: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
            for entry in (entry for process in everywhere for entry in process.get(name, [])):
                by_tick[entry[0]].append(entry[1:])
            finite = [value for value in map(_join, by_tick.values()) if not math.isnan(value)]
            if finite and next(iter(by_tick.values()))[0][2] == "variance":
                averages[name] = statistics.variance(finite) if len(finite) > 1 else 0.0
            elif finite:
                averages[name] = sum(finite) / len(finite)
        return averages


def _join(entries: list[tuple[float, float, str]]) -> float:
    present = [(value, weight) for value, weight, _ in entries if not math.isnan(value)]
    if not present:
        return math.nan
    if entries[0][2] in ("min", "max"):
        return (min if entries[0][2] == "min" else max)(value for value, _ in present)
    total = sum(weight for _, weight in present)
    return sum(value * weight for value, weight in present) / total if total else math.nan


def rollout_metrics(rollouts: Rollouts, keep: Tensor, names: list[str]) -> dict[str, float]:
    """Rewards (of kept rows) and lengths (of all rows) of a generation batch, under the names TRL users know."""
    kept = rollouts.reward[keep]
    scored = kept[~torch.isnan(kept)]
    metrics = {"reward": _mean(scored), "reward_std": _std(scored)}
    for name, column in zip(names, rollouts.rewards[keep].unbind(1), strict=True):
        present = column[~torch.isnan(column)]
        metrics[f"rewards/{name}/mean"] = _mean(present)
        metrics[f"rewards/{name}/std"] = _std(present)
    std = torch.nan_to_num(group_std(rollouts, rollouts.reward, keep))
    metrics["frac_reward_zero_std"] = (std < 1e-8).float().mean().item()
    lengths = rollouts.completion_lengths.float()
    ended = lengths[~rollouts.truncated]
    ended = ended if ended.numel() else torch.zeros(1)
    metrics["completions/clipped_ratio"] = rollouts.truncated.float().mean().item()
    for prefix, values in (("", lengths), ("terminated_", ended)):
        metrics[f"completions/mean_{prefix}length"] = values.mean().item()
        metrics[f"completions/min_{prefix}length"] = values.min().item()
        metrics[f"completions/max_{prefix}length"] = values.max().item()
    return metrics


def _mean(values: Tensor) -> float:
    return values.mean().item() if values.numel() else math.nan


def _std(values: Tensor) -> float:
    return values.std().item() if values.numel() > 1 else 0.0 if values.numel() else math.nan
