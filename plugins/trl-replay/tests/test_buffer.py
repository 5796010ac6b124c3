"""The buffer on its own: what it holds, and how often it gives what."""

import json

import pytest
import torch
from torch import Tensor

from trl_replay import ReplayBuffer


def filled(*scores, capacity=64):
    """A buffer to which items named by their order were pushed."""
    held = ReplayBuffer(capacity)
    for number, score in enumerate(scores):
        held.push(score, f"item {number}")
    return held


def generator(seed):
    return torch.Generator().manual_seed(seed)


def items(held):
    return [item for _, _, item in held.entries()]


# -- what is held ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [1, 3, 16])
def test_highest_scores_are_held_and_never_more_than_the_capacity(capacity, seed):
    # Few different scores, so that many are equal.
    scores = torch.randint(1, 30, (100,), generator=generator(seed)).tolist()
    held, sizes = ReplayBuffer(capacity), []
    for score in scores:
        held.push(score, {"of": score})
        sizes.append(len(held))
    assert sizes == [min(count, capacity) for count in range(1, 101)]
    assert [score for score, _, _ in held.entries()] == sorted(scores, reverse=True)[:capacity]
    assert all(item == {"of": score} for score, _, item in held.entries())


def test_equal_score_does_not_replace_the_lowest():
    assert items(filled(2, 1, 1, 2, capacity=2)) == ["item 0", "item 3"]
    assert items(filled(2, 1, 1, 1, capacity=2)) == ["item 0", "item 1"]


def test_of_equal_lowest_scores_the_oldest_goes():
    assert items(filled(1, 1, 3, capacity=2)) == ["item 2", "item 1"]


def test_items_are_never_compared():
    held = ReplayBuffer(2)
    for _ in range(5):
        held.push(1.0, {"rows": torch.zeros(3)})
        held.push(1.0 + 1e-9, {"rows": torch.zeros(3)})
    assert [score for score, _, _ in held.entries()] == [1.0 + 1e-9, 1.0 + 1e-9]


@pytest.mark.parametrize("score", [0.0, -1.0, float("nan"), float("inf")])
def test_what_could_not_be_drawn_is_not_held(score):
    held = filled(1.0, score, capacity=2)
    assert items(held) == ["item 0"]
    assert held.sampling_probabilities().tolist() == [1.0]


def test_capacity_of_zero_holds_nothing():
    assert items(filled(1.0, 2.0, capacity=0)) == []


def test_forgets_what_is_unwanted_and_goes_on():
    held = filled(5, 1, 4, 2, 3, capacity=5)
    assert held.forget(lambda item: item in ("item 1", "item 2")) == 2
    assert items(held) == ["item 0", "item 4", "item 3"]
    for score in (6, 7, 8):
        held.push(score, f"new {score}")
    assert items(held) == ["new 8", "new 7", "new 6", "item 0", "item 4"]


# -- what is drawn -----------------------------------------------------------------------------------------------------
def test_probabilities_are_proportional_to_scores():
    # Of the groups [1, 0, 0, 1] and [1, 0, 0, 0].
    assert filled(1.499700, 1.999654).sampling_probabilities().tolist() == pytest.approx([0.571435, 0.428565], abs=1e-6)


def test_items_are_drawn_as_often_as_their_scores_say():
    held, draws = filled(4, 1, 3, 2), 20_000
    drawn = [held.sample(1, generator(seed))[0] for seed in range(draws)]
    shares = [drawn.count(f"item {number}") / draws for number in range(4)]
    # Four standard deviations of a share.
    assert shares == pytest.approx([0.4, 0.1, 0.3, 0.2], abs=0.014)


def test_drawing_several_takes_one_after_the_other():
    held, draws = filled(5, 3, 2), 20_000
    pairs = [tuple(held.sample(2, generator(seed))) for seed in range(draws)]
    assert all(first != second for first, second in pairs)
    # The first with its probability, the second with its share of what is left.
    p = {"item 0": 0.5, "item 1": 0.3, "item 2": 0.2}
    for one in p:
        for other in p.keys() - {one}:
            assert pairs.count((one, other)) / draws == pytest.approx(p[one] * p[other] / (1 - p[one]), abs=0.014)


def test_as_many_as_are_held_are_drawn_once_each():
    assert sorted(filled(1, 100, 1e-6).sample(3, generator(0))) == ["item 0", "item 1", "item 2"]


def test_more_than_are_held_are_drawn_with_repetition():
    drawn = filled(3, 1).sample(4000, generator(0))
    assert drawn.count("item 0") / 4000 == pytest.approx(0.75, abs=0.03)


def test_only_what_fits_is_drawn():
    held = filled(1, 9, 1, 2)
    wanted = {"item 0", "item 3"}
    assert held.sampling_probabilities(wanted.__contains__).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert set(held.sample(50, generator(0), wanted.__contains__)) == wanted
    assert held.sample(2, generator(0), lambda item: False) == []


def test_nothing_is_drawn_from_an_empty_buffer():
    assert ReplayBuffer(3).sample(2, generator(0)) == []


def test_the_same_generator_draws_the_same_and_the_global_one_is_left_alone():
    held, before = filled(*range(1, 30)), torch.get_rng_state()
    first = held.sample(10, generator(3))
    assert first == held.sample(10, generator(3))
    assert first != held.sample(10, generator(4))
    assert torch.equal(before, torch.get_rng_state())


# -- state -------------------------------------------------------------------------------------------------------------
def stored(held):
    """The state as it comes back from JSON."""
    return json.loads(json.dumps(held.state_dict()))


def test_loaded_state_replaces_all_and_goes_on_alike():
    one, other = filled(3, 1, 2, 5, 4, capacity=3), filled(9, 9, 9, 9, capacity=3)
    other.load_state_dict(stored(one))
    assert stored(other) == stored(one)
    for held in (one, other):
        held.push(3, "equal")
        held.push(6, "higher")
    assert stored(other) == stored(one)
    assert items(one) == ["higher", "item 3", "item 4"]
    assert one.sample(2, generator(1)) == other.sample(2, generator(1))


def test_state_is_a_copy():
    held = filled(3, 1, capacity=2)
    state = held.state_dict()
    held.push(5, "later")
    assert [entry[2] for entry in sorted(state["heap"])] == ["item 1", "item 0"]


def test_smaller_buffer_loads_the_best():
    smaller = ReplayBuffer(2)
    smaller.load_state_dict(stored(filled(3, 1, 2, 5, 4)))
    assert items(smaller) == ["item 3", "item 4"]
    smaller.push(4.5, "new")
    assert items(smaller) == ["item 3", "new"]


def test_tensors_in_items_are_kept_as_they_are():
    held, values = ReplayBuffer(2), torch.arange(3.0)
    held.push(1.0, {"values": values})
    (entry,) = held.state_dict()["heap"]
    assert isinstance(entry[2]["values"], Tensor) and entry[2]["values"] is values
