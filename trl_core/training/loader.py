"""Which prompts make up each generation batch.

The loader yields, for each micro-step, the dataset rows of the generation batch it belongs to: every batch of P
prompts is repeated S x mu times. Every process gets the same rows and takes its own share of the completions, so
groups may straddle processes and the data do not depend on how many there are. `transformers.Trainer` can skip
micro-steps when it resumes without knowing anything of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from ..errors import DatasetError


class RepeatSampler(Sampler[list[int]]):
    """Chunks of `prompts` indices, shuffled per epoch, each repeated; an incomplete last chunk is dropped.

    Args:
        size: rows of the dataset.
        prompts: P, prompts of a generation batch.
        repeats: micro-steps that use it.
        seed: of the shuffle, or None to keep the order.
    """

    def __init__(self, size: int, prompts: int, repeats: int, seed: int | None) -> None:
        self.size, self.prompts, self.repeats, self.seed = size, prompts, repeats, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = permutation(self.size, None if self.seed is None else (self.seed, self.epoch))
        for start in range(0, self.size - self.prompts + 1, self.prompts):
            for _ in range(self.repeats):
                yield order[start : start + self.prompts]

    def __len__(self) -> int:
        return self.size // self.prompts * self.repeats


class RepeatStream(IterableDataset[list[Any]]):
    """The same for a dataset without length: chunks of a stream, each repeated, epoch after epoch without end.

    The training loop takes all of it for one epoch, so that it can skip what a resumed run has already used.
    """

    def __init__(self, dataset: Any, prompts: int, repeats: int) -> None:
        self.dataset, self.prompts, self.repeats = dataset, prompts, repeats

    def __iter__(self) -> Iterator[list[Any]]:
        for rows in _epochs(self.dataset):
            chunk: list[Any] | None = None
            while len(following := list(islice(rows, self.prompts))) == self.prompts:
                chunk = following
                for _ in range(self.repeats):
                    yield chunk
            if chunk is None:
                raise _too_few("The stream of train_dataset", len(following), self.prompts)


class EndlessStream(IterableDataset[Any]):
    """A stream row by row, epoch after epoch without end, so that a resumed run skips exactly what it has used.

    Args:
        dataset: the stream.
        split: how to call it in messages.
    """

    def __init__(self, dataset: Any, split: str) -> None:
        self.dataset, self.split = dataset, split

    def __iter__(self) -> Iterator[Any]:
        for rows in _epochs(self.dataset):
            row = None
            for row in rows:
                yield row
            if row is None and get_worker_info() is not None:
                return  # more workers than parts of the stream
            if row is None:
                raise DatasetError(
                    f"The stream of {self.split} gives no row to train on.",
                    mend="Check how it was loaded or filtered, and max_length.",
                )


def _epochs(dataset: Any) -> Iterator[Iterator[Any]]:
    """The rows of a stream, again and again, each time in the order of that epoch."""
    for epoch in count():
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        yield iter(dataset)


class PromptLoader(DataLoader[Any]):
    """A DataLoader that passes `set_epoch` on to its sampler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Without a generator of its own every pass would draw from the random state of the run.
        super().__init__(*args, **kwargs | {"generator": torch.Generator()})

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop at the start of each epoch."""
        if isinstance(self.batch_sampler, RepeatSampler):
            self.batch_sampler.set_epoch(epoch)


def prompt_loader(dataset: Any, *, prompts: int, repeats: int, seed: int | None, split: str) -> PromptLoader:
    """The loader of a map-style or iterable dataset.

    Raises:
        DatasetError: the dataset cannot fill one generation batch.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return PromptLoader(RepeatStream(dataset, prompts, repeats), batch_size=None, collate_fn=as_is)
    sampler = RepeatSampler(len(dataset), prompts, repeats, seed)
    if not len(sampler):
        raise _too_few(split, len(dataset), prompts)
    return PromptLoader(dataset, batch_sampler=sampler, collate_fn=as_is)


def _too_few(split: str, rows: int, prompts: int) -> DatasetError:
    return DatasetError(
        f"{split} has {rows} prompts, but a generation batch needs {prompts} (generation_batch_size / "
        "num_generations).",
        mend="Add prompts, or lower the batch size or gradient_accumulation_steps.",
    )


def as_is(rows: Any) -> Any:
    """A collation that collates nothing: rows reach the trainer as the dataset gives them."""
    return rows


def permutation(size: int, seed: tuple[int, ...] | None) -> list[int]:
    """0..size-1, shuffled by the seed without touching the global random state."""
    if seed is None:
        return list(range(size))
    mixed = 0
    for part in seed:
        mixed = (mixed * 1_000_003 + part) % 2**63
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(mixed)).tolist()
    return order


class SparePrompts:
    """An endless, resumable supply of further prompts, for refilling groups.

    Args:
        dataset: the training dataset, map-style or iterable.
        seed: of its own order; None keeps the dataset's.
    """

    def __init__(self, dataset: Any, seed: int | None) -> None:
        self.dataset, self.seed = dataset, seed
        self.drawn = 0
        self._rows: Iterator[Any] | None = None

    def draw(self, count: int) -> list[Any]:
        """The next rows."""
        if self._rows is None:
            self._rows = islice(self._endless(), self.drawn, None)
        self.drawn += count
        return list(islice(self._rows, count))

    def restore(self, drawn: int) -> None:
        """Go on after `drawn` rows."""
        self.drawn, self._rows = drawn, None

    def _endless(self) -> Iterator[Any]:
        if not hasattr(self.dataset, "__len__"):
            yield from chain.from_iterable(_epochs(self.dataset))
        for epoch in count():
            # Another stream than the main order of the same seed.
            order = permutation(len(self.dataset), None if self.seed is None else (self.seed, epoch, 1))
            yield from (self.dataset[i] for i in order)
