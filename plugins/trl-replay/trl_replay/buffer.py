"""A store of bounded size that keeps what scores highest."""

import heapq
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _any(item: Any) -> bool:
    return True


class ReplayBuffer:
    """The items with the highest scores, to be drawn with probabilities proportional to their scores.

    Args:
        capacity: most items held.

    Attributes:
        heap: [score, number, item], lowest score first. Numbers count the items pushed, so that no two items are ever
            compared with each other, and of equal scores the older one goes first.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.pushed = capacity, 0
        self.heap: list[list[Any]] = []

    def __len__(self) -> int:
        return len(self.heap)

    def push(self, score: float, item: Any) -> None:
        """Hold an item; when full, in place of the lowest score, if that is strictly lower.

        What could never be drawn, with a score that is not positive and finite, is not held.
        """
        entry, self.pushed = [score, self.pushed, item], self.pushed + 1
        if not 0 < score < float("inf"):
            return
        if len(self.heap) < self.capacity:
            heapq.heappush(self.heap, entry)
        elif self.heap and score > self.heap[0][0]:
            heapq.heapreplace(self.heap, entry)

    def forget(self, unwanted: Callable[[Any], bool]) -> int:
        """Drop the items for which `unwanted` is true; returns how many."""
        before = len(self.heap)
        self.heap = [entry for entry in self.heap if not unwanted(entry[2])]
        heapq.heapify(self.heap)
        return before - len(self.heap)

    def entries(self, fits: Callable[[Any], bool] = _any) -> list[list[Any]]:
        """[score, number, item] of the items for which `fits` is true, highest score first, of equal ones the older."""
        return sorted((e for e in self.heap if fits(e[2])), key=lambda entry: (-entry[0], entry[1]))

    def sampling_probabilities(self, fits: Callable[[Any], bool] = _any) -> Tensor:
        """(items that fit,) float64: the probability of each of `entries` to be drawn first."""
        scores = torch.tensor([score for score, _, _ in self.entries(fits)], dtype=torch.float64)
        return scores / scores.sum()

    def sample(self, count: int, generator: torch.Generator, fits: Callable[[Any], bool] = _any) -> list[Any]:
        """`count` items that fit, one drawn after the other; none if none fits.

        No item is drawn twice, unless more are wanted than there are.
        """
        held = self.entries(fits)
        if not held or not count:
            return []
        repeat = count > len(held)
        drawn = torch.multinomial(self.sampling_probabilities(fits), count, repeat, generator=generator)
        return [held[i][2] for i in drawn.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """All entries; to be saved where items are JSON values and tensors."""
        return {"pushed": self.pushed, "heap": [list(entry) for entry in self.heap]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; of more entries than the capacity the best are kept."""
        self.pushed = state["pushed"]
        self.heap = [list(entry) for entry in state["heap"]]
        while len(self.heap) > self.capacity:
            heapq.heappop(self.heap)
