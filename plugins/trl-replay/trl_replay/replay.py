"""Replay of groups on the hook `select`, after the experimental trainer of TRL."""

import logging
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trl_core import Algorithm, HookContext, Samples, hookimpl, option

from .buffer import ReplayBuffer

logger = logging.getLogger(__name__)


@dataclass
class ReplayOptions:
    """What replay adds to the options of GRPO."""

    replay_buffer_size: int = option(64, "Most groups held for replay; 0: no replay.", ge=0)
    sample_before_add: bool = option(False, "Draw before the groups just generated are stored: none is used twice.")


class Replay:
    """The hooks of replay."""

    def __init__(self, context: HookContext) -> None:
        self.context, self.args = context, context.args
        self.buffer = ReplayBuffer(self.args.replay_buffer_size)
        if not self.buffer.capacity:
            self.select = None  # type: ignore[method-assign,assignment]  # else log-probabilities would be computed

    @hookimpl(wrapper=True)
    def select(self, samples: Samples) -> Generator[None, Samples, Samples]:
        """Groups whose rewards are all equal make room for stored ones, which keep all but place and number."""
        rows = yield
        if not samples.num_rows:
            return rows
        fields = rows.tensors().keys()
        if others := self.buffer.forget(lambda group: group.keys() != fields):
            logger.warning("Forgot %d stored groups: they have other fields than %s.", others, sorted(fields))
        groups = [line[line >= 0] for line in rows.by_group(torch.arange(rows.num_rows), fill=-1)]
        spreads = [reward_std(rows.reward[places]) for places in groups]
        now = int(samples.generation[0])
        if not self.args.sample_before_add:
            self._add(rows, groups, spreads)
        drawn = self._draw([places for places, std in zip(groups, spreads, strict=True) if std == 0], now)
        if self.args.sample_before_add:
            self._add(rows, groups, spreads)
        self.context.log("replay/size", len(self.buffer))
        self.context.log("replay/replaced_groups", len(drawn))
        for _, group in drawn:
            self.context.log("replay/mean_age", now - int(group.generation[0]))
        return with_replaced(rows, drawn)

    def _add(self, rows: Samples, groups: list[Tensor], spreads: list[float]) -> None:
        """Store the groups with a signal, scored by `std * sum over rows of |advantage|`."""
        size = rows.mean_per_row(rows.advantages.abs())
        for places, std in zip(groups, spreads, strict=True):
            if std:
                self.buffer.push(std * float(size[places].sum()), rows.take(places).tensors())

    def _draw(self, flat: list[Tensor], generation: int) -> list[tuple[Tensor, Samples]]:
        """For the groups without a signal, given by their rows, stored ones of as many rows, as far as there are any.

        The generator depends on nothing but the seed and the number of the generation batch, so processes agree, and a
        resumed run draws as one that was not stopped.
        """
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        generator = torch.Generator().manual_seed(((seed * 1_000_003 + generation) * 1_000_003 + 3) % 2**63)
        drawn: list[tuple[Tensor, Samples]] = []
        for size in sorted({len(places) for places in flat}):
            alike = [places for places in flat if len(places) == size]
            found = self.buffer.sample(len(alike), generator, partial(has_rows, size))
            drawn += zip(alike, map(Samples.from_tensors, found), strict=False)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """All stored groups."""
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.buffer.load_state_dict(state)


def has_rows(count: int, group: dict[str, Tensor]) -> bool:
    """Whether a stored group has this many rows."""
    return group["reward"].numel() == count


def reward_std(rewards: Tensor) -> float:
    """Sample standard deviation of a group's rewards, NaN left out; 0 of fewer than two, and of equal ones exactly."""
    scored = rewards[~rewards.isnan()]
    return float(scored.std()) if scored.unique().numel() > 1 else 0.0


def with_replaced(rows: Samples, drawn: list[tuple[Tensor, Samples]]) -> Samples:
    """The rows, of which some, given by their indices, are replaced by those of a group; place and number remain."""
    if not drawn:
        return rows
    pool = Samples.concat([rows, *(group for _, group in drawn)])
    order = torch.arange(rows.num_rows)
    order[torch.cat([places for places, _ in drawn])] = torch.arange(rows.num_rows, pool.num_rows)
    return replace(pool.take(order), position=rows.position, group=rows.group)


algorithm = Algorithm(
    name="replay",
    summary="GRPO whose groups without any difference in reward are replaced by earlier, stored ones.",
    extends="grpo",
    config=ReplayOptions,
    hooks=Replay,
    config_name="GRPOWithReplayBufferConfig",
    trainer_name="GRPOWithReplayBufferTrainer",
)
