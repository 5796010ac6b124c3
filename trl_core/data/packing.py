"""Packing: several short rows in one, so that few positions are padding.

Source: "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from ..errors import ConfigError, DatasetError
from .formats import uncached

STRATEGIES = ("bfd", "bfd_split", "wrapped")
_ROWS = 10_000
"""Rows packed together. More would fill the bins no better, but would have to be in memory at once."""


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over bins: the longest first, each to the bin with the smallest space that is large enough.

    Equal lengths keep their order, and of bins with equal space the one that has had it longest is taken, so that the
    result depends on nothing else. An item over the capacity gets a bin of its own.

    Args:
        lengths: of the items.
        capacity: of a bin.

    Returns:
        Indices into `lengths`, one list per bin, in the order in which the bins were opened.
    """
    bins: list[list[int]] = []
    spaces: list[int] = []  # the distinct free spaces, ascending
    having: defaultdict[int, deque[int]] = defaultdict(deque)  # bins by free space
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, lengths[item])
        if place == len(spaces):
            space, chosen = capacity, len(bins)
            bins.append([])
        else:
            space = spaces[place]
            chosen = having[space].popleft()
            if not having[space]:
                del spaces[place]
        bins[chosen].append(item)
        left = space - lengths[item]
        if left >= 0:
            if not having[left]:
                insort(spaces, left)
            having[left].append(chosen)
    return bins


def pack_dataset(dataset: Any, seq_length: int, strategy: str = "bfd") -> Any:
    """Pack the rows of a tokenised dataset.

    `bfd` cuts rows to `seq_length` and drops the rest, `bfd_split` makes further documents of the rest, and both keep
    documents whole; `wrapped` joins all rows and cuts the string of tokens every `seq_length`. The first token of what
    a model sees as one document has `loss_mask` 0: it would be predicted from another document, or from nothing.

    Args:
        dataset: all columns are lists, of one length in each row; empty rows are dropped.
        seq_length: tokens of a packed row, at most.
        strategy: one of `STRATEGIES`.

    Returns:
        The dataset with the same columns; with the two bfd strategies also `seq_lengths`, the lengths of the documents
        in each row.

    Raises:
        ConfigError: unknown strategy, or a `seq_length` below 1.
        DatasetError: a column that is no list, or not as long as the others.
    """
    if strategy not in STRATEGIES or seq_length < 1:
        raise ConfigError(
            f"packing_strategy={strategy!r} with rows of {seq_length} tokens is not possible.",
            mend=f"Use one of {', '.join(map(repr, STRATEGIES))} and at least one token.",
        )
    lengths = {} if strategy == "wrapped" else {"seq_lengths": List(Value("int32"))}
    features = Features({**dataset.features, **lengths}) if dataset.features else None
    rows = min(_ROWS, max(len(dataset), 1)) if isinstance(dataset, Dataset) else 1000
    packed = dataset.with_format("arrow").map(
        lambda table: _pack(table, seq_length, strategy),
        batched=True,
        batch_size=rows,
        features=features,
        **uncached(dataset),
    )
    return packed.with_format(None)


def _pack(table: pa.Table, limit: int, strategy: str) -> pa.Table:
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    for name, column in columns.items():
        listed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if not listed or not column.value_lengths().equals(next(iter(columns.values())).value_lengths()):
            raise DatasetError(
                f"Column {name!r} cannot be packed: it is no list, or in some row not as long as the others.",
                mend=f"Take it out first: dataset.remove_columns({name!r}).",
            )
    sizes = np.asarray(next(iter(columns.values())).value_lengths())
    ends = np.cumsum(sizes)
    starts = ends - sizes
    if strategy == "wrapped":
        starts, ends = starts[:1] * 0, ends[-1:]
    stops = np.minimum(ends, starts + limit) if strategy == "bfd" else ends
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    pieces = [(at, min(stop, at + limit)) for start, stop in spans for at in range(start, stop, limit)]
    lengths = [end - start for start, end in pieces]
    bins = [[i] for i in range(len(pieces))] if strategy == "wrapped" else best_fit_decreasing(lengths, limit)
    order = [i for members in bins for i in members]
    taken = np.concatenate([np.arange(0), *(np.arange(*pieces[i]) for i in order)]).astype(np.int64)
    documents = _offsets([lengths[i] for i in order])
    rows = _offsets([sum(lengths[i] for i in members) for members in bins])
    packed = {}
    for name, column in columns.items():
        values = column.flatten().take(pa.array(taken))
        if name == "loss_mask":
            mask = values.to_numpy(zero_copy_only=False).copy()
            mask[documents[:-1]] = 0
            values = pa.array(mask)
        packed[name] = pa.ListArray.from_arrays(rows, values)
    if strategy != "wrapped":
        members = pa.array([lengths[i] for i in order], pa.int32())
        packed["seq_lengths"] = pa.ListArray.from_arrays(_offsets([len(members) for members in bins]), members)
    return pa.table(packed)


def _offsets(lengths: list[int]) -> np.ndarray[Any, Any]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
