import random

import pytest
from datasets import Dataset, IterableDataset

from trl_core.data import packing
from trl_core.data.packing import best_fit_decreasing, pack_dataset
from trl_core.errors import ConfigError, DatasetError


def documents(lengths, **columns):
    """Rows of these lengths; the tokens say which row they are of."""
    ids = [[10 * (i + 1) + t for t in range(length)] for i, length in enumerate(lengths)]
    return Dataset.from_dict({"input_ids": ids, "loss_mask": [[1] * length for length in lengths], **columns})


# -- bins --------------------------------------------------------------------------------------------------------------
def test_items_go_to_the_tightest_bin():
    # 6 and 5 open bins with 4 and 5 left; 4 fits the first exactly, 3 only the second, 2 that one exactly.
    assert best_fit_decreasing([3, 6, 2, 5, 4], 10) == [[1, 4], [3, 0, 2]]


def test_equal_lengths_keep_their_order_and_bins_their_turn():
    assert best_fit_decreasing([3, 3, 3, 1, 1, 1], 4) == [[0, 3], [1, 4], [2, 5]]


def test_item_over_the_capacity_is_alone():
    assert best_fit_decreasing([9, 2, 2], 4) == [[0], [1, 2]]


def test_empty_items_and_no_items_have_a_place():
    assert best_fit_decreasing([], 4) == []
    assert sorted(i for members in best_fit_decreasing([4, 0, 0], 4) for i in members) == [0, 1, 2]


def naive(lengths, capacity):
    """The same rule with a search over all bins."""
    bins, spaces = [], []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [(spaces[b], b) for b in range(len(bins)) if spaces[b] >= lengths[item]]
        if fitting:
            _, chosen = min(fitting)
        else:
            chosen = len(bins)
            bins.append([])
            spaces.append(capacity)
        bins[chosen].append(item)
        spaces[chosen] -= lengths[item]
    return bins


@pytest.mark.parametrize("seed", range(20))
def test_packs_as_tightly_as_a_search_over_all_bins(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 50) for _ in range(300)]
    bins = best_fit_decreasing(lengths, 50)
    assert sorted(i for members in bins for i in members) == list(range(300))
    sums = sorted(sum(lengths[i] for i in members) for members in bins)
    assert sums[-1] <= 50
    assert sums == sorted(sum(lengths[i] for i in members) for members in naive(lengths, 50))


@pytest.mark.timeout(20)
def test_hundred_thousand_items_take_no_search_over_bins():
    draw = random.Random(0)
    lengths = [draw.randint(1, 2048) for _ in range(100_000)]
    bins = best_fit_decreasing(lengths, 2048)
    assert sum(lengths) / (2048 * len(bins)) > 0.99


# -- datasets ----------------------------------------------------------------------------------------------------------
def test_bfd_cuts_and_fills():
    packed = pack_dataset(documents([5, 2, 3, 1]), 4)
    assert packed.to_dict() == {
        "input_ids": [[10, 11, 12, 13], [30, 31, 32, 40], [20, 21]],
        "loss_mask": [[0, 1, 1, 1], [0, 1, 1, 0], [0, 1]],
        "seq_lengths": [[4], [3, 1], [2]],
    }


def test_bfd_split_keeps_every_token():
    packed = pack_dataset(documents([5, 2, 3, 1]), 4, "bfd_split")
    assert packed.to_dict() == {
        "input_ids": [[10, 11, 12, 13], [30, 31, 32, 14], [20, 21, 40]],
        "loss_mask": [[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0]],
        "seq_lengths": [[4], [3, 1], [2, 1]],
    }


def test_wrapped_cuts_the_string_of_all_tokens():
    packed = pack_dataset(documents([5, 2, 0, 3]), 4, "wrapped")
    assert packed.to_dict() == {
        "input_ids": [[10, 11, 12, 13], [14, 20, 21, 40], [41, 42]],
        "loss_mask": [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1]],
    }


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_every_column_moves_with_the_ids(strategy):
    draw = random.Random(0)
    data = documents([draw.randint(0, 9) for _ in range(60)])
    data = data.map(lambda row: {"twice": [2 * token for token in row["input_ids"]]})
    packed = pack_dataset(data, 7, strategy)
    for row in packed:
        assert row["twice"] == [2 * token for token in row["input_ids"]]
        assert 0 < len(row["input_ids"]) <= 7
        assert strategy == "wrapped" or sum(row["seq_lengths"]) == len(row["input_ids"])


def test_empty_rows_are_dropped():
    assert pack_dataset(documents([0, 2, 0]), 4)["seq_lengths"][:] == [[2]]


def test_sliced_dataset_packs_its_own_rows():
    assert pack_dataset(documents([5, 2, 3, 1]).select(range(1, 3)), 8)["input_ids"][:] == [[30, 31, 32, 20, 21]]
    assert pack_dataset(documents([5, 2, 3]).select([2, 0]), 8, "wrapped")["input_ids"][0][:3] == [30, 31, 32]


def test_later_batches_pack_their_own_rows(monkeypatch):
    monkeypatch.setattr(packing, "_ROWS", 2)
    assert pack_dataset(documents([2, 1, 1, 2]), 4)["input_ids"][:] == [[10, 11, 20], [40, 41, 30]]
    assert pack_dataset(documents([2, 1, 1, 2]), 4, "wrapped")["input_ids"][:] == [[10, 11, 20], [30, 40, 41]]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_stream_is_packed_in_passing(strategy):
    read = []

    def rows():
        for i, row in enumerate(documents([5, 2, 3, 1])):
            read.append(i)
            yield row

    packed = pack_dataset(IterableDataset.from_generator(rows), 4, strategy)
    assert not read
    assert list(packed) == list(pack_dataset(documents([5, 2, 3, 1]), 4, strategy))


@pytest.mark.parametrize(
    ("columns", "named"), [({"id": [1, 2]}, "'id'"), ({"other": [[1], [1, 1, 1]]}, "'other' cannot be packed")]
)
def test_column_that_does_not_fit_is_named(columns, named):
    with pytest.raises(DatasetError, match=named):
        pack_dataset(documents([2, 3], **columns), 4)


@pytest.mark.parametrize(("length", "strategy"), [(4, "first_fit"), (0, "bfd")])
def test_impossible_packing_is_refused(length, strategy):
    with pytest.raises(ConfigError, match=strategy):
        pack_dataset(documents([2]), length, strategy)
