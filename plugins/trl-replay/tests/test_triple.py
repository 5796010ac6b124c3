"""Replay on top of other algorithms: kept subsets, per-token credit and sequence ratios, and all at once."""

import pytest
import torch

from trl_core.testing import Subject, conformance_checks

from .helpers import EOS, batch, buffer, lines, make_trainer, seen, tags

BEST, FLAT = [1, 0, 0, 1], [0.5] * 4


def rising(completion_ids, advantages):
    """Credit that grows along the completion: the row's advantage times 1, 2, 3, ..."""
    rows = zip(completion_ids, advantages, strict=True)
    return [[value * (place + 1) for place in range(len(ids))] for ids, value in rows]


def longest(group_completions, group_rewards, group_completion_ids):
    return [[float(len(ids)) for ids in group] for group in group_completion_ids]


def trained(folder, batches, algorithm, arguments, **options):
    trainer = make_trainer(folder, batches, algorithm, arguments, **options)
    trainer.train()
    return trainer


# -- two ---------------------------------------------------------------------------------------------------------------
def test_gfpo_and_replay_store_and_replace_kept_rows(tmp_path):
    # Rows of 4, 5, 6, 7 tokens, of which the two longest are kept: their rewards are 0 and 1, then 0.5 and 0.5. In the
    # third group they are equal although those of the whole group are not.
    generations = [batch(BEST, BEST, BEST, tag=0), batch(FLAT, [1, 0, 0, 0.1], [0.2, 0.9, 0, 0], tag=1)]
    trainer = trained(
        tmp_path,
        generations,
        "gfpo+replay",
        {"group_filter_func": longest},
        num_remains_in_group=2,
        replay_buffer_size=1,
    )
    # Of rewards 0 and 1: advantages 0.707007, and a std of 0.707107.
    assert [score for score, _, _ in buffer(trainer).entries()] == pytest.approx([2 * 0.707007 * 0.707107], abs=1e-5)
    (_, _), (rows, ratios) = seen(trainer)
    assert tags(rows) == [0] * 2 + [21] * 2 + [0] * 2
    assert rows.position.tolist() == [2, 3, 6, 7, 10, 11]
    assert rows.group.tolist() == [0, 0, 1, 1, 2, 2]
    replayed = (rows.generation == 0)[rows.row_of_token]
    assert ratios[~replayed].unique().tolist() == [1.0] and (ratios[replayed] != 1).all()


def test_gfpo_of_adaptive_difficulty_replays_groups_of_as_many_rows(tmp_path):
    # Mean rewards rise from group to group, so that 5, 4, 3 and 2 rows are kept.
    options = {"adaptive_difficulty": True, "difficulty_warmup": 1, "num_generations": 5}
    options |= {"k_very_hard": 5, "k_hard": 4, "k_medium": 3, "k_easy": 2}
    spread = [[base, base + 0.1, base, base + 0.1, base] for base in (0, 1, 2, 3)]
    flat = [[0] * 5, [1] * 5, [2] * 5, [3] * 5]
    generations = [batch(*spread, tag=0), batch(*flat, tag=1)]
    trainer = trained(tmp_path, generations, "gfpo+replay", {"group_filter_func": longest}, **options)
    (_, _), (rows, _) = seen(trainer)
    sizes = torch.bincount(rows.group).tolist()
    assert len(set(sizes)) > 1
    stored = [len(item["reward"]) for _, _, item in buffer(trainer).entries()]
    replayed = torch.bincount(rows.group[rows.generation == 0], minlength=4).tolist()
    # A group is replaced as a whole wherever one of its size is held.
    assert replayed == [size if size in stored else 0 for size in sizes]
    assert sum(replayed) > 0 and lines(trainer)[1]["replay/replaced_groups"] == sum(1 for size in replayed if size)


def test_gspo_token_and_replay_keep_the_credit_of_each_token(tmp_path):
    four_tokens = [[*row[:3], EOS] for row in batch(BEST, [0.1, 0, 0, 0])]
    arguments = {"advantage_func": rising}
    trainer = trained(
        tmp_path, [four_tokens, batch(FLAT, FLAT, tag=1)], "gspo_token+replay", arguments, replay_buffer_size=1
    )
    # The mean of 1, 2, 3, 4 times the score of GRPO.
    assert [score for score, _, _ in buffer(trainer).entries()] == pytest.approx([2.5 * 1.999654], abs=1e-5)
    (_, _), (rows, ratios) = seen(trainer)
    assert tags(rows) == [0] * 8
    first = rows.advantages[:4]
    torch.testing.assert_close(first / first[0], torch.arange(1.0, 5.0))
    # One ratio per row, and not 1, for the policy has moved.
    by_row = ratios.reshape(8, 4)
    torch.testing.assert_close(by_row, by_row[:, :1].expand(8, 4))
    assert (by_row - 1).abs().min() > 1e-4


# -- three -------------------------------------------------------------------------------------------------------------
ARGUMENTS = {"advantage_func": rising, "group_filter_func": "token_efficiency"}
OPTIONS = {"num_remains_in_group": 2, "replay_buffer_size": 4, "sample_before_add": True, "num_iterations": 1}
NAMES = {
    "gfpo+replay": "trl-gfpo:gfpo+trl-replay:replay",
    "gspo_token+replay": "trl-gspo:gspo_token+trl-replay:replay",
    "gspo_token+gfpo+replay": "trl-gspo:gspo_token+trl-gfpo:gfpo+trl-replay:replay",
}


def subject(name):
    # Without a filter all four rows of a group are kept, of which few have equal rewards.
    options = OPTIONS if "gfpo" in name else {"num_generations": 2, "replay_buffer_size": 4, "num_iterations": 1}
    wanted = {"advantage_func": "gspo", "group_filter_func": "gfpo"}
    return Subject(NAMES[name], options, {key: value for key, value in ARGUMENTS.items() if wanted[key] in name})


@pytest.mark.parametrize("name", NAMES)
def test_composition_trains_and_replays_what_it_generated_earlier(name, tmp_path):
    trainer = subject(name).trainer(tmp_path, logging_steps=1)
    trainer.train()
    assert trainer.state.global_step == 6
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert sum(line.get("replay/replaced_groups", 0) for line in trainer.state.log_history) > 0
    assert max(line.get("replay/mean_age", 0) for line in trainer.state.log_history) > 0


# Among the checks: a run resumed from any of its checkpoints ends with the same weights, bit for bit.
@pytest.mark.parametrize("check", conformance_checks(subject("gspo_token+gfpo+replay")))
def test_conformance_of_all_three(check, tmp_path):
    check(tmp_path)
