"""The flat layout: rows of tokens without padding, and the helpers between tokens, rows and groups."""

import pytest
import torch

from trl_core import Rollouts, Samples
from trl_core.errors import HookResultError
from trl_core.stages import group_advantages

from .helpers_online import make_rows

NAN = float("nan")


def three_rows(**fields):
    """Completions of 3, 1 and 2 tokens; the second token of the first and all of the last are not in the loss."""
    mask = torch.tensor([True, False, True, True, False, False])
    given = {
        "prompt_ids": torch.tensor([50, 60, 61, 70, 71, 72]),
        "prompt_lengths": torch.tensor([1, 2, 3]),
        "reward": torch.tensor([1.0, 2.0, 3.0]),
        "advantages": torch.tensor([0.1, 0.2, 0.3]),
        **fields,
    }
    return make_rows([3, 1, 2], group=[4, 4, 9], loss_mask=mask, **given)


def rollouts():
    rows = three_rows()
    base = {name: getattr(rows, name) for name in ("prompt_ids", "prompt_lengths", "completion_ids", "loss_mask")}
    return Rollouts(
        **base,
        completion_lengths=rows.completion_lengths,
        group=rows.group,
        prompts=["a", "b", "c"],
        completions=["x", "y", "z"],
        columns={"answer": [7, 8, 9]},
        truncated=torch.tensor([False, True, False]),
    )


# -- sizes ------------------------------------------------------------------------------------------------------------
def test_lengths_count_loss_tokens():
    assert three_rows().lengths.tolist() == [2, 1, 0]


def test_row_of_token_skips_tokens_out_of_the_loss():
    rows = three_rows()
    assert rows.row_of_completion_token.tolist() == [0, 0, 0, 1, 2, 2]
    assert rows.row_of_token.tolist() == [0, 0, 1]


# -- between tokens and rows ------------------------------------------------------------------------------------------
def test_sum_and_mean_per_row_are_over_loss_tokens():
    values = torch.tensor([1.0, 4.0, 7.0])
    assert three_rows().sum_per_row(values).tolist() == [5.0, 7.0, 0.0]
    assert three_rows().mean_per_row(values).tolist() == [2.5, 7.0, 0.0]


def test_mean_per_row_carries_gradient():
    values = torch.tensor([1.0, 4.0, 7.0], requires_grad=True)
    (three_rows().mean_per_row(values) * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad.tolist() == [0.5, 0.5, 10.0]


def test_expand_repeats_a_value_per_row():
    rows = make_rows([3, 1])
    assert rows.expand(torch.tensor([1.0, 2.0])).tolist() == [1.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_expand_keeps_a_value_per_token(shape):
    rows = make_rows([3, 1])
    assert rows.expand(torch.arange(4.0).reshape(shape)).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_expand_takes_as_many_values_as_rows_for_values_per_row():
    # 3 rows and 3 loss tokens: a plain tensor of 3 is per row, a column of 3 is per token.
    values = torch.tensor([1.0, 2.0, 3.0])
    assert three_rows().expand(values).tolist() == [1.0, 1.0, 2.0]
    assert three_rows().expand(values[:, None]).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("shape", [(3,), (1, 4), (2, 1), ()])
def test_expand_refuses_any_other_shape(shape):
    with pytest.raises(HookResultError, match=r"neither per row \(2,\) nor per loss token \(4,\)"):
        make_rows([3, 1]).expand(torch.zeros(shape))


# -- between rows and groups ------------------------------------------------------------------------------------------
def test_by_group_makes_a_line_per_group():
    rows = make_rows([1] * 4, group=[7, 7, 3, 3])
    assert rows.by_group(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_by_group_fills_smaller_groups():
    rows = make_rows([1] * 4, group=[0, 1, 1, 1])
    values = torch.arange(4)
    assert rows.by_group(values, fill=-1).tolist() == [[0, -1, -1], [1, 2, 3]]
    grid = rows.by_group(values.float())
    assert torch.isnan(grid[0, 1:]).all()


def test_flat_is_the_inverse_of_by_group():
    rows = make_rows([1] * 4, group=[5, 2, 2, 2])
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert rows.flat(rows.by_group(values)).tolist() == values.tolist()


def test_no_rows_are_no_groups():
    rows = three_rows().take([])
    assert rows.by_group(torch.zeros(0)).shape == (0, 0)
    assert group_advantages(rows, torch.zeros(0)).shape == (0,)


# -- selecting and joining --------------------------------------------------------------------------------------------
def test_take_brings_everything_that_belongs_to_a_row():
    rows = three_rows(sampling_logps=torch.tensor([-1.0, -2.0, -3.0])).take([2, 0])
    assert rows.prompt_ids.tolist() == [70, 71, 72, 50]
    assert rows.prompt_lengths.tolist() == [3, 1]
    assert rows.completion_ids.tolist() == [14, 15, 10, 11, 12]
    assert rows.loss_mask.tolist() == [False, False, True, False, True]
    assert rows.position.tolist() == [2, 0]
    assert rows.reward.tolist() == [3.0, 1.0]
    assert rows.advantages.tolist() == pytest.approx([0.1, 0.2])
    assert rows.sampling_logps.tolist() == [-1.0, -2.0]
    assert rows.old_logps is None
    rows.validate()


def test_split_gives_all_rows_some_at_a_time():
    rows = three_rows()
    parts = rows.split(2)
    assert [part.num_rows for part in parts] == [2, 1]
    assert type(rows).concat(parts).completion_ids.tolist() == rows.completion_ids.tolist()
    assert parts[1].prompt_ids.tolist() == [70, 71, 72]
    assert rows.take([]).split(2) == []


def test_take_may_repeat_rows():
    rows = three_rows().take(torch.tensor([1, 1]))
    assert rows.completion_ids.tolist() == [13, 13]
    assert rows.advantages.tolist() == pytest.approx([0.3, 0.3])


def test_take_selects_from_lists_and_columns():
    taken = rollouts().take([2, 0])
    assert (taken.prompts, taken.completions, taken.columns) == (["c", "a"], ["z", "x"], {"answer": [9, 7]})
    assert taken.truncated.tolist() == [False, False]


def test_take_of_no_rows_is_a_batch_without_rows():
    taken = rollouts().take([]).validate()
    assert (taken.num_rows, taken.prompts, taken.columns) == (0, [], {"answer": []})


def test_concat_is_the_inverse_of_taking_apart():
    whole = three_rows(old_logps=torch.tensor([-1.0, -2.0, -3.0]))
    joined = Samples.concat([whole.take([0]), whole.take([1, 2])]).validate()
    assert joined.tensors().keys() == whole.tensors().keys()
    assert all(torch.equal(value, whole.tensors()[name]) for name, value in joined.tensors().items())


def test_concat_joins_lists_and_columns():
    whole = rollouts()
    joined = Rollouts.concat([whole.take([1, 2]), whole.take([0])])
    assert (joined.prompts, joined.columns) == (["b", "c", "a"], {"answer": [8, 9, 7]})


@pytest.mark.parametrize("order", [1, -1])
def test_concat_refuses_a_field_that_only_some_parts_have(order):
    parts = [three_rows(old_logps=torch.zeros(3)), three_rows()]
    with pytest.raises(HookResultError, match="old_logps"):
        Samples.concat(parts[::order])


def test_tensors_hold_all_that_is_needed_to_make_the_rows_again():
    whole = three_rows(ref_logps=torch.tensor([-1.0, -2.0, -3.0]))
    again = Samples.from_tensors(whole.tensors())
    assert again.ref_logps.tolist() == [-1.0, -2.0, -3.0]
    assert again.old_logps is None
    assert "old_logps" not in whole.tensors()
    assert again.take([1]).completion_ids.tolist() == [13]


def test_to_moves_every_tensor():
    moved = three_rows().to("meta")
    assert {value.device.type for value in moved.tensors().values()} == {"meta"}


# -- validating -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("position", torch.zeros(2), "position has 2 entries; expected 3, one per row"),
        ("group", torch.zeros(4), "group has 4 entries; expected 3, one per row"),
        ("prompt_ids", torch.zeros(5), "prompt_ids has 5 entries; expected 6, one per prompt token"),
        ("completion_ids", torch.zeros(7), "completion_ids has 7 entries; expected 6, one per completion token"),
        ("loss_mask", torch.ones(5, dtype=torch.bool), "loss_mask has 5 entries; expected 6, one per completion token"),
        ("advantages", torch.zeros(6), "advantages has 6 entries; expected 3, one per loss token"),
        ("old_logps", torch.zeros(2), "old_logps has 2 entries; expected 3, one per loss token"),
    ],
)
def test_validate_names_the_field_of_the_wrong_size(field, value, expected):
    rows = three_rows()
    setattr(rows, field, value)
    with pytest.raises(HookResultError, match=f"Samples.{expected}"):
        rows.validate()


def test_validate_checks_lists():
    wrong = rollouts()
    wrong.prompts = ["a"]
    with pytest.raises(HookResultError, match=r"Rollouts\.prompts has 1 entries; expected 3"):
        wrong.validate()


def test_validate_returns_the_rows():
    rows = three_rows()
    assert rows.validate() is rows
