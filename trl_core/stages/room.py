"""Cache layers with room for further columns.

The dynamic cache of `transformers` copies all keys and values in every step to append one column. These layers write it
in place, and move rows of other layers into a new batch with one copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class Room(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values with room behind them: a new column is written in place, where the base class copies them all."""

    start, more = 0, 0

    def fill(self, sources: list[tuple[DynamicLayer, Tensor]], columns: int, more: int) -> None:
        """Take these rows of each source, with their ends in the last of `columns` columns; up to `more` will follow.

        There is room for only some of these at first. What does not fit into the columns is left out.
        """
        room = min(more, columns // 4 + 32)
        self.buffers = [
            _right_aligned([(getattr(layer, name), rows) for layer, rows in sources], columns, room)
            for name in ("keys", "values")
        ]
        self.dtype, self.device, self.is_initialized = self.buffers[0].dtype, self.buffers[0].device, True
        self.start, self.end, self.more = 0, columns, more - room
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values that the new columns may attend to, these included."""
        end = self.end + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            kept = self.end - self.start
            self.fill([(self, torch.arange(len(key_states)))], kept, max(self.more, end - self.end))
            end = kept + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.end : end] = states
        self.keys, self.values = (buffer[:, :, self.start : end] for buffer in self.buffers)
        self.end = end
        return self.keys, self.values


class SlidingRoom(Room, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """Likewise, of the last columns only."""

    def fill(self, sources: list[tuple[DynamicLayer, Tensor]], columns: int, more: int) -> None:
        """As above; `columns` counts those that have left the window too."""
        super().fill(sources, min(columns, self.sliding_window - 1), more)
        self.cumulative_length = columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As above."""
        seen = self.cumulative_length
        keys, values = super().update(key_states, value_states)
        self.cumulative_length = seen + key_states.shape[2]
        left = max(0, self.end - self.start - self.sliding_window + 1)
        self.keys, self.values, self.start = keys[:, :, left:], values[:, :, left:], self.start + left
        return keys, values


LAYERS: dict[type, type[Room]] = {DynamicLayer: Room, DynamicSlidingWindowLayer: SlidingRoom}
"""The layers whose rows can be moved, and what they become."""


def with_room(sources: list[tuple[DynamicLayer, Tensor]], columns: int, more: int) -> DynamicLayer:
    """The first layer, with these rows of all of them and room for more columns; see `Room.fill`."""
    layer = sources[0][0]
    if layer.keys is None:  # the model does not use it
        return layer
    if not isinstance(layer, Room):
        layer = LAYERS[type(layer)](sliding_window=getattr(layer, "sliding_window", None))
    layer.fill(sources, columns, more)
    return layer


def _right_aligned(parts: list[tuple[Tensor, Tensor]], columns: int, room: int) -> Tensor:
    """(N, H, columns + room, D): these rows of each part, with their ends in the last column before the room."""
    first = parts[0][0]
    joined = first.new_empty(sum(len(rows) for _, rows in parts), first.shape[1], columns + room, first.shape[3])
    start = 0
    for states, rows in parts:
        width, target = min(columns, states.shape[2]), joined[start : start + len(rows), :, :columns]
        target[:, :, : columns - width] = 0  # masked, but what is there by chance may be no number
        source = states[:, :, states.shape[2] - width :]
        torch.index_select(source, 0, rows.to(states.device), out=target[:, :, columns - width :])
        start += len(rows)
    return joined
